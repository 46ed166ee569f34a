"""Denoisers computed from a data set: `denoiser(y, sigma, labels)` gives the posterior mean.

One convention: y = x0 + sigma z with pixels in [-1, 1]. Every denoiser keeps the data as it was
stored (uint8) and is free of state.
"""

from __future__ import annotations

import functools
import math
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .images import MEMORY, decode, load_images, size_for
from .posterior import Box, Result, Source, block_size, compare, posterior
from .schedules import WINDOWS, schedule
from .softmax import Info
from .statistics import DatasetStatistics
from .subset import FEWEST, Index, mean_of

Sigma = float | Tensor


class Denoiser(ABC):
    """An analytic denoiser of a data set.

    Args:
        images: Images (N, C, H, W), uint8 or floats in [-1, 1], or any source that
            `images.load_images` reads (a folder, a data set).
        labels: Class of each image, with shape (N,), int64 >= 0; None for what the source gives.
        value_range: Range of float pixels; None for latents. See `images.stream`.
        statistics: Of the same images; computed when first needed if None.
        size: Side in pixels of the squares that files and PIL images are cropped to. None keeps
            them; the pictures of a folder that differ in size, or that the method cannot take, are
            then cropped to a `side`, with a warning.

    Raises:
        ValueError: fewer than `LEAST` images, images that are all the same, labels that do not
            fit, or what `images.stream` or `accept` refuses.
    """

    uses_statistics = False
    LEAST = 2  # images
    SIDE = 256  # pixels, of the squares that a folder of photos is cropped to by default

    def __init__(
        self,
        images: Any,
        labels: Tensor | None = None,
        *,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        statistics: DatasetStatistics | None = None,
        size: int | None = None,
    ) -> None:
        images, found = self.load(images, value_range=value_range, size=size)
        if len(images) < self.LEAST:
            raise ValueError(f"this denoiser needs at least two images, got {len(images)}")
        if len(images) > 1 and all(bool((part == images[:1]).all()) for part in images.split(256)):
            raise ValueError(f"all {len(images)} images are the same")
        if statistics is not None and statistics.shape != tuple(images.shape[1:]):
            raise ValueError(f"images {tuple(images.shape[1:])}, statistics {statistics.shape}")
        self.images: Tensor = images
        self.order: Tensor | None = None  # of the images as they were given, once sorted by class
        self.pools: dict[int, Source] = {}
        labels = found if labels is None else labels
        if labels is not None:
            self._sort_into_pools(torch.as_tensor(labels))
        self.pools[-1] = Source(self.images)
        self._given = statistics

    @classmethod  # noqa: B027
    def accept(cls, shape: tuple[int, ...]) -> None:
        """Refuse images (C, H, W) that are too large for the method, with a ValueError."""

    @classmethod
    def side(cls, channels: int, count: int) -> int:
        """Side in pixels that a folder's pictures are cropped to by default.

        `SIDE`, or what makes so many pictures take `images.MEMORY` bytes.
        """
        return max(1, min(cls.SIDE, math.isqrt(MEMORY // (channels * count))))

    @classmethod
    def load(
        cls, source: Any, *, value_range: tuple[float, float] | None, size: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Images and labels of any source, as this method takes them; see the arguments above."""
        if size is None and isinstance(source, (str, Path)) and Path(source).is_dir():
            size, why = size_for(source, cls.accept, cls.side)
            if why:
                warnings.warn(f"{why}; size sets another side", UserWarning, stacklevel=4)
        return load_images(source, value_range=value_range, accept=cls.accept, size=size)

    @functools.cached_property
    def statistics(self) -> DatasetStatistics:
        """Mean and covariance of the images."""
        return self._given or DatasetStatistics.from_images(self.images, value_range=None)

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
            return_info: Return `Info` (effective number of candidates, top image, how many were
                compared) as well.

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
        n_eff = torch.empty_like(y)
        top, used = (torch.empty_like(y, dtype=torch.int64) for _ in range(2))
        for level, label in sorted(set(zip(levels.tolist(), classes.tolist(), strict=True))):
            rows = ((levels == level) & (classes == label)).to(y.device)
            source = self.pool(int(label))
            out[rows], info = self._denoise(y[rows], level, source, return_info)
            if info is not None:
                used[rows] = len(source.images) if info.used is None else info.used
                n_eff[rows] = info.n_eff
                top[rows] = info.top if self.order is None else self.order.to(y.device)[info.top]
        return (out, Info(n_eff, top, used)) if return_info else out

    @abstractmethod
    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        """Posterior mean of y at one noise level, from one pool."""

    def pool(self, label: int) -> Source:
        """The images of a class; of all with -1.

        Raises:
            ValueError: there are none, or too few for the method.
        """
        if label not in self.pools:
            known = sorted(self.pools.keys() - {-1}) or "none: the images came without labels"
            raise ValueError(f"no images of class {label}; classes: {known}")
        return self.pools[label]

    def _sort_into_pools(self, labels: Tensor) -> None:
        """Sort the images by class, so that a class is a slice of them and costs no copy."""
        if labels.shape != (len(self.images),):
            raise ValueError(f"labels {tuple(labels.shape)} for {len(self.images)} images")
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
        if bool((labels[1:] < labels[:-1]).any()):  # else in order, perhaps mapped from a file
            self.order = labels.argsort(stable=True)
            self.images = self.images[self.order.to(self.images.device)]
        values, counts = labels.unique(return_counts=True)
        stops = counts.cumsum(0).tolist()
        for label, stop, count in zip(values.tolist(), stops, counts.tolist(), strict=True):
            start = stop - count
            self.pools[label] = Source(self.images[start:stop], start)


class OptimalDenoiser(Denoiser):
    """Posterior mean under the empirical distribution: whole images.

    At low noise it reproduces training images. float32 queries on a CPU are compared with the
    images that can matter, whose number `Info.used` tells; the others hold less than
    `subset.TOLERANCE` of the posterior mass. float64 queries are compared with all.
    """

    def __init__(self, images: Any, labels: Tensor | None = None, **rest: Any) -> None:
        super().__init__(images, labels, **rest)
        self._indices: dict[Source, Index] = {}

    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        near: list[Tensor | None] = [None] * len(y)
        if self._selects(y, sigma, source):
            if source not in self._indices:
                self._indices[source] = Index.of(source.images)
            near = self._indices[source].near(y.flatten(1), sigma)
        out, n_eff = torch.empty_like(y), torch.empty_like(y)
        top, used = (torch.empty_like(y, dtype=torch.int64) for _ in range(2))
        whole, size = [chosen is None for chosen in near], block_size(y)
        groups: list[tuple[Any, Tensor | None]] = []
        if any(whole):
            groups.append((torch.tensor(whole, device=y.device), None))
        for b, chosen in enumerate(near):
            if chosen is None:
                continue
            if len(chosen) > size:
                groups.append((slice(b, b + 1), chosen))
                continue
            stored = source.images.index_select(0, chosen)
            mean, weights = mean_of(y[b].flatten(), decode(stored, y.dtype).flatten(1), sigma)
            out[b] = mean.view_as(y[b])
            if info:
                n_eff[b], used[b] = 1 / weights.square().sum(), len(chosen)
                top[b] = chosen[weights.argmax()] + source.first
        factor, summand = source.units
        for rows, chosen in groups:
            part = y[rows]
            state = compare(
                part.flatten(1) * factor + summand,
                ((x.T, x, index) for x, index in source.rows(part, chosen)),
                sigma * factor,
                largest=source.largest * factor - summand,
                responses=y[0].numel(),
                logits=size * y[0].numel(),
                info=info,
                half=source.half if chosen is None else source.half[chosen],
            )
            out[rows] = ((state.mean() - summand) / factor).view_as(part)
            if info:
                found = [one.view(-1, 1, 1, 1).expand_as(part) for one in state.info()]
                n_eff[rows], top[rows] = found
                used[rows] = len(source.images) if chosen is None else len(chosen)
        return out, Info(n_eff, top, used) if info else None

    @staticmethod
    def _selects(y: Tensor, sigma: float, source: Source) -> bool:
        here = y.device.type == source.images.device.type == "cpu"
        large = len(source.images) >= FEWEST and y.isfinite().all()
        return here and bool(large) and y.dtype == torch.float32 and sigma < math.inf


class WienerDenoiser(Denoiser):
    """Best linear denoiser, from mean and covariance, of a class of those of its images.

    Attribution is refused.
    """

    uses_statistics = True

    def __init__(self, images: Any, labels: Tensor | None = None, **rest: Any) -> None:
        super().__init__(images, labels, **rest)
        self._of: dict[Source, DatasetStatistics] = {}

    def pool(self, label: int) -> Source:
        """See `Denoiser.pool`; the statistics of a class are made when it is first asked for."""
        source = super().pool(label)
        if label == -1:
            self._of[source] = self.statistics
        elif source not in self._of:
            try:
                made = DatasetStatistics.from_images(source.images, value_range=None)
            except ValueError as error:
                raise ValueError(f"class {label}: {error}") from None
            self._of[source] = made
        return source

    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        if info:
            raise ValueError("a Wiener filter weighs no images: there is no info to return")
        return self._of[source].wiener(y, sigma), None


class LSDenoiser(Denoiser):
    """Local score (Kamb & Ganguli): k x k windows at the same place.

    Args:
        images: See `Denoiser`; further arguments likewise.
        k: Window size, odd, or the name of a schedule in `schedules.WINDOWS`.
    """

    LEAST = 1

    def __init__(
        self, images: Any, labels: Tensor | None = None, *, k: int | str = "cifar10", **rest: Any
    ) -> None:
        super().__init__(images, labels, **rest)
        self.window = schedule(k, WINDOWS, odd=True)

    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        return posterior(y, sigma, source, Box(self.window(sigma)), info=info)
