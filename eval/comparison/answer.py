"""Which guidance should I use? Sentences derived from the figures of a comparison, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

# Name, and by what the best comes first: low distances, high alignments.
QUALITY = {"fd": ("Lowest Fréchet distance", 1), "alignment": ("Highest alignment", -1)}
FEW = 20  # prompts below which standard errors are rough
LISTED = 3  # settings named in a sentence


def answer(rows: Sequence[Row], facts: dict[str, Any]) -> list[str]:
    """A few sentences, the most important first.

    With a reference, quality is the Fréchet distance (lower is better), else the alignment
    (higher is better). The best is one of the settings asked for; baselines that were added are
    what it is measured by. A setting is called better or worse only where the interval of the
    paired difference, corrected for all pairs of settings, excludes zero (see `paired`); otherwise
    the figures cannot tell, and the sentence says how many prompts would. Without intervals there
    are no verdicts.

    Args:
        rows: The settings' figures.
        facts: What ``cells.json`` says beside them: of it, ``comparisons`` and ``resampled``.
    """
    metric = next((m for m in QUALITY if any(row.get(m) is not None for row in rows)), None)
    if metric is None:
        cheapest = min(_asked(rows), key=lambda row: row["nfe"])
        return [
            "Neither reference pictures nor an alignment score were given, so quality was not "
            f"measured. Cheapest: {cheapest['label']}, {cheapest['nfe']:.4g} network evaluations "
            "a picture; look at the pictures before you choose."
        ]
    name, sign = QUALITY[metric]
    known = [row for row in rows if row.get(metric) is not None]
    asked = _asked(known)
    best = min(asked, key=lambda row: sign * row[metric])
    lead = f"{name} of the settings asked for: {best['label']}, {_value(best, metric)}."
    if len(known) == 1:
        return [lead]
    found = _verdicts(facts["comparisons"], metric, sign)
    if not {row["label"] for row in known} <= {label for pair in found for label in pair}:
        return [
            lead,
            "That is no verdict: with so few pictures there are no intervals, and any order may be "
            "chance.",
        ]
    drawn, one_prompt = facts["resampled"]["count"], facts["resampled"]["unit"] == "pictures"
    units = f"{drawn} pictures of one prompt" if one_prompt else f"{drawn} prompts"
    sentences = []
    if others := [row for row in asked if row is not best]:
        told = {row["label"]: found[best["label"], row["label"]] for row in others}
        better = sum(verdict == "better" for verdict, _ in told.values())
        same = [label for label, (verdict, _) in told.items() if verdict == "same"]
        unknown = {label: needed for label, (verdict, needed) in told.items() if verdict == ""}
        parts = []
        if better:
            every = f"all {better} others" if better > 1 else "the other one"
            of = f"{better} of the {len(others)} others"
            parts.append(f"it is better than {every if better == len(others) else of}")
        if same:
            parts.append(f"it gives the same as {_listed(same)}")
        if unknown:
            parts.append(f"{units} cannot tell it from {_would(unknown)}")
        text = "; ".join(parts)
        lead += f" {text[0].upper()}{text[1:]}."
        rivals = [row for row in others if row["label"] in unknown or row["label"] in same]
        cheapest = min([*rivals, best], key=lambda row: (row["nfe"], sign * row[metric]))
        if cheapest["nfe"] < best["nfe"]:
            sentences.append(
                f"Cheapest that is not clearly worse: {cheapest['label']}, "
                f"{_value(cheapest, metric)}, {cheapest['nfe']:.4g} network evaluations a picture "
                f"instead of {best['nfe']:.4g}."
            )
    if equal_cost := _at_equal_cost(known, found, units, metric):
        sentences.append(equal_cost)
    added = [row for row in known if row["kind"] != "grid"]
    above = [row for row in added if found[row["label"], best["label"]][0] == "better"]
    if above:
        top = min(above, key=lambda row: sign * row[metric])
        sentences.append(
            f"Better than all asked for, though added for comparison only: {top['label']}, "
            f"{_value(top, metric)}, {top['nfe']:.4g} network evaluations a picture."
        )
    if one_prompt:
        sentences.append("All pictures are of one prompt, and say nothing about others.")
    elif drawn < FEW:
        sentences.append(
            f"Only {drawn} prompts: intervals from fewer than {FEW} are rough, and prompts not "
            "tried may differ."
        )
    return [lead, *sentences]


def _asked(rows: Sequence[Row]) -> list[Row]:
    """The settings asked for; all, if no figures of theirs are known."""
    return [row for row in rows if row["kind"] == "grid"] or list(rows)


def _verdicts(
    comparisons: Iterable[Row], metric: str, sign: int
) -> dict[tuple[str, str], tuple[str, int | None]]:
    """(setting, other) -> "better", "worse", "same" or "" (cannot tell); prompts that would tell.

    Both orders of every pair.
    """
    found: dict[tuple[str, str], tuple[str, int | None]] = {}
    for one in comparisons:
        if one["metric"] != metric:
            continue
        verdict, reverse = "", ""
        if (ends := one["interval"]) is not None:
            if ends[0] == ends[1] == 0:
                verdict = reverse = "same"
            elif ends[0] > 0 or ends[1] < 0:
                words = ("better", "worse")
                verdict, reverse = words if sign * one["difference"] < 0 else words[::-1]
        found[one["setting"], one["other"]] = verdict, one["needed"]
        found[one["other"], one["setting"]] = reverse, one["needed"]
    return found


def _at_equal_cost(
    known: Sequence[Row],
    found: dict[tuple[str, str], tuple[str, int | None]],
    units: str,
    metric: str,
) -> str:
    """One sentence on all settings beside the CFG that costs the same; empty without any."""
    by_label = {row["label"]: row for row in known}
    told: dict[str, dict[str, int | None]] = {}
    for plain in known:
        for label in plain["matches"]:
            if label in by_label:
                verdict, needed = found[label, plain["label"]]
                text = f"{label} ({by_label[label][metric]:.4g} against {plain[metric]:.4g})"
                told.setdefault(verdict, {})[text] = needed
    words = {"better": "better", "worse": "worse", "same": "the same"}
    parts = [f"{words[v]}: {_listed(list(told[v]))}" for v in words if v in told]
    if "" in told:
        parts.append(f"{units} cannot tell: {_would(told[''])}")
    if not parts:
        return ""
    return f"Beside CFG with fewer steps at the nearest cost, {'; '.join(parts)}."


def _would(needed: dict[str, int | None]) -> str:
    """Settings, each with how many would tell."""
    return _listed(
        [f"{label} (about {n:,} would)" if n else label for label, n in needed.items()],
    )


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - LISTED
    return ", ".join(labels[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _value(row: Row, metric: str) -> str:
    if not (interval := row.get(f"{metric}_interval")):
        return f"{row[metric]:.4g}"
    return f"{row[metric]:.4g} (95 % interval {interval[0]:.4g} to {interval[1]:.4g})"
