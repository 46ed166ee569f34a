"""``guidance="forecast"`` under one scheduler after another: ``eval/results/forecasts.json``.

    python -m examples.emoji.data prepare && python -m examples.studies.forecasts

Held-out (concept, style) pairs, w = 7.5, with CFG and with APG: SSIM to the run that evaluates
every step, beside that of the run with as many evaluations by fewer steps, and the paired
difference of the two; all of them are one family. Nothing is fitted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
from tqdm import tqdm

from examples.emoji import data as emoji
from pilotage.eval.comparison.cost import steps_for_nfe
from pilotage.eval.comparison.paired import differences
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.bootstrap import Resamples
from pilotage.eval.metrics.images import ssim
from pilotage.eval.record import write_figures
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import Rule, forecast

SCALE = 7.5
BATCH = 16
RESAMPLES = 2000
# With settings where the model's own would clip or be refused. (HeunDiscreteScheduler diverges from
# this model's infinite first noise level, stock runs as well.)
RUNS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("DPMSolverMultistepScheduler", 10, {}),
    ("DPMSolverMultistepScheduler", 20, {}),
    ("UniPCMultistepScheduler", 20, {}),
    ("DDIMScheduler", 20, {"clip_sample": False}),
    ("DDIMScheduler", 50, {"clip_sample": False}),
    ("EulerDiscreteScheduler", 30, {}),
    ("EulerAncestralDiscreteScheduler", 30, {"rescale_betas_zero_snr": False}),
)


def measured(pipe, prompts: list[str], steps: int, rule: Rule | None) -> dict[str, Any]:
    """What leaving steps out does, and what fewer steps do."""

    def trials(count: int) -> Trials:
        options = {"guidance_scale": SCALE, "num_inference_steps": count, "batch_size": BATCH}
        return Trials(pipe, prompts, rule=rule, **options)

    full = trials(steps)
    plain = "cfg" if rule is None else rule
    reference, nfe = full.run(plain)
    found: dict[str, Any] = {"nfe_full": nfe[0]}
    images, nfe = full.run(full.plain | forecast())
    runs = {"forecast": (images, nfe[0])}
    fewer = steps_for_nfe(pipe.scheduler, nfe[0], steps)
    images, nfe = trials(fewer).run(plain)
    runs["fewer_steps"] = (images, nfe[0])
    for name, (images, cost) in runs.items():
        found[name] = {"nfe": cost, "ssim": ssim(images, reference)}
    return found | {"steps_of_fewer": fewer}


def compared(rows: list[dict[str, Any]], count: int) -> None:
    """Put the mean SSIM of each run, and the paired difference, in the place of every prompt's."""
    drawn = Resamples.of(range(count), RESAMPLES)
    values = [row[name].pop("ssim") for row in rows for name in ("forecast", "fewer_steps")]
    means = [one.double().mean().item() for one in values]
    pairs = [(2 * i, 2 * i + 1) for i in range(len(rows))]
    found = differences(means, [drawn.means(one) for one in values], pairs, count)
    for row, (i, j), one in zip(rows, pairs, found, strict=True):
        row["forecast"]["ssim"], row["fewer_steps"]["ssim"] = round(means[i], 5), round(means[j], 5)
        row["difference"] = round(one.value, 5)
        row["interval"] = one.interval and [round(end, 5) for end in one.interval]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/forecasts.json"))
    args = parser.parse_args()
    held_out = [d.text for d in emoji.load(args.archive) if d.split == "pair"]
    prompts = held_out[:: max(1, len(held_out) // args.prompts)][: args.prompts]
    pipe = load_embedded()
    config, rows = pipe.scheduler.config, []
    apg = pipe.resolve_guidance("apg").rule
    for name, steps, settings in tqdm(RUNS, unit="scheduler"):
        pipe.scheduler = getattr(diffusers, name).from_config(config, **settings)
        for rule in (None, apg):
            row = {"scheduler": name, "steps": steps, "rule": "cfg" if rule is None else "apg"}
            rows.append(row | measured(pipe, prompts, steps, rule))
    compared(rows, len(prompts))
    write_figures(args.output, {"n": len(prompts), "rows": rows})
    print(args.output.read_text())


if __name__ == "__main__":
    main()
