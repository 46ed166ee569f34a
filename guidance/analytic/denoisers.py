"""Denoisers computed from a data set: `denoiser(y, sigma, labels)` gives the posterior mean.

One convention: y = x0 + sigma z with pixels in [-1, 1]; a denoiser is a choice of precision and
source for `posterior`. Every one keeps the data as it was stored (uint8) and is free of state.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .images import checked, load_images
from .posterior import Box, Source, Whole, posterior
from .schedules import WINDOWS, schedule
from .softmax import Info
from .statistics import DatasetStatistics, Sigma


class Denoiser(ABC):
    """An analytic denoiser of a data set.

    Args:
        images: Images (N, C, H, W), uint8 or floats in [-1, 1], or any source that
            `images.load_images` reads (a folder, a data set).
        labels: Class of each image, with shape (N,), int64 >= 0; None for what the source gives.
        flips: Whether mirror images are candidates too.
        value_range: Range of float pixels; None for latents. See `images.stream`.
        chunk: Candidates handled at once; None for a size that fits the cache.
        statistics: Of the same images (mirror images are added here); computed when first needed
            if None.

    Raises:
        ValueError: fewer than two images, images that are all the same, labels that do not fit,
            or what `images.stream` or `accept` refuses.
    """

    def __init__(
        self,
        images: Any,
        labels: Tensor | None = None,
        *,
        flips: bool = False,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        chunk: int | None = None,
        statistics: DatasetStatistics | None = None,
    ) -> None:
        if isinstance(images, Tensor):
            images = checked(images, value_range)
            self.accept(tuple(images.shape[1:]))
        else:
            images, found = load_images(images, value_range=value_range, accept=self.accept)
            labels = found if labels is None else labels
        if len(images) < 2:
            raise ValueError(f"a denoiser needs at least two images, got {len(images)}")
        if bool((images == images[:1]).all()):
            raise ValueError(f"all {len(images)} images are the same")
        if statistics is not None and statistics.shape != tuple(images.shape[1:]):
            raise ValueError(f"images {tuple(images.shape[1:])}, statistics {statistics.shape}")
        self.images = images
        self.order: Tensor | None = None  # of the images as they were given, once sorted by class
        self.pools: dict[int, Source] = {}
        self.flips, self.chunk, self.value_range = flips, chunk, value_range
        if labels is not None:
            self._sort_into_pools(torch.as_tensor(labels))
        self._all = Source(self.images, 0, flips)
        self._given = statistics

    @classmethod  # noqa: B027
    def accept(cls, shape: tuple[int, ...]) -> None:
        """Refuse images (C, H, W) that are too large for the method, with a ValueError."""

    @functools.cached_property
    def statistics(self) -> DatasetStatistics:
        """Mean and covariance of the images and, with flips, their mirror images."""
        found = self._given or DatasetStatistics.from_images(
            self.images, value_range=None if self.value_range is None else (-1.0, 1.0)
        )
        return found.mirrored() if self.flips else found

    @overload
    def __call__(
        self, y: Tensor, sigma: Sigma, labels: Tensor | None = ..., *, return_info: Literal[True]
    ) -> tuple[Tensor, Info]: ...

    @overload
    def __call__(self, y: Tensor, sigma: Sigma, labels: Tensor | None = ...) -> Tensor: ...

    def __call__(
        self, y: Tensor, sigma: Sigma, labels: Tensor | None = None, *, return_info: bool = False
    ) -> Tensor | tuple[Tensor, Info]:
        """Posterior mean of the clean images.

        Args:
            y: Noisy images x0 + sigma z, with shape (B, C, H, W).
            sigma: Noise level > 0, a number or shape (B,).
            labels: Classes whose images are the candidates, with shape (B,); -1 for all images.
            return_info: Return `Info` (effective number of candidates, top image) as well.

        Returns:
            Shape (B, C, H, W), in float32 (float64 if y is).

        Raises:
            ValueError: another shape than the images', sigma not > 0, an unknown label.
        """
        if y.shape[1:] != self.images.shape[1:] or y.ndim != 4:
            raise ValueError(f"denoiser of images {tuple(self.images.shape[1:])}, got {y.shape}")
        y = y if y.dtype.itemsize >= 4 else y.float()
        levels = torch.as_tensor(sigma, dtype=torch.float64).flatten().cpu().expand(len(y))
        if not bool((levels > 0).all()):
            raise ValueError(f"sigma must be > 0, got {sigma}")
        classes = torch.full((len(y),), -1) if labels is None else labels.flatten().cpu()
        if len(classes) != len(y):
            raise ValueError(f"{len(classes)} labels for {len(y)} images")
        out = torch.empty_like(y)
        n_eff, top = torch.empty_like(y), torch.empty_like(y, dtype=torch.int64)
        for level, label in sorted(set(zip(levels.tolist(), classes.tolist(), strict=True))):
            rows = ((levels == level) & (classes == label)).to(y.device)
            out[rows], info = self._denoise(y[rows], level, self._source(int(label)), return_info)
            if info is not None:
                n_eff[rows] = info.n_eff
                top[rows] = info.top if self.order is None else self.order.to(y.device)[info.top]
        return (out, Info(n_eff, top)) if return_info else out

    @abstractmethod
    def _denoise(
        self, y: Tensor, sigma: float, source: Source, info: bool
    ) -> tuple[Tensor, Info | None]:
        """Posterior mean of y at one noise level, from one pool."""

    def _source(self, label: int) -> Source:
        if label == -1:
            return self._all
        if label not in self.pools:
            known = sorted(self.pools) or "none: the images came without labels"
            raise ValueError(f"no images of class {label}; classes: {known}")
        return self.pools[label]

    def _sort_into_pools(self, labels: Tensor) -> None:
        """Sort the images by class, so that a class is a slice of them and costs no copy."""
        if labels.shape != (len(self.images),):
            raise ValueError(f"labels {tuple(labels.shape)} for {len(self.images)} images")
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
        self.order = labels.argsort(stable=True)
        self.images = self.images[self.order.to(self.images.device)]
        values, counts = labels.unique(return_counts=True)
        stops = counts.cumsum(0).tolist()
        for label, stop, count in zip(values.tolist(), stops, counts.tolist(), strict=True):
            start = stop - count
            self.pools[label] = Source(self.images[start:stop], start, self.flips)


class OptimalDenoiser(Denoiser):
    """Posterior mean under the empirical distribution: whole images, all of them.

    At low noise it reproduces training images.
    """

    def _denoise(
        self, y: Tensor, sigma: float, source: Source, info: bool
    ) -> tuple[Tensor, Info | None]:
        return posterior(y, sigma, source, Whole(), chunk=self.chunk, info=info)


class WienerDenoiser(Denoiser):
    """Best linear denoiser, from mean and covariance; labels and attribution are refused."""

    def _denoise(
        self, y: Tensor, sigma: float, source: Source, info: bool
    ) -> tuple[Tensor, Info | None]:
        if info:
            raise ValueError("a Wiener filter weighs no images: there is no info to return")
        if len(source.images) != len(self.images):
            raise ValueError("WienerDenoiser: make one of each class's images instead of labels")
        return self.statistics.wiener(y, sigma), None


class LSDenoiser(Denoiser):
    """Local score (Kamb & Ganguli): k x k windows at the same place.

    Args:
        images: See `Denoiser`; further arguments likewise.
        k: Window size, odd, or a schedule: a name in `schedules.WINDOWS` or a function of sigma.
    """

    def __init__(self, images: Any, labels: Tensor | None = None, *, k: Any, **rest: Any) -> None:
        super().__init__(images, labels, **rest)
        self.window = schedule(k, WINDOWS, odd=True)

    def _denoise(
        self, y: Tensor, sigma: float, source: Source, info: bool
    ) -> tuple[Tensor, Info | None]:
        box = Box(self.window(sigma))
        return posterior(y, sigma, source, box, chunk=self.chunk, info=info)
