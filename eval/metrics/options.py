"""Options and steps that the metric commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .features import Features, load_features
from .pictures import picture_files

DEFAULT = "efficientnet-lite0"


def load_pair(
    real: Path,
    fake: Path,
    name: str,
    keep: bool,
    batch_size: int,
    resize: int | None,
    device: str,
    least: tuple[int, int] = (1, 1),
    real_statistics: bool = False,
) -> tuple[Features, Features]:
    """Features of two folders or files, for the commands; cheap mistakes first.

    Args:
        real, fake: Folders or files.
        name: Of the extractor.
        keep: The features themselves are needed.
        batch_size, resize, device: As the options.
        least: Pictures needed of `real` and of `fake`.
        real_statistics: Of `real`, statistics do even if `keep`.
    """
    from .extractors import load_extractor

    counts: dict[Path, int] = {}
    found: dict[Path, Features] = {}
    for source in (real, fake):
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
        if source.suffix != ".npz":
            counts[source] = len(picture_files(source))
    network = load_extractor(name).to(device)
    options = {"batch_size": batch_size, "resize": resize}
    for source in (real, fake):
        if source not in counts:
            found[source] = load_features(source, network, keep, **options)
            counts[source] = found[source].statistics.count
    for source, needed in zip((real, fake), least, strict=True):
        if counts[source] < needed:
            raise ValueError(
                f"at least {needed} pictures are needed, {source} has {counts[source]}"
            )
        if keep and source in found and not (source == real and real_statistics):
            found[source].rows()
    for source in counts:
        if source not in found:
            found[source] = load_features(source, network, keep, **options)
    return found[real], found[fake]


def device_of(name: str) -> torch.device:
    """The device of a name, if it is there; ``auto``: an accelerator if there is one.

    Raises:
        ValueError: nothing can be computed on it here.
    """
    if name == "auto":
        from ...pipelines.processes import processes

        return processes().device
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({reason}): expected auto, cpu, cuda, ..."
        ) from error
    return device


def check_target(path: Path) -> None:
    """Refuse the name of a file that could not be written, before there is something to write.

    Raises:
        ValueError: it is a folder, or nothing can be created where it would lie.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {place} is not a folder to write to")


def report(values: dict[str, Any], json_file: Path | None) -> None:
    """Print a command's values, a line each; write them as JSON if asked."""
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        typer.echo(f"{name}: {shown}")
    if json_file is not None:
        from ..record import write_figures

        write_figures(json_file, values)


def _target(path: Path | None) -> Path | None:
    if path is not None:
        check_target(path)
    return path


Real = Annotated[Path, typer.Argument(help="Folder of real pictures, or a .npz of theirs.")]
Fake = Annotated[Path, typer.Argument(help="Folder of generated pictures, or a .npz of theirs.")]
Name = Annotated[
    str, typer.Option("--extractor", "-e", help="Network; inception, clip:MODEL, dinov2:MODEL.")
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Resize = Annotated[int | None, typer.Option(min=1, help="Bring pictures to this side first.")]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, ...", callback=lambda name: str(device_of(name))),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="File to write the values to.", callback=_target),
]
