r"""FD∞: the Fréchet distance of infinitely many generated pictures (Chong & Forsyth 2020).

.. math:: FD_N \approx FD_\infty + b / N

arXiv:1911.07023. The distance of N pictures is too large by about b / N. It is measured at several
N, and a line over 1 / N is read off at 0. So figures of different N compare, which those of `fid`
do not. As in dgm-eval (github.com/layer6ai-labs/dgm-eval), which states it for DINOv2: 15 sizes at
equal steps from 5,000 (a tenth of the pictures, if that is less) to all of them, each a random part
without repetition. The paper also draws the pictures' noise from a Sobol sequence; here they are
taken as they are.

The line is a good description where N is well above the number of features; `fit` says how much of
the distances' variance it explains (R squared). The bias of the *real* pictures' number stays in
it.

Cost: 15 Fréchet distances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import checked_features
from .frechet import Gaussian, distance_of, factor

POINTS = 15
LARGEST_FIRST = 5000


class FDInfinity(NamedTuple):
    """Read off at 1 / N = 0.

    Args:
        value: The distance; from few pictures it may be below zero.
        fit: R squared of the line; 1 for distances that do not vary.
        counts: N of every point.
        distances: The distance at each.
    """

    value: float
    fit: float
    counts: list[int]
    distances: list[float]


def fd_infinity(
    real: Gaussian | Tensor, fake: Tensor, points: int = POINTS, seed: int = 0
) -> FDInfinity:
    """FD∞ of generated pictures' features.

    Args:
        real: Features (N, D) or their statistics.
        fake: Features (M, D).
        points: How many sizes.
        seed: Of the random parts.

    Raises:
        ValueError: fewer than two points, fewer than two pictures for each of them, NaN, or
            different dimensions.
    """
    if points < 2:
        raise ValueError(f"a line needs at least 2 points, got {points}")
    fake = checked_features(fake, least=2 * points)
    first = min(LARGEST_FIRST, max(len(fake) // 10, 2))
    counts = torch.linspace(first, len(fake), points, dtype=torch.float64).long().tolist()
    generator = torch.Generator().manual_seed(seed)
    known = factor(real)
    found = []
    for count in counts:
        rows = torch.randperm(len(fake), generator=generator)[:count].to(fake.device)
        found.append(distance_of(known, factor(fake[rows])))
    x = 1 / torch.tensor(counts, dtype=torch.float64)
    y = torch.tensor(found, dtype=torch.float64)
    around = x - x.mean()
    slope = (around * y).sum() / around.square().sum()
    value = y.mean() - slope * x.mean()
    total = (y - y.mean()).square().sum()
    rest = (y - value - slope * x).square().sum()
    return FDInfinity(float(value), float(1 - rest / total) if total > 0 else 1.0, counts, found)
