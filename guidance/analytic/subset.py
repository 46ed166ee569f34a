r"""Which training images can matter: the others with a bound on their posterior mass.

For orthonormal directions P and the part Q that they leave out,

.. math::
    \|y - x_i\|^2 \ge \|P(y - x_i)\|^2 + (\|Qy\| - \|Qx_i\|)^2 =: b_i,

the squared distance of vectors of a few numbers that are kept of every image. With u the squared
distance of any one image, those with :math:`b_i > u + 2\sigma^2 \ln(N / \epsilon)` hold together at
most the share :math:`\epsilon` of the posterior mass. A coarse level judges all images, finer ones
those that it leaves; then the images themselves are compared. Where noise is high the bounds leave
most of them, and all are.

Coarse-to-fine selection is the idea of GoldDiff (https://arxiv.org/abs/2602.16498), which takes
numbers of images by schedule; here what is left out is bounded.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .images import decode

TOLERANCE = 1e-6  # posterior mass that may be left out: results move by at most twice as much
LEVELS = (24, 96, 256)  # directions
SAMPLE = 1024, 2**26  # images that the directions are taken from, and numbers in them
BASIS = 2**25  # numbers in the directions
FEWEST = 1024  # images; of fewer all are compared
MOST = 0.5  # share of the images from which on all are compared; at a level, half as many more
NEAREST = 8  # images by their bounds, whose distances are taken for u
FEW = 128  # images that are compared without a further bound
# Of the squared sizes of a query and an image: what rounding in float32 may move a bound by.
ROUNDING = 256 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Index:
    """What is kept of images (N, n) to tell which are near a query; 1.5 KB an image.

    Args:
        images: The stored images, (N, C, H, W).
        mean: What is subtracted before, float32 (n,).
        basis: Orthonormal directions, float32 (n, K).
        coarse: Coordinates of the first level and the size of the rest, float32 (k + 1, N).
        finer: Likewise of every further level, (N, k + 1).
        half: Half of the squared sizes, float32 (N,).
    """

    images: Tensor
    mean: Tensor
    basis: Tensor
    coarse: Tensor
    finer: list[Tensor]
    half: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Index:
        """The index of stored images, read block by block."""
        count, n = len(images), images[0].numel()
        most = min(SAMPLE[0], max(LEVELS[0] + 1, SAMPLE[1] // n))
        sample = decode(images[:: -(-count // most)]).flatten(1)
        mean = sample.mean(0)
        sample = sample - mean
        _, vectors = torch.linalg.eigh((sample @ sample.T).double())
        directions = min(LEVELS[-1], max(LEVELS[0], BASIS // n))
        leading = vectors.flip(1)[:, :directions].to(sample.dtype)
        basis = torch.linalg.qr(sample.T @ leading).Q.contiguous()
        levels = sorted({min(k, basis.shape[1]) for k in LEVELS})
        parts = [torch.empty(count, k + 1) for k in levels]
        size = max(1, 2**22 // n)
        for start in range(0, count, size):
            x = decode(images[start : start + size]).flatten(1) - mean
            for part, found in zip(parts, features(x, basis, levels), strict=True):
                part[start : start + size] = found
        half = parts[-1].square().sum(1) / 2
        return cls(images, mean, basis, parts[0].T.contiguous(), parts[1:], half)

    @functools.cached_property
    def largest(self) -> float:
        """Largest size of an image."""
        return math.sqrt(2 * float(self.half.max()))

    def near(self, y: Tensor, sigma: float) -> list[Tensor | None]:
        """Rising numbers of the images that matter for queries y (B, n), float32; None for all."""
        levels = [len(self.coarse) - 1, *(part.shape[1] - 1 for part in self.finer)]
        coarse, *finer = features(y - self.mean, self.basis, levels)
        sizes = coarse.norm(dim=1).tolist()
        reach = 2 * sigma**2 * math.log(len(self.images) / TOLERANCE)
        # Half of each bound less half of the query's squared size.
        bounds = torch.addmm(self.half, coarse, self.coarse, alpha=-1)
        found: list[Tensor | None] = []
        for b, (bound, size) in enumerate(zip(bounds, sizes, strict=True)):
            slack = reach + ROUNDING * (size + self.largest) ** 2 - size**2
            least = self._least(y[b], bound.topk(NEAREST, largest=False, sorted=False).indices)
            kept = (bound <= (least + slack) / 2).nonzero()[:, 0]
            for part, query in zip(self.finer, finer, strict=True):
                if len(kept) <= FEW or len(kept) > 1.5 * MOST * len(self.images):
                    break
                # What is left includes an image at `least`, the first of the nearest.
                there = part.index_select(0, kept)
                bound = torch.addmv(self.half.index_select(0, kept), there, query[b], alpha=-1)
                best = bound.topk(min(NEAREST, len(kept)), largest=False, sorted=False).indices
                least = min(least, self._least(y[b], kept[best]))
                kept = kept[bound <= (least + slack) / 2]
            found.append(kept if len(kept) <= MOST * len(self.images) else None)
        return found

    def _least(self, y: Tensor, numbers: Tensor) -> float:
        """Squared distance of a query (n,) and the nearest of some images."""
        images = decode(self.images.index_select(0, numbers)).flatten(1)
        return float((images - y).square_().sum(1).min())


def mean_of(y: Tensor, images: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Posterior mean (n,) of a query among a few decoded images (k, n), and their weights (k,)."""
    distances = (images - y).square_().sum(1)
    distances -= distances.min()  # at no noise the nearest alone counts, not 0 / 0
    weights = torch.softmax(distances.div_(-max(2 * sigma**2, 1e-30)), 0)
    return weights @ images, weights


def features(x: Tensor, basis: Tensor, levels: list[int]) -> list[Tensor]:
    """Coordinates of x (b, n) in the first k directions and the size of the rest, (b, k + 1)."""
    inside = x @ basis
    outside = torch.addmm(x, inside, basis.T, alpha=-1).norm(dim=1, keepdim=True)
    whole = torch.cat([inside, outside], 1)
    return [torch.cat([whole[:, :k], whole[:, k:].norm(dim=1, keepdim=True)], 1) for k in levels]
