"""What one sees of a run: lines, a bar, and curve, losses and pictures beside the token."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ...guidance.files import atomic, write_text
from .schedule import duration
from .training import TokenTrainer

CURVE = "curve.png"
LOG = "losses.jsonl"
PREVIEWS = "previews"


def attempt(what: str, write: Callable[[], Any]) -> None:
    """Write something that a run can do without; what prevents it becomes a warning."""
    try:
        write()
    except Exception as error:  # a preview runs the user's pipeline: anything may go wrong
        warnings.warn(f"{what} cannot be written ({error}); the run goes on without", stacklevel=2)


class Progress:
    """Lines and a bar on stderr, and the files that show how the held-out loss went.

    Args:
        trainer: Whose run it is.
        steps: Of the whole run.
        folder: Where curve and losses go; None writes none.
        shown: Whether there are lines and a bar.
    """

    def __init__(self, trainer: TokenTrainer, steps: int, folder: Path | None, shown: bool) -> None:
        self.trainer, self.folder, self.shown = trainer, folder, shown
        self._began = time.monotonic()
        self.bar = tqdm(total=steps, initial=trainer.step, unit="step", disable=not shown)
        self.phase()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.shown and text:
            self.bar.write(text, file=sys.stderr)

    def phase(self, name: str = "") -> None:
        """Name what the run does now, before its bar; by default, what its next step does."""
        step = "comparing known words" if self.trainer.comparing_words else "descent"
        self.bar.set_description_str(name or step)

    def advanced(self, compared: bool) -> None:
        """After a step; `compared`: it was one of known words."""
        self.bar.update()
        if not compared or self.trainer.comparing_words:
            return
        self.phase()
        better = [f"{word} ({difference:+.4f})" for word, difference in self.trainer.leading()]
        if better:
            self.say(
                f"step {self.trainer.step}: the descent begins at the mean of the known words "
                f"{', '.join(better)}; in brackets, their loss against the given word's"
            )
        else:
            self.say(
                f"step {self.trainer.step}: no known word is better than the given one; the "
                "descent begins there"
            )

    def evaluated(self) -> None:
        """After a held-out loss: a line, the bar, the files."""
        trainer = self.trainer
        step, forwards, value = trainer.evaluations[-1]
        best = min(e[2] for e in trainer.evaluations)
        leading = ""
        if trainer.comparing_words and trainer.leading():
            leading = f"; leading: {', '.join(word for word, _ in trainer.leading())}"
        self.say(
            f"step {step}: held-out loss {value:.4f}, best {best:.4f} of step {trainer.best_step}; "
            f"{forwards} forward passes, {duration(time.monotonic() - self._began)}{leading}"
        )
        self.bar.set_postfix({"held out": f"{value:.4f}", "best": f"{best:.4f}"})
        self.phase()
        self.write()

    def write(self) -> None:
        """The losses so far, a line each, and the curve; of nothing but the trainer's state."""
        if self.folder is not None and self.trainer.evaluations:
            attempt(LOG, self._write_log)
            attempt(CURVE, self._write_curve)

    def _write_log(self) -> None:
        held_out = {step: (forwards, loss) for step, forwards, loss in self.trainer.evaluations}
        lines = []
        for step, loss in enumerate([None, *self.trainer.losses]):
            line: dict[str, Any] = {"step": step}
            if loss is not None:
                line["loss"] = loss if math.isfinite(loss) else None
            if step in held_out:
                forwards, value = held_out[step]
                line |= {"forwards": forwards}
                line |= {"held_out": value if math.isfinite(value) else None}
            lines.append(json.dumps(line) + "\n")
        assert self.folder is not None
        write_text(self.folder / LOG, "".join(lines))

    def _write_curve(self) -> None:
        assert self.folder is not None
        points = [(step, loss) for step, _, loss in self.trainer.evaluations]
        with atomic(self.folder / CURVE) as partial:
            curve(points).save(partial)


def curve(points: list[tuple[int, float]], size: tuple[int, int] = (640, 400)) -> Image.Image:
    """A picture of held-out losses over steps: a line, the best one marked, the first one dashed.

    Args:
        points: (step, loss), at least one; those that are not finite are left out.
        size: Width and height in pixels.
    """
    points = [point for point in points if math.isfinite(point[1])]
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    left, top, right, bottom = 70, 30, size[0] - 20, size[1] - 40
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    low, high, last = min(losses), max(losses), max(*steps, 1)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / last
        return x, bottom - (bottom - top) * (loss - low) / (high - low)

    for i in range(5):
        loss, step = low + (high - low) * i / 4, round(last * i / 4)
        (_, y), (x, _) = place(0, loss), place(step, low)
        draw.line([(left, y), (right, y)], "#dddddd")
        draw.text((left - 8, y), f"{loss:.4f}", "#444444", font, anchor="rm")
        draw.text((x, bottom + 6), str(step), "#444444", font, anchor="mt")
    draw.text((left, 8), "held-out loss over steps", "black", font)
    first = place(0, losses[0])[1]
    for x in range(left, right, 8):
        draw.line([(x, first), (x + 4, first)], "#999999")
    path = [place(*point) for point in points]
    draw.line(path, "#1f77b4", 2)
    x, y = path[losses.index(min(losses))]
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], "#d62728")
    label = f"best {min(losses):.4f}, step {steps[losses.index(min(losses))]}"
    draw.text((right, 8), label, "#d62728", font, anchor="ra")
    return image


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
        image = self._draw()
        with atomic(path) as partial:
            image.save(partial)
        self._failed = False
