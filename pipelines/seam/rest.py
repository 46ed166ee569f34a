"""Steps at which nothing is left to decide: the conditional branch alone, for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...guidance import Run
from .calls import Made, RowsError, Selection, prediction_of, with_rows
from .patterns import Pattern


class Rest:
    """The rest of a run whose policy is settled, one call of the network a step.

    Every step is like the one before, so that what it needs is made ready once.

    Args:
        run: It.
        pattern: Of a step.
        first: Name of the network's first input; None where it comes by its place.
    """

    def __init__(self, run: Run, pattern: Pattern, first: str | None) -> None:
        assert pattern.main is not None
        self.run, self.branches, self.first = run, pattern.branches, first
        start = pattern.main * run.batch
        keep = list(range(start, start + run.batch))
        self.select = Selection(keep, pattern.branches * run.batch, listed=False)
        self.known: dict[Any, tuple[Any, Any]] = {}  # input -> what it was, and the rows of that

    def __call__(self, network: Callable, args: tuple, kwargs: dict[str, Any]) -> Made | None:
        """A call of the network on the conditional rows; None if it is of other rows."""
        first = args[0] if self.first is None else kwargs[self.first]
        if first.shape[0] != self.select.rows:
            return None
        chosen = [self.of(i, value) for i, value in enumerate(args)]
        named = {name: self.of(name, value) for name, value in kwargs.items()}
        output = network(*chosen, **named)
        if type(output) is tuple and len(output) == 1:
            cond = output[0]
            if cond.shape[0] != self.run.batch:
                raise RowsError("x")
            both = torch.cat([cond] * self.branches)
            return Made(self.select.rows, (both,), both)
        output = with_rows([output], lambda t: torch.cat(t * self.branches), [self.run.batch])
        return Made(self.select.rows, output, prediction_of(output))

    def of(self, name: Any, value: Any) -> Any:
        """The conditional rows of an input."""
        known = self.known.get(name)
        if known is not None and known[0] is value:
            return known[1]
        chosen = self.select(value, name)
        if value is None or isinstance(value, (Tensor, bool, int, float, str)):
            self.known[name] = value, chosen
        return chosen
