"""Saturation, contrast and colourfulness of a folder's pictures, with bootstrap intervals.

    python -m pilotage.eval.metrics.saturation FOLDER

They need no reference. High guidance scales raise all three; the same pictures without guidance,
or real ones, say how much is right. Definitions: `images`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import images
from .bootstrap import interval
from .options import Batch, Json, Resize, report
from .pictures import batches, picture_files

STATISTICS = ("saturation", "contrast", "colourfulness")


def colour_statistics(
    folder: str | Path, batch_size: int = 32, resize: int | None = None
) -> dict[str, Any]:
    """Mean of each statistic over a folder's pictures, its 95 % interval and N.

    The interval is None for one picture.
    """
    values: dict[str, list] = {name: [] for name in STATISTICS}
    for pictures in batches(picture_files(folder), batch_size, resize):
        for name, found in values.items():
            found.append(getattr(images, name)(pictures))
    result: dict[str, Any] = {}
    for name, found in values.items():
        joined = torch.cat(found).double()
        result[name] = float(joined.mean())
        result[f"{name}_interval"] = list(interval(joined)) if len(joined) > 1 else None
    return result | {"n": len(joined)}


app = typer.Typer(add_completion=False)


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    batch_size: Batch = 32,
    resize: Resize = None,
    json: Json = None,
) -> None:
    """Saturation, contrast and colourfulness of pictures, with 95 % intervals."""
    report(colour_statistics(folder, batch_size, resize), json)


if __name__ == "__main__":
    from ..cli import run

    run(app)
