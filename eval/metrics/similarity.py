"""SSIM and PSNR of pictures to those of the same file name in another folder.

    python -m pilotage.eval.metrics.similarity FOLDER BASELINE

Meant for pictures of the same seeds and prompts under two settings: how much a setting changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .bootstrap import interval
from .images import psnr, ssim
from .options import Batch, Json, report
from .pictures import batches, picture_files


def folder_similarity(
    folder: str | Path, baseline: str | Path, batch_size: int = 32
) -> dict[str, Any]:
    """Means over pairs, their 95 % intervals, N.

    Equal pictures have no finite PSNR; ``n_equal`` counts them, and the mean of the PSNR leaves
    them out (None if none is left).

    Raises:
        ValueError: the folders' file names or picture sizes differ.
    """
    pair = picture_files(folder), picture_files(baseline)
    names = [{f.name for f in files} for files in pair]
    for place, other, missing in (
        (folder, baseline, names[1] - names[0]),
        (baseline, folder, names[0] - names[1]),
    ):
        if missing:
            raise ValueError(
                f"{place} has no {min(missing)}, which {other} has ({len(missing)} such files)"
            )
    values: dict[str, list] = {"ssim": [], "psnr": []}
    streams = (batches(files, batch_size) for files in pair)
    for a, b in zip(*streams, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{folder} and {baseline} hold pictures of different sizes (height, width): "
                f"{tuple(a.shape[2:])} and {tuple(b.shape[2:])}"
            )
        values["ssim"].append(ssim(a, b).flatten())
        values["psnr"].append(psnr(a, b).flatten())
    joined = {name: torch.cat(parts).double() for name, parts in values.items()}
    result: dict[str, Any] = {"n": len(joined["ssim"])}
    result["n_equal"] = int(joined["psnr"].isinf().sum())
    for name, found in joined.items():
        found = found[found.isfinite()]
        result[name] = float(found.mean()) if len(found) else None
        result[f"{name}_interval"] = list(interval(found)) if len(found) > 1 else None
    return result


app = typer.Typer(add_completion=False)


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    baseline: Annotated[Path, typer.Argument(help="Folder of pictures with the same names.")],
    batch_size: Batch = 32,
    json: Json = None,
) -> None:
    """SSIM and PSNR of pictures to those of the same name in another folder."""
    report(folder_similarity(folder, baseline, batch_size), json)


if __name__ == "__main__":
    from ..cli import run

    run(app)
