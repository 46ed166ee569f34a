r"""Random gradient estimates: a gradient from losses alone.

With directions :math:`u_k` of zero mean and unit covariance, and one distance :math:`\mu`,

.. math:: \hat g = \frac{1}{n} \sum_k \frac{L(v + \mu u_k) - L(v)}{\mu} u_k

is unbiased for a linear loss. All losses of a step must be taken on the same data and noise (common
random numbers), which is up to the caller.

References:
    Seo et al., "Efficient Personalization of Quantized Diffusion Model without Backpropagation",
    CVPR 2025, https://arxiv.org/abs/2503.14868 (n = 2, mu = 1e-3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .perturbations import perturbations


def forward_difference(losses: Tensor, base: Tensor, directions: Tensor, mu: float) -> Tensor:
    """Gradient estimate from n one-sided differences.

    Args:
        losses: L(v + mu u_k), with shape (n,).
        base: L(v), a 0-d tensor.
        directions: u_k, with shape (n, d).
        mu: Length of the difference, in units of v.

    Returns:
        The estimate, with shape (d,), in the directions' dtype.
    """
    return ((losses - base) / mu).to(directions) @ directions / len(directions)


@dataclass(frozen=True)
class Estimator:
    """Which points a step evaluates, and the gradient estimate from their losses.

    Args:
        directions: n.
        mu: Length of the difference, in units of v.

    The defaults are those of ZOODiP.

    Raises:
        ValueError: no direction, or a mu that is not a positive number.
    """

    directions: int = 2
    mu: float = 1e-3

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions must be at least 1, got {self.directions}")
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise ValueError(f"mu must be a positive number, got {self.mu}")

    @property
    def evaluations(self) -> int:
        """Losses that a step takes, K = n + 1."""
        return self.directions + 1

    def offsets(self, size: int, seed: int, step: int) -> Tensor:
        """Where the losses of a step are taken, relative to v: the origin, then mu u_k.

        With shape (K, size), float32, on the CPU.
        """
        steps = self.mu * perturbations(size, seed, step, self.directions)
        return torch.cat([torch.zeros(1, size), steps])

    def gradient(self, losses: Tensor, size: int, seed: int, step: int) -> Tensor:
        """The estimate from the losses at `offsets`, with shape (size,), float32 on the CPU.

        Raises:
            ValueError: the number of losses is not `evaluations`.
        """
        if losses.shape != (self.evaluations,):
            raise ValueError(f"expected {self.evaluations} losses, got {tuple(losses.shape)}")
        losses = losses.double().cpu()
        directions = perturbations(size, seed, step, self.directions).double()
        return forward_difference(losses[1:], losses[0], directions, self.mu).float()
