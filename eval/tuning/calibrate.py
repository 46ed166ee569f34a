"""Calibrate Adaptive Guidance: the command.

    pilotage calibrate PROMPTS --nfe 30 -o ag-30.json

See `calibration`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BatchSize, Device, Model, Negative, Scale, Seed, Steps
from .options import Output, Prompts, load, name_it


def command(
    prompts: Prompts,
    nfe: Annotated[float | None, typer.Option(help="Wanted evaluations a picture.")] = None,
    ssim: Annotated[float | None, typer.Option(help="Wanted SSIM to plain guidance.")] = None,
    rule: Annotated[str, typer.Option(help="How predictions combine: cfg, apg, ...")] = "cfg",
    tail: Annotated[
        str,
        typer.Option(help="After the threshold: 'cond' (the paper's) or 'forecast' every other."),
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

    if tail not in ("cond", "forecast"):
        raise ValueError(f"--tail is 'cond' or 'forecast', got {tail!r}")
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
        tail=tail,
    )
    found.save(output)
    for space, (threshold, cost, quality) in found.proofs.items():
        typer.echo(f"{space}: threshold {threshold:.6g}, NFE {cost:.2f}, SSIM {quality:.4f}")
    typer.echo(f"{found.guidance}")
    typer.echo(name_it(output, pipe))
