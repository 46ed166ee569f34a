"""Keep a folder's features, or only their mean and covariance, in a file for later comparisons.

python -m pilotage.eval.metrics.statistics FOLDER -o stats.npz
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .features import folder_features
from .options import DEFAULT, Batch, Device, Name, Resize, check_target
from .pictures import picture_files

app = typer.Typer(add_completion=False)


@app.command()
def statistics(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.")],
    extractor: Name = DEFAULT,
    features: Annotated[bool, typer.Option(help="Keep the features too.")] = False,
    batch_size: Batch = 32,
    resize: Resize = None,
    device: Device = "cpu",
) -> None:
    """Keep mean and covariance of a folder's features in a file, for later comparisons."""
    if output.suffix != ".npz":
        raise ValueError(f"the file to write must end in .npz, got {output}")
    check_target(output)
    picture_files(folder)
    from .extractors import load_extractor

    network = load_extractor(extractor).to(device)
    found = folder_features(folder, network, batch_size, resize, features)
    found.save(output)
    typer.echo(f"{output}: {found.statistics.count} pictures, {found.tags.extractor}")


if __name__ == "__main__":
    from ..cli import run

    run(app)
