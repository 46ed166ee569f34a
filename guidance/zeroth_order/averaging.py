r"""Iterate averaging: the mean of the later tokens is less noisy than the last one.

Polynomial-decay averaging needs no length of the run in advance:

.. math:: \bar v_t = \left(1 - \frac{\eta + 1}{t + \eta}\right) \bar v_{t-1}
          + \frac{\eta + 1}{t + \eta} v_t

eta = 0 is the mean of all iterates; with larger eta early iterates weigh less, as (i / t)^eta.

References:
    Shamir & Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", ICML 2013,
    https://arxiv.org/abs/1212.1824
"""

from __future__ import annotations

import torch
from torch import Tensor


class IterateAverage:
    """The running average.

    Args:
        eta: Weight of late iterates, at least 0.
    """

    def __init__(self, eta: float = 8.0) -> None:
        if not eta >= 0:
            raise ValueError(f"IterateAverage: eta must be at least 0, got {eta}")
        self.eta = eta
        self.value: Tensor | None = None
        self._count = 0

    def add(self, iterate: Tensor) -> None:
        """Take in the token of a step."""
        self._count += 1
        weight = (self.eta + 1) / (self._count + self.eta)
        iterate = iterate.detach().float()
        if self.value is None:
            self.value = iterate.clone()
        else:
            self.value = (1 - weight) * self.value + weight * iterate

    def state_dict(self) -> dict[str, Tensor]:
        """Average and count, as tensors."""
        value = {} if self.value is None else {"value": self.value}
        return {"count": torch.tensor(self._count), **value}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self.value, self._count = state.get("value"), int(state["count"])
