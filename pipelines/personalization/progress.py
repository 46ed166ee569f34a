"""What one sees of a run while it goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

from .output import write_losses
from .schedule import duration
from .training import TokenTrainer


class Progress:
    """Lines and a bar on stderr; files of losses at every held-out loss.

    Args:
        trainer: Whose run it is.
        steps: Of the whole run.
        folder: Where losses and curve go; None writes none.
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
        step = "descent"
        if self.trainer.comparing_words:
            leading = ", ".join(word for word, _ in self.trainer.leading())
            step = "comparing known words" + (f", leading: {leading}" if leading else "")
        self.bar.set_description_str(name or step)

    def advanced(self, compared: bool) -> None:
        """After a step; `compared`: it was one of known words."""
        self.bar.update()
        if not compared:
            return
        self.phase()
        if self.trainer.comparing_words:
            return
        better = [f"{word} ({difference:+.4f})" for word, difference in self.trainer.leading()]
        if better:
            self.say(
                f"step {self.trainer.step}: the descent begins at the mean of the given word and "
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
        self.say(
            f"step {step}: held-out loss {value:.4f}, best {best:.4f} of step {trainer.best_step}; "
            f"{forwards} forward passes, {duration(time.monotonic() - self._began)}"
        )
        self.bar.set_postfix({"held out": f"{value:.4f}", "best": f"{best:.4f}"})
        self.phase()
        if self.folder is not None:
            write_losses(trainer, self.folder)
