"""How long a run takes, from one measured step, and the number of steps that fits into a time."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ...guidance.zeroth_order import GradientSearch, WordSearch
from .loss import TokenBatch
from .training import TokenTrainer

PREVIEW_STEPS = 20  # sampling steps of a preview, unless its options say otherwise
EVALUATIONS = 20  # held-out losses of a run, at most
HELD_OUT_SHARE = 0.25  # their most forward passes, in those of the steps
PREVIEWS = 4  # of a run


@dataclass(frozen=True)
class Schedule:
    """When a run looks at its token, and what that costs.

    Args:
        rows: Forward passes of a step.
        held_out_rows: Of a held-out loss; 0 is none.
        preview_rows: Of a preview; 0 is none.
        evaluate_every: Steps between held-out losses; None is a twentieth of the run, and so
            many that they take a quarter of the steps' forward passes at most.
        preview_every: Steps between previews; None is a quarter of the run.
    """

    rows: int
    held_out_rows: int
    preview_rows: int
    evaluate_every: int | None = None
    preview_every: int | None = None

    def evaluation_interval(self, steps: int) -> int:
        """Steps between held-out losses in a run of so many."""
        seldom = round(self.held_out_rows / (HELD_OUT_SHARE * self.rows))
        return self.evaluate_every or max(1, steps // EVALUATIONS, seldom)

    def preview_interval(self, steps: int) -> int:
        """Steps between previews."""
        return self.preview_every or max(1, -(-steps // PREVIEWS))

    def forwards(self, steps: int) -> int:
        """Forward passes of a run, with those of held-out losses and previews."""
        evaluations = 1 + -(-steps // self.evaluation_interval(steps))
        previews = -(-steps // self.preview_interval(steps))
        extra = evaluations * self.held_out_rows + previews * self.preview_rows
        return steps * self.rows + extra

    def steps_within(self, seconds: float, seconds_a_pass: float) -> int:
        """The most steps that take no longer; 0 if even one does."""
        low, high = 0, int(seconds / (seconds_a_pass * self.rows))
        while low < high:
            middle = (low + high + 1) // 2
            if self.forwards(middle) * seconds_a_pass <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


def seconds_a_pass(trainer: TokenTrainer, points: Tensor, batch: TokenBatch) -> float:
    """Seconds of one forward pass, measured on one step's; the same in every process.

    The pass before that prepares what is made once. Passes of several processes run beside each
    other, so that one of them takes a share of the time.
    """
    trainer.evaluate(points[:1], batch.rows(slice(0, 1)))
    begin = time.perf_counter()
    trainer.evaluate(points, batch)
    passed = torch.tensor(time.perf_counter() - begin)
    main = trainer.process.is_main_process
    return trainer.shared(passed * main).item() / (len(points) * len(batch))


def word_steps(search: GradientSearch) -> int:
    """Steps that a search takes for comparing known words."""
    search, count = copy.deepcopy(search), 0
    while isinstance(search, WordSearch) and not search.done:
        search.tell(torch.zeros(len(search.ask())))
        count += 1
    return count


def duration(seconds: float) -> str:
    """Seconds in words, to two digits: 45 s, 12 min, 8 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
