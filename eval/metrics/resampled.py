"""Kernel distance, precision, recall, density and coverage of resampled generated pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from .bootstrap import Resamples
from .kid import checked_pair, cubic
from .precision_recall import radii

CHUNK = 512  # generated pictures at once


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
    real, fake = checked_pair(real, fake, least=2)
    counts = resamples.counts().to(fake)  # (R, M)
    own = torch.zeros(len(counts), dtype=counts.dtype, device=counts.device)
    cross = torch.zeros_like(own)
    for start in range(0, len(fake), CHUNK):
        part, times = fake[start : start + CHUNK], counts[:, start : start + CHUNK]
        kernel = cubic(part, fake)
        kernel.diagonal(start).zero_()
        own += ((counts @ kernel.T) * times).sum(1)
        cross += times @ cubic(part, real).mean(1)
    total = counts.sum(1)
    pairs = total.square() - counts.square().sum(1)
    constant = (_kernel_total(real) / (len(real) * (len(real) - 1))).to(own)
    return (constant + own / pairs - 2 * cross / total).cpu()


def _kernel_total(x: Tensor) -> Tensor:
    """Sum of the kernel over all pairs of different pictures."""
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), CHUNK):
        kernel = cubic(x[start : start + CHUNK], x)
        kernel.diagonal(start).zero_()
        total += kernel.sum()
    return total


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
    real, fake = checked_pair(real, fake, least=2)
    counts = resamples.counts().to(fake)  # (R, M)
    total, group = counts.sum(1), resamples.group.to(fake.device)
    least = min(len(real), len(fake))
    near = (radii(real, k), radii(fake, k)) if least > k else None
    wide = radii(real, k_density) if least > k_density else None
    sums = {name: torch.zeros_like(total) for name in ("precision", "density")}
    # Pictures of each group near each real one: groups are left out by taking theirs away.
    shape = (resamples.times.shape[1], len(real))
    around = {name: torch.zeros(shape, device=real.device) for name in ("recall", "coverage")}
    for start in range(0, len(fake), CHUNK):
        part = slice(start, start + CHUNK)
        distances = torch.cdist(fake[part], real, compute_mode="donot_use_mm_for_euclid_dist")
        if near is not None:
            sums["precision"] += counts[:, part] @ (distances <= near[0]).any(1).to(counts)
            around["recall"].index_add_(0, group[part], (distances <= near[1][part, None]).float())
        if wide is not None:
            within = distances <= wide
            sums["density"] += counts[:, part] @ within.sum(1).to(counts) / k_density
            around["coverage"].index_add_(0, group[part], within.float())
    found = {name: (value / total).cpu() for name, value in sums.items()}
    for name, near_by in around.items():
        every = near_by.sum(0)
        left_out = (every - near_by > 0).double().mean(1).cpu()
        found[name] = resamples.linear(float((every > 0).double().mean()), left_out)
    names = ["precision", "recall"] * (near is not None)
    return {name: found[name] for name in names + ["density", "coverage"] * (wide is not None)}
