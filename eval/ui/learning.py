"""What the third tab does: a word from pictures, by forward passes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...pipelines.personalization import Personalizer
from ...pipelines.personalization.curve import curve
from ...pipelines.personalization.output import PREVIEWS, TOKEN
from ...pipelines.personalization.training import TokenTrainer
from . import lines
from .background import Emit, streamed
from .studio import Studio, whole


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
    steps = whole("steps", steps)
    word, initializer, template = word.strip(), initializer.strip(), template.strip()
    folder, source = studio.fresh_folder("word"), studio.gathered(pictures)

    def work(emit: Emit) -> Word:
        last = Learning(0, steps, (), ())
        emit(last)

        def look(trainer: TokenTrainer) -> None:
            nonlocal last
            losses = tuple((step, loss) for step, _, loss in trainer.evaluations)
            found = sorted((folder / PREVIEWS).glob("*.png"))
            shown = tuple((file, f"step {int(file.stem[5:])}") for file in found)
            last = Learning(trainer.step, steps, losses, shown)
            emit(last)

        with _forgotten(studio, word):
            token = Personalizer(studio.pipe).fit(
                source,
                word,
                initializer,
                steps=steps,
                templates=[template],
                preview_prompt=template,
                output=folder,
                seed=seed,
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
            "--steps": steps,
            "--template": template,
            "--preview-prompt": template,
            "--seed": seed,
            **studio.loading,
        },
    )
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
