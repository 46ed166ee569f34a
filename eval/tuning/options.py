"""Options and steps that `fit`, `calibrate` and `search` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..options import check_target
from ..prompts import read_prompts

Known = TypeVar("Known", bound=str)


def load(prompts: Path, output: Path, model: str | None, device: str) -> tuple[list[str], Any]:
    """The prompts of a file and the guided pipeline of a folder or hub name, on its device.

    Raises:
        ValueError: no prompts, an unknown device, or settings cannot be written to `output`.
    """
    from ..embedded import load_on

    texts = read_prompts(prompts)
    if output.suffix != ".json":
        raise ValueError(f"--output is a file NAME.json, got {output}")
    check_target(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    return texts, load_on(device, model)


def one_of(option: str, value: str, known: tuple[Known, ...]) -> Known:
    """The value of an option that takes a few words.

    Raises:
        ValueError: it is none of those known.
    """
    for word in known:
        if word == value:
            return word
    raise ValueError(f"{option} is {' or '.join(map(repr, known))}, got {value!r}")


def name_it(path: Path, pipe: Any) -> str:
    """How the settings just written to `path` are used."""
    from ...pipelines.guided import guidance_folder

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
