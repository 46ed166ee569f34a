r"""Paired differences of settings, with intervals that hold for all of them together.

All settings share prompts and noise, so what is hard about a prompt is hard for all, and the
difference of two settings is known much better than either: their own intervals may overlap while
the difference is clear. Prompts are resampled with all their seeds, the same ones for every
setting, and the difference of two settings in a resample is that of both metrics in it.

.. math:: d_j \pm c\, s_j, \qquad P(\max_j |t_j| \le c) = 0.95

:math:`s_j` is the standard error of the difference :math:`d_j`, that of its resamples times
:math:`\sqrt{G / (G - 1)}` for G prompts, and :math:`t` has the multivariate Student distribution
with the correlations of the resampled differences ("max-t": Hothorn, Bretz, Westfall 2008,
doi:10.1002/bimj.200810425). Its degrees of freedom :math:`\nu` count what the prompts and what R
resamples leave uncertain about :math:`s_j`: :math:`1/\nu = 1/(G - 1) + 1/(R - 1)`.

Why this and not Holm's: it gives an interval and a verdict of one definition, and is less strict
where comparisons share settings, as they do here. For one comparison of means it is the paired t
interval. Standard errors need fewer resamples than the far quantiles of a bootstrap would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..metrics.bootstrap import LEVEL

SIMULATED = 40_000  # draws of the largest |t|
AT_ONCE = 4_000
POWER = 0.8416  # quantile .8 of the normal distribution: M prompts would tell 4 times in 5
MOST = 1000  # times the prompts there are: more is no advice


@dataclass(frozen=True)
class Difference:
    """The first setting's metric minus the second's.

    Args:
        value: The difference.
        error: Its standard error.
        interval: 95 %, for all differences of the family together; None where resamples do not
            vary although there is a difference, which proves nothing.
        needed: About how many prompts would tell, 4 times in 5, if the difference is what it seems;
            None if it is clear, zero, or would need more than 1,000 times the prompts.
    """

    value: float
    error: float
    interval: tuple[float, float] | None
    needed: int | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def differences(
    values: Sequence[float],
    draws: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    groups: int,
    seed: int = 0,
) -> list[Difference]:
    """Differences of pairs of settings, one family.

    Args:
        values: A metric of each of K settings.
        draws: The metric in R resamples of each, with shape (R,); resample r drew the same prompts
            for all.
        pairs: Positions of two settings each.
        groups: How many prompts (or whatever was resampled) there are.
        seed: Of the simulation of c.

    Raises:
        ValueError: NaN, fewer than two groups or resamples, or numbers that do not fit.
    """
    table = np.stack([draw.double().cpu().numpy() for draw in draws], 1)  # (R, K)
    metric = np.asarray(values, dtype=np.float64)
    if len(metric) != table.shape[1] or groups < 2 or len(table) < 2:
        raise ValueError(
            f"{len(metric)} values, resamples {table.shape} and {groups} groups make no difference"
        )
    if not (np.isfinite(table).all() and np.isfinite(metric).all()):
        raise ValueError("values or resamples contain NaN or infinity")
    if not pairs:
        return []
    first, second = np.array(pairs).T
    value = metric[first] - metric[second]
    shared = table - table.mean(1, keepdims=True)  # what all settings share cancels
    centred = shared - shared.mean(0)
    spread = np.sqrt(np.square(centred[:, first] - centred[:, second]).sum(0) / (len(table) - 1))
    error = spread * math.sqrt(groups / (groups - 1))
    varies = spread > 1e-12 * np.abs(table).max()
    freedom = 1 / (1 / (groups - 1) + 1 / (len(table) - 1))
    critical = limit = 0.0
    if varies.any():
        varying = first[varies], second[varies], spread[varies]
        critical, limit = _critical(centred, *varying, freedom, seed)
    found = []
    for d, s, some in zip(value.tolist(), error.tolist(), varies.tolist(), strict=True):
        half = critical * s if some else 0.0
        interval = (d - half, d + half) if some or d == 0 else None
        needed = None
        if some and d and abs(d) <= half:
            count: float = groups
            for _ in range(20):  # c is nearly linear in 1 / nu
                share = freedom * (1 / (count - 1) + 1 / (len(table) - 1))
                c = limit + (critical - limit) * share
                count = max(groups * ((c + POWER) * s / abs(d)) ** 2, groups + 1)
            needed = two_digits(count) if count <= MOST * groups else None
        found.append(Difference(d, s if some else 0.0, interval, needed))
    return found


def _critical(
    centred: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    spread: np.ndarray,
    freedom: float,
    seed: int,
) -> tuple[float, float]:
    """c, below which 95 % of the largest |t| are; and its limit for many prompts."""
    rng = np.random.default_rng(seed)
    root: np.ndarray = np.linalg.qr(centred)[1] / math.sqrt(len(centred) - 1)  # covariance: R^T R
    largest, limits = [], []
    for _ in range(SIMULATED // AT_ONCE):
        normal = rng.standard_normal((AT_ONCE, len(root))) @ root
        t = np.abs((normal[:, first] - normal[:, second]) / spread).max(1)
        limits.append(t)
        largest.append(t / np.sqrt(rng.chisquare(freedom, AT_ONCE) / freedom))
    found = (np.quantile(np.concatenate(draws), LEVEL) for draws in (largest, limits))
    critical, limit = map(float, found)
    return critical, limit


def two_digits(number: float) -> int:
    """Rounded up to two significant digits."""
    unit = 10 ** max(math.floor(math.log10(number)) - 1, 0)
    return math.ceil(number / unit) * unit
