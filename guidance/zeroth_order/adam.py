"""Adam: from a gradient estimate to an update of the token.

References:
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980.
    Seo et al., https://arxiv.org/abs/2503.14868 (Adam on zeroth-order estimates).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-8  # added to the root of the second moment


class AdamStep:
    """Adam, with moments in float32 whatever the token's dtype.

    Args:
        rate: Learning rate (ZOODiP: 5e-3).
        betas: Decays of the first and second moment, in [0, 1).
        warmup: Steps over which the rate rises to its value. Adam's first steps are as long as its
            later ones, however poor the first estimates are.

    Raises:
        ValueError: a rate that is not positive, a beta outside [0, 1), a negative warmup.
    """

    def __init__(
        self,
        rate: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int = 0,
    ) -> None:
        if not rate > 0:
            raise ValueError(f"the learning rate must be positive, got {rate}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {warmup}")
        self.rate, self.betas, self.warmup = rate, betas, warmup
        self._moments: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def update(self, gradient: Tensor) -> Tensor:
        """What to add to the token, float32, with the shape of `gradient`."""
        gradient = gradient.float()
        if self._moments is None:
            self._moments = torch.zeros_like(gradient), torch.zeros_like(gradient)
        a, b = self.betas
        self._count += 1
        first = a * self._moments[0] + (1 - a) * gradient
        second = b * self._moments[1] + (1 - b) * gradient.square()
        self._moments = first, second
        first = first / (1 - a**self._count)
        second = second / (1 - b**self._count)
        rate = self.rate * min(1.0, self._count / max(1, self.warmup))
        return -rate * first / (second.sqrt() + EPSILON)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and count, as tensors."""
        moments = dict(zip(("first", "second"), self._moments or (), strict=False))
        return {"count": torch.tensor(self._count), **moments}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self._count = int(state["count"])
        self._moments = (state["first"], state["second"]) if "first" in state else None
