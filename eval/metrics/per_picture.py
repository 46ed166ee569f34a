"""What is measured of every picture by itself; means over pictures, with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pictures import batches, picture_files
from .alignment import Alignment
from .bootstrap import interval
from .extractors import Extractor
from .images import PER_PICTURE, TO_BASELINE


def measure(
    files: Sequence[Path],
    baseline: Sequence[Path] | None = None,
    prompts: Sequence[str] | None = None,
    alignment: Alignment | None = None,
    extractor: Extractor | None = None,
    batch_size: int = 64,
    resize: int | None = None,
) -> dict[str, Tensor]:
    """Saturation, contrast and colourfulness of pictures, and what else they can be compared with.

    Args:
        files: N pictures of one size.
        baseline: N others, for SSIM and PSNR.
        prompts, alignment: N texts and what scores pictures by them, for the alignment.
        extractor: For the features.
        batch_size: Pictures at once.
        resize: Bring pictures to this side first.

    Returns:
        Name -> values on the CPU, with shape (N,); ``features`` with shape (N, D).

    Raises:
        ValueError: as for `batches`, or pictures and baseline have different sizes.
    """
    values: dict[str, list[Tensor]] = {}
    others = None if baseline is None else batches(baseline, batch_size, resize)
    for number, pictures in enumerate(batches(files, batch_size, resize)):
        found = {name: metric(pictures) for name, metric in PER_PICTURE.items()}
        part = slice(number * batch_size, number * batch_size + len(pictures))
        if others is not None:
            other = next(others)
            if other.shape != pictures.shape:
                raise ValueError(
                    f"{files[part][0]} and its baseline have different sizes (height, width): "
                    f"{tuple(pictures.shape[2:])} and {tuple(other.shape[2:])}"
                )
            found |= {name: metric(pictures, other) for name, metric in TO_BASELINE.items()}
        if alignment is not None and prompts is not None:
            found["alignment"] = alignment.score(pictures, prompts[part])
        if extractor is not None:
            found["features"] = extractor(pictures)
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


def folder_similarity(
    folder: str | Path, baseline: str | Path, batch_size: int = 32
) -> dict[str, Any]:
    """Mean SSIM and PSNR to the pictures of the same file names, their intervals, N.

    Meant for the same seeds and prompts under two settings: how much does a setting change? Equal
    pictures have no finite PSNR; ``n_equal`` counts them, and the mean of the PSNR leaves them out
    (None if none is left).

    Raises:
        ValueError: the folders' file names or picture sizes differ.
    """
    pair = picture_files(folder), picture_files(baseline)
    names = [{f.name for f in files} for files in pair]
    for place, other, missing in (
        (folder, baseline, names[1] - names[0]),
        (baseline, folder, names[0] - names[1]),
    ):
        if missing:
            raise ValueError(
                f"{place} has no {min(missing)}, which {other} has ({len(missing)} such files)"
            )
    values = measure(*pair, batch_size=batch_size)
    return means(values, TO_BASELINE) | {"n_equal": int(values["psnr"].isinf().sum())}
