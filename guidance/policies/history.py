"""Past predictions of a run: only those that later steps use, combined in one weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import to_device
from ..ops import linear_history
from ..prediction import accumulate
from .fill import Weights

Variable = tuple[str, int]  # (a key of KINDS, step)
KINDS = {"cond": "conditional", "uncond": "unconditional", "guided": "guided"}


class HistoryPlan:
    """Where each prediction is kept, and for how long.

    A prediction gets a place when it is made and gives it back after the last step that uses it;
    one that no step uses is never kept.

    Args:
        weights: The sum that estimates each step's unconditional prediction, or forecasts its
            guided one; None where neither is done.

    Attributes:
        places: Number of predictions kept at the same time, at most.
        table: Weight of every place at every step, with shape (T, places), float64.

    Raises:
        ValueError: a sum uses a prediction that comes after its step.
    """

    def __init__(self, weights: Sequence[Weights | None]) -> None:
        self.weights = weights
        last_use = self._last_uses()
        self.place_of: dict[Variable, int] = {}
        free: list[int] = []
        held: dict[Variable, int] = {}
        rows: list[dict[int, float]] = []
        self.places = 0

        def take(variable: Variable) -> None:
            if not free:
                free.append(self.places)
                self.places += 1
            held[variable] = self.place_of[variable] = free.pop()

        for step, sum_ in enumerate(weights):
            if ("cond", step) in last_use:
                take(("cond", step))
            rows.append({held[v]: weight for v, weight in _terms(sum_)})
            for variable in [v for v in held if last_use[v] <= step]:
                free.append(held.pop(variable))
            for kind in ("uncond", "guided"):
                if (kind, step) in last_use:
                    take((kind, step))
        self.table = torch.zeros(len(weights), self.places, dtype=torch.float64)
        for step, row in enumerate(rows):
            for place, weight in row.items():
                self.table[step, place] = weight

    def _last_uses(self) -> dict[Variable, int]:
        last: dict[Variable, int] = {}
        for step, sum_ in enumerate(self.weights):
            for variable, _ in _terms(sum_):
                kind, made = variable
                if not 0 <= made <= step - (kind != "cond"):
                    raise ValueError(f"the estimate of step {step} uses {kind} of step {made}")
                last[variable] = step
        return last


class History:
    """The predictions kept during one run, in one tensor (places, B, \\*)."""

    def __init__(self, plan: HistoryPlan) -> None:
        self.plan = plan
        self.kept: Tensor | None = None
        self.table = plan.table
        self.written: dict[int, Variable] = {}

    def write(self, kind: str, step: int, prediction: Tensor) -> None:
        """Keep a prediction, with shape (B, \\*), if a later sum (or this step's) uses it."""
        place = self.plan.place_of.get((kind, step))
        if place is None:
            return
        if self.kept is None:
            # Zeros: an unused place has weight 0, which would not silence a NaN.
            self.kept = prediction.new_zeros(self.plan.places, *prediction.shape)
            table = self.plan.table.to(accumulate(self.kept).dtype)  # before: MPS has no float64
            self.table = to_device(table, prediction.device)
        self.kept[place].copy_(prediction)
        self.written[place] = (kind, step)

    def estimate(self, step: int) -> Tensor:
        """The weighted sum of `step`, with shape (B, \\*), accumulated in float32 at least.

        Raises:
            ValueError: a prediction that it needs was never made.
        """
        sum_ = self.plan.weights[step]
        for variable, _ in _terms(sum_):
            if self.written.get(self.plan.place_of[variable]) != variable:
                kind, made = variable
                raise ValueError(
                    f"the estimate of step {step} needs the {KINDS[kind]} prediction of step "
                    f"{made}, at which the pipeline did not guide"
                )
        total = linear_history(self.kept, self.table[step])
        return total + sum_.intercept if sum_.intercept else total


def _terms(sum_: Weights | None) -> list[tuple[Variable, float]]:
    if sum_ is None:
        return []
    return [
        ((kind, step), weight)
        for kind in KINDS
        for step, weight in getattr(sum_, kind).items()
        if weight != 0
    ]
