r"""Moments of a data set in one pass: mergeable, resumable, float64.

Two accumulators with counts :math:`a, b`, means :math:`\mu_a, \mu_b` and centred sums
:math:`S_a, S_b` merge into

.. math::
    S = S_a + S_b + \frac{ab}{a+b} (\mu_a - \mu_b)(\mu_a - \mu_b)^\top

so that blocks, checkpoints and processes all go through one operation.

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

FORMS = ("dense", "sketch", "stationary")


def fingerprint(images: Tensor) -> int:
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
            the centred data have rank <= size, otherwise each merge drops at most `dropped` from
            any direction (the sum of the largest eigenvalue left out each time: a bound in operator
            norm on the error of `second`). "stationary": one Hermitian C x C matrix per frequency,
            (H, W // 2 + 1, C, C).
        size: Rows of the sketch.

    All tensors are float64 (complex128 for "stationary") on the CPU.
    """

    def __init__(self, shape: tuple[int, ...], form: str = "dense", size: int = 0) -> None:
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}: expected one of {FORMS}")
        self.shape, self.form, self.size = tuple(shape), form, size
        self.count = self.hash = 0
        self.total = self.dropped = 0.0
        c, h, w = self.shape
        n = c * h * w
        self.mean = torch.zeros(n, dtype=torch.float64)
        if form == "stationary":
            self.second = torch.zeros(h, w // 2 + 1, c, c, dtype=torch.complex128)
        else:
            self.second = torch.zeros(n if form == "dense" else 0, n, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Take in a block of stored images (b, C, H, W).

        Raises:
            ValueError: images of another shape.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"expected images {self.shape}, got {tuple(images.shape[1:])}")
        x = decode(images.cpu(), torch.float64).flatten(1)
        mean = x.mean(0)
        x = x - mean
        if self.form == "dense":
            second = x.T @ x
        else:
            second = x if self.form == "sketch" else self._spectra(x)
        self._take(len(x), mean, second, float(x.square().sum()))
        self.hash = (self.hash + fingerprint(images)) % 2**128

    def merge(self, other: Accumulator) -> None:
        """Take in what another accumulator counted; the order of merges changes only rounding.

        Raises:
            ValueError: the two keep different things.
        """
        ours, theirs = (self.shape, self.form, self.size), (other.shape, other.form, other.size)
        if ours != theirs:
            raise ValueError(f"cannot merge accumulators of {theirs} into {ours}")
        if other.count:
            self._take(other.count, other.mean, other.second, other.total)
            self.dropped += other.dropped
            self.hash = (self.hash + other.hash) % 2**128

    def _take(self, count: int, mean: Tensor, second: Tensor, total: float) -> None:
        """The formula above, for `count` further images."""
        step = mean - self.mean
        weight = self.count * count / (self.count + count)
        self.total += total + weight * float(step.square().sum())
        if self.form == "dense":
            self.second = self.second.addr(step, step, alpha=weight).add_(second)
        elif self.form == "stationary":
            self.second = self.second + second + weight * self._spectra(step[None])
        else:
            rows = torch.cat([self.second, second, weight**0.5 * step[None]])
            self.second = self._compress(rows)
        self.count += count
        self.mean = self.mean + step * (count / self.count)

    def _spectra(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x.view(-1, *self.shape), norm="ortho")
        return torch.einsum("bchw,bdhw->hwcd", waves, waves.conj())

    def _compress(self, rows: Tensor) -> Tensor:
        """At most `size` rows with the same leading second moments, orthogonal to each other."""
        if len(rows) <= self.size:
            return rows
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        self.dropped += float(values[-self.size - 1].clamp(min=0))
        return vectors[:, -self.size :].T @ rows
