"""Kernel distance, precision, recall, density and coverage of resampled generated pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import dots, prepared, slices
from .bootstrap import Resamples
from .kid import cubic, own_mean
from .precision_recall import neighbourhoods


def kernel_resamples(real: Tensor, fake: Tensor, resamples: Resamples) -> Tensor:
    """Unbiased kernel distance (KID) of every resample, with shape (R,), on the CPU.

    A picture drawn twice is no pair with itself: pairs of copies are left out, as pairs of a
    picture with itself are in the distance. Without repetition it is the distance.

    Args:
        real: Features, with shape (N, D).
        fake: Features, with shape (M, D).
        resamples: Of the M pictures.

    Raises:
        ValueError: as `kernel_distance`.
    """
    one, other = prepared(real, fake, least=2)
    device, dimension = other.given.device, other.dimension
    counts = resamples.counts().to(device)  # (R, M)
    own, cross = torch.zeros(2, len(counts), dtype=torch.float64, device=device)
    for rows in slices(len(other), len(other)):
        times = counts[:, rows]
        kernel = cubic(dots(other, rows, other), dimension)
        kernel.diagonal(rows.start).zero_()
        own += ((counts @ kernel.T) * times).sum(1)
    for rows in slices(len(other), len(one)):
        cross += counts[:, rows] @ cubic(dots(other, rows, one), dimension).mean(1)
    total = counts.sum(1)
    pairs = total.square() - counts.square().sum(1)
    return (own_mean(one) + own / pairs - 2 * cross / total).cpu()


def neighbour_resamples(
    real: Tensor, fake: Tensor, resamples: Resamples, k: int, k_density: int
) -> dict[str, Tensor]:
    """Precision, recall, density and coverage of every resample, each with shape (R,), on the CPU.

    Balls are those of the whole sets: neighbours are not looked for again among the pictures drawn,
    where copies would be neighbours at no distance. Recall and coverage ask whether any picture
    drawn is near, which a real picture that none is near never is in a resample; so theirs are
    `Resamples.linear`. Without repetition they are the metrics.

    Args:
        real: Features, with shape (N, D).
        fake: Features, with shape (M, D).
        resamples: Of the M pictures.
        k: Which neighbour a ball reaches, for precision and recall.
        k_density: The same for density and coverage.

    Returns:
        By name; the first two are left out with k pictures or fewer, the others with `k_density`.

    Raises:
        ValueError: as `precision_recall`.
    """
    one, other = prepared(real, fake, least=2)
    device = other.given.device
    counts = resamples.counts().to(device)  # (R, M)
    total, group = counts.sum(1), resamples.group.to(device)
    least = min(len(one), len(other))
    ks = k if least > k else None, k_density if least > k_density else None
    sums = {name: torch.zeros_like(total) for name in ("precision", "density")}
    # Pictures of each group near each real one: groups are left out by taking theirs away.
    shape = (resamples.times.shape[1], len(one))
    around = {name: torch.zeros(shape, device=device) for name in ("recall", "coverage")}
    for near in neighbourhoods(one, other, *ks):
        times, groups = counts[:, near.part], group[near.part]
        if near.in_real is not None and near.in_fake is not None:
            sums["precision"] += times @ near.in_real.any(1).to(counts)
            around["recall"].index_add_(0, groups, near.in_fake.float())
        if near.in_wide is not None:
            sums["density"] += times @ near.in_wide.sum(1).to(counts) / k_density
            around["coverage"].index_add_(0, groups, near.in_wide.float())
    found = {name: (value / total).cpu() for name, value in sums.items()}
    for name, near_by in around.items():
        every = near_by.sum(0)
        left_out = (every - near_by > 0).double().mean(1).cpu()
        found[name] = resamples.linear(float((every > 0).double().mean()), left_out)
    names = ["precision", "recall"] * (ks[0] is not None)
    return {name: found[name] for name in names + ["density", "coverage"] * (ks[1] is not None)}
