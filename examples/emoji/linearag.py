"""LinearAG, calibration and policy search on the embedded model: ``eval/results/linearag.json``.

    python examples/emoji/data.py prepare && python examples/emoji/linearag.py

Coefficients, thresholds and schedules are fitted on prompts of the training split; the figures are
of the held-out (concept, style) pairs, three seeds each. DPM++ 2M, 20 steps, w = 7.5. What is found
is written to ``examples/emoji/model/guidance`` and then has a name: "linear-ag", "searched".
Interrupted, it goes on where it stopped (``cache/linearag``).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from pilotage.eval.calibration import agreement, cost_curve
from pilotage.eval.comparison import compare
from pilotage.eval.embedded import embedded_folder, load_embedded
from pilotage.eval.extractors import EfficientNetLite0
from pilotage.eval.images import to_tensor
from pilotage.eval.policy_search import search
from pilotage.eval.record import write_figures
from pilotage.eval.relaxed_search import relaxed_search
from pilotage.eval.sampling import Setting
from pilotage.eval.trials import Trials
from pilotage.guidance import (
    CFG,
    AdaptiveGuidance,
    Extrapolate,
    Guidance,
    Hold,
    LinearAG,
    load_guidance,
)
from pilotage.pipelines.fit import fit

import data as emoji
from evaluate import fit_alignment
from timing import seconds_in_turn

STEPS = 20
SCALE = 7.5
BATCH = 8
FIT_PROMPTS = 200
SEARCH_PROMPTS = 8
SEEDS = 3
AG_NFE = (26, 28, 30, 34)
SEARCHED_NFE = (24, 26, 30)
MARGIN = 0.005  # of the search's floor above what AG reaches on the same prompts
TIMING_ROUNDS = 5


def training_prompts(drawings: list[emoji.Drawing], count: int, first: int = 0) -> list[str]:
    """Some captions of the training split, evenly spread."""
    train = [d.text for d in drawings if d.split == "train"]
    return train[first :: len(train) // count][:count]


def fitted(pipe, prompts: list[str], folder: Path, work: Path) -> dict[str, float]:
    """Fit on disjoint halves and on all; save the last. How far the halves agree."""
    halves = [
        fit(pipe, prompts[i::2], seed=1000 * (i + 1), checkpoint=work / f"fit-{i}") for i in (0, 1)
    ]
    found = fit(pipe, prompts, seed=5000, checkpoint=work / "fit")
    policy = LinearAG(tail="linear", coefficients=found.coefficients)
    found.save(folder / "linear-ag.json", Guidance(CFG(), policy))
    held_out = [statistics.fmean(half.r2_held_out) for half in halves]
    steps = [abs(a - b) for a, b in zip(halves[0].r2_held_out, halves[1].r2_held_out, strict=True)]
    return {
        "trajectories": found.trajectories,
        "r2_mean": round(statistics.fmean(found.r2_held_out), 4),
        "r2_of_difference_mean": round(statistics.fmean(found.r2_difference), 4),
        "r2_of_difference": [round(value, 4) for value in found.r2_difference],
        "r2_disjoint_difference": round(abs(held_out[0] - held_out[1]), 5),
        "r2_disjoint_difference_worst_step": round(max(steps), 5),
    }


def searched(pipe, prompts: list[str], folder: Path, work: Path, coefficients) -> None:
    """Both searches for the quality of Adaptive Guidance; save the schedules."""
    trials = Trials(pipe, prompts, guidance_scale=SCALE, num_inference_steps=STEPS)
    floor = trials.judge("ag")[0] + MARGIN
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "quality_floor": floor}
    checkpoint = work / "search.json"
    found = search(
        pipe, prompts, stand_in=coefficients, rounds=60, checkpoint=checkpoint, **options
    )
    found.save(folder / "searched.json")
    for candidate in found.front:
        if candidate.nfe in SEARCHED_NFE:
            found.save(folder / f"searched-{candidate.nfe:g}.json", candidate)
    if not (folder / "relaxed.json").is_file():
        found = relaxed_search(pipe, prompts[:4], iterations=20, **options)
        found.save(folder / "relaxed.json")


def settings(pipe, prompts: list[str]) -> list[Setting]:
    """The table's rows."""
    trials = Trials(pipe, prompts, guidance_scale=SCALE, num_inference_steps=STEPS)
    curve = cost_curve(agreement(trials)["x0"])
    folder = embedded_folder() / "guidance"
    linear = load_guidance(folder / "linear-ag.json").policy.coefficients
    rows = [("cfg", "cfg")]
    for nfe in AG_NFE:
        threshold = min(curve, key=lambda point: abs(point[1] - nfe))[0]
        rows.append((f"ag {threshold:.4f}", AdaptiveGuidance(round(threshold, 4))))
    rows += [
        ("linear-ag, cond tail", LinearAG(tail="cond", coefficients=linear)),
        ("linear-ag, linear tail", LinearAG(tail="linear", coefficients=linear)),
        ("hold, cond tail", Hold(tail="cond")),
        ("hold, held tail", Hold(tail="hold")),
        ("hold, refreshed every 4th", Hold(period=4, head=1.0)),
        ("extrapolate, cond tail", Extrapolate(tail="cond")),
        *((path.stem, path.stem) for path in sorted(folder.glob("searched*.json"))),
        ("relaxed", "relaxed"),
    ]
    return [Setting(guidance, SCALE, STEPS, method) for method, guidance in rows]


