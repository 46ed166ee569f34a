r"""Moments of a data set in one pass, in float64.

Two blocks with counts :math:`a, b`, means :math:`\mu_a, \mu_b` and centred sums
:math:`S_a, S_b` have together

.. math::
    S = S_a + S_b + \frac{ab}{a+b} (\mu_a - \mu_b)(\mu_a - \mu_b)^\top.

References:
    Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979. The sketch is block incremental PCA: Ross, Lim, Lin & Yang, "Incremental
    Learning for Robust Visual Tracking", 2008.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .images import decode


def hash_of_images(images: Tensor) -> int:
    """Order-independent 128-bit hash of images (b, C, H, W): the sum of one hash per image."""
    rows = images.detach().cpu().contiguous().flatten(1)
    total = 0
    for row in rows:
        digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()
        total += int.from_bytes(digest, "little")
    return total % 2**128


class Accumulator:
    """Count, mean and centred second moments of images (C, H, W).

    Args:
        shape: (C, H, W).
        form: What is kept of the second moments. "dense": all of them, (n, n). "sketch": the
            `size` leading directions, (size, n), with the total variance exact; exact as long as
            the centred data have rank <= size. "stationary": one Hermitian C x C matrix per
            frequency, (H, W // 2 + 1, C, C).
        size: Rows of the sketch.

    All tensors are float64 (complex128 for "stationary") on the CPU.
    """

    def __init__(self, shape: tuple[int, ...], form: str = "dense", size: int = 0) -> None:
        self.shape, self.form, self.size = tuple(shape), form, size
        self.count = self.hash = 0
        self.total = 0.0
        c, h, w = self.shape
        n = c * h * w
        self.mean = torch.zeros(n, dtype=torch.float64)
        if form == "stationary":
            self.second = torch.zeros(h, w // 2 + 1, c, c, dtype=torch.complex128)
        else:
            self.second = torch.zeros(n if form == "dense" else 0, n, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Take in a block of stored images (b, C, H, W)."""
        x = decode(images.cpu(), torch.float64).flatten(1)
        count, mean = len(x), x.mean(0)
        x = x - mean
        step = mean - self.mean
        weight = self.count * count / (self.count + count)
        self.total += float(x.square().sum()) + weight * float(step.square().sum())
        if self.form == "dense":
            self.second = self.second.addr(step, step, alpha=weight).add_(x.T @ x)
        elif self.form == "stationary":
            self.second = self.second + self._spectra(x) + weight * self._spectra(step[None])
        else:
            self.second = self._compress(torch.cat([self.second, x, weight**0.5 * step[None]]))
        self.count += count
        self.mean = self.mean + step * (count / self.count)
        self.hash = (self.hash + hash_of_images(images)) % 2**128

    def _spectra(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x.view(-1, *self.shape), norm="ortho")
        return torch.einsum("bchw,bdhw->hwcd", waves, waves.conj())

    def _compress(self, rows: Tensor) -> Tensor:
        """At most `size` rows with the same leading second moments, orthogonal to each other."""
        if len(rows) <= self.size:
            return rows
        _, vectors = torch.linalg.eigh(rows @ rows.T)
        return vectors[:, -self.size :].T @ rows
