"""``pilotage score``; see `preference` for what the scores are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Background, BatchSize, Device, Folder, Json, Recursive, Resize, report
from .commands import Prompts, read_folder, texts_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..pictures import Pictures
    from .alignment import Alignment


def score(
    folder: Folder,
    scores: Annotated[
        list[str],
        typer.Option(
            "--score",
            help="pickscore:MODEL, hpsv2:MODEL, aesthetic:MODEL or clip-iqa:MODEL, a folder or hub "
            "name; repeat.",
        ),
    ],
    prompts: Prompts = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures with the same names, for the share of wins."),
    ] = None,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Scores of pictures that networks learned from people's choices."""
    from .preference import NEED_PROMPTS, kinds_of, load_preference

    kinds = kinds_of(scores)

    from ..pictures import Reading
    from .per_picture import check_names, mean_and_interval, measure, wins

    reading = Reading(recursive, resize, background)
    pictures = read_folder(folder, reading)
    others = None if baseline is None else read_folder(baseline, reading)
    if others is not None:
        check_names(pictures, others)
    texts = [""] * len(pictures)
    if prompts is not None or any(kind in NEED_PROMPTS for kind in kinds):
        texts = texts_of(prompts, pictures)
    groups = texts if len(set(texts)) > 1 else None  # a prompt's seeds say little about others
    values: dict[str, Any] = {"n": len(pictures)}
    for kind, name in kinds.items():
        scorer = load_preference(name, device)

        def scored(folder: Pictures, scorer: Alignment = scorer) -> Tensor:
            return measure(folder, None, texts, {"score": scorer}, None, batch_size)["score"]

        own = scored(pictures)
        values[kind], values[f"{kind}_interval"] = mean_and_interval(own, groups)
        if others is not None:
            found = mean_and_interval(wins(own, scored(others)), groups)
            values[f"{kind}_wins"], values[f"{kind}_wins_interval"] = found
    report(values, json, pictures, others)
