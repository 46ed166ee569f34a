"""LinearAG, calibration and policy search on the embedded model: ``eval/results/linearag.json``.

    python -m examples.emoji.data prepare && python -m examples.studies.linearag
    python -m examples.studies.linearag --part timing    # the times alone, of every row in the file

Coefficients, thresholds and schedules are fitted on prompts of the training split; the figures are
of the held-out (concept, style) pairs, three seeds each. DPM++ 2M, 20 steps, w = 7.5. What is found
is written to ``examples/emoji/model/guidance`` and then has a name: "linear-ag" is the paper's
regression, "linear-ag-steered", "linear-ag-forecast" and the searched schedules have estimates and
forecasts fitted on runs of their own (`pilotage.pipelines.fitting.on_policy`). Interrupted, it goes
on where it stopped (``cache/linearag``).

``--keep`` makes pictures only for settings that hold fitted numbers and for CFG, and takes the rows
of the others, which their text describes in full, from the file, with the date they were measured;
it refuses if CFG itself does not come out as in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from examples.emoji import data as emoji
from examples.studies.evaluate import fit_alignment
from examples.studies.timing import (
    clocks_in_turn,
    evaluations_of,
    keep_freed_memory,
    network_in_turn,
)
from pilotage.eval.comparison.comparison import compare
from pilotage.eval.comparison.plan import Plan, Setting
from pilotage.eval.embedded import embedded_folder, load_embedded
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import figures_context, write_figures, write_json
from pilotage.eval.tuning.calibration import agreement, cost_curve
from pilotage.eval.tuning.policy_search import search
from pilotage.eval.tuning.relaxed_search import relaxed_search
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import (
    AdaptiveGuidance,
    extrapolate,
    hold,
    linear_ag,
    load_guidance,
)
from pilotage.pipelines.fitting.fit import fit
from pilotage.pipelines.fitting.on_policy import ScheduleFitter
from pilotage.pipelines.fitting.runs import Runs

STEPS = 20
SCALE = 7.5
BATCH = 8
FIT_PROMPTS = 200
SEARCH_PROMPTS = 24
CALIBRATION_PROMPTS = 8
SEARCH_ROUNDS = 40
FINE_FLOOR = 0.98
SEEDS = 3
AG_NFE = (26, 28, 30, 34)
AG_FORECAST_NFE = (26, 28, 30)
MARGIN = 0.02  # of the search's floor above what AG reaches on the same prompts: it picks the best
TIMING_ROUNDS = 3
KEPT = ("n", "nfe", "ssim", "psnr", "fd", "alignment")
PARTS = ("fit", "search", "pictures", "timing")


def training_prompts(drawings: list[emoji.Drawing], count: int, first: int = 0) -> list[str]:
    """Some captions of the training split, evenly spread."""
    train = [d.text for d in drawings if d.split == "train"]
    return train[first :: len(train) // count][:count]


def fitted(pipe, prompts: list[str], folder: Path, work: Path) -> dict[str, Any]:
    """Fit on disjoint halves and on all; save the last. How far the halves agree."""
    halves = [
        fit(Runs(pipe, prompts[i::2], seed=1000 * (i + 1)), checkpoint=work / f"fit-{i}")
        for i in (0, 1)
    ]
    found = fit(Runs(pipe, prompts, seed=5000), checkpoint=work / "fit")
    found.save(folder / "linear-ag.json", linear_ag(found.coefficients, then="estimate"))
    r2 = [half.figures["r2_held_out"] for half in halves]
    held_out = [statistics.fmean(values) for values in r2]
    steps = [abs(a - b) for a, b in zip(*r2, strict=True)]
    return {
        "trajectories": found.trajectories,
        "r2_mean": round(statistics.fmean(found.figures["r2_held_out"]), 4),
        "r2_of_difference_mean": round(statistics.fmean(found.figures["r2_difference"]), 4),
        "r2_of_difference": [round(value, 4) for value in found.figures["r2_difference"]],
        "r2_disjoint_difference": round(abs(held_out[0] - held_out[1]), 5),
        "r2_disjoint_difference_worst_step": round(max(steps), 5),
    }


def searched(pipe, prompts: list[str], folder: Path, work: Path) -> None:
    """Search for the quality of Adaptive Guidance, and for more; save the schedules.

    LinearAG is fitted on runs of its own likewise: its first half is the same, whatever follows.
    """
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE}
    trials = Trials(pipe, prompts, **options)
    floor = trials.judge("ag")[0] + MARGIN
    for path in folder.glob("searched*.json"):
        path.unlink()
    for name, between, wanted in (
        ("searched", "forecast", floor),
        ("searched-fine", "forecast", FINE_FLOOR),
        ("searched-estimates", "estimate", floor),
    ):
        found = search(
            trials,
            quality_floor=wanted,
            fitted=True,
            between=between,
            rounds=SEARCH_ROUNDS,
            checkpoint=work / f"search-{between}.json",
        )
        found.save(folder / f"{name}.json")
    for name, then in (("steered", "estimate"), ("forecast", "forecast")):
        fitter = ScheduleFitter(Runs(pipe, prompts, SCALE, STEPS, batch_size=2 * BATCH))
        found, _ = fitter.fit(hold(then=then).choices_for(STEPS))
        policy = linear_ag(found.coefficients, then=then)
        found.save(folder / f"linear-ag-{name}.json", policy)
    if not (folder / "relaxed.json").is_file():
        relaxed = relaxed_search(
            Trials(pipe, prompts[:4], **options), quality_floor=floor, iterations=20
        )
        relaxed.save(folder / "relaxed.json")


def settings(pipe, prompts: list[str]) -> list[Setting]:
    """The table's rows, under the names that they have in the file."""
    trials = Trials(pipe, prompts, guidance_scale=SCALE, num_inference_steps=STEPS)
    gamma = agreement(trials)["x0"]
    folder = embedded_folder() / "guidance"
    rows = [("cfg", "cfg")]
    for then, wanted in (("cond", AG_NFE), ("forecast", AG_FORECAST_NFE)):
        curve = cost_curve(gamma, then=then)
        for nfe in wanted:
            threshold = round(min(curve, key=lambda point: abs(point[1] - nfe))[0], 4)
            name = f"ag {threshold:.4f}" + (", forecast tail" if then == "forecast" else "")
            rows.append((name, AdaptiveGuidance(threshold, then=then)))
    for name in ("linear-ag", "linear-ag-steered"):
        coefficients = load_guidance(folder / f"{name}.json").policy.fill
        for label, then in (("cond", "cond"), ("linear", "estimate")):
            rows.append((f"{name}, {label} tail", linear_ag(coefficients, then=then)))
    rows += [
        ("linear-ag-forecast", "linear-ag-forecast"),
        ("hold, cond tail", hold(then="cond")),
        ("hold, held tail", hold(then="estimate")),
        ("hold, refreshed every 4th", hold(period=4, first=1.0, then="cond")),
        ("extrapolate, cond tail", extrapolate(then="cond")),
        ("forecast", "forecast"),
        *((path.stem, path.stem) for path in sorted(folder.glob("searched*.json"))),
        ("relaxed", "relaxed"),
    ]
    return [Setting(guidance, SCALE, STEPS, method) for method, guidance in rows]


