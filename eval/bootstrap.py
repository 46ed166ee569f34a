"""Bootstrap intervals: of a statistic of values, and of the Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .features import FeatureStatistics, checked_features
from .frechet import factor, frechet_distance

CHUNK = 2**24  # numbers drawn at once


def _quantiles(draws: Tensor, level: float) -> tuple[float, float]:
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype, device=draws.device)
    low, high = torch.quantile(draws, ends).tolist()
    return low, high


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 2:
        raise ValueError(f"at least 2 resamples are needed, got {resamples}")


def interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values.

    Args:
        values: Values, with shape (N,).
        statistic: Maps (R, N) to (R,), a resample a row; default: the mean.
        level: Share of the resamples inside.
        resamples: Their number.
        seed: Of the resampling.

    Raises:
        ValueError: fewer than two values, NaN, or bad settings.
    """
    _check(level, resamples)
    if values.ndim != 1:
        raise ValueError(f"expected values (N,), got shape {tuple(values.shape)}")
    values = checked_features(values[:, None].cpu(), least=2)[:, 0]
    statistic = statistic or (lambda rows: rows.mean(1))
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    at_once = max(CHUNK // count, 1)
    draws = []
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), count)
        draws.append(statistic(values[torch.randint(count, shape, generator=generator)]))
    return _quantiles(torch.cat(draws), level)


def frechet_interval(
    real: FeatureStatistics | Tensor,
    fake: Tensor,
    level: float = 0.95,
    resamples: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the Fréchet distance under resampling of the generated pictures.

    A resample repeats pictures, which biases its distance upwards as a smaller N does. So the
    quantiles are moved by the resamples' mean: the interval shows the noise at this N, around the
    distance of the pictures themselves. The bias of the distance in N stays in it. The real
    pictures count as given.

    Cost: every resample takes the eigenvalues of a symmetric matrix of side min(rank, N), at most
    D: about a second on one core for D = 1280.

    Args:
        real: Features (N, D) or their statistics.
        fake: Features (M, D).
        level, resamples, seed: As for `interval`.

    Raises:
        ValueError: fewer than two pictures, NaN, different dimensions, or bad settings.
    """
    _check(level, resamples)
    fake = checked_features(fake, least=2)
    value = frechet_distance(real, fake)
    mean, root = factor(real)
    generator = torch.Generator().manual_seed(seed)
    count, constant = len(fake), root.square().sum()
    projected, squares = fake @ root, fake.square().sum(1)  # (M, r), (M,)
    draws = []
    for _ in range(resamples):
        rows = torch.randint(count, (count,), generator=generator).to(fake.device)
        centre = fake[rows].mean(0)
        trace = (squares[rows].sum() - count * centre.square().sum()) / (count - 1)
        part = projected[rows] - centre @ root
        gram = part.T @ part if part.shape[1] <= count else part @ part.T
        roots = (torch.linalg.eigvalsh(gram).clamp(min=0) / (count - 1)).sqrt().sum()
        draws.append((centre - mean).square().sum() + constant + trace - 2 * roots)
    draws = torch.stack(draws)
    low, high = _quantiles(draws - draws.mean() + value, level)
    return max(low, 0.0), high
