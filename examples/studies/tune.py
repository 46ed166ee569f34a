"""Find the embedded model's presets, on prompts it was trained on (never on the held-out ones).

    python -m examples.studies.tune

prints, for APG, picture statistics over thresholds and momenta at a high scale, and for Adaptive
Guidance the threshold on denoised images at which a run of 20 steps costs 30 evaluations. What was
chosen from it stands in ``guidance/presets.py``.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from examples.emoji import data as emoji
from examples.studies.spine import AG_SCALE, STEPS, generate, retrieval
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import contrast, saturation, to_tensor
from pilotage.guidance import APG

HIGH_SCALE = 15.0
THRESHOLDS = (0.025, 0.05, 0.1, 0.2)
MOMENTA = (0.0, -0.25, -0.5)
TARGET_NFE = 30


def agreement(pipe, prompts: list[str]) -> list[list[float]]:
    """gamma on denoised images of every step (rows) and prompt under plain guidance."""
    pipe(
        prompts,
        guidance="cfg",
        guidance_scale=AG_SCALE,
        num_inference_steps=STEPS,
        detailed_trace=True,
        output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    )
    return [step.gamma.tolist() for step in pipe.guidance_trace.steps]


def threshold_for(gammas: list[list[float]], target: float) -> tuple[float, float]:
    """The threshold whose mean cost is closest to `target` evaluations, and that cost."""
    steps, samples = len(gammas), range(len(gammas[0]))

    def cost(threshold: float) -> float:
        guided = [
            next((i + 1 for i in range(steps) if gammas[i][s] >= threshold), steps) for s in samples
        ]
        return steps + sum(guided) / len(guided)

    candidates = sorted({g for row in gammas for g in row})
    best = min(candidates, key=lambda threshold: abs(cost(threshold) - target))
    return best, cost(best)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--prompts", type=int, default=40)
    args = parser.parse_args()
    trained = [d for d in emoji.load(args.archive, everyday=True) if d.split == "train"]
    chosen = trained[:: len(trained) // args.prompts][: args.prompts]
    prompts, concepts = [d.text for d in chosen], [d.concept for d in chosen]
    real = to_tensor(emoji.pictures(args.archive, chosen))
    extractor = EfficientNetLite("efficientnet-lite0")
    gallery = extractor(real)
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)

    table = Table("guidance", "scale", "threshold", "momentum", "saturation", "contrast", "found")

    def add(name, scale, rule, images):
        values = (saturation(images).mean(), contrast(images).mean())
        found = retrieval(extractor(images), gallery, concepts)
        settings = (f"{rule.norm_threshold}", f"{rule.momentum}") if rule else ("", "")
        table.add_row(name, f"{scale:g}", *settings, *(f"{v:.3f}" for v in (*values, found)))

    add("real", 1, None, real)
    for scale in (AG_SCALE, HIGH_SCALE):
        add("CFG", scale, None, generate(pipe, prompts, "cfg", scale)[0])
    for threshold, momentum in itertools.product(THRESHOLDS, MOMENTA):
        rule = APG(norm_threshold=threshold, momentum=momentum)
        add("APG", HIGH_SCALE, rule, generate(pipe, prompts, rule, HIGH_SCALE)[0])
    Console().print(table)

    threshold, cost = threshold_for(agreement(pipe, prompts), TARGET_NFE)
    print(f"AdaptiveGuidance: threshold {threshold:.4f} on denoised images, {cost:.2f} evaluations")


if __name__ == "__main__":
    main()
