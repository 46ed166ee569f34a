"""Bootstrap: intervals, and resamples that several sets of pictures share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import checked_features

CHUNK = 2**24  # numbers drawn at once
LEVEL = 0.95  # share of the resamples inside an interval


def quantiles(draws: Tensor) -> tuple[float, float]:
    """The ends of the middle 95 % of `draws` (R,)."""
    low, high = torch.quantile(draws, draws.new_tensor([1 - LEVEL, 1 + LEVEL]) / 2).tolist()
    return low, high


def check_resampling(resamples: int) -> None:
    """Refuse fewer than two resamples."""
    if resamples < 2:
        raise ValueError(f"at least 2 resamples are needed, got {resamples}")


def members(groups: Sequence[Hashable]) -> list[Tensor]:
    """The positions of each group, in the order in which groups first occur.

    Raises:
        ValueError: fewer than two groups.
    """
    found: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        found.setdefault(group, []).append(position)
    if len(found) < 2:
        raise ValueError(f"at least 2 groups are needed, got {len(found)}")
    return [torch.tensor(positions) for positions in found.values()]


def interval(
    values: Tensor,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the mean of values.

    Args:
        values: Values, with shape (N,).
        resamples: Number of resamples.
        seed: Of the resampling.
        groups: The group of each value, e.g. its prompt, where values are independent from group
            to group only: whole groups are resampled. Default: each value is its own.

    Raises:
        ValueError: fewer than two values, groups or resamples; or NaN.
    """
    check_resampling(resamples)
    if values.ndim != 1:
        raise ValueError(f"expected values (N,), got shape {tuple(values.shape)}")
    sums = checked_features(values[:, None].cpu(), least=2)[:, 0]
    counts = torch.ones_like(sums)
    if groups is not None:
        parts = members(groups)
        sums = torch.stack([sums[rows].sum() for rows in parts])
        counts = torch.tensor([len(rows) for rows in parts], dtype=sums.dtype)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(CHUNK // len(sums), 1)
    means = []
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), len(sums))
        drawn = torch.randint(len(sums), shape, generator=generator)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return quantiles(torch.cat(means))


@dataclass(frozen=True, eq=False)
class Resamples:
    """Resamples of whole groups, the same for all sets of pictures of the same groups.

    Args:
        times: How often each group is drawn, with shape (R, G), float64.
        group: Position of each element's group, with shape (N,).
    """

    times: Tensor
    group: Tensor

    @classmethod
    def of(cls, groups: Sequence[Hashable], resamples: int, seed: int = 0) -> Resamples:
        """As many groups as there are, drawn with repetition, R times.

        Fewer resamples of the same seed are the first ones of more.

        Args:
            groups: The group of each element, e.g. its prompt.
            resamples: R.
            seed: Of the drawing.

        Raises:
            ValueError: fewer than two groups or resamples.
        """
        check_resampling(resamples)
        parts = members(groups)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(parts), (resamples, len(parts)), generator=generator)
        times = torch.zeros(resamples, len(parts), dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        group = torch.empty(len(groups), dtype=torch.long)
        for position, rows in enumerate(parts):
            group[rows] = position
        return cls(times, group)

    def __len__(self) -> int:
        """R."""
        return len(self.times)

    def first(self, count: int) -> Resamples:
        """The first `count` of them."""
        return Resamples(self.times[:count], self.group)

    def counts(self) -> Tensor:
        """How often each element is drawn, with shape (R, N), float64."""
        return self.times[:, self.group]

    def means(self, values: Tensor) -> Tensor:
        """Mean of values (N,) in every resample, with shape (R,), float64."""
        sums, sizes = torch.zeros(2, self.times.shape[1], dtype=torch.float64)
        sums.index_add_(0, self.group, values.double())
        sizes.index_add_(0, self.group, torch.ones(len(values), dtype=torch.float64))
        return (self.times @ sums) / (self.times @ sizes)

    def linear(self, value: float, left_out: Tensor) -> Tensor:
        r"""What resamples do to a metric to first order, with shape (R,), float64.

        .. math:: v + \frac{G - 1}{G} \sum_g (n_g - 1)(v - v_{-g})

        with group g drawn :math:`n_g` times. Its variance is the jackknife's, times (G - 1) / G.
        For metrics that ask whether anything drawn is near: copies then change nothing, and
        resamples themselves vary too little.

        Args:
            value: v, the metric of all.
            left_out: The metric without each group, with shape (G,).
        """
        count = len(left_out)
        influence = (value - left_out.double()) * (count - 1) / count
        return value + (self.times - 1) @ influence


def moved_interval(draws: Tensor, value: float) -> tuple[float, float]:
    """The middle 95 % of `draws` (R,), moved so that their mean is `value`.

    For what is biased when pictures repeat, as they do in a resample.
    """
    return quantiles(draws - draws.mean() + value)
