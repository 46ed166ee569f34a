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

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, step, index): no process has to send it to another.

    The key is hashed, so that neighbouring keys give unrelated streams.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def perturbations(size: int, seed: int, step: int, count: int) -> Tensor:
    """The directions u of one step: Gaussian, with zero mean and unit covariance.

    Args:
        size: d, elements of a direction.
        seed: Seed of the run.
        step: Step of the run.
        count: n, directions of the step, at least 1.

    Returns:
        Directions with shape (n, d), float32, on the CPU: the same on every device.
    """
    return torch.stack(
        [torch.randn(size, generator=generator(seed, step, i)) for i in range(count)]
    )


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
