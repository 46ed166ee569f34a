"""Options and steps that the metric commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .features import Features, load_features, require_same
from .pictures import picture_files

DEFAULT = "efficientnet-lite0"


def load_pair(
    real: Path, fake: Path, name: str, keep: bool, batch_size: int, resize: int | None, device: str
) -> tuple[Features, Features]:
    """Features of two folders or files, for the commands."""
    from .extractors import load_extractor

    for source in (real, fake):  # cheap mistakes first
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
        if source.suffix != ".npz":
            picture_files(source)
    network = load_extractor(name).to(device)
    options = {"batch_size": batch_size, "resize": resize}
    pair = [load_features(source, network, keep, **options) for source in (real, fake)]
    require_same(pair[0].tags, pair[1].tags)
    return pair[0], pair[1]


def report(values: dict[str, Any], json_file: Path | None) -> None:
    """Print a command's values, a line each; write them as JSON if asked."""
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        typer.echo(f"{name}: {shown}")
    if json_file is not None:
        from .record import write_figures

        write_figures(json_file, values)


Real = Annotated[Path, typer.Argument(help="Folder of real pictures, or a .npz of theirs.")]
Fake = Annotated[Path, typer.Argument(help="Folder of generated pictures, or a .npz of theirs.")]
Name = Annotated[
    str, typer.Option("--extractor", "-e", help="Network; inception, clip:MODEL, dinov2:MODEL.")
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Resize = Annotated[int | None, typer.Option(min=1, help="Bring pictures to this side first.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Json = Annotated[Path | None, typer.Option("--json", help="File to write the values to.")]
