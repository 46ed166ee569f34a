"""Fit LinearAG's coefficients: the command.

    pilotage fit PROMPTS -o linear-ag.json

See `pilotage.pipelines.fitting.fit`. Under ``accelerate launch`` the trajectories are shared out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..options import BatchSize, Device, Model, Negative, Seed, Steps
from .options import Output, Prompts, load, name_it, one_of

SCALES = [7.5]


def command(
    prompts: Prompts,
    output: Output = Path("outputs/linear-ag.json"),
    scale: Annotated[
        list[float], typer.Option("--scale", "-w", help="Guidance scale; repeat for a range.")
    ] = SCALES,
    then: Annotated[
        str,
        typer.Option(help="Second half: 'estimate', 'cond' or (with --on-policy) 'forecast'."),
    ] = "estimate",
    target: Annotated[
        str | None,
        typer.Option(help="Regress 'difference' (default) or 'uncond'; not with --on-policy."),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(help="Relative to the regressors' square; default: 1e-3, --on-policy 1e-4."),
    ] = None,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Fit on runs of LinearAG itself, back to plain guidance."),
    ] = False,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder for finished batches; default: OUTPUT.batches. Not with --on-policy."
        ),
    ] = None,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Fit LinearAG's coefficients on trajectories of ordinary guidance; resumable.

    With --on-policy, on runs of LinearAG itself: each estimate then makes up for earlier ones.
    These are made all at once, so that memory grows with the prompts and nothing is resumed, and
    hold for this pattern and --then only.
    """
    from ...guidance.fitting.regression import Target
    from ...guidance.policies.schedule import Choice

    seconds: tuple[Choice, ...] = ("estimate", "cond", "forecast")
    second = one_of("--then", then, seconds)
    regressed: Target = one_of("--target", target or "difference", get_args(Target))
    if second == "forecast" and not on_policy:
        raise ValueError("--then forecast is fitted with --on-policy")
    if on_policy and len(scale) > 1:
        raise ValueError("--on-policy fits one guidance scale")
    if on_policy and (target is not None or checkpoint is not None):
        raise ValueError("--on-policy regresses no target and is not resumed: leave both out")
    texts, pipe = load(prompts, output, model, device)

    from ...guidance import CFG, Guidance, hold, linear_ag, save_guidance
    from ...pipelines.fitting.fit import fit
    from ...pipelines.fitting.on_policy import ScheduleFitter
    from ...pipelines.processes import processes

    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "negative_prompt": negative,
        "seed": seed,
        "batch_size": batch_size,
    }
    if ridge is not None:
        settings["ridge"] = ridge
    if on_policy:
        fitter = ScheduleFitter(pipe, texts, guidance_scale=scale[0], **settings)
        made, _ = fitter.fit(hold(then=second).choices_for(fitter.total))
        policy = linear_ag(made.coefficients, then=second)
        save_guidance(output, Guidance(CFG(), policy), made.measured)
        typer.echo("step      distance held out")
        for step, values in enumerate(zip(made.distance, made.distance_held_out, strict=True)):
            typer.echo(f"{step:4} {values[0]:13.4f} {values[1]:8.4f}")
        typer.echo(name_it(output, pipe))
        return
    found = fit(
        pipe,
        texts,
        guidance_scale=scale,
        target=regressed,
        checkpoint=checkpoint or output.with_name(f"{output.name}.batches"),
        **settings,
    )
    if processes().is_main_process:
        found.save(output, Guidance(CFG(), linear_ag(found.coefficients, then=second)))
        typer.echo(f"step {'':4} R² held out   of the difference")
        for step, values in enumerate(zip(found.r2_held_out, found.r2_difference, strict=True)):
            typer.echo(f"{step:9} {values[0]:11.4f} {values[1]:19.4f}")
        typer.echo(name_it(output, pipe))