def kept_rows(pipe, columns: list[Setting], path: Path) -> list[dict[str, Any]]:
    """Rows of the file that need no new pictures: text says all of them, and says the same."""
    figures = json.loads(path.read_text())
    date = figures["context"]["date"]
    texts = {s.method: str(pipe.resolve_guidance(s.guidance)) for s in columns}
    rows = []
    for row in figures["rows"]:
        fewer = row["method"].startswith("cfg, ")
        same = texts.get(row["method"]) == row["guidance"]
        full_text = "Schedule" not in row["guidance"]
        if fewer or (same and full_text and row["method"] != "cfg"):
            rows.append({"measured": date} | row)
    return rows


def pictures(pipe, drawings, columns: list[Setting], archive: Path, work: Path, fewer: bool):
    """Make and judge the pictures of some settings: rows without times."""
    held = [d for d in drawings if d.split == "pair"]
    extractor = EfficientNetLite("efficientnet-lite0")
    cells = compare(
        pipe,
        Plan([d.text for d in held], columns, range(SEEDS), BATCH),
        work / "pictures",
        reference=to_tensor(emoji.pictures(archive, held)),
        extractor=extractor,
        scorers={"alignment": fit_alignment(archive, drawings, extractor)},
        equal_nfe=fewer,
    )
    date, rows = figures_context()["date"], []
    for cell in cells:
        method = cell["method"]
        if cell["kind"] == "equal nfe":
            method = f"cfg, {cell['steps']} steps"
        intervals = (f"{name}_interval" for name in KEPT[2:])
        row = {"measured": date, "method": method, "guidance": cell["guidance"]}
        rows.append(row | {name: cell.get(name) for name in (*KEPT, *intervals)})
    return rows


def check_same(found: list[dict[str, Any]], path: Path) -> None:
    """Raise ValueError unless plain guidance came out as in the file."""
    old, new = (
        next(row for row in rows if row["method"] == "cfg")
        for rows in (json.loads(path.read_text())["rows"], found)
    )
    for name in ("n", "nfe", "fd", "alignment"):
        if abs(old[name] - new[name]) > 1e-3 * abs(old[name]):
            raise ValueError(
                f"{path} is of other pictures: {name} of cfg is {old[name]} there, {new[name]} "
                "here; run without --keep"
            )


