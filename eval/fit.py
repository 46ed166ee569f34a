"""Fit LinearAG's coefficients: the command.

    python -m pilotage.eval.fit PROMPTS -o linear-ag.json

See `pilotage.pipelines.fit`. Under ``accelerate launch`` the trajectories are shared out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .tuning_options import (
    BatchSize,
    Device,
    Model,
    Negative,
    Output,
    Prompts,
    Seed,
    Steps,
    load,
    name_it,
)

SCALES = [7.5]

app = typer.Typer(add_completion=False)


@app.command("fit")
def command(
    prompts: Prompts,
    output: Output = Path("outputs/linear-ag.json"),
    scale: Annotated[
        list[float], typer.Option("--scale", "-w", help="Guidance scale; repeat for a range.")
    ] = SCALES,
    tail: Annotated[str, typer.Option(help="Second half: 'linear' (estimated) or 'cond'.")] = (
        "linear"
    ),
    target: Annotated[str, typer.Option(help="Regress 'difference' or 'uncond'.")] = "difference",
    ridge: Annotated[float, typer.Option(help="Relative to the regressors' square.")] = 1e-3,
    steps: Steps = 20,
    negative: Negative = "",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for finished batches; default: OUTPUT.batches.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Fit LinearAG's coefficients on trajectories of ordinary guidance; resumable."""
    if tail not in ("linear", "cond"):
        raise ValueError(f"--tail is 'linear' or 'cond', got {tail!r}")
    texts, pipe = load(prompts, model, device)

    from ..guidance import CFG, Guidance, LinearAG
    from ..pipelines.fit import fit
    from ..pipelines.processes import processes

    found = fit(
        pipe,
        texts,
        guidance_scale=scale,
        num_inference_steps=steps,
        negative_prompt=negative,
        seed=seed,
        batch_size=batch_size,
        target=target,
        ridge=ridge,
        checkpoint=checkpoint or output.with_name(f"{output.name}.batches"),
    )
    if processes().is_main_process:
        policy = LinearAG(tail=tail, coefficients=found.coefficients)
        found.save(output, Guidance(CFG(), policy))
        typer.echo(f"step {'':4} R² held out   of the difference")
        for step, values in enumerate(zip(found.r2_held_out, found.r2_difference, strict=True)):
            typer.echo(f"{step:9} {values[0]:11.4f} {values[1]:19.4f}")
        typer.echo(name_it(output, pipe))


if __name__ == "__main__":
    from .cli import run

    run(app)
