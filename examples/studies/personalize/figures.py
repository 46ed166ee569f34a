"""How the figures of ``python -m examples.studies.personalize`` are counted.

A record of one method on one subject has ``unseen`` (its loss on rows that no method has seen, of
the token that was best at the looks, ``kept``, and of the ``last`` one), ``forwards``, ``looks``
(rows of the looks), ``evaluations`` (step, forwards, held-out loss), ``similarity`` and
``alignment`` (a value for each picture, in the same order for all methods: same prompts and noise).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median_high
from typing import Any

import torch

from pilotage.eval.comparison.paired import differences
from pilotage.eval.metrics.bootstrap import Resamples

Records = Mapping[str, Mapping[str, dict[str, Any]]]  # subject -> method -> record
RESAMPLES = 10_000
OTHERS = ("zoodip", "zoodip_swept", "backprop")  # what ours is compared with
INTERVALS_ARE = (
    "95 % for all methods of a table together, of differences paired by subject, in percent for "
    "losses"
)


def told(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Means of one value a subject, which is 0 where there is no difference, and what they tell.

    The intervals are 95 % for all names together; see `pilotage.eval.comparison.paired`. "needed"
    is about how many subjects would tell, null if these do.
    """
    rows = [torch.tensor(row, dtype=torch.float64) for row in values.values()]
    rows.append(torch.zeros_like(rows[0]))
    count = len(rows[0])
    drawn = Resamples.of(range(count), RESAMPLES)
    found = differences(
        [row.mean().item() for row in rows],
        [drawn.means(row) for row in rows],
        [(i, len(values)) for i in range(len(values))],
        count,
    )
    result = {}
    for name, one in zip(values, found, strict=True):
        low, high = (None, None) if one.interval is None else map(_round, one.interval)
        result[name] = {"mean": _round(one.value), "low": low, "high": high, "needed": one.needed}
    return result


def _round(value: float) -> float:
    return round(value, 4)


def gain(record: Mapping[str, Any], known: Mapping[str, Any], name: str) -> float:
    """Mean difference to the known word's pictures, picture by picture."""
    pairs = zip(record[name], known[name], strict=True)
    return fmean(mine - other for mine, other in pairs)


def gains(records: Records, methods: Iterable[str], name: str) -> dict[str, dict[str, float]]:
    """`gain` of each method on each subject."""
    return {
        method: {
            subject: _round(gain(of[method], of["initial"], name))
            for subject, of in records.items()
        }
        for method in methods
    }


