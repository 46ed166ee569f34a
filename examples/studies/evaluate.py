"""Evaluate CFG, APG and AG on the embedded model: ``eval/results/eval.json`` and a report.

    pip install --no-deps torch-fidelity
    python -m examples.emoji.data prepare && python -m examples.studies.evaluate --samples 470

Prompts are the (concept, style) pairs that were held out of training, their real pictures the
reference; features are EfficientNet-Lite0's. The alignment score is a ridge map from those features
to MiniLM sentence vectors, fitted on the training split's pictures and captions: weaker than CLIP.
DPM++ 2M with 20 steps; CFG with fewer steps stands beside every method that costs less. The
pictures lie in ``cache/evaluate``: an interrupted run goes on where it stopped, and
``accelerate launch`` (on CPUs: ``torchrun``) splits the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from examples.emoji import data as emoji
from examples.studies.agreement import agreement, made_up
from examples.studies.timing import seconds_in_turn
from pilotage.eval.comparison.comparison import compare, grid
from pilotage.eval.comparison.plan import Plan, Setting
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.alignment import RidgeAlignment
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import write_figures
from pilotage.guidance import available
from pilotage.pipelines.processes import processes

STEPS = 20
SCALES = (1.5, 3, 5, 7.5, 10, 15)
POLICY_SCALE = 7.5
ROUNDS = 3  # of the timing
POLICIES = ("ag", "linear-ag")


def settings(pipe) -> list[Setting]:
    """CFG and APG at every scale, and at one the policies that this model has settings for."""
    policies = []
    for name in POLICIES:
        if name in available():
            try:
                pipe.resolve_guidance(name)
            except ValueError as error:  # coefficients that were not fitted
                print(f"{name} is left out: {error}")
                continue
            policies.append(name)
    found = grid(["cfg", "apg"], SCALES, [STEPS])
    return [*found, *(Setting(name, POLICY_SCALE, STEPS) for name in policies)]


def share(prompts: list[str], samples: int) -> tuple[list[str], range]:
    """Prompts and seeds that give about `samples` pictures: whole rounds over all prompts.

    Fewer than one round takes the first prompts only.
    """
    if samples < 2:
        raise ValueError(f"--samples must be at least 2, got {samples}")
    if samples < len(prompts):
        return prompts[:samples], range(1)
    return prompts, range(round(samples / len(prompts)))


def claims(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired differences that docs/results speak of, of those between all settings.

    Their intervals hold for all pairs of settings of a metric together.
    """
    pairs = [(f"apg w={w:g}, {STEPS} steps", f"cfg w={w:g}, {STEPS} steps") for w in SCALES]
    ag = f"ag w={POLICY_SCALE:g}, {STEPS} steps"
    pairs += [
        (f"apg w={POLICY_SCALE:g}, {STEPS} steps", f"cfg w=3, {STEPS} steps"),
        (ag, f"cfg w={POLICY_SCALE:g}, {STEPS} steps"),
        (ag, f"cfg w={POLICY_SCALE:g}, 15 steps"),
    ]
    wanted = set(map(frozenset, pairs))
    return [one for one in comparisons if frozenset((one["setting"], one["other"])) in wanted]


def fit_alignment(archive: Path, drawings: list[emoji.Drawing], extractor) -> RidgeAlignment:
    """The ridge map, fitted on the training split."""
    train = [d for d in drawings if d.split == "train"]
    pictures = to_tensor(emoji.pictures(archive, train))
    return RidgeAlignment.fit(pictures, [d.text for d in train], extractor=extractor)


def main() -> None:
    """Generate, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--samples", type=int, default=470, help="pictures a setting")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("cache/evaluate"))
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/eval.json"))
    args = parser.parse_args()
    state = processes()
    # First, as it fails at once where torch-fidelity is not installed.
    agreed = agreement(*made_up(4000, 512)) if state.is_main_process else None
    everyday = emoji.load(args.archive, everyday=True)
    held = [d for d in everyday if d.split == "pair"]
    prompts, seeds = share([d.text for d in held], args.samples)
    pipe = load_embedded().to(state.device)
    columns = settings(pipe)
    extractor = EfficientNetLite("efficientnet-lite0").to(state.device)
    folder = args.work / f"{len(prompts)}x{len(seeds)}"
    rows = compare(
        pipe,
        Plan(prompts, columns, seeds, args.batch_size),
        folder,
        reference=to_tensor(emoji.pictures(args.archive, held)),
        extractor=extractor,
        scorers={"alignment": fit_alignment(args.archive, everyday, extractor)},
    )
    if not state.is_main_process:
        return
    # Pictures may have been made while the machine had other work: seconds are measured anew.
    cells = {row["label"]: Setting(row["method"], row["w"], row["steps"]) for row in rows}
    seconds = seconds_in_turn(pipe, list(cells.values()), prompts[: args.batch_size], ROUNDS)
    for row in rows:
        row["seconds"] = round(statistics.median(seconds[cells[row["label"]]]) / args.batch_size, 4)
    figures = {
        "prompts": len(prompts),
        "seeds": len(seeds),
        "reference": len(held),
        "extractor": extractor.name,
        "threads": torch.get_num_threads(),
        "cells": rows,
        "claims": claims(json.loads((folder / "cells.json").read_text())["comparisons"]),
        "agreement": agreed,
    }
    write_figures(args.output, figures)
    print(args.output.read_text())
    for claim in figures["claims"]:
        print("{metric}: {setting} minus {other}: {difference} {interval}".format(**claim))


if __name__ == "__main__":
    main()
