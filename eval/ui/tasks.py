"""What the other tabs do: compare settings, make a word from pictures, denoise."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...guidance.analytic import DENOISERS
from ...pipelines.personalization import Personalizer
from ...pipelines.personalization.curve import curve
from ...pipelines.personalization.output import PREVIEWS, TOKEN
from ...pipelines.personalization.training import TokenTrainer
from ..comparison.comparison import compare, grid
from ..comparison.plan import Plan
from ..generation import Made, denoise
from . import lines
from .background import Emit, streamed
from .studio import Step, Studio

REPORTS = "reports"
MOST_PICTURES = 400  # of one comparison: more is work for the command
METHODS = tuple(DENOISERS)


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    Args:
        page: ``report.html``, in its folder.
        command: A command line that makes the same comparison.
    """

    page: Path
    command: str


@dataclass(frozen=True)
class Learning:
    """How far a word is.

    Args:
        done: Steps done.
        total: Of how many.
        losses: (step, held-out loss) so far, the first one of the word it began from.
        previews: (picture, step) of the best token so far, each once.
    """

    done: int
    total: int
    losses: tuple[tuple[int, float], ...]
    previews: tuple[tuple[Path, str], ...]

    @property
    def curve(self) -> Image.Image | None:
        """The losses as a picture; None before the second."""
        return curve(list(self.losses)) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Word:
    """A learned word; from now on prompts may contain it.

    Args:
        name: The word.
        file: What was learned, to be downloaded.
        last: The end of its making.
        summary: Held-out loss before and after, and what it cost.
        command: A command line that learns the same.
    """

    name: str
    file: Path
    last: Learning
    summary: str
    command: str


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


def comparison(
    studio: Studio,
    prompts: str,
    guidances: Sequence[str],
    scales: str,
    steps: int,
    seeds: int,
    negative: str = "",
) -> Generator[int, None, Report]:
    """Compare settings; yields how many pictures there are, now and then.

    Args:
        studio: The model.
        prompts: One a line.
        guidances: As text.
        scales: Numbers, separated by commas or spaces.
        steps: Sampling steps.
        seeds: Pictures of every prompt.
        negative: What the pictures shall not show.

    Raises:
        ValueError: there is nothing to compare, too much, or something unknown.
    """
    texts = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not texts:
        raise ValueError("no prompts: write one a line")
    try:
        numbers = [float(text) for text in re.split(r"[,;\s]+", scales) if text]
    except ValueError:
        raise ValueError(f"scales must be numbers separated by commas, got {scales!r}") from None
    names = [name.strip() for name in guidances or () if name.strip()]
    settings = grid(names, numbers, (int(steps),))
    if (count := len(settings) * len(texts) * int(seeds)) > MOST_PICTURES:
        raise ValueError(
            f"that would be {count} pictures, more than the {MOST_PICTURES} that the page makes at "
            "once: choose fewer, or use the command"
        )
    for name in names:
        studio.pipe.resolve_guidance(name)
    options = {"negative_prompt": negative or None}
    plan = Plan(texts, settings, range(int(seeds)), options=options)
    folder = studio.fresh_folder(REPORTS)
    line = lines.command(
        "compare",
        "prompts.txt",
        {
            "-g": names,
            "-w": numbers,
            "--steps": int(steps),
            "--seeds": int(seeds),
            "--negative": negative or None,
            "--model": studio.model,
            "-o": "outputs/compare",
        },
    )

    def work(emit: Emit) -> Report:
        compare(studio.pipe, plan, folder, progress=False)
        return Report(folder / "report.html", line)

    with contextlib.closing(streamed(work, studio.lock)) as news:
        while True:
            try:
                next(news)
            except StopIteration as end:
                return end.value
            yield sum(1 for _ in folder.rglob("*.png"))


def learn(
    studio: Studio,
    pictures: Sequence[str | Path] | None,
    word: str,
    initializer: str,
    steps: int,
    template: str,
    seed: int = 0,
) -> Generator[Learning | None, None, Word]:
    """Learn a word from pictures by forward passes; yields `Learning` as it goes.

    Args:
        studio: The model, which knows the word afterwards.
        pictures: Files, of one subject.
        word: The new word.
        initializer: A known word to begin from.
        steps: Steps of the search.
        template: Prompt of the pictures, with {}, in training and in previews.
        seed: Of everything that is drawn.

    Raises:
        ValueError: an input is unusable, or nothing was learned.
    """
    word, initializer, template = word.strip(), initializer.strip(), template.strip()
    folder, source = studio.fresh_folder("word"), studio.gathered(pictures)

    def work(emit: Emit) -> Word:
        last = Learning(0, int(steps), (), ())
        emit(last)

        def look(trainer: TokenTrainer) -> None:
            nonlocal last
            losses = tuple((step, loss) for step, _, loss in trainer.evaluations)
            found = sorted((folder / PREVIEWS).glob("*.png"))
            shown = tuple((file, f"step {int(file.stem[5:])}") for file in found)
            last = Learning(trainer.step, int(steps), losses, shown)
            emit(last)

        with _forgotten(studio, word):
            token = Personalizer(studio.pipe).fit(
                source,
                word,
                initializer,
                steps=int(steps),
                templates=[template],
                preview_prompt=template,
                output=folder,
                seed=int(seed),
                callback=look,
                progress=False,
            )
        first, best = token.evaluations[0][2], min(e[2] for e in token.evaluations)
        if not token.learned:
            raise ValueError(
                f"nothing was learned, held-out loss {first:.4f}: try more steps, another word to "
                "begin from, or a prompt that fits the pictures"
            )
        plain = re.sub(r"[^\w-]+", "", word) or "word"
        file = (folder / TOKEN).rename(folder / f"{plain}.safetensors")
        studio.forget(word)
        studio.know(file)
        cost = f"{token.forwards} forward passes, {token.seconds:.0f} s"
        summary = f"held-out loss {first:.4f} → {best:.4f} ({cost})"
        return Word(word, file, last, summary, line)

    line = lines.command(
        "personalize",
        "pictures/",
        {
            "--token": word,
            "--initializer": initializer,
            "--steps": int(steps),
            "--template": template,
            "--preview-prompt": template,
            "--seed": int(seed),
            "--model": studio.model,
        },
    )
    return streamed(work, studio.lock)


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
    target = studio.fresh_folder("denoised") / "picture.png"
    side = int(size) if size else None
    line = lines.command(
        "denoise",
        folder.strip() or "pictures/",
        {
            "-m": method,
            "--size": side,
            "-n": int(count),
            "--steps": int(steps),
            "--seed": int(seed),
            "-o": "picture.png",
        },
    )

    def work(emit: Emit) -> Denoised:
        notes: list[str] = []

        def through(timesteps: Iterable[Any]) -> Iterator[Any]:
            for i, timestep in enumerate(timesteps):
                emit(Step(i, int(steps)))
                yield timestep

        made = denoise(
            source,
            method,
            side,
            count=int(count),
            steps=int(steps),
            seed=int(seed),
            tell=notes.append,
            progress=through,
        )
        return Denoised(made, made.save(target), " ".join(notes), line)

    return streamed(work, studio.lock)


@contextlib.contextmanager
def _forgotten(studio: Studio, word: str) -> Iterator[None]:
    """Within this context the model does not know the word, so that it can be learned anew."""
    file = studio.forget(word)
    try:
        yield
    finally:
        if file is not None:
            studio.know(file)