def unseen(records: Records, methods: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean loss on unseen rows: kept tokens and last ones."""
    return {
        name: {
            which: _round(fmean(of[name]["unseen"][which] for of in records.values()))
            for which in ("kept", "last")
        }
        for name in methods
    }


def compared(
    records: Records, mine: str, others: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Relative difference of unseen losses in percent, paired by subject; negative: mine is lower.

    Kept tokens are compared with kept ones, and last with last.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {other: {} for other in others}
    for which in ("kept", "last"):
        percent = {
            other: [
                100 * (of[mine]["unseen"][which] / of[other]["unseen"][which] - 1)
                for of in records.values()
            ]
            for other in others
        }
        for other, one in told(percent).items():
            result[other][which] = one | {"lower_on": sum(p < 0 for p in percent[other])}
    return result


def reached(evaluations: Sequence[Sequence], target: float) -> int | None:
    """Forwards after which a held-out loss was at most `target`."""
    return next((rows for _, rows, value in evaluations if value <= target), None)


def ratio(of: Mapping[str, dict], other: str) -> float | None:
    """Forwards in which ours reaches the last held-out loss of another method, over all of its.

    None if it does not reach it.
    """
    target = of[other]["evaluations"][-1][2]
    rows = reached(of["ours"]["evaluations"], target)
    return None if rows is None else _round(rows / of[other]["forwards"])


def median(ratios: Iterable[float | None]) -> float | None:
    """Median over subjects, one that was not reached as infinite; None if it is or none is."""
    values = [float("inf") if r is None else r for r in ratios]
    value = median_high(values) if values else float("inf")
    return None if value == float("inf") else value


def improved(record: Mapping[str, Any]) -> bool:
    """Whether a run ended below the held-out loss of the known word."""
    losses = [value for _, _, value in record["evaluations"]]
    return losses[-1] < losses[0]


def held_out(
    records: Records, steps: Mapping[str, int], cost: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Figures of the held-out concepts.

    Args:
        records: Of all methods.
        steps: Of those that learn.
        cost: Megabytes and processor seconds of one step, by method and of plain inference.
    """
    subjects, methods = list(records), list(next(iter(records.values())))
    table = {}
    for name in methods:
        rows = [of[name] for of in records.values()]
        step = cost.get(name, cost["zoodip"]) if name in steps else {"seconds": 0.0, "mb": 0.0}
        table[name] = {
            "similarity": _round(fmean(fmean(row["similarity"]) for row in rows)),
            "alignment": _round(fmean(fmean(row["alignment"]) for row in rows)),
            "unseen_loss_kept": _round(fmean(row["unseen"]["kept"] for row in rows)),
            "unseen_loss_last": _round(fmean(row["unseen"]["last"] for row in rows)),
            "forwards": rows[0]["forwards"],
            "forwards_of_looks": rows[0]["looks"],
            "seconds": round(step["seconds"] * steps.get(name, 0), 1),
            "peak_mb_over_weights": step["mb"],
        }
    ratios = {
        other: {subject: ratio(of, other) for subject, of in records.items()}
        for other in ("zoodip", "zoodip_swept")
    }
    learned = {
        other: [subject for subject, of in records.items() if improved(of[other])]
        for other in ratios
    }
    return {
        "subjects": subjects,
        "methods": table,
        "unseen": unseen(records, methods),
        "unseen_compared": compared(records, "ours", OTHERS),
        "unseen_by_subject": {
            subject: {
                name: {which: _round(value) for which, value in of[name]["unseen"].items()}
                for name in methods
            }
            for subject, of in records.items()
        },
        "ended_below_the_known_word": learned,
        "forwards_ratio_is": "ours' forwards to reach the last held-out loss of the other method, "
        "over all of the other's; median over the subjects on which it ended below the known word; "
        "null: not within ours' forwards",
        "forwards_ratio_to_reach": {
            other: median(rows[subject] for subject in learned[other])
            for other, rows in ratios.items()
        },
        "forwards_ratio_to_reach_by_subject": ratios,
        "memory_ratio_to_inference": _round(cost["ours"]["mb"] / cost["inference"]["mb"]),
        "memory_ratio_to_inference_two_rows": _round(
            cost["ours_two_rows"]["mb"] / cost["inference"]["mb"]
        ),
    }


def in_reach(
    records: Records, families: Mapping[str, str], methods: Sequence[str]
) -> dict[str, Any]:
    """What learned tokens' pictures gain over the known word's, over subjects and by family.

    Args:
        records: Of the subjects in reach.
        families: Subject -> known word.
        methods: Those that learn.
    """
    result: dict[str, Any] = {
        "subjects": {name: families[name] for name in records},
        "unseen": unseen(records, ["initial", *methods]),
    }
    for name in (*methods, "name"):
        mean = fmean(fmean(of[name]["similarity"]) for of in records.values())
        result[name] = {"similarity": _round(mean)}
    for of_what in ("similarity", "alignment"):
        gained = gains(records, [*methods, "name"], of_what)
        whole = told({name: list(by.values()) for name, by in gained.items()})
        for name, by in gained.items():
            families_of = {
                word: [value for subject, value in by.items() if families[subject] == word]
                for word in dict.fromkeys(families[subject] for subject in by)
            }
            result[name] |= {
                f"{of_what}_gain": whole[name],
                f"{of_what}_gain_by_family": {w: _round(fmean(v)) for w, v in families_of.items()},
                f"{of_what}_gain_by_subject": by,
            }
    ceiling = result["backprop"]["similarity_gain"]["mean"]
    result["share_of_backprop"] = {
        name: _round(result[name]["similarity_gain"]["mean"] / ceiling) for name in methods
    }
    return result


def recounted(content: dict[str, Any]) -> dict[str, Any]:
    """Figures with the intervals counted again from what the file has of each subject."""
    reach = content["subjects_in_reach"]
    by = {
        name: list(found["similarity_gain_by_subject"].values())
        for name, found in reach.items()
        if isinstance(found, dict) and "similarity_gain_by_subject" in found
    }
    gained = {name: reach[name] | {"similarity_gain": one} for name, one in told(by).items()}
    records = {
        subject: {name: {"unseen": losses} for name, losses in of.items()}
        for subject, of in content["unseen_by_subject"].items()
    }
    return content | {
        "intervals_are": f"{INTERVALS_ARE}; of alignments and on all subjects: of each alone",
        "subjects_in_reach": reach | gained,
        "unseen_compared": compared(records, "ours", OTHERS),
    }
