"""Which guidance should I use? One recommendation, derived from the figures of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .plan import BASELINE
from .sentences import QUALITY, Sentences
from .verdicts import Row, found_by, number, short_labels

ASKED = ("grid", "matched")  # kinds of settings that were asked for
TRADED = ("saturation", "contrast")
LITTLE = 1.2  # times the cheapest cost: so little more decides nothing
SHOWN = 4  # settings whose pictures stand beside the answer


def answer(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """The recommended setting, why, and what it costs, ready for JSON.

    With a reference, quality is the Fréchet distance (lower is better), else the alignment (higher
    is better). Recommended is the cheapest of the settings asked for that are not clearly worse
    than the best of them; where costs are within a fifth of the cheapest, the best of these.
    Baselines that were added are never recommended, but it is said if one is clearly better.
    *Clearly* is said only where the interval of the paired difference, corrected for all pairs of
    settings, excludes zero (see `paired`).

    Args:
        rows: The settings' figures.
        facts: What ``cells.json`` says beside them: of it, ``comparisons`` and ``resampled``.

    Returns:
        ``setting``: label of the recommended setting; None if quality was not measured, or so few
        pictures were made that there are no intervals. ``metric``: what decided. ``headline`` and
        ``sentences`` (at most three): the same in words. ``plain``: label of plain CFG with the
        same scale and steps, None if that is the setting itself. ``pictures``: label -> why its
        picture is shown. ``trades``: figures beside those of plain CFG. ``verdicts``: every other
        setting beside the recommended one.
    """
    names = short_labels(rows)
    metric = next((m for m in QUALITY if any(row.get(m) is not None for row in rows)), None)
    if metric is None:
        cheapest = min(_asked(rows), key=lambda row: row["nfe"])
        return _undecided(
            rows,
            "No recommendation: quality was not measured.",
            "Neither reference pictures nor an alignment score were given: name a folder of real "
            "pictures with --reference, or a model that scores pictures with --clip or --ridge.",
            f"{names[cheapest['label']]} needs the fewest network evaluations, "
            f"{number(cheapest['nfe'])} a picture; look at the pictures before you choose.",
        )
    name, extreme, sign = QUALITY[metric]
    known = [row for row in rows if row.get(metric) is not None]
    asked = _asked(known)
    best = min(asked, key=lambda row: sign * row[metric])
    found = found_by(facts["comparisons"], metric)
    if len(known) > 1 and not {r["label"] for r in known} <= {x for pair in found for x in pair}:
        return _undecided(
            rows,
            "No recommendation: too few pictures.",
            f"{names[best['label']]} has the {extreme} {name}, {number(best[metric])}, but without "
            "intervals any order may be chance: compare with more prompts.",
        )
    as_good = [
        row
        for row in asked
        if row is best or found[row["label"], best["label"]].verdict(sign) != "worse"
    ]
    enough = LITTLE * min(row["nfe"] for row in as_good)
    cheap = [row for row in as_good if row["nfe"] <= enough]
    chosen = min(cheap, key=lambda row: (sign * row[metric], row["nfe"]))
    plain = _plain(rows, chosen)
    equal = next((row for row in known if chosen["label"] in row["matches"]), None)
    text = Sentences(names, metric, found, facts["resampled"])
    added = [row for row in known if row["kind"] not in ASKED]
    told = [
        text.why(chosen, best, asked, as_good),
        text.baselines(chosen, None if plain is best else plain, equal, added),
        text.warning(),
    ]
    why = "" if chosen is best else ": cheaper, and not clearly worse than the best"
    others = [(row, found[row["label"], chosen["label"]]) for row in known if row is not chosen]
    return {
        "setting": chosen["label"],
        "metric": metric,
        "headline": f"Use {names[chosen['label']]}{why}.",
        "sentences": [sentence for sentence in told if sentence],
        "plain": None if plain is None else plain["label"],
        "pictures": _pictures(chosen, plain, best, equal),
        "trades": [] if plain is None else _trades(chosen, plain, facts["comparisons"]),
        "verdicts": [
            {"setting": row["label"], **one._asdict(), "verdict": one.verdict(sign)}
            for row, one in others
        ],
    }


def _asked(rows: Sequence[Row]) -> list[Row]:
    """The settings asked for; all, if no figures of theirs are known."""
    return [row for row in rows if row["kind"] in ASKED] or list(rows)


def _plain(rows: Iterable[Row], like: Row) -> Row | None:
    """CFG with the same steps and scale, or as strong; None if that is the setting itself."""
    wanted = BASELINE, like.get("matched_to") or like["w"], like["steps"]
    found = (row for row in rows if (row["method"], row["w"], row["steps"]) == wanted)
    plain = next(found, None)
    return None if plain is like else plain


def _undecided(rows: Sequence[Row], headline: str, *sentences: str) -> dict[str, Any]:
    """No recommendation; the pictures are of every method at the middle scale."""
    asked = _asked(rows)
    scales = sorted({row["w"] for row in asked})
    shown: dict[str, str] = {}  # method -> label
    for row in asked:
        if row["w"] == scales[len(scales) // 2]:
            shown.setdefault(row["method"], row["label"])
    return {
        "setting": None,
        "metric": None,
        "headline": headline,
        "sentences": list(sentences),
        "plain": None,
        "pictures": dict.fromkeys(list(shown.values())[:SHOWN], ""),
        "trades": [],
        "verdicts": [],
    }


def _pictures(chosen: Row, plain: Row | None, best: Row, equal: Row | None) -> dict[str, str]:
    """Label -> why its picture is shown."""
    shown = {}
    if plain is not None:
        shown[plain["label"]] = "Plain CFG, best figure" if plain is best else "Plain CFG"
    shown[chosen["label"]] = "Recommended"
    shown.setdefault(best["label"], "Best figure")
    if equal is not None:
        shown.setdefault(equal["label"], "CFG at this cost")
    return shown


def _trades(chosen: Row, plain: Row, comparisons: Sequence[Row]) -> list[Row]:
    """Figures beside those of plain CFG: name, both values, what the difference is."""
    notes = {name: _share(chosen[name], plain[name]) for name in ("nfe", "seconds")}
    words: dict[int | None, str] = {1: "clearly higher", -1: "clearly lower", 0: "the same"}
    for name in TRADED:
        one = found_by(comparisons, name).get((chosen["label"], plain["label"]))
        notes[name] = "cannot tell" if one is None else words.get(one.direction, "cannot tell")
    table = [
        {"name": name, "value": chosen[name], "plain": plain[name], "note": note}
        for name, note in notes.items()
        if chosen.get(name) is not None and plain.get(name) is not None
    ]
    if chosen.get("ssim") is not None:
        table.append({"name": "ssim", "value": chosen["ssim"], "plain": 1.0, "note": "1: the same"})
    return table


def _share(value: float, plain: float) -> str:
    """How much more or less than plain CFG's."""
    share = round(100 * (value / plain - 1)) if plain else 0
    return f"{abs(share)} % {'more' if share > 0 else 'less'}" if share else "as much"
