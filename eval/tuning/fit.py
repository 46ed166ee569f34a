"""Fit LinearAG's coefficients: the command.

    pilotage fit PROMPTS -o linear-ag.json

See `pilotage.pipelines.fitting.fit`. Under ``accelerate launch`` the trajectories are shared out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BatchSize, Device, Model, Negative, Seed, Steps
from .options import Output, Prompts, load, name_it

SCALES = [7.5]


def command(
    prompts: Prompts,
    output: Output = Path("outputs/linear-ag.json"),
    scale: Annotated[
        list[float], typer.Option("--scale", "-w", help="Guidance scale; repeat for a range.")
    ] = SCALES,
    tail: Annotated[
        str, typer.Option(help="Second half: 'linear', 'cond' or (with --steered) 'forecast'.")
    ] = "linear",
    target: Annotated[
        str | None,
        typer.Option(help="Regress 'difference' (default) or 'uncond'; not with --steered."),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(help="Relative to the regressors' square; default: 1e-3, --steered 1e-4."),
    ] = None,
    steered: Annotated[
        bool,
        typer.Option("--steered", help="Fit on runs of LinearAG itself, back to plain guidance."),
    ] = False,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder for finished batches; default: OUTPUT.batches. Not with --steered."
        ),
    ] = None,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Fit LinearAG's coefficients on trajectories of ordinary guidance; resumable.

    With --steered, on runs of LinearAG itself: each estimate then makes up for earlier ones. These
    are made all at once, so that memory grows with the prompts and nothing is resumed, and hold for
    this pattern and tail only.
    """
    if tail not in ("linear", "cond", "forecast"):
        raise ValueError(f"--tail is 'linear', 'cond' or 'forecast', got {tail!r}")
    if tail == "forecast" and not steered:
        raise ValueError("--tail forecast is fitted with --steered")
    if steered and len(scale) > 1:
        raise ValueError("--steered fits one guidance scale")
    if steered and (target is not None or checkpoint is not None):
        raise ValueError("--steered regresses no target and is not resumed: leave both out")
    texts, pipe = load(prompts, output, model, device)

    from ...guidance import CFG, Guidance, LinearAG
    from ...guidance.saved import save_guidance
    from ...pipelines.fitting.fit import fit
    from ...pipelines.processes import processes

    if steered:
        from ...guidance.policies.alternating import alternating
        from ...pipelines.fitting.on_policy import Steering

        steering = Steering(
            pipe,
            texts,
            guidance_scale=scale[0],
            num_inference_steps=steps,
            negative_prompt=negative,
            seed=seed,
            batch_size=2 * batch_size,
            ridge=1e-4 if ridge is None else ridge,
        )
        tail_choice = "estimate" if tail == "linear" else tail
        found, _ = steering.fit(alternating(steering.total, 2, 0.5, tail_choice))
        policy = LinearAG(tail=tail, coefficients=found.coefficients)
        save_guidance(output, Guidance(CFG(), policy), found.measured)
        typer.echo("step      distance held out")
        for step, values in enumerate(zip(found.distance, found.distance_held_out, strict=True)):
            typer.echo(f"{step:4} {values[0]:13.4f} {values[1]:8.4f}")
        typer.echo(name_it(output, pipe))
        return
    found = fit(
        pipe,
        texts,
        guidance_scale=scale,
        num_inference_steps=steps,
        negative_prompt=negative,
        seed=seed,
        batch_size=batch_size,
        target=target or "difference",
        ridge=1e-3 if ridge is None else ridge,
        checkpoint=checkpoint or output.with_name(f"{output.name}.batches"),
    )
    if processes().is_main_process:
        policy = LinearAG(tail=tail, coefficients=found.coefficients)
        found.save(output, Guidance(CFG(), policy))
        typer.echo(f"step {'':4} R² held out   of the difference")
        for step, values in enumerate(zip(found.r2_held_out, found.r2_difference, strict=True)):
            typer.echo(f"{step:9} {values[0]:11.4f} {values[1]:19.4f}")
        typer.echo(name_it(output, pipe))
