"""Which guidance should I use? Sentences derived from the figures of a comparison, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# Name, and by what the best comes first: low distances, high alignments.
QUALITY = {"fd": ("Lowest Fréchet distance", 1), "alignment": ("Highest alignment", -1)}


def answer(rows: Sequence[Row]) -> list[str]:
    """Short sentences, the most important first.

    With a reference, quality is the Fréchet distance (lower is better), else the alignment
    (higher is better). Settings whose 95 % intervals overlap are not called different; without
    intervals none are.

    Args:
        rows: The settings' figures.
    """
    metric = next((m for m in QUALITY if any(row.get(m) is not None for row in rows)), None)
    if metric is None:
        cheapest = min(rows, key=lambda row: row["nfe"])
        return [
            "Neither reference pictures nor an alignment score were given, so quality was not "
            f"measured. Cheapest: {cheapest['label']}, {cheapest['nfe']:.4g} network evaluations "
            "a picture; look at the pictures before you choose."
        ]
    name, sign = QUALITY[metric]
    known = [row for row in rows if row.get(metric) is not None]
    best = min(known, key=lambda row: sign * row[metric])
    sentences = [f"{name}: {best['label']}, {_value(best, metric)}."]
    if not all(row.get(f"{metric}_interval") for row in known):
        return [
            *sentences,
            "That is no verdict: with so few pictures there are no intervals, and any order may be "
            "chance.",
        ]
    rivals = [row for row in known if _overlap(row, best, metric)]
    cheapest = min(rivals, key=lambda row: (row["nfe"], sign * row[metric]))
    if cheapest["nfe"] < best["nfe"]:
        sentences.append(
            f"Cheapest whose interval overlaps with that: {cheapest['label']}, "
            f"{_value(cheapest, metric)}, {cheapest['nfe']:.4g} network evaluations a picture "
            f"instead of {best['nfe']:.4g}."
        )
    by_label = {row["label"]: row for row in known}
    for other in known:
        for row in (by_label[label] for label in other["matches"] if label in by_label):
            verdict = "no better and no worse than"
            if not _overlap(row, other, metric):
                better = sign * row[metric] < sign * other[metric]
                verdict = "better than" if better else "worse than"
            sentences.append(
                f"At the nearest cost ({row['nfe']:.4g} and {other['nfe']:.4g} evaluations), "
                f"{row['label']} is {verdict} {other['label']}: {row[metric]:.4g} against "
                f"{other[metric]:.4g}."
            )
    return sentences


def _value(row: Row, metric: str) -> str:
    if not (interval := row.get(f"{metric}_interval")):
        return f"{row[metric]:.4g}"
    return f"{row[metric]:.4g} (95 % interval {interval[0]:.4g} to {interval[1]:.4g})"


def _overlap(a: Row, b: Row, metric: str) -> bool:
    first, second = a[f"{metric}_interval"], b[f"{metric}_interval"]
    return first[0] <= second[1] and second[0] <= first[1]
