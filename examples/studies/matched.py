"""Rules and scale schedules beside CFG, at equal scales and at equal measured guidance.

    python -m examples.emoji.data prepare && python -m examples.studies.matched

``eval/results/matched.json`` has two tables: every rule at the same nominal scale as CFG, and at
the scale at which it moves the denoised image as far as CFG does (`pilotage compare --matched`).
Held-out prompts of the embedded model, the same noise for every setting, DPM++ 2M with 20 steps;
real pictures are those of all held-out prompts. Differences to CFG are paired over prompts, their
intervals corrected for all pairs of settings at that strength. Rules that this model or solver
cannot have (SMC-CFG: flow models; CFG++: Euler and DDIM) are left out, and CFG-Zero* has no zero
steps. Pictures and strengths lie in ``cache/matched``: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from examples.emoji import data as emoji
from examples.studies.evaluate import fit_alignment
from pilotage.eval.comparison.evaluation import evaluate, paired_differences
from pilotage.eval.comparison.matched import matched_settings
from pilotage.eval.comparison.plan import BASELINE, Plan, Samples, Setting
from pilotage.eval.comparison.sampling import generate
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import write_figures
from pilotage.guidance import CFGZeroStar

STEPS = 20
SCALES = (3.0, 5.0, 7.5, 15.0)
RULES: dict[str, Any] = {
    "apg": "apg",
    "rescale": "rescale",
    "cfg-zero*": CFGZeroStar(zero_steps=0),
    "tcfg": "tcfg",
    "magnitude": "magnitude",
    "fdg": "fdg",
    "momentum": "momentum",
    "higs": "higs",
    "tag": "tag",
    "scale-linear": "scale-linear",
    "scale-cosine": "scale-cosine",
    "scale-beta": "scale-beta",
}
METRICS = ("saturation", "contrast", "fd", "precision", "alignment")
KEPT = ("w", "n", "effective_guidance", "ssim", *METRICS)


def settings() -> list[Setting]:
    """Every rule at every scale, CFG included."""
    every = {BASELINE: BASELINE, **RULES}
    return [Setting(rule, scale, STEPS, name) for scale in SCALES for name, rule in every.items()]


def table(
    made: list[Samples], baselines: dict[float, Samples], output: Path, **judges: Any
) -> list[dict[str, Any]]:
    """The figures of some settings, each with its paired differences to CFG."""
    rows = []
    for scale, plain in baselines.items():
        found, resampled = {}, {}
        for samples in [plain, *(one for one in made if one.setting.beside == scale)]:
            baseline = None if samples is plain else plain
            name = samples.setting.method
            found[name], resampled[name] = evaluate(samples, baseline, output, **judges)
        pairs = paired_differences(resampled, len(set(plain.prompts)))
        pairs = [one for one in pairs if one["setting"] == BASELINE]  # it comes first
        for name, row in found.items():
            kept = {k: row[k] for k in KEPT if k in row}
            minus = {one["metric"]: reversed_(one) for one in pairs if one["other"] == name}
            rows.append({"rule": name, "as_cfg": scale, **kept, "minus_cfg": minus})
    return rows


def lines(figures: dict[str, Any], table: str, metric: str) -> list[str]:
    """A line a rule, of its differences to CFG: bold where the interval leaves out zero."""
    made = {(row["rule"], row["as_cfg"]): row for row in figures[table]}
    found = []
    for rule in figures["rules"]:
        cells = []
        for strength in figures["strengths"]:
            row = made.get((rule, strength))
            if row is None:
                cells.append("no such scale")
                continue
            one = row["minus_cfg"][metric]
            text = f"{one['difference']:+.3g}".replace("-", "−")
            low, high = one["interval"]
            text = f"**{text}**" if low > 0 or high < 0 else text
            cells.append(text if table == "equal_scale" else f"{row['w']:.3g}: {text}")
        found.append(f"| `{rule}` | {' | '.join(cells)} |")
    return found


def reversed_(one: dict[str, Any]) -> dict[str, Any]:
    """The paired difference of CFG and a rule the other way round: the rule minus CFG."""
    ends = one["interval"] and [-end for end in reversed(one["interval"])]
    return {"difference": -one["difference"], "interval": ends}


def main() -> None:
    """Match, generate, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts, evenly spread")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("cache/matched"))
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/matched.json"))
    args = parser.parse_args()
    begin = time.perf_counter()
    everyday = emoji.load(args.archive, everyday=True)
    held = [d for d in everyday if d.split == "pair"]
    texts = [d.text for d in held][:: max(len(held) // args.prompts, 1)][: args.prompts]
    pipe, extractor = load_embedded(), EfficientNetLite("efficientnet-lite0")
    plan = Plan(texts, settings(), batch_size=args.batch_size)
    folder = args.work / str(len(texts))
    matched = matched_settings(pipe, plan, folder / "matching.json")
    made = generate(
        pipe, Plan(texts, [*plan.settings, *matched], (0,), args.batch_size), folder / "pictures"
    )
    baselines = {one.setting.scale: one for one in made if one.setting.method == BASELINE}
    judges = {
        "extractor": extractor,
        "gallery": extractor(to_tensor(emoji.pictures(args.archive, held))),
        "scorers": {"alignment": fit_alignment(args.archive, everyday, extractor)},
    }
    nominal = [one for one in made if one.setting.matched is None and one.setting.method in RULES]
    same = [one for one in made if one.setting.matched is not None]
    strengths: dict[str, dict[str, float | None]] = {
        name: dict.fromkeys(f"{scale:g}" for scale in SCALES) for name in RULES
    }
    for one in same:
        strengths[one.setting.method][f"{one.setting.beside:g}"] = one.setting.scale
    figures = {
        "prompts": len(texts),
        "reference": len(held),
        "steps": STEPS,
        "strengths": list(SCALES),
        "rules": strengths,  # the scale of each that is as strong as CFG; None: there is none
        "equal_scale": table(nominal, baselines, folder, **judges),
        "equal_strength": table(same, baselines, folder, **judges),
        "minutes": round((time.perf_counter() - begin) / 60, 1),
    }
    write_figures(args.output, figures)


if __name__ == "__main__":
    main()
