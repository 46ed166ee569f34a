"""Statistics of a folder's pictures that need no reference set: means, intervals and counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pictures import batches, picture_files
from .alignment import Alignment
from .bootstrap import interval
from .images import PER_PICTURE, TO_BASELINE


def colour_statistics(
    folder: str | Path, batch_size: int = 32, resize: int | None = None
) -> dict[str, Any]:
    """Mean saturation, contrast and colourfulness (see `images`), their intervals, N.

    High guidance scales raise all three; the same pictures without guidance, or real ones, say how
    much is right.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in PER_PICTURE}
    for pictures in batches(picture_files(folder), batch_size, resize):
        for name, metric in PER_PICTURE.items():
            values[name].append(metric(pictures))
    joined = {name: torch.cat(found) for name, found in values.items()}
    return _means(joined) | {"n": len(joined["saturation"])}


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
    values: dict[str, list[Tensor]] = {name: [] for name in TO_BASELINE}
    streams = (batches(files, batch_size) for files in pair)
    for a, b in zip(*streams, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{folder} and {baseline} hold pictures of different sizes (height, width): "
                f"{tuple(a.shape[2:])} and {tuple(b.shape[2:])}"
            )
        for name, metric in TO_BASELINE.items():
            values[name].append(metric(a, b).flatten())
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    counts = {"n": len(joined["ssim"]), "n_equal": int(joined["psnr"].isinf().sum())}
    return counts | _means(joined)


def folder_alignment(
    folder: str | Path,
    prompts: Sequence[str],
    scorer: Alignment,
    batch_size: int = 32,
    resize: int | None = None,
) -> dict[str, Any]:
    """Mean alignment of a folder's pictures with their prompts, its interval, N, and by what.

    Args:
        folder: Where the pictures lie.
        prompts: A text a picture, in the order of file names.
        scorer: What scores, e.g. `alignment.CLIPAlignment`.
        batch_size: Pictures at once.
        resize: Bring pictures to this side first.
    """
    scores: list[Tensor] = []
    for start, pictures in enumerate(batches(picture_files(folder), batch_size, resize)):
        texts = prompts[start * batch_size :][: len(pictures)]
        scores.append(scorer.score(pictures, texts).cpu())
    values = torch.cat(scores)
    found = _means({"alignment": values})
    ends = found.pop("alignment_interval")
    return found | {"by": scorer.name, "n": len(values), "interval": ends}


def _means(values: dict[str, Tensor]) -> dict[str, Any]:
    """Means of the finite values, and their 95 % intervals; None where there are too few."""
    result: dict[str, Any] = {}
    for name, found in values.items():
        found = found[found.isfinite()].double()
        result[name] = float(found.mean()) if len(found) else None
        result[f"{name}_interval"] = list(interval(found)) if len(found) > 1 else None
    return result
