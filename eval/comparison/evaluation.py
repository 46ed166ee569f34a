"""Metrics of a comparison's settings: of every picture, to the baseline, to real pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..metrics.alignment import Alignment
from ..metrics.bootstrap import Resamples, moved_interval
from ..metrics.chroma import chroma_distance
from ..metrics.extractors import Extractor
from ..metrics.feature_files import Features
from ..metrics.frechet import frechet_distance, frechet_resamples
from ..metrics.kid import kernel_distance
from ..metrics.per_picture import (
    NO_DISTANCES,
    NO_SCORERS,
    SIMILARITIES,
    Distance,
    mean_and_interval,
    measure,
    wins,
)
from ..metrics.precision_recall import neighbour_metrics
from ..metrics.preference import KINDS
from ..metrics.resampled import kernel_resamples, neighbour_resamples
from ..pictures import Pictures, Reading
from .paired import differences
from .plan import Samples

RESAMPLES = 2000
DISTANCE_RESAMPLES = 100  # of metrics of whole sets, which cost more
NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
NO_SCORES: Mapping[str, Tensor] = {}
SHARES = ("precision", "recall", "coverage")  # at most 1


class Resampled(NamedTuple):
    """A metric of a setting, and the same in R resamples of its prompts, with shape (R,)."""

    value: float
    draws: Tensor


def evaluate(
    samples: Samples,
    baseline: Samples | None,
    output: Path,
    kind: str = "grid",
    matches: Sequence[str] = (),
    guidance: str = "",
    extractor: Extractor | None = None,
    gallery: Tensor | Features | None = None,
    scorers: Mapping[str, Alignment] = NO_SCORERS,
    plain: Mapping[str, Tensor] = NO_SCORES,
    distances: Mapping[str, Distance] = NO_DISTANCES,
    chroma: Tensor | None = None,
    reading: Reading | None = None,
) -> tuple[dict[str, Any], dict[str, Resampled]]:
    """All figures of a setting, ready for JSON, and what `paired_differences` needs of it.

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
        gallery: Features of the reference, with shape (N, D), on the CPU, or their mean and
            covariance, or None.
        scorers: By name, what scores pictures by their prompts.
        plain: Scores of the baseline's pictures by some of them, with shape (N,), for the share of
            pictures that score higher than the baseline's of the same prompt and noise.
        distances: ``lpips`` and ``dreamsim`` to the baseline, as far as their weights are there.
        chroma: Shares of the reference's pixels by chroma, with shape (280,), or None.
        reading: How pictures are read.
    """
    reading = reading or Reading()
    values = measure(
        Pictures(samples.paths, reading),
        None if baseline is None else Pictures(baseline.paths, reading),
        samples.prompts,
        scorers,
        None if gallery is None else extractor,
        distances=distances,
    )
    features, shares = values.pop("features", None), values.pop("chroma_shares")
    if baseline is not None:
        values |= {f"{kind}_wins": wins(values[kind], other) for kind, other in plain.items()}
    groups = independent(samples.prompts)
    setting = samples.setting
    row: dict[str, Any] = {
        "label": setting.label,
        "method": setting.method,
        "guidance": guidance,
        "kind": kind,
        "matches": list(matches),
        "w": setting.scale,
        "matched_to": setting.matched,
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
    drawn = Resamples.of(groups, RESAMPLES) if len(set(groups)) > 1 else None
    resampled: dict[str, Resampled] = {}
    of_baseline = {*SIMILARITIES, *(f"{kind}_wins" for kind in plain)}
    for name, value in values.items():
        mean, ends = mean_and_interval(value, groups)
        row[name] = rounded(mean)
        row[f"{name}_interval"] = None if ends is None else [rounded(end) for end in ends]
        if drawn and name not in of_baseline and mean is not None and value.isfinite().all():
            resampled[name] = Resampled(mean, drawn.means(value))
    if "psnr" in values:
        row["n_equal"] = int(values["psnr"].isinf().sum())
    if drawn and gallery is not None and features is not None:
        found = distribution_metrics(gallery, features, drawn.first(DISTANCE_RESAMPLES))
        for name, one in found.items():
            row[name] = rounded(one.value)
            if not one.draws.isfinite().all():  # KID: of so few, some draws are of one picture only
                row[f"{name}_interval"] = None
                continue
            resampled[name] = one
            low, high = moved_interval(one.draws, one.value)
            row[f"{name}_interval"] = [
                rounded(low if name == "kid" else max(low, 0.0)),
                rounded(min(high, 1.0) if name in SHARES else high),
            ]
    if drawn and chroma is not None:
        one = chroma_resamples(chroma, shares, drawn)
        low, high = moved_interval(one.draws, one.value)
        row["chroma_distance"] = rounded(one.value)
        row["chroma_distance_interval"] = [rounded(max(low, 0.0)), rounded(high)]
        resampled["chroma_distance"] = one
    return row, resampled


def chroma_resamples(real: Tensor, shares: Tensor, drawn: Resamples) -> Resampled:
    """Distance of chroma to real pictures (see `metrics.chroma`), and its resamples.

    Args:
        real: Shares of the real pictures' pixels, with shape (280,).
        shares: The same of each generated picture, with shape (N, 280).
        drawn: Resamples of the generated pictures.
    """
    counts = drawn.counts()
    means = counts @ shares / counts.sum(1, keepdim=True)
    return Resampled(float(chroma_distance(real, shares.mean(0))), chroma_distance(real, means))


def preferences(
    samples: Samples, scorers: Mapping[str, Alignment], reading: Reading | None = None
) -> dict[str, Tensor]:
    """Scores of a setting's pictures by the kinds of `metrics.preference`, with shape (N,)."""
    kinds = {name: one for name, one in scorers.items() if name in KINDS}
    pictures = Pictures(samples.paths, reading or Reading())
    found = measure(pictures, None, samples.prompts, kinds) if kinds else {}
    return {kind: found[kind] for kind in kinds}


