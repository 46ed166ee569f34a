"""Search a schedule: the command.

    pilotage search PROMPTS --floor 0.9 -o schedule.json

See `policy_search` and `relaxed_search`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..options import BatchSize, Device, Model, Negative, Scale, Seed, Steps
from .options import Output, Prompts, load, name_it, one_of


def command(
    prompts: Prompts,
    floor: Annotated[float, typer.Option(help="SSIM to plain guidance to be kept.")] = 0.9,
    coefficients: Annotated[
        Path | None,
        typer.Option(help="File of 'pilotage fit' for the estimates; default: hold differences."),
    ] = None,
    fitted: Annotated[
        bool,
        typer.Option("--fitted", help="Fit to every schedule tried; 30 prompts or more."),
    ] = False,
    between: Annotated[
        str,
        typer.Option(
            help="With --fitted, steps between full evaluations: 'forecast' evaluates nothing, "
            "'estimate' the conditional branch."
        ),
    ] = "forecast",
    relaxed: Annotated[
        bool, typer.Option("--relaxed", help="Gradient descent instead of greedy and evolution.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Tries of evolution, or gradient steps.")] = 60,
    output: Output = Path("outputs/schedule.json"),
    scale: Scale = 7.5,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Find the cheapest schedule of evaluated, estimated and skipped steps above a quality.

    In what it prints, B evaluates both branches, e estimates the unconditional one, - lets the
    conditional one stand alone, and a dot skips the step.
    """
    from ...guidance import Coefficients, Schedule, load_guidance
    from .store import Between

    if fitted and (relaxed or coefficients is not None):
        raise ValueError("--fitted makes its own estimates: leave --coefficients and --relaxed out")
    other: Between = one_of("--between", between, get_args(Between))
    if relaxed and coefficients is not None:
        raise ValueError("--relaxed makes no estimates: leave --coefficients out")
    fill = None
    if coefficients is not None:
        policy = load_guidance(coefficients).policy
        if not isinstance(policy, Schedule) or not isinstance(policy.fill, Coefficients):
            raise ValueError(f"{coefficients} holds no coefficients: make them with 'pilotage fit'")
        fill = policy.fill
    texts, pipe = load(prompts, output, model, device)

    from .policy_search import search
    from .relaxed_search import relaxed_search

    settings: dict[str, Any] = {
        "quality_floor": floor,
        "guidance_scale": scale,
        "num_inference_steps": steps,
        "negative_prompt": negative,
        "seed": seed,
        "batch_size": batch_size,
    }
    if relaxed:
        found = relaxed_search(pipe, texts, iterations=max(rounds, 1), **settings)
    else:
        settings["checkpoint"] = output.with_name(f"{output.name}.tried")
        settings |= {"fitted": fitted, "between": other, "rounds": rounds}
        found = search(pipe, texts, fill=fill, **settings)
    found.save(output)
    typer.echo("  NFE    SSIM")
    for candidate in found.front:
        mark = "*" if candidate is found.best else " "
        typer.echo(f"{mark}{candidate.nfe:4g}  {candidate.quality:.4f}  {candidate.schedule}")
    typer.echo(name_it(output, pipe))
