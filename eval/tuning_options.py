"""Options and steps that `fit`, `calibrate` and `search` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .compare import read_prompts


def load(prompts: Path, output: Path, model: str | None, device: str) -> tuple[list[str], Any]:
    """The prompts of a file and the guided pipeline of a folder or hub name, on its device.

    Raises:
        ValueError: no prompts, an unknown device, or settings cannot be written to `output`.
    """
    texts = read_prompts(prompts)
    if output.suffix != ".json" or output.is_dir():
        raise ValueError(f"--output is a file NAME.json, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)

    import torch

    from ..pipelines.processes import processes
    from .embedded import load_embedded, load_pipeline

    try:
        place = processes().device if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: expected auto, cpu, cuda, ...") from error
    dtype = torch.float32 if place.type == "cpu" else torch.float16
    pipe = load_embedded(dtype) if model is None else load_pipeline(model, dtype)
    return texts, pipe.to(place)


def name_it(path: Path, pipe: Any) -> str:
    """How the settings just written to `path` are used."""
    from ..pipelines.guided import guidance_folder

    named = guidance_folder(pipe)
    if named is not None and path.resolve().parent == named.resolve():
        return f'{path}: use it as guidance="{path.stem}"'
    return f'{path}: use it as guidance=load_guidance("{path}")'


Prompts = Annotated[Path, typer.Argument(help="Text file, one prompt a line.")]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="NAME.json to write; in MODEL/guidance, NAME is then a guidance."
    ),
]
Scale = Annotated[float, typer.Option("--scale", "-w", help="Guidance scale.")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Negative = Annotated[
    str | None,
    typer.Option(help="Prompt of the unconditional branch; default: as of a call without one."),
]
Seed = Annotated[int, typer.Option(help="Seed of the first picture.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Model = Annotated[
    str | None, typer.Option(help="Folder or hub name; default: the embedded emoji model.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
