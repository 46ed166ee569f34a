"""Step rules: from a gradient estimate to an update, in float32.

Adam as in Kingma & Ba, https://arxiv.org/abs/1412.6980, which ZOODiP uses on its estimates; and one
scalar step with momentum: the noise of an estimate is the same in every element, so per-element
step sizes have little to adapt to.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ScalarStep:
    """Update -rate * m, where m is the running mean of the estimates.

    Args:
        rate: Learning rate.
        momentum: Decay of the running mean; 0 is plain SGD.
        decay_steps: T: the rate of step t is divided by sqrt(1 + t / T); 0 keeps it constant.
    """

    def __init__(self, rate: float, momentum: float = 0.0, decay_steps: int = 0) -> None:
        _check_rates(rate, momentum)
        self.rate, self.momentum, self.decay_steps = rate, momentum, decay_steps
        self._mean: Tensor | None = None
        self._count = 0

    def update(self, gradient: Tensor) -> Tensor:
        """What to add to the token, with the shape of `gradient`."""
        gradient = gradient.float()
        previous = torch.zeros_like(gradient) if self._mean is None else self._mean
        self._mean = self.momentum * previous + (1 - self.momentum) * gradient
        rate = self.rate
        if self.decay_steps:
            rate /= (1 + self._count / self.decay_steps) ** 0.5
        self._count += 1
        return -rate * self._mean / (1 - self.momentum**self._count)

    def state_dict(self) -> dict[str, Tensor]:
        """Running mean and count, as tensors."""
        mean = {} if self._mean is None else {"mean": self._mean}
        return {"count": torch.tensor(self._count), **mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self._mean, self._count = state.get("mean"), int(state["count"])


class AdamStep:
    """Adam, with moments in float32 whatever the token's dtype.

    Args:
        rate: Learning rate (ZOODiP: 5e-3).
        betas: Decays of the first and second moment.
        eps: Added to the root of the second moment.
        warmup: Steps over which the rate rises to its value. Adam's first steps are as long as its
            later ones, whatever the estimates are worth.
    """

    def __init__(
        self,
        rate: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup: int = 0,
    ) -> None:
        _check_rates(rate, *betas)
        if warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {warmup}")
        self.rate, self.betas, self.eps, self.warmup = rate, betas, eps, warmup
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._count = 0

    def update(self, gradient: Tensor) -> Tensor:
        """What to add to the token, with the shape of `gradient`."""
        gradient = gradient.float()
        if self._first is None:
            self._first, self._second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        a, b = self.betas
        self._count += 1
        self._first = a * self._first + (1 - a) * gradient
        self._second = b * self._second + (1 - b) * gradient.square()
        first = self._first / (1 - a**self._count)
        second = self._second / (1 - b**self._count)
        rate = self.rate * min(1.0, self._count / max(1, self.warmup))
        return -rate * first / (second.sqrt() + self.eps)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and count, as tensors."""
        state = {"count": torch.tensor(self._count)}
        if self._first is not None:
            state |= {"first": self._first, "second": self._second}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self._count = int(state["count"])
        self._first, self._second = state.get("first"), state.get("second")


def _check_rates(rate: float, *decays: float) -> None:
    if not rate > 0:
        raise ValueError(f"the learning rate must be positive, got {rate}")
    for decay in decays:
        if not 0 <= decay < 1:
            raise ValueError(f"momentum and betas must lie in [0, 1), got {decay}")
