"""Calibrate Adaptive Guidance: the command.

    pilotage calibrate PROMPTS --nfe 30 -o ag-30.json

See `calibration`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from ..options import BatchSize, Device, Model, Negative, Scale, Seed, Steps
from .options import Output, Prompts, load, name_it, one_of


def command(
    prompts: Prompts,
    nfe: Annotated[float | None, typer.Option(help="Wanted evaluations a picture.")] = None,
    ssim: Annotated[float | None, typer.Option(help="Wanted SSIM to plain guidance.")] = None,
    rule: Annotated[str, typer.Option(help="How predictions combine: cfg, apg, ...")] = "cfg",
    then: Annotated[
        str,
        typer.Option(
            help="After the threshold: 'cond' (as in the paper), or 'forecast': skip every other "
            "step."
        ),
    ] = "cond",
    output: Output = Path("outputs/ag.json"),
    scale: Scale = 7.5,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Find Adaptive Guidance's threshold for a wanted cost (--nfe) or quality (--ssim)."""
    if (nfe is None) == (ssim is None):
        raise ValueError("name a target: --nfe or --ssim, one of them")

    from ...guidance import Always, resolve
    from ...guidance.policies.adaptive import Then

    follows: Then = one_of("--then", then, get_args(Then))
    if not isinstance(resolve(rule).policy, Always):
        raise ValueError(f"--rule is a rule alone, such as cfg or apg, got {rule!r}")
    texts, pipe = load(prompts, output, model, device)

    from .calibration import calibrate

    found = calibrate(
        pipe,
        texts,
        target_nfe=nfe,
        target_ssim=ssim,
        guidance_scale=scale,
        num_inference_steps=steps,
        negative_prompt=negative,
        seed=seed,
        batch_size=batch_size,
        rule=pipe.resolve_guidance(rule).rule,
        then=follows,
    )
    found.save(output)
    for space, (threshold, cost, quality) in found.proofs.items():
        typer.echo(f"{space}: threshold {threshold:.6g}, NFE {cost:.2f}, SSIM {quality:.4f}")
    typer.echo(f"{found.guidance}")
    typer.echo(name_it(output, pipe))
