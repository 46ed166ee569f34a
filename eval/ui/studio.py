"""What the buttons of the page do with the model; nothing here knows of the page."""

from __future__ import annotations

import inspect
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...guidance import Trace
from ...pipelines.personalization.files import add_token, remove_token
from ...pipelines.seam.noise_levels import knows_levels
from ..comparison.cost import update_norms, x0_factor
from ..comparison.evaluation import effective_guidance
from ..comparison.plan import Samples, Setting
from ..generation import Made, generate
from ..metrics.images import saturation, to_tensor
from ..options import device_of
from . import lines
from .background import Emit, streamed
from .controls import methods
from .previews import Previews

REMEMBERED = 64  # runs of plain guidance that others are measured by


@dataclass(frozen=True)
class Wish:
    """A picture to make.

    Args:
        prompt: What it shows.
        negative: What it shall not show.
        seed: Of its noise.
        guidance: As text.
        scale: w; 1 is no guidance.
        steps: Sampling steps.
    """

    prompt: str
    negative: str
    seed: int
    guidance: str
    scale: float
    steps: int

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the picture shall show")
        whole("seed", self.seed)
        _ = self.setting  # it checks scale and steps

    @property
    def setting(self) -> Setting:
        """What it would be in a comparison."""
        return Setting(self.guidance, self.scale, self.steps)


@dataclass(frozen=True)
class Step:
    """News of a run: steps done, of how many, and the picture so far, if that was drawn."""

    done: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Picture:
    """A picture, and what there is to say about it.

    Args:
        wish: What was asked for.
        image: The picture.
        samples: The file (a PNG with its settings inside), and what it cost.
        saturation: Mean saturation of its pixels, 0 to 1.
        trace: One row a step: ``step``, ``evaluations``, ``cosine``, ``update``; the last two None
            where they were not measured.
        command: A command line that writes the same file.
        python: Lines of Python that make the same picture.
    """

    wish: Wish
    image: Image.Image
    samples: Samples
    saturation: float
    trace: list[dict[str, Any]]
    command: str
    python: str


