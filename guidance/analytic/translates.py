r"""ELS: patches from every place, and PSPC: crops at their own place.

References:
    Kamb & Ganguli, "An analytic theory of creativity in convolutional diffusion models", ICML 2025,
    https://arxiv.org/abs/2412.20292 (equivariant local score, ELS). Niedoba et al., "Towards a
    Mechanistic Explanation of Diffusion Model Generalization", ICML 2025,
    https://arxiv.org/abs/2411.19339 (patch set posterior composites, PSPC).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .denoisers import Denoiser
from .posterior import Result, Source, block_size, compare, window_distances
from .schedules import CROPS, WINDOWS, schedule
from .softmax import Info

LARGEST = 128**2  # pixels of ELS
Places = tuple[slice, int, int]  # along an axis, and the first and last offset of their windows


def border_classes(length: int, k: int) -> list[Places]:
    """Places along an axis whose windows are cut alike.

    Places near a border are alone in their class; those whose whole window fits share one.
    """
    half = k // 2
    found: dict[tuple[int, int], list[int]] = {}
    for place in range(length):
        offsets = (-min(half, place), min(half, length - 1 - place))
        found.setdefault(offsets, []).append(place)
    return [(slice(p[0], p[-1] + 1), low, high) for (low, high), p in found.items()]


class ELSDenoiser(Denoiser):
    """Equivariant local score: k x k windows from every place with the same border.

    A window that the border cuts is compared with windows that it cuts in the same way; the value
    is the centre of the patch. The cost grows with the square of the number of places: use some
    thousand images.

    Args:
        images: See `Denoiser`; further arguments likewise.
        k: Window size, odd, or the name of a schedule in `schedules.WINDOWS`.
    """

    LEAST = 1
    SIDE = 32

    def __init__(
        self, images: Any, labels: Tensor | None = None, *, k: int | str = "cifar10", **rest: Any
    ) -> None:
        super().__init__(images, labels, **rest)
        self.window = schedule(k, WINDOWS, odd=True)

    @classmethod
    def accept(cls, shape: tuple[int, ...]) -> None:
        """Refuse images (C, H, W) of more than `LARGEST` pixels."""
        if math.prod(shape[1:]) > LARGEST:
            raise ValueError(
                f"els compares every place with every other: {shape[1]} x {shape[2]} pixels are "
                f"too many (at most {LARGEST}, as 128 x 128): make the pictures smaller or take "
                "another method (ls, pspc, optimal)"
            )

    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        k, out = self.window(sigma), torch.empty_like(y)
        n_eff, top = torch.empty_like(y), torch.empty_like(y, dtype=torch.int64)
        classes = itertools.product(*(border_classes(length, k) for length in y.shape[2:]))
        for rows, columns in classes:
            place = (slice(None), slice(None), rows[0], columns[0])
            _, channels, height, width = out[place].shape
            queries = patches(y.permute(1, 2, 3, 0), rows, columns)
            # (d, places, B) as one row per query, in the order (B, places).
            queries = queries.unflatten(1, (-1, len(y))).permute(2, 1, 0).flatten(0, 1)
            # Blocks of images and of queries such that neither patches nor logits outgrow the work.
            wanted = block_size(y) * y[0].numel()
            blocks = (
                (patches(x, rows, columns), x[place[1:]].flatten(1).T, index.repeat(height * width))
                for x, index in source.blocks(y, wanted // (height * width * queries.shape[1]))
            )
            state = compare(
                queries, blocks, sigma,
                largest=source.largest, responses=channels, logits=wanted, info=info,
            )  # fmt: skip
            out[place] = state.mean().view(-1, height, width, channels).permute(0, 3, 1, 2)
            if info:
                n_eff[place], top[place] = (
                    part.view(-1, 1, height, width) for part in state.info()
                )
        return out, Info(n_eff, top) if info else None


def patches(x: Tensor, rows: Places, columns: Places) -> Tensor:
    """Windows of x (C, H, W, c) around the places of a border class, shape (d, places c)."""
    (r, top, bottom), (s, left, right) = rows, columns
    x = x[:, r.start + top : r.stop + bottom, s.start + left : s.stop + right]
    windows = x.unfold(1, bottom - top + 1, 1).unfold(2, right - left + 1, 1)
    # (C, places, places, c, height, width)
    return windows.permute(0, 4, 5, 1, 2, 3).reshape(
        x.shape[0] * (bottom - top + 1) * (right - left + 1), -1
    )


class PSPCDenoiser(Denoiser):
    """Patch set posterior composite: the posterior mean of every P x P crop, averaged.

    Args:
        images: See `Denoiser`; further arguments likewise.
        size: P, or the name of a schedule in `schedules.CROPS`. Never more than the image has;
            "edm32" is for 32 pixels, where its 32 is the whole image.
    """

    LEAST = 1

    def __init__(
        self, images: Any, labels: Tensor | None = None, *, size: int | str = "edm32", **rest: Any
    ) -> None:
        super().__init__(images, labels, **rest)
        self.size = schedule(size, CROPS, odd=False)

    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        (h, w), size = y.shape[2:], self.size(sigma)
        down, right = crops(h, min(size, h), y), crops(w, min(size, w), y)
        coverage = torch.outer(down.sum(0), right.sum(0))
        # Two passes: a crop's normalizer first, so that weights of crops can be added per pixel.
        norms = y.new_full((len(y), len(down) * len(right)), -torch.inf)
        for x, _ in source.blocks(y):
            for query, norm in zip(y, norms, strict=True):
                logits = -window_distances(query, x, sigma, down, right)
                norm.copy_(torch.logaddexp(norm, logits.logsumexp(1)))
        out, square = torch.zeros_like(y), torch.zeros_like(y)
        best, top = torch.full_like(y, -1), torch.zeros_like(y, dtype=torch.int64)
        for x, index in source.blocks(y):
            for b, query in enumerate(y):
                found = window_distances(query, x, sigma, down, right)
                weights = (-norms[b][:, None] - found).exp_()
                weights = weights.view(len(down), len(right), -1)
                weights = torch.matmul(right.T, weights)
                weights = (down.T @ weights.flatten(1)).view(h, w, -1) / coverage[..., None]
                out[b] += (weights * x).sum(-1)
                if info:
                    square[b] += weights.square().sum(-1)
                    high, which = weights.max(-1)
                    top[b] = torch.where(high > best[b], index[which], top[b])
                    best[b] = torch.maximum(best[b], high)
        return out, Info(1 / square, top) if info else None


def crops(length: int, size: int, like: Tensor) -> Tensor:
    """Which places each crop along an axis covers: ones and zeros, (length - size + 1, length)."""
    places = torch.arange(length, device=like.device)
    first = places[: length - size + 1, None]
    return ((places >= first) & (places < first + size)).to(like.dtype)
