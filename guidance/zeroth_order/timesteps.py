"""Partial Uniform Timestep Sampling (PUTS): timesteps from a window only.

Text controls colour and shape at middle to high noise; the rest of the range adds variance to the
loss and hardly any signal.

References:
    Seo et al., https://arxiv.org/abs/2503.14868 (t ~ U(500, 900) for Stable Diffusion 1.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartialUniformTimesteps:
    """Uniform over the integers low, ..., high - 1.

    Args:
        low: First timestep.
        high: One past the last.

    Raises:
        ValueError: the window is empty or begins below 0.
    """

    low: int = 500
    high: int = 900

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"timesteps must satisfy 0 <= low < high, got low={self.low}, high={self.high}"
            )

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent timesteps, with shape (count,), int64."""
        return torch.randint(self.low, self.high, (count,), generator=generator)

    def stratified(self, count: int, generator: torch.Generator) -> Tensor:
        """One timestep from each of `count` equal parts of the window, in rising order, int64."""
        places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        width = self.high - self.low
        return self.low + (places * width).long().clamp(max=width - 1)