class Studio:
    """A model, and a folder for what is made of it.

    One thing is done at a time: who comes meanwhile waits.

    Args:
        pipe: A guided text-to-image pipeline, on its device.
        folder: For everything written; whoever made it deletes it.
        model: Folder or hub name of the pipeline; None: the embedded model.
        dtype: The precision that it was loaded with, as `load_on` takes it.
        tokens: Files of learned words that the pipeline is to know.

    Raises:
        ValueError: the pipeline takes no prompt.
    """

    def __init__(
        self,
        pipe: Any,
        folder: Path,
        model: str | None = None,
        dtype: str = "auto",
        tokens: Iterable[Path] = (),
    ) -> None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in parameters or "guidance" not in parameters:
            raise ValueError(
                f"the page is for text-to-image models; {type(pipe).__name__} takes no prompt"
            )
        self.pipe, self.folder, self.model, self.dtype = pipe, folder, model, dtype
        self.lock = threading.Lock()
        self.methods = methods(pipe)
        self.words: dict[str, Path] = {}
        for file in tokens:
            self.know(file)
        self._plain: dict[Any, Samples] = {}
        pipe.set_progress_bar_config(disable=True)

    @property
    def loading(self) -> dict[str, str | None]:
        """Options with which commands load the same pipeline; None leaves one out."""
        device = str(self.pipe.device)
        return {
            "--model": self.model,
            "--dtype": None if self.dtype == "auto" else self.dtype,
            "--device": None if device == str(device_of("auto")) else device,
        }

    def picture(self, wish: Wish) -> Generator[Step | None, None, Picture]:
        """Make a picture; yields `Step` as it goes, None where there is no news."""
        return streamed(lambda emit: self._picture(wish, emit), self.lock)

    def know(self, file: Path) -> None:
        """Let prompts contain the word of a token file."""
        self.words[add_token(self.pipe, file)[0]] = file

    def forget(self, word: str) -> Path | None:
        """Undo `know`; the file of the word, None if it was not known."""
        if word in self.words:
            remove_token(self.pipe, word)
        return self.words.pop(word, None)

    def fresh_folder(self, name: str) -> Path:
        """A new folder for results, in one of that name."""
        (self.folder / name).mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.folder / name))

    def gathered(self, pictures: Sequence[str | Path] | None) -> Path:
        """A new folder with copies of pictures, in their order.

        Raises:
            ValueError: there are none.
        """
        if not pictures:
            raise ValueError("no pictures: drop some first")
        folder = self.fresh_folder("pictures")
        for i, file in enumerate(pictures):
            name = re.sub(r"[^\w.-]+", "-", Path(file).name)
            shutil.copyfile(file, folder / f"{i:04d}-{name}")
        return folder

    def used_words(self, *texts: str) -> dict[str, Path]:
        """The learned words in some texts, with their files."""
        return {word: file for word, file in self.words.items() if any(word in t for t in texts)}

    def _picture(self, wish: Wish, emit: Emit) -> Picture:
        emit(Step(0, wish.steps))
        words = self.used_words(wish.prompt, wish.negative)
        detailed = knows_levels(self.pipe.scheduler)
        previews = Previews(self.pipe, lambda *news: emit(Step(*news)))
        begin = time.perf_counter()
        made = generate(
            self.pipe,
            wish.prompt,
            wish.guidance,
            wish.scale,
            wish.steps,
            [wish.seed],
            negative=wish.negative,
            model=self.model,
            words=list(words),
            detailed_trace=detailed,
            **previews.options(wish.steps),
        )
        seconds = time.perf_counter() - begin
        file = self.fresh_folder("picture") / "picture.png"
        made.save([file])
        trace, guidance = self.pipe.guidance_trace, self._guidance(wish)
        update = update_norms(trace, guidance, self.pipe.scheduler) if detailed else None
        samples = Samples(wish.setting, [file], [wish.prompt], trace.nfe, update, seconds)
        if guidance.is_plain:
            self._remember(wish, samples)
        return Picture(
            wish,
            made.images[0],
            samples,
            saturation(to_tensor(made.images)).item(),
            self._rows(wish, trace),
            self._command(wish, words),
            self._python(wish, made, words),
        )

    def effective(self, picture: Picture) -> float | None:
        """Effective guidance of a picture (see `comparison`).

        It is measured by plain guidance of the same prompt, noise, scale and steps; None where that
        has not been run, or the scheduler's noise levels are not known.
        """
        wish = picture.wish
        plain = self._plain.get(self._same(wish))
        if self._guidance(wish).is_plain:
            return wish.scale
        return None if plain is None else effective_guidance(picture.samples, plain)

    def _guidance(self, wish: Wish) -> Any:
        return self.pipe.resolve_guidance("cfg" if wish.scale == 1 else wish.guidance)

    def _same(self, wish: Wish) -> tuple[Any, ...]:
        """What plain guidance must have in common with a wish to be measured by."""
        files = self.used_words(wish.prompt, wish.negative).values()
        return (wish.prompt, wish.negative, wish.seed, wish.scale, wish.steps, *files)

    def _remember(self, wish: Wish, samples: Samples) -> None:
        key = self._same(wish)
        self._plain.pop(key, None)
        self._plain[key] = samples
        for old in list(self._plain)[:-REMEMBERED]:
            del self._plain[old]

    def _rows(self, wish: Wish, trace: Trace) -> list[dict[str, Any]]:
        native = self._guidance(wish).rule.space != "x0"
        rows = []
        for step in trace.steps:
            factor = x0_factor(step.noise, self.pipe.scheduler) if native and step.noise else 1.0
            cosine, update = (
                None if values is None or not len(values) else values[0].item()
                for values in (step.gamma, step.update_norm)
            )
            rows.append(
                {
                    "step": step.index + 1,
                    "evaluations": Trace(trace.batch, [step]).nfe[0],
                    "cosine": cosine,
                    "update": None if update is None else factor * update,
                }
            )
        return rows

    def _command(self, wish: Wish, words: dict[str, Path]) -> str:
        options = {
            "-g": wish.guidance,
            "-w": wish.scale,
            "--steps": wish.steps,
            "--seed": wish.seed,
            "--negative": wish.negative or None,
            "--token": [str(file) for file in self._shown(words)],
            **self.loading,
            "-o": "picture.png",
        }
        return lines.command("generate", wish.prompt, options)

    def _python(self, wish: Wish, made: Made, words: dict[str, Path]) -> str:
        (settings,) = made.settings
        arguments: dict[str, Any] = {
            "prompt": [wish.prompt],
            "guidance": "cfg" if wish.scale == 1 else wish.guidance,
            **{name: settings[name] for name in settings if name.endswith("_scale")},
            "num_inference_steps": wish.steps,
        }
        if settings["negative_prompt"] is not None:
            arguments["negative_prompt"] = [settings["negative_prompt"]]
        files = [str(file) for file in self._shown(words)]
        loading = [str(self.pipe.device), self.model]
        loading += [] if self.dtype == "auto" else [self.dtype]
        return lines.python(arguments, wish.seed, loading, files)

    def _shown(self, words: dict[str, Path]) -> list[Path]:
        """Files of words under the names they have when downloaded; of others, their paths."""
        own = self.folder.resolve()
        return [
            Path(file.name) if file.resolve().is_relative_to(own) else file
            for file in words.values()
        ]


def whole(name: str, value: float | None) -> int:
    """The number of a control.

    Raises:
        ValueError: it holds none, or no whole one.
    """
    if value is None or value != int(value):
        raise ValueError(f"{name}: expected a whole number, got {value}")
    return int(value)
