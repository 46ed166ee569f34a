"""The folder of a run: tried before the work; the token and the files beside it."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ...guidance.files import atomic, write_json, write_text
from .curve import curve
from .files import save_token
from .training import TokenTrainer

TOKEN = "learned_embeds.safetensors"
CHECKPOINT = "checkpoint.safetensors"
RECORD = "personalization.json"
LOSSES = "losses.jsonl"
CURVE = "curve.png"
PREVIEWS = "previews"


@dataclass(frozen=True)
class LearnedToken:
    """The result of a run.

    Args:
        placeholder: The new word.
        vectors: Its embeddings, with shape (m, d), float32; d is the sum of the text encoders'
            widths. Those of the lowest held-out loss.
        widths: The text encoders' embedding widths.
        steps: Steps taken.
        forwards: Rows that the steps put through the denoiser.
        losses: Mean loss of each step's points; NaN where no row had a finite one.
        evaluations: (step, forwards, held-out loss), the first one of the initial token.
        seconds: Wall time of this call.
        learned: Whether a later token has a lower held-out loss than the initial one; without
            held-out losses, whether there was an update. If not, `vectors` are the initial ones.
    """

    placeholder: str
    vectors: Tensor
    widths: tuple[int, ...]
    steps: int
    forwards: int
    losses: list[float]
    evaluations: list[tuple[int, int, float]]
    seconds: float
    learned: bool

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The vectors for each text encoder, with shapes (m, width)."""
        return self.vectors.split(self.widths, dim=1)


def attempt(what: str, write: Callable[[], Any]) -> None:
    """Write something that a run can do without; what prevents it becomes a warning."""
    try:
        write()
    except Exception as error:  # a preview runs the user's pipeline: anything may go wrong
        warnings.warn(f"{what} cannot be written ({error}); the run goes on without", stacklevel=2)


def try_folder(folder: Path) -> None:
    """Make an output folder and write to it; OSError where the run could not.

    Raises:
        OSError: the folder cannot be made or written to, or a folder is where a file will be.
    """
    for name in (TOKEN, CHECKPOINT, RECORD, LOSSES, CURVE):
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder, expected a file to write")
    if (folder / PREVIEWS).is_file():
        raise NotADirectoryError(f"{folder / PREVIEWS} is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        reason = f"the output folder cannot be written to ({error.strerror})"
        raise type(error)(error.errno, reason, str(folder)) from error


def save_result(token: LearnedToken, folder: Path) -> None:
    """Write the token, if anything was learned, and how it came about.

    Where the folder can no longer be written to, the token goes to a temporary one.
    """
    losses = [(*at, loss if math.isfinite(loss) else None) for *at, loss in token.evaluations]
    record = {name: getattr(token, name) for name in ("placeholder", "steps", "forwards")}
    record |= {"learned": token.learned, "evaluations": losses}
    attempt(RECORD, lambda: write_json(folder / RECORD, record))
    if not token.learned:
        return
    try:
        save_token(folder / TOKEN, token.parts, token.placeholder)
    except OSError as error:
        refuge = Path(tempfile.mkdtemp(prefix="pilotage-")) / TOKEN
        save_token(refuge, token.parts, token.placeholder)
        warnings.warn(f"{error}; the token is in {refuge}", stacklevel=2)


def write_losses(trainer: TokenTrainer, folder: Path) -> None:
    """The losses so far, a line of JSON for each step, and the curve of the held-out ones.

    They follow from the trainer's state alone, so that a run that was killed has the same ones.
    """
    held_out = {step: (forwards, loss) for step, forwards, loss in trainer.evaluations}
    lines = []
    for step, loss in enumerate([None, *trainer.losses]):
        line: dict[str, Any] = {"step": step}
        if loss is not None:
            line["loss"] = loss if math.isfinite(loss) else None
        if step in held_out:
            forwards, value = held_out[step]
            line |= {"forwards": forwards, "held_out": value if math.isfinite(value) else None}
        lines.append(json.dumps(line) + "\n")
    attempt(LOSSES, lambda: write_text(folder / LOSSES, "".join(lines)))
    if held_out:
        image = curve([(step, loss) for step, _, loss in trainer.evaluations])
        attempt(CURVE, lambda: _write_image(folder / CURVE, image))


def _write_image(path: Path, image: Image.Image) -> None:
    with atomic(path) as partial:
        image.save(partial)


class Previews:
    """Pictures of the best token so far, each token once, under the step it is of.

    Args:
        draw: Makes the picture of the trainer's best token.
        folder: Of the run.
        fresh: Whether the run begins anew: pictures of another one are removed.
    """

    def __init__(self, draw: Callable[[], Image.Image], folder: Path, fresh: bool) -> None:
        self._draw, self._folder, self._failed = draw, folder / PREVIEWS, False
        for old in self._folder.glob("step-*.png") if fresh else ():
            old.unlink()

    def write(self, step: int) -> None:
        """Make the picture unless it is there; one that fails is the last."""
        path = self._folder / f"step-{step:06d}.png"
        if self._failed or path.is_file():
            return
        self._failed = True
        attempt(f"preview {path.name}", lambda: self._make(path))

    def _make(self, path: Path) -> None:
        _write_image(path, self._draw())
        self._failed = False
