"""Pipelines that evaluate the branches of a step in two calls."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Call, prediction_of, with_prediction
from .driver import Driver
from .layouts import LayoutError, TwoCalls


@dataclass
class Pending:
    """A conditional prediction that waits for the unconditional call of the same step.

    Args:
        call: The conditional call.
        rows: The samples whose unconditional branch is to be evaluated.
        cond: The conditional prediction; the guided one if the whole step is skipped.
        returned: What the pipeline holds of it; None if the whole step is skipped.
    """

    call: Call
    rows: list[int]
    cond: Tensor
    returned: weakref.ref[Tensor] | None


class InTurnDriver(Driver):
    """The branches in two calls, as `TwoCalls` describes."""

    layout: TwoCalls
    pending: Pending | None = None

    def evaluate(self, call: Call) -> Any:
        """Evaluate the conditional call; of the unconditional one only the wanted samples."""
        if not self.begun:
            self.start(call.rows, call)
        pending = self.pending
        if pending is not None and _same(call.sample, pending.call.sample):
            self.pending = None
            return self._unconditional(call, pending)
        self.close_step()
        rows = self.plan(call, call.sample)
        if self.run.all_skipped:
            guided = self.reused(call.sample)
            self.pending = Pending(call, rows, guided, None)
            return with_prediction(self.example, guided)
        skipped = self.run.skipped
        output = call([i for i in range(call.rows) if i not in skipped] if skipped else None)
        if not isinstance(output, tuple):
            raise LayoutError(f"expected a tuple from the denoiser, got {type(output).__name__}")
        self.remember(output)
        if skipped:
            output = with_prediction(output, self.with_skipped(prediction_of(output), call.sample))
        returned = prediction_of(output)
        # A copy: the pipeline, or a cache in the network, may go on using the tensor itself.
        self.pending = Pending(call, rows, returned.clone(), weakref.ref(returned))
        return output

    def _unconditional(self, call: Call, pending: Pending) -> Any:
        if pending.returned is None:
            return with_prediction(self.example, pending.cond)
        returned, rows, cond = pending.returned(), pending.rows, pending.cond
        uncond = None
        if rows:
            uncond = prediction_of(call(None if len(rows) == self.run.batch else rows))
        pair = self.combine(rows, cond, uncond, pending.call.sample)
        if pair[0] is not cond:
            if returned is None:
                raise LayoutError(
                    "the pipeline no longer holds the conditional prediction it was given, so the "
                    "guided one cannot be put in its place"
                )
            guided = pair[0]
            if self.layout.norm_matched(self.options):
                lengths = [torch.norm(pred, dim=-1, keepdim=True) for pred in (cond, guided)]
                guided = guided * (lengths[0] / lengths[1])
            returned.copy_(guided)
            return (guided,)
        return (pair[1],)

    def close_step(self) -> None:
        """Close a step whose unconditional call never came: it was not guided."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            if pending.returned is not None:
                self.unguided(pending.call, pending.cond)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs belong to one step: one tensor as a rule, else equal ones."""
    if a.shape != b.shape:
        return False
    # Both are alive, so equal addresses mean one tensor; values are compared only where not.
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
