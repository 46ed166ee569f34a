r"""Random gradient estimates: a gradient from losses alone.

With directions :math:`u_k` of zero mean and unit covariance, and one step :math:`\mu`,

.. math::
    \hat g_{forward} &= \frac{1}{n} \sum_k \frac{L(v + \mu u_k) - L(v)}{\mu} u_k \\
    \hat g_{antithetic} &= \frac{1}{n} \sum_k \frac{L(v + \mu u_k) - L(v - \mu u_k)}{2 \mu} u_k

Both are unbiased for a linear loss; antithetic pairs also for a quadratic one. All losses of a step
belong to the same data and noise (common random numbers): that is for the caller to see to.

References:
    Seo et al., "Efficient Personalization of Quantized Diffusion Model without Backpropagation",
    CVPR 2025, https://arxiv.org/abs/2503.14868 (forward difference, n = 2, mu = 1e-3).
    Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models",
    https://arxiv.org/abs/2506.09034 (step divided by the deviation of the losses).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .perturbations import DISTRIBUTIONS, Distribution, perturbations

Difference = Literal["forward", "antithetic"]

DIFFERENCES: tuple[str, ...] = get_args(Difference)


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


def antithetic_difference(plus: Tensor, minus: Tensor, directions: Tensor, mu: float) -> Tensor:
    """Gradient estimate from n symmetric differences; L(v ± mu u_k) have shape (n,)."""
    return ((plus - minus) / (2 * mu)).to(directions) @ directions / len(directions)


def loss_deviation(losses: Tensor) -> Tensor:
    """Standard deviation of the perturbed losses, shape (); 1 where they are all equal.

    It is about mu times the gradient's norm: a step divided by it keeps its length as the gradient
    shrinks or grows (FZOO).
    """
    deviation = losses.std(correction=0)
    return deviation.where(deviation > 0, torch.ones_like(deviation))


@dataclass(frozen=True)
class Estimator:
    """Which points a step evaluates, and the gradient estimate from their losses.

    Args:
        difference: "forward" (n + 1 losses) or "antithetic" (2 n losses).
        directions: n.
        mu: Length of the difference, in units of v.
        distribution: "gaussian" or "rademacher".
        normalise: Return mu times the estimate over the deviation of the perturbed losses (FZOO):
            then the estimate has no unit, and its length does not depend on the loss's scale.

    The defaults are those of ZOODiP.

    Raises:
        ValueError: an unknown name, no direction, or a mu that is not a positive number.
    """

    difference: Difference = "forward"
    directions: int = 2
    mu: float = 1e-3
    distribution: Distribution = "gaussian"
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.difference not in DIFFERENCES:
            raise ValueError(f"unknown difference {self.difference!r}: known are {DIFFERENCES}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"unknown distribution {self.distribution!r}: known are {DISTRIBUTIONS}"
            )
        if self.directions < 1:
            raise ValueError(f"directions must be at least 1, got {self.directions}")
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise ValueError(f"mu must be a positive number, got {self.mu}")
        if self.normalise and self.evaluations - (self.difference == "forward") < 2:
            raise ValueError("normalise needs at least two perturbed losses")

    @property
    def evaluations(self) -> int:
        """Losses that a step takes, K."""
        if self.difference == "forward":
            return self.directions + 1
        return 2 * self.directions

    def _directions(self, size: int, seed: int, step: int) -> Tensor:
        return perturbations(size, seed, step, range(self.directions), self.distribution)

    def offsets(self, size: int, seed: int, step: int) -> Tensor:
        """Where the losses of a step are taken, relative to v, with shape (K, size), float32.

        Forward: the origin, then mu u_k. Antithetic: all mu u_k, then all -mu u_k.
        """
        steps = self.mu * self._directions(size, seed, step)
        if self.difference == "forward":
            return torch.cat([torch.zeros(1, size), steps])
        return torch.cat([steps, -steps])

    def gradient(self, losses: Tensor, size: int, seed: int, step: int) -> Tensor:
        """The estimate from the losses at `offsets`, with shape (size,), float32 on the CPU.

        Raises:
            ValueError: the number of losses is not `evaluations`.
        """
        if losses.shape != (self.evaluations,):
            raise ValueError(f"expected {self.evaluations} losses, got {tuple(losses.shape)}")
        losses = losses.double().cpu()
        directions = self._directions(size, seed, step).double()
        if self.difference == "forward":
            perturbed = losses[1:]
            estimate = forward_difference(perturbed, losses[0], directions, self.mu)
        else:
            perturbed = losses
            estimate = antithetic_difference(*losses.chunk(2), directions, self.mu)
        if self.normalise:
            estimate = self.mu * estimate / loss_deviation(perturbed)
        return estimate.float()
