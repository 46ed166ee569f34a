"""What the fourth tab does: pictures from pictures, without a network."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...guidance.analytic import DENOISERS
from ..generation import Made, denoise
from . import lines
from .background import Emit, streamed
from .studio import Step, Studio, whole

METHODS = tuple(DENOISERS)


@dataclass(frozen=True)
class Denoised:
    """Pictures made without a network.

    Args:
        made: The pictures.
        files: PNGs of them.
        note: Why the pictures were taken at another size; empty if they were not.
        command: A command line that makes the same, of a folder of the same pictures.
    """

    made: Made
    files: list[Path]
    note: str
    command: str


def sample(
    studio: Studio,
    pictures: Sequence[str | Path] | None,
    folder: str,
    method: str,
    size: int | None,
    count: int,
    steps: int,
    seed: int,
) -> Generator[Step | None, None, Denoised]:
    """Sample from pictures without a network.

    Args:
        studio: For its folder; its model has no part in it.
        pictures: Files, if no folder is named.
        folder: A folder of pictures on this machine, or empty.
        method: A name in `METHODS`.
        size: Side in pixels that pictures are cropped to; None: what fits them and the method.
        count: How many pictures to make.
        steps: Sampling steps.
        seed: Of the first one.

    Raises:
        ValueError: there are no pictures, or they do not suit the method.
        FileNotFoundError: there is no such folder.
    """
    if folder.strip() and not Path(folder.strip()).is_dir():
        raise FileNotFoundError(f"no folder {folder.strip()}")
    source = Path(folder.strip()) if folder.strip() else studio.gathered(pictures)
    count, steps, seed = whole("how many", count), whole("steps", steps), whole("seed", seed)
    target = studio.fresh_folder("denoised")
    files = [target / f"picture-{i}.png" for i in range(count)]
    side = None if size is None else whole("side in pixels", size)
    line = lines.command(
        "denoise",
        folder.strip() or "pictures/",
        {
            "-m": method,
            "--size": side,
            "-n": count,
            "--steps": steps,
            "--seed": seed,
            "-o": "picture.png",
        },
    )

    def work(emit: Emit) -> Denoised:
        notes: list[str] = []

        def through(timesteps: Iterable[Any]) -> Iterator[Any]:
            for i, timestep in enumerate(timesteps):
                emit(Step(i, steps))
                yield timestep

        made = denoise(
            source,
            method,
            side,
            count=count,
            steps=steps,
            seed=seed,
            tell=notes.append,
            progress=through,
        )
        made.save(files)
        return Denoised(made, files, " ".join(notes), line)

    return streamed(work, studio.lock)
