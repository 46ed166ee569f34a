"""Which guidance should I use? Sentences derived from the cells of a comparison, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def answer(rows: Sequence[Row], real: dict[str, float] | None = None) -> list[str]:
    """Short sentences, the most important first.

    With a reference, quality is the Fréchet distance (lower is better), else the alignment
    (higher is better). Settings whose 95 % intervals overlap are not called different; without
    intervals none are.

    Args:
        rows: The cells.
        real: Statistics of the reference pictures.
    """
    metric, sign = _quality(rows)
    if metric is None:
        return [_without_quality(rows)]
    known = [row for row in rows if row.get(metric) is not None]
    name = "Fréchet distance" if metric == "fd" else "alignment"
    best = min(known, key=lambda row: sign * row[metric])
    word = "Lowest" if metric == "fd" else "Highest"
    sentences = [f"{word} {name}: {best['label']}, {_value(best, metric)}."]
    if all(row.get(f"{metric}_interval") for row in known):
        sentences += _cheapest(known, best, metric, sign)
        sentences += _by_scale(known, metric, sign)
        sentences += _fewer_steps(known, metric, sign)
    else:
        sentences.append(
            "That is no verdict: with so few pictures there are no intervals, and any order may be "
            "chance."
        )
    if real is not None:
        sentences.append(_saturation(rows, real))
    return sentences


def _cheapest(rows: Sequence[Row], best: Row, metric: str, sign: int) -> list[str]:
    rivals = [row for row in rows if _overlap(row, best, metric)]
    cheapest = min(rivals, key=lambda row: (row["nfe"], sign * row[metric]))
    if cheapest["nfe"] >= best["nfe"]:
        return []
    return [
        f"Cheapest whose interval overlaps with that: {cheapest['label']}, "
        f"{_value(cheapest, metric)}, {cheapest['nfe']:.4g} network evaluations a picture "
        f"instead of {best['nfe']:.4g}."
    ]


def _quality(rows: Sequence[Row]) -> tuple[str | None, int]:
    for metric, sign in (("fd", 1), ("alignment", -1)):
        if any(row.get(metric) is not None for row in rows):
            return metric, sign
    return None, 0


def _without_quality(rows: Sequence[Row]) -> str:
    cheapest = min(rows, key=lambda row: row["nfe"])
    return (
        "Neither reference pictures nor an alignment score were given, so quality was not "
        f"measured. Cheapest: {cheapest['label']}, {cheapest['nfe']:.4g} network evaluations a "
        "picture; look at the pictures before you choose."
    )


def _value(row: Row, metric: str) -> str:
    interval = row.get(f"{metric}_interval")
    if interval is None:
        return f"{row[metric]:.4g}"
    return f"{row[metric]:.4g} (95 % interval {interval[0]:.4g} to {interval[1]:.4g})"


def _overlap(a: Row, b: Row, metric: str) -> bool:
    first, second = a[f"{metric}_interval"], b[f"{metric}_interval"]
    return first[0] <= second[1] and second[0] <= first[1]


def _by_scale(rows: Sequence[Row], metric: str, sign: int) -> list[str]:
    """The best of the settings asked for at each scale, where there is a choice."""
    several = len({row["steps"] for row in rows if row["kind"] != "equal nfe"}) > 1
    parts = []
    for scale in sorted({row["w"] for row in rows}):
        here = [row for row in rows if row["w"] == scale and row["kind"] != "equal nfe"]
        if len(here) < 2:
            continue
        ranked = sorted(here, key=lambda row: sign * row[metric])
        tied = [row for row in ranked if _overlap(row, ranked[0], metric)]
        names = [f"{r['method']}, {r['steps']} steps" if several else r["method"] for r in tied]
        more = f" (no difference from {' or '.join(names[1:])})" if len(names) > 1 else ""
        parts.append(f"w={scale:g}: {names[0]}{more}")
    return [f"Best at each scale: {'; '.join(parts)}."] if parts else []


def _fewer_steps(rows: Sequence[Row], metric: str, sign: int) -> list[str]:
    """Whether a cheaper method beats plain guidance with fewer steps at about its cost."""
    by_label: dict[str, Row] = {row["label"]: row for row in rows}
    sentences = []
    for other in rows:
        for label in other["matches"]:
            row = by_label.get(label)
            if row is None:
                continue
            if _overlap(row, other, metric):
                verdict = "no better and no worse than"
            else:
                verdict = (
                    "better than" if sign * row[metric] < sign * other[metric] else "worse than"
                )
            sentences.append(
                f"At the nearest cost ({row['nfe']:.4g} and {other['nfe']:.4g} evaluations), "
                f"{label} is {verdict} {other['label']}: {row[metric]:.4g} against "
                f"{other[metric]:.4g}."
            )
    return sentences


def _saturation(rows: Sequence[Row], real: dict[str, float]) -> str:
    gap: Callable[[Row], float] = lambda row: abs(row["saturation"] - real["saturation"])  # noqa: E731
    nearest, farthest = min(rows, key=gap), max(rows, key=gap)
    return (
        f"Saturation of the real pictures is {real['saturation']:.3f}; nearest to it is "
        f"{nearest['label']} ({nearest['saturation']:.3f}), farthest {farthest['label']} "
        f"({farthest['saturation']:.3f})."
    )