def timed(pipe, columns: list[Setting], rows: list[dict], prompts: list[str], rounds: int) -> dict:
    """Measure times of all rows, write ratios to CFG into them; facts about the measurement.

    Where samples differ in what they evaluate, the batch that is timed has another mean than the
    table's pictures: its own is in `timed_nfe`, and the saving of time is held against that.
    """
    by_method = {setting.method: setting for setting in columns}
    wanted = []
    for row in rows:
        if row["method"] in by_method:
            wanted.append(by_method[row["method"]])
        else:
            count = int(row["method"].removeprefix("cfg, ").removesuffix(" steps"))
            wanted.append(Setting("cfg", SCALE, count, row["method"]))
    for row, setting in zip(rows, wanted, strict=True):
        row["timed_nfe"] = round(evaluations_of(pipe, setting, prompts[:BATCH]), 4)
    full_cost = next(row["timed_nfe"] for row in rows if row["method"] == "cfg")
    facts: dict[str, Any] = {"batch": BATCH, "rounds": rounds}
    threads = torch.get_num_threads()
    for kept in ("", "_memory_kept"):
        # As the C library has it, a part of the time goes into pages fetched anew for each
        # temporary, more for large batches than for small ones. Then, for good, without that.
        if kept and not keep_freed_memory():
            break
        for name, count in ((kept, threads), (f"_one_thread{kept}", 1)):
            torch.set_num_threads(count)
            clocks = clocks_in_turn(pipe, wanted, prompts[:BATCH], rounds)
            network = network_in_turn(pipe, BATCH, rounds)
            torch.set_num_threads(threads)
            full = clocks[by_method["cfg"]]
            for row, setting in zip(rows, wanted, strict=True):
                for clock, kind in enumerate(("time_ratio", "cpu_time_ratio")):
                    ratio = statistics.median(
                        a[clock] / b[clock] for a, b in zip(clocks[setting], full, strict=True)
                    )
                    row[kind + name] = round(ratio, 4)
            facts[f"threads{name}"] = count
            for clock, kind in enumerate(("time_ratio", "cpu_time_ratio")):
                middle = statistics.median(ratios[clock] for ratios in network)
                facts[f"network_{kind}{name}"] = round(middle, 4)
                shares = {
                    row["method"]: (1 - row[kind + name]) / (1 - row["timed_nfe"] / full_cost)
                    for row in rows
                    if row["timed_nfe"] < full_cost
                }
                facts[f"smallest_share_of_saving_{kind}{name}"] = round(min(shares.values()), 4)
                apart = (row[kind + name] - row["timed_nfe"] / full_cost for row in rows)
                facts[f"largest_distance_{kind}{name}"] = round(max(map(abs, apart)), 4)
    return facts | {"context": figures_context()}


def main() -> None:
    """Fit, search, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--work", type=Path, default=Path("cache/linearag"))
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--keep", action="store_true", help="keep rows of the file (see above)")
    parser.add_argument("--methods", default=".*", help="regular expression: leave out other rows")
    parser.add_argument("--rounds", type=int, default=TIMING_ROUNDS, help="of the timing")
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/linearag.json"))
    args = parser.parse_args()
    parts = PARTS if args.part == "all" else (args.part,)
    drawings = emoji.load(args.archive, everyday=True)
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    folder = embedded_folder() / "guidance"
    figures = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if "fit" in parts:
        quality = fitted(pipe, training_prompts(drawings, FIT_PROMPTS), folder, args.work)
        write_json(args.work / "fit.json", quality)
    if "search" in parts:
        few = training_prompts(drawings, SEARCH_PROMPTS, first=3)
        searched(pipe, few, folder, args.work)
    if not {"pictures", "timing"} & set(parts):
        return
    columns = settings(pipe, training_prompts(drawings, CALIBRATION_PROMPTS, first=3))
    if "pictures" in parts:
        old = kept_rows(pipe, columns, args.output) if args.keep else []
        have = {row["method"] for row in old}
        new = [s for s in columns if s.method not in have]
        new = [s for s in new if s.method == "cfg" or re.fullmatch(args.methods, s.method)]
        rows = pictures(pipe, drawings, new, args.archive, args.work, fewer=not args.keep)
        if args.keep:
            check_same(rows, args.output)
        order = {setting.method: i for i, setting in enumerate(columns)}
        rows = sorted(rows + old, key=lambda row: order.get(row["method"], len(order)))
        found = next(row for row in rows if row["method"] == "searched")
        names = ("nfe", "ssim", "ssim_interval", "guidance")
        quality = args.work / "fit.json"
        figures = {
            "rows": rows,
            "search": {name: found[name] for name in names},
            "fit": json.loads(quality.read_text()) if quality.is_file() else figures.get("fit"),
            "reference": sum(d.split == "pair" for d in drawings),
        }
        write_figures(args.output, figures)
    if "timing" in parts:
        prompts = [d.text for d in drawings if d.split == "pair"]
        figures["timing"] = timed(pipe, columns, figures["rows"], prompts, args.rounds)
        write_json(args.output, figures)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
