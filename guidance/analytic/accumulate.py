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
import math

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

    Second moments are first kept as rows (r, n) whose Gram matrix they are, about one an image:
    exact. More rows than `size` turn into what `beyond` says: "dense", all moments, (n, n);
    "stationary", one Hermitian C x C matrix per frequency, (H, W // 2 + 1, C, C); "cut", the
    `keep` leading directions as rows, with the total variance exact, which is exact as long as the
    centred data have rank <= keep.

    Args:
        shape: (C, H, W).
        size: Largest number of rows.
        beyond: What they turn into.
        keep: Rows of "cut", at most `size`.

    `form` is "rows", or `beyond` once there were too many. All tensors are float64 (complex128 for
    "stationary") on the CPU.
    """

    def __init__(self, shape: tuple[int, ...], size: int, beyond: str, keep: int = 0) -> None:
        self.shape, self.size, self.beyond, self.keep = tuple(shape), size, beyond, keep
        self.form = "rows"
        self.count = self.hash = 0
        self.total = 0.0
        n = math.prod(self.shape)
        self.mean = torch.zeros(n, dtype=torch.float64)
        self.second = torch.zeros(0, n, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Take in a block of stored images (b, C, H, W)."""
        x = decode(images.cpu(), torch.float64).flatten(1)
        count, mean = len(x), x.mean(0)
        x = x - mean
        step = mean - self.mean
        weight = self.count * count / (self.count + count)
        self.total += float(x.square().sum()) + weight * float(step.square().sum())
        new = torch.cat([x, weight**0.5 * step[None]]) if self.count else x
        self.second = self._with(new)
        self.count += count
        self.mean = self.mean + step * (count / self.count)
        self.hash = (self.hash + hash_of_images(images)) % 2**128

    def _with(self, new: Tensor) -> Tensor:
        """The second moments with those of further rows."""
        if self.form in ("rows", "cut"):
            rows = torch.cat([self.second, new])
            if len(rows) <= self.size:
                return rows
            self.form = self.beyond
            if self.form == "cut":
                _, vectors = torch.linalg.eigh(rows @ rows.T)
                return vectors[:, -self.keep :].T @ rows
            return rows.T @ rows if self.form == "dense" else self._spectra(rows)
        if self.form == "dense":
            return self.second.addmm_(new.T, new)
        return self.second + self._spectra(new)

    def _spectra(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x.view(-1, *self.shape), norm="ortho")
        return torch.einsum("bchw,bdhw->hwcd", waves, waves.conj())