def paired_differences(
    settings: Mapping[str, Mapping[str, Resampled]], count: int
) -> list[dict[str, Any]]:
    """Every metric's differences between all pairs of settings, ready for JSON.

    All pairs of a metric are one family, so that the intervals also hold for pairs chosen after
    looking, such as the best setting and its rivals.

    Args:
        settings: Label -> metric -> values, from `evaluate` with the same prompts in the same
            order.
        count: How many prompts (or pictures of one prompt) were resampled, at least 2.
    """
    table = []
    for metric in dict.fromkeys(name for found in settings.values() for name in found):
        known = {label: found[metric] for label, found in settings.items() if metric in found}
        pairs = list(combinations(range(len(known)), 2))
        labels = list(known)
        values, draws = [one.value for one in known.values()], [one.draws for one in known.values()]
        for (i, j), one in zip(pairs, differences(values, draws, pairs, count), strict=True):
            table.append(
                {
                    "metric": metric,
                    "setting": labels[i],
                    "other": labels[j],
                    "difference": rounded(one.value),
                    "interval": one.interval and [rounded(end) for end in one.interval],
                    "needed": one.needed,
                }
            )
    return table


def effective_guidance(samples: Samples, baseline: Samples) -> float | None:
    """Effective guidance (see `comparison`); None where it could not be measured."""
    if samples.update is None or baseline.update is None or sum(baseline.update) == 0:
        return None
    return 1 + (samples.setting.beside - 1) * sum(samples.update) / sum(baseline.update)


def independent(prompts: Sequence[str]) -> list[Hashable]:
    """The group of each picture, so that pictures are independent from group to group.

    That is its prompt: the seeds of a prompt say little about other prompts. Pictures of one prompt
    only speak for this prompt, and are groups of their own.
    """
    return list(prompts) if len(set(prompts)) > 1 else list(range(len(prompts)))


def distribution_metrics(
    real: Tensor | Features, fake: Tensor, drawn: Resamples
) -> dict[str, Resampled]:
    """Fréchet distance, KID, precision, recall, density and coverage, and their resamples.

    The first two need two pictures, the others more than their k (3, 3, 5, 5); what has too few is
    left out. Of mean and covariance alone there is the Fréchet distance.

    Args:
        real: Features of the reference, with shape (N, D), or their mean and covariance.
        fake: Features of the generated pictures, with shape (M, D).
        drawn: Resamples of the generated pictures.
    """
    values: dict[str, float] = {}
    draws: dict[str, Tensor] = {}
    if len(fake) > 1:
        values["fd"] = frechet_distance(real, fake)
        draws["fd"] = frechet_resamples(real, fake, drawn)
    rows = real if isinstance(real, Tensor) else fake[:0]  # none: nothing below is measured
    least = min(len(rows), len(fake))
    if least > 1:
        values["kid"] = kernel_distance(rows, fake).value
        draws["kid"] = kernel_resamples(rows, fake, drawn)
    if least > NEIGHBOUR:
        wide = DENSITY_NEIGHBOUR if least > DENSITY_NEIGHBOUR else None
        for found in neighbour_metrics(rows, fake, NEIGHBOUR, wide):
            values |= {} if found is None else found._asdict()
        draws |= neighbour_resamples(rows, fake, drawn, NEIGHBOUR, DENSITY_NEIGHBOUR)
    return {name: Resampled(value, draws[name]) for name, value in values.items()}


def rounded(value: float | Tensor | None) -> float | None:
    """Six significant digits; None for none, NaN and infinity."""
    number = math.nan if value is None else float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
