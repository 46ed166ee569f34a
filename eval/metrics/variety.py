"""Commands on sets of pictures beyond the usual distances: FD∞, Vendi score, nearest pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import (
    DEFAULT_EXTRACTOR,
    Background,
    BatchSize,
    Device,
    Extractor,
    Fake,
    Json,
    Real,
    Recursive,
    Resize,
    report,
)
from ..terminal import note

if TYPE_CHECKING:
    from .feature_files import Features


def fd_infinity(
    real: Real,
    fake: Fake,
    extractor: Extractor = DEFAULT_EXTRACTOR,
    points: Annotated[int, typer.Option(min=2, help="Sizes the line is drawn through.")] = 15,
    seed: Annotated[int, typer.Option(help="Of the random parts.")] = 0,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Fréchet distance of infinitely many generated pictures, read off a line over 1 / N."""
    from ..pictures import Reading
    from .fd_infinity import fd_infinity as limit
    from .features import load_pair

    least, rows = (2, 2 * points), (False, True)
    settings = real, fake, extractor, device, batch_size, Reading(recursive, resize, background)
    one, two = load_pair(*settings, rows=rows, least=least)
    found = limit(one if one.values is None else one.values, two.rows(), points, seed)
    if found.counts[0] < len(one.mean):
        note(
            f"warning: the smallest part has {found.counts[0]} pictures for "
            f"{len(one.mean)} features: the line is a poor description there"
        )
    counts = {"n_real": one.count, "n_fake": two.count}
    values = {"fd_infinity": found.value, "fit": found.fit, "fd": found.distances[-1]}
    report(values | {"extractor": one.extractor} | counts, json, one.pictures, two.pictures)


def vendi(
    fake: Fake,
    extractor: Extractor = DEFAULT_EXTRACTOR,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Vendi score: how many different pictures there are, in effect."""
    from ..pictures import Reading
    from .features import load_pair
    from .vendi import vendi_score

    reading = Reading(recursive, resize, background)
    found, _ = load_pair(fake, fake, extractor, device, batch_size, reading)
    score = vendi_score(found.rows())
    report({"vendi": score, "n": found.count, "extractor": found.extractor}, json, found.pictures)


def nearest(
    train: Annotated[Path, typer.Argument(help="Folder of training pictures, or a .npz.")],
    fake: Fake,
    held_out: Annotated[
        Path | None, typer.Option(help="Folder of real pictures not trained on, or a .npz.")
    ] = None,
    extractor: Extractor = DEFAULT_EXTRACTOR,
    closest: Annotated[int, typer.Option(min=0, help="Pairs to list, the closest first.")] = 10,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """The nearest training picture of every generated one: was anything learned by heart?"""
    from ..pictures import Reading
    from .blocks import on_device
    from .features import load_pair
    from .memorised import nearest_training, share_close

    options = extractor, device, batch_size, Reading(recursive, resize, background)
    known, made = load_pair(train, fake, *options)
    rows = on_device(known.rows(), device)
    found = nearest_training(rows, made.rows())
    values: dict[str, Any] = {
        "nearest_median": float(found.distances.median()),
        "nearest_smallest": float(found.distances.min()),
    }
    if held_out is not None:
        real = load_pair(held_out, held_out, *options)[0]
        real.require(known.extractor, known.preprocessing)
        distances = nearest_training(rows, real.rows()).distances
        values["held_out_median"] = float(distances.median())
        values["share_close"] = share_close(found.distances, distances)
        values["n_held_out"] = real.count
    names = _names(made), _names(known)
    order = found.distances.argsort(stable=True)[:closest].tolist()
    pairs = [
        {
            "picture": names[0][i] if names[0] else i,
            "training": names[1][j] if names[1] else j,
            "distance": float(found.distances[i]),
        }
        for i, j in zip(order, found.positions[order].tolist(), strict=True)
    ]
    values |= {"n_train": known.count, "n": made.count, "extractor": known.extractor}
    report(values | {"closest": pairs}, json, known.pictures, made.pictures)


def _names(features: Features) -> list[str]:
    """Names of a folder's pictures in the order of their features; none of a file's rows."""
    read = features.pictures
    return [] if read is None else [read.name(file) for file in read.files]
