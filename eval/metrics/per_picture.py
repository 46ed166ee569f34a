"""What is measured of every picture by itself; means over pictures, with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..pictures import Pictures
from .alignment import Alignment
from .bootstrap import interval
from .extractors import Extractor
from .images import PER_PICTURE, TO_BASELINE


def measure(
    pictures: Pictures,
    baseline: Pictures | None = None,
    prompts: Sequence[str] | None = None,
    alignment: Alignment | None = None,
    extractor: Extractor | None = None,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Saturation, contrast and colourfulness of pictures, and what else they can be compared with.

    Args:
        pictures: N pictures.
        baseline: N others, for SSIM and PSNR.
        prompts, alignment: N texts and what scores pictures by them, for the alignment.
        extractor: For the features.
        batch_size: Pictures at once.

    Returns:
        Name -> values on the CPU, with shape (N,); ``features`` with shape (N, D).

    Raises:
        ValueError: as for `Pictures.batches`, or pictures and baseline have different sizes.
    """
    values: dict[str, list[Tensor]] = {}
    others = None if baseline is None else baseline.batches(batch_size)
    for number, batch in enumerate(pictures.batches(batch_size)):
        found = {name: metric(batch) for name, metric in PER_PICTURE.items()}
        part = slice(number * batch_size, number * batch_size + len(batch))
        if others is not None:
            other = next(others)
            if other.shape != batch.shape:
                raise ValueError(
                    f"{pictures.files[part][0]} and its baseline have different sizes (height, "
                    f"width): {tuple(batch.shape[2:])} and {tuple(other.shape[2:])}"
                )
            found |= {name: metric(batch, other) for name, metric in TO_BASELINE.items()}
        if alignment is not None and prompts is not None:
            found["alignment"] = alignment.score(batch, prompts[part])
        if extractor is not None:
            found["features"] = extractor(batch)
        for name, value in found.items():
            values.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(parts) for name, parts in values.items()}


def mean_and_interval(
    values: Tensor, groups: Sequence[Hashable] | None = None
) -> tuple[float | None, list[float] | None]:
    """Mean of the values that are not infinite (equal pictures have no finite PSNR).

    Args:
        values: With shape (N,).
        groups: See `interval`; default: every value is independent.

    Returns:
        The mean, None of no values; its 95 % interval, None of fewer than two groups or of NaN.
    """
    kept = ~values.isinf()
    groups = list(compress(range(len(values)) if groups is None else groups, kept))
    values = values[kept].double()
    mean = float(values.mean()) if len(values) else None
    if len(set(groups)) < 2 or values.isnan().any():
        return mean, None
    return mean, list(interval(values, groups=groups))


def means(values: dict[str, Tensor], names: Iterable[str]) -> dict[str, Any]:
    """N, and mean and 95 % interval of some of what `measure` gives, by name."""
    result: dict[str, Any] = {}
    for name in names:
        result["n"] = len(values[name])
        result[name], result[f"{name}_interval"] = mean_and_interval(values[name])
    return result


def similarity(pictures: Pictures, baseline: Pictures, batch_size: int = 32) -> dict[str, Any]:
    """Mean SSIM and PSNR to the pictures of the same names below their folders, intervals, N.

    Meant for the same seeds and prompts under two settings: how much does a setting change? Equal
    pictures have no finite PSNR; ``n_equal`` counts them, and the mean of the PSNR leaves them out
    (None if none is left).

    Raises:
        ValueError: the folders' file names or picture sizes differ.
    """
    for one, other in ((pictures, baseline), (baseline, pictures)):
        names = {one.name(file) for file in one.files}
        if missing := {other.name(file) for file in other.files} - names:
            raise ValueError(
                f"{one.folder} has no {min(missing)}, which {other.folder} has ({len(missing)} "
                "such files)"
            )
    values = measure(pictures, baseline, batch_size=batch_size)
    return means(values, TO_BASELINE) | {"n_equal": int(values["psnr"].isinf().sum())}
