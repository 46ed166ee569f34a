"""Metrics of a comparison's settings: of every picture, to the baseline, to real pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..metrics.alignment import Alignment
from ..metrics.extractors import Extractor
from ..metrics.frechet import frechet_distance, frechet_interval
from ..metrics.kid import kernel_distance
from ..metrics.per_picture import mean_and_interval, measure
from ..metrics.precision_recall import density_coverage, precision_recall
from .plan import Samples

DISTANCE_RESAMPLES = 100


def evaluate(
    samples: Samples,
    baseline: Samples | None,
    output: Path,
    kind: str = "grid",
    matches: Sequence[str] = (),
    guidance: str = "",
    extractor: Extractor | None = None,
    gallery: Tensor | None = None,
    alignment: Alignment | None = None,
) -> dict[str, Any]:
    """All figures of a setting, ready for JSON.

    Args:
        samples: Its pictures.
        baseline: Pictures of CFG with the same scale and, but for ``equal nfe``, as many steps;
            None for a baseline.
        output: Folder of the comparison.
        kind: ``grid``: asked for; ``baseline``: added for the others; ``equal nfe``: CFG with as
            many steps as cost what another method costs.
        matches: For ``equal nfe``, the labels of the settings whose cost it has.
        guidance: The settings its name stands for, written out.
        extractor: Pictures to features, None without a reference.
        gallery: Features of the reference, with shape (N, D), on the CPU, or None.
        alignment: What scores pictures by their prompts, or None.
    """
    values = measure(
        samples.paths,
        None if baseline is None else baseline.paths,
        samples.prompts,
        alignment,
        None if gallery is None else extractor,
    )
    features = values.pop("features", None)
    groups = independent(samples.prompts)
    setting = samples.setting
    row: dict[str, Any] = {
        "label": setting.label,
        "method": setting.method,
        "guidance": guidance,
        "kind": kind,
        "matches": list(matches),
        "w": setting.scale,
        "steps": setting.steps,
        "n": len(samples.paths),
        "nfe": rounded(samples.mean_nfe),
        "nfe_range": [min(samples.nfe), max(samples.nfe)],
        "seconds": rounded(samples.seconds),
        "effective_guidance": rounded(
            setting.scale
            if baseline is None or kind == "equal nfe"
            else effective_guidance(samples, baseline)
        ),
        "folder": os.path.relpath(samples.paths[0].parent, output),
    }
    for name, value in values.items():
        mean, ends = mean_and_interval(value, groups)
        row[name] = rounded(mean)
        row[f"{name}_interval"] = None if ends is None else [rounded(end) for end in ends]
    if "psnr" in values:
        row["n_equal"] = int(values["psnr"].isinf().sum())
    if gallery is not None and features is not None:
        row |= distribution_metrics(gallery, features, groups)
    return row


def effective_guidance(samples: Samples, baseline: Samples) -> float | None:
    """Effective guidance (see `comparison`); None where it could not be measured."""
    if samples.update is None or baseline.update is None or sum(baseline.update) == 0:
        return None
    return 1 + (samples.setting.scale - 1) * sum(samples.update) / sum(baseline.update)


def independent(prompts: Sequence[str]) -> list[Hashable]:
    """The group of each picture, so that pictures are independent from group to group.

    That is its prompt: the seeds of a prompt say little about other prompts. Pictures of one prompt
    only speak for this prompt, and are groups of their own.
    """
    return list(prompts) if len(set(prompts)) > 1 else list(range(len(prompts)))


def distribution_metrics(
    real: Tensor, fake: Tensor, groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Fréchet distance with its interval, KID, precision, recall, density and coverage.

    The first two need two pictures, the others more than their k (3, 3, 5, 5); what has too few is
    left out.

    Args:
        real: Features of the reference, with shape (N, D).
        fake: Features of the generated pictures, with shape (M, D).
        groups: See `frechet_interval`.
    """
    values: dict[str, Any] = {}
    least = min(len(real), len(fake))
    if least > 1:
        values["fd"] = rounded(frechet_distance(real, fake))
        ends = frechet_interval(real, fake, resamples=DISTANCE_RESAMPLES, groups=groups)
        values["fd_interval"] = [rounded(end) for end in ends]
        values["kid"] = rounded(kernel_distance(real, fake).value)
    for metric, k in ((precision_recall, 3), (density_coverage, 5)):
        if least > k:
            found = metric(real, fake, k)
            values |= {name: rounded(value) for name, value in found._asdict().items()}
    return values


def rounded(value: float | Tensor | None) -> float | None:
    """Six significant digits; None for none, NaN and infinity."""
    number = math.nan if value is None else float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
