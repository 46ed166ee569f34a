"""Pipelines that call their network once a branch, with one call for all branches instead."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...guidance.prediction import accumulate
from .calls import LAYERS_FIRST, SAMPLES, Call, is_by_row, is_shared, prediction_of, with_rows
from .deferred import DeferringDriver, placeholder, shapes_of, tensors_of
from .hooks import check_no_caches
from .layouts import LayoutError
from .patch import unwrapped
from .patterns import Pattern

# What one call may differ by from several: rounding, or this share of what the branches do.
ROUNDING = 64.0
SHARE = 0.05


class Unlike(ValueError):
    """Inputs of two calls that one call cannot have together."""


class BatchingDriver(DeferringDriver):
    """One call of one pipeline whose branches are evaluated together.

    At the first step that is evaluated so, it is evaluated one branch after the other, too, and
    both have to give the same to rounding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wish = "batch_branches=True"
        self.compared = False  # whether they did

    def begin_step(self, call: Call) -> None:
        """See that no cache holds the rows of one branch, before the first evaluation."""
        if self.run is None:
            check_no_caches([unwrapped(getattr(self.pipe, n)) for n in self.denoisers], self.wish)
        super().begin_step(call)

    def output_of(self, place: int, call: Call, like: Any) -> Any:
        """The output, if its shape is not known yet."""
        return call() if like is None else placeholder(like)

    def complete(self) -> None:
        """Evaluate the calls of the step as one."""
        if not self.waits:
            return
        name = type(self.pipe).__name__
        try:
            output = merged(self.calls)()
        except (Unlike, RuntimeError) as error:
            raise LayoutError(
                f"the branches of {name} cannot be evaluated in one call: {error}. Leave out "
                f"{self.wish}"
            ) from error
        rows = [call.rows for call in self.calls]
        ends = list(itertools.accumulate(rows))
        cuts = [
            with_rows([output], functools.partial(_some, start=end - n, stop=end), [ends[-1]])
            for n, end in zip(rows, ends, strict=True)
        ]
        if shapes_of(cuts) != shapes_of(self.outputs):
            raise LayoutError(self.unforeseen())
        for target, source in zip(tensors_of(self.outputs), tensors_of(cuts), strict=True):
            target.copy_(source)
        if not self.compared:
            self.compare()
            self.compared = True

    def compare(self) -> None:
        """Evaluate one branch after the other, and raise LayoutError if that gives another."""
        together = [accumulate(prediction_of(output)) for output in self.outputs]
        in_turn = [prediction_of(call()) for call in self.calls]
        eps = torch.finfo(in_turn[0].dtype).eps
        apart = [accumulate(prediction) for prediction in in_turn]
        error = max(float((a - b).norm()) for a, b in zip(together, apart, strict=True))
        size, effect = float(apart[0].norm()), float((apart[0] - apart[-1]).norm())
        if not error <= max(ROUNDING * eps * size, SHARE * effect):
            raise LayoutError(
                f"the branches of {type(self.pipe).__name__} give something else in one call than "
                f"in several (a difference of {error:.2g}, where they differ by {effect:.2g}): "
                f"leave out {self.wish}"
            )

    def check_pattern(self, run: Any, pattern: Pattern) -> None:
        """Refuse what a pattern has no place for, or has nothing to put together."""
        super().check_pattern(run, pattern)
        if not self.defers(pattern):
            name = type(self.pipe).__name__
            why = "evaluates its branches in one call already"
            if len(pattern.calls) > 1:
                why = "calls its network for something else than a branch as well"
            raise LayoutError(f"{name} {why}: leave out {self.wish}")


def _some(tensors: list[Tensor], start: int, stop: int) -> Tensor:
    return tensors[0][start:stop]


def merged(calls: Sequence[Call]) -> Call:
    """Calls of one network as one call with the rows of all.

    Raises:
        Unlike: their inputs differ in something that is not per row, or in shape.
    """
    first = calls[0]
    if any(call.network is not first.network for call in calls):
        raise Unlike("they are evaluated by different networks")
    if any(call.listed for call in calls):
        raise Unlike("their samples come as lists")
    names = first.names
    inputs = [dict(zip(names, c.args, strict=False)) | c.kwargs for c in calls]
    for given in inputs:
        if odd := given.keys() ^ inputs[0].keys():
            raise Unlike(f"only some of them are given {', '.join(sorted(odd))}")
    masked = any("mask" in name and isinstance(v, Tensor) for name, v in inputs[0].items())
    joined = {
        name: _joined(name, [given[name] for given in inputs], first.rows, masked)
        for name in inputs[0]
    }
    args = tuple(joined.pop(name) for name in names[: len(first.args)])
    return Call(first.network, args, joined)


def _joined(name: Any, values: list[Any], rows: int, masked: bool) -> Any:
    """The values of one input as one value, of calls with `rows` rows each."""
    first = values[0]
    if all(value is first for value in values) and not isinstance(first, (Tensor, list, Mapping)):
        return first
    if any(type(value) is not type(first) for value in values):
        raise Unlike(f"their {name} are of different types")
    if isinstance(first, Tensor):
        return _joined_tensors(name, values, rows, masked)
    if is_by_row(first):
        raise Unlike(f"their {name} counts rows")
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise Unlike(f"their {name} have different names in them")
        return {k: _joined(k, [v[k] for v in values], rows, masked) for k in first}
    if isinstance(first, list) and name in SAMPLES and len(first) == rows:
        return sum(values, [])
    if isinstance(first, (list, tuple)) and any(isinstance(item, Tensor) for item in first):
        if any(len(value) != len(first) for value in values):
            raise Unlike(f"their {name} have different lengths")
        inner = None if is_shared(name) else name
        items = [
            _joined(name if inner is None else f"{name} {i}", list(group), rows, masked)
            for i, group in enumerate(zip(*values, strict=True))
        ]
        return type(first)(items)
    if any(value != first for value in values):
        raise Unlike(f"their {name} differ: {values}")
    return first


def _joined_tensors(name: Any, values: list[Tensor], rows: int, masked: bool) -> Tensor:
    first = values[0]
    axis = 1 if name in LAYERS_FIRST else 0
    each = first.shape[axis] // rows if first.ndim > axis else 0
    by_row = each > 0 and first.shape[axis] % rows == 0 and (each == 1 or first.ndim > 2)
    if is_shared(name) or not by_row:
        if all(v is first or (v.shape == first.shape and torch.equal(v, first)) for v in values):
            return first
        raise Unlike(f"their {name} differ")
    if masked and not axis and first.ndim > 1 and "encoder" in str(name):
        longest = max(value.shape[1] for value in values)
        values = [pad(v, [0, 0] * (v.ndim - 2) + [0, longest - v.shape[1]]) for v in values]
    if any(value.shape != values[0].shape for value in values):
        shapes = " and ".join(str(tuple(value.shape)) for value in values)
        raise Unlike(f"their {name} have the shapes {shapes}")
    return torch.cat(values, axis)