def time_ratios(pipe, columns: list[Setting], prompts: list[str]) -> dict[str, float]:
    """Seconds of each setting over those of CFG in the same round, median over rounds, batch 8."""
    seconds = seconds_in_turn(pipe, columns, prompts[:BATCH], TIMING_ROUNDS)
    full = seconds[columns[0]]
    return {
        setting.method: round(
            statistics.median(a / b for a, b in zip(values, full, strict=True)), 4
        )
        for setting, values in seconds.items()
    }


def main() -> None:
    """Fit, search, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--work", type=Path, default=Path("cache/linearag"))
    parser.add_argument("--until", choices=["fit", "search", "all"], default="all")
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/linearag.json"))
    args = parser.parse_args()
    drawings = emoji.load(args.archive, everyday=True)
    pipe = load_embedded()
    folder = embedded_folder() / "guidance"
    quality = fitted(pipe, training_prompts(drawings, FIT_PROMPTS), folder, args.work)
    if args.until == "fit":
        return
    few = training_prompts(drawings, SEARCH_PROMPTS, first=3)
    coefficients = load_guidance(folder / "linear-ag.json").policy.coefficients
    searched(pipe, few, folder, args.work, coefficients)
    if args.until == "search":
        return

    held = [d for d in drawings if d.split == "pair"]
    columns = settings(pipe, few)
    extractor = EfficientNetLite0()
    cells = compare(
        pipe,
        [d.text for d in held],
        columns,
        args.work / "pictures",
        range(SEEDS),
        reference=to_tensor(emoji.pictures(args.archive, held)),
        extractor=extractor,
        alignment=fit_alignment(args.archive, drawings, extractor),
        batch_size=BATCH,
    )
    fewer = [
        Setting("cfg", SCALE, cell["steps"], f"cfg, {cell['steps']} steps")
        for cell in cells
        if cell["kind"] == "equal nfe"
    ]
    ratios = time_ratios(pipe, [*columns, *fewer], [d.text for d in held])
    rows = []
    for cell in cells:
        method = cell["method"]
        if cell["kind"] == "equal nfe":
            method = f"cfg, {cell['steps']} steps"
        kept = ("n", "nfe", "ssim", "psnr", "fd", "alignment")
        intervals = (f"{name}_interval" for name in kept[2:])
        row = {"method": method, "guidance": cell["guidance"]}
        row |= {name: cell.get(name) for name in (*kept, *intervals)}
        rows.append(row | {"time_ratio": ratios[method]})
    by_name = {row["method"]: row for row in rows}
    figures = {
        "rows": rows,
        "search": {
            name: by_name["searched"][name] for name in ("nfe", "ssim", "ssim_interval", "guidance")
        },
        "fit": quality,
        "reference": len(held),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
    }
    write_figures(args.output, figures)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
