"""The command line, thin over the Python API."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .personalize import personalize

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Guidance for diffusion sampling, on every diffusers pipeline.",
)

app.command()(personalize)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    guidance: Annotated[
        str, typer.Option("--guidance", "-g", help="cfg, apg, ag, interval, or e.g. apg+ag.")
    ] = "apg",
    scale: Annotated[float, typer.Option("--scale", "-w", help="Guidance scale; 1 is none.")] = 7.5,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("out.png"),
    negative: Annotated[str, typer.Option(help="What the picture shall not show.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of pictures.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name; default: the embedded emoji model.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Make pictures from a prompt; the settings are kept in the PNG's metadata."""
    from ..guidance import resolve

    resolve(guidance)  # an unknown name fails before anything is loaded

    import torch
    from PIL.PngImagePlugin import PngInfo

    from .embedded import load_embedded, load_pipeline

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = (load_embedded(dtype) if model is None else load_pipeline(model, dtype)).to(device)
    settings = pipe.resolve_guidance(guidance)
    result = pipe(
        prompt,
        negative_prompt=negative or None,
        guidance=settings,
        guidance_scale=scale,
        num_inference_steps=steps,
        num_images_per_prompt=count,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    nfe = pipe.guidance_trace.nfe
    for i, image in enumerate(result.images):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{i}")
        info = PngInfo()
        made = {
            "prompt": prompt,
            "negative_prompt": negative,
            "guidance": str(settings),
            "guidance_scale": scale,
            "steps": steps,
            "seed": seed + i,
            "scheduler": type(pipe.scheduler).__name__,
            "model": str(model or "embedded"),
            "nfe": nfe[i],
        }
        info.add_text("pilotage", json.dumps(made))
        image.save(path, pnginfo=info)
        typer.echo(f"{path}  ({nfe[i]} network evaluations)")


@app.command()
def info() -> None:
    """Versions, guidance names and presets."""
    from rich.console import Console
    from rich.table import Table

    from ..guidance import PRESETS, available
    from .record import machine, versions

    console = Console()
    console.print(
        ", ".join(f"{name} {version}" for name, version in versions().items()), highlight=False
    )
    console.print(f"machine: {machine()['processor']}, accelerator: {machine()['accelerator']}")
    console.print(f"guidance: {', '.join(available())}; combined: apg+ag, apg+interval")
    table = Table("model family", "name", "settings", title="presets")
    for family, presets in PRESETS.items():
        for name, preset in presets.items():
            values = ", ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in asdict(preset).items()
            )
            table.add_row(family, name, values)
    console.print(table)


def main() -> None:
    """Entry point of ``pilotage``: errors of the user's making end in one line."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
