"""What is measured of every picture by itself; means over pictures, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..pictures import Pictures
from .alignment import Alignment
from .bootstrap import interval
from .chroma import chroma, chroma_shares
from .clipping import clipped
from .extractors import Extractor
from .images import colourfulness, contrast, psnr, saturation, ssim
from .ms_ssim import large_enough, ms_ssim

PER_PICTURE: dict[str, Callable[[Tensor], Tensor]] = {
    "saturation": saturation,
    "contrast": contrast,
    "colourfulness": colourfulness,
    "chroma": chroma,
    "clipped": clipped,
}
TO_BASELINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ssim": ssim, "psnr": psnr}
Distance = Callable[[Tensor, Tensor], Tensor]  # two times (N, 3, H, W) in [0, 1] -> (N,)
# The last three where they can be measured.
SIMILARITIES = (*TO_BASELINE, "ms_ssim", "lpips", "dreamsim")
NO_SCORERS: Mapping[str, Alignment] = {}
NO_DISTANCES: Mapping[str, Distance] = {}


def measure(
    pictures: Pictures,
    baseline: Pictures | None = None,
    prompts: Sequence[str] | None = None,
    scorers: Mapping[str, Alignment] = NO_SCORERS,
    extractor: Extractor | None = None,
    batch_size: int = 64,
    distances: Mapping[str, Distance] = NO_DISTANCES,
) -> dict[str, Tensor]:
    """Colour statistics of pictures, and what else they can be compared with.

    Args:
        pictures: N pictures.
        baseline: N others, for SSIM, PSNR, MS-SSIM (of pictures that are large enough) and
            `distances`.
        prompts, scorers: N texts, and by name what scores pictures by them.
        extractor: For the features.
        batch_size: Pictures at once.
        distances: ``lpips`` and ``dreamsim``, as far as their weights are there.

    Returns:
        Name -> values on the CPU, with shape (N,); ``features`` with shape (N, D) and
        ``chroma_shares`` with shape (N, 280).

    Raises:
        ValueError: as for `Pictures.batches`, or pictures and baseline have different sizes.
    """
    values: dict[str, list[Tensor]] = {}
    others = None if baseline is None else baseline.batches(batch_size)
    for number, batch in enumerate(pictures.batches(batch_size)):
        found = {name: metric(batch) for name, metric in PER_PICTURE.items()}
        found["chroma_shares"] = chroma_shares(batch)
        part = slice(number * batch_size, number * batch_size + len(batch))
        if others is not None:
            other = next(others)
            if other.shape != batch.shape:
                raise ValueError(
                    f"{pictures.files[part][0]} and its baseline have different sizes (height, "
                    f"width): {tuple(batch.shape[2:])} and {tuple(other.shape[2:])}"
                )
            found |= {name: metric(batch, other) for name, metric in TO_BASELINE.items()}
            if large_enough(batch):
                found["ms_ssim"] = ms_ssim(batch, other)
            found |= {name: distance(batch, other) for name, distance in distances.items()}
        if prompts is not None:
            found |= {name: one.score(batch, prompts[part]) for name, one in scorers.items()}
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


def wins(scores: Tensor, others: Tensor) -> Tensor:
    """1 where a picture's score is higher than the other's, 0 where lower, .5 where equal; (N,)."""
    return (scores > others).double() + (scores == others).double() / 2


def check_names(pictures: Pictures, baseline: Pictures) -> None:
    """Refuse folders whose pictures do not have the same names below them.

    Raises:
        ValueError: names one that is missing.
    """
    for one, other in ((pictures, baseline), (baseline, pictures)):
        names = {one.name(file) for file in one.files}
        if missing := {other.name(file) for file in other.files} - names:
            raise ValueError(
                f"{one.folder} has no {min(missing)}, which {other.folder} has ({len(missing)} "
                "such files)"
            )


def similarity(
    pictures: Pictures,
    baseline: Pictures,
    batch_size: int = 32,
    distances: Mapping[str, Distance] = NO_DISTANCES,
) -> dict[str, Any]:
    """Mean SSIM, PSNR, MS-SSIM and distances to the pictures of the same names below their folders.

    With their intervals and N. Meant for the same seeds and prompts under two settings: how much
    does a setting change? Equal pictures have no finite PSNR; ``n_equal`` counts them, and the mean
    of the PSNR leaves them out (None if none is left). MS-SSIM is left out of pictures that are too
    small for it.

    Raises:
        ValueError: the folders' file names or picture sizes differ.
    """
    check_names(pictures, baseline)
    values = measure(pictures, baseline, batch_size=batch_size, distances=distances)
    names = [name for name in SIMILARITIES if name in values]
    return means(values, names) | {"n_equal": int(values["psnr"].isinf().sum())}
