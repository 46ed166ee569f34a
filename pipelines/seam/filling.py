"""Calls of the network of which some rows are evaluated, and what the others are given."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import Tensor

from ...guidance import Decision
from ...guidance.device import row_index
from .calls import Call, prediction_of, with_rows
from .patterns import Pattern

Attention = dict[str, Any]  # a network's attention processors, by name


@dataclass
class Made:
    """What one call of the network gave to the pipeline.

    Args:
        rows: Number of rows.
        output: As the pipeline has it.
        prediction: The prediction in it, with shape (rows, \\*).
        stale: Samples without guidance have another prediction in it than their conditional one.
        more: More was evaluated than was wanted.
    """

    rows: int
    output: Any
    prediction: Tensor
    stale: bool = False
    more: bool = False


def made_of(rows: int, output: Any, stale: bool = False, more: bool = False) -> Made:
    """An output and the prediction in it."""
    return Made(rows, output, prediction_of(output), stale, more)


@dataclass(frozen=True)
class Wanted:
    """What a step evaluates.

    Rows that are not evaluated are given their sample's conditional prediction, so that what the
    pipeline makes of both is that again; where the scale is to be measured on them, and where the
    conditional prediction is not there yet, what they had at the step before.

    Args:
        pattern: Where its branches are.
        batch: Number of samples, B.
        cond: The samples whose conditional branch is evaluated.
        others: The samples whose other branches are evaluated.
        measured: The scale is to be measured where a branch is not evaluated.
        decisions: That this follows from.
    """

    pattern: Pattern
    batch: int
    cond: list[int]
    others: list[int]
    measured: bool
    decisions: Sequence[Decision]

    @functools.cached_property
    def whole(self) -> bool:
        """Whether everything is evaluated."""
        return len(self.others) == len(self.cond) == self.batch

    def of(self, decisions: Sequence[Decision], pattern: Pattern) -> bool:
        """Whether it follows from these very decisions."""
        return self.decisions is decisions and self.pattern is pattern

    def make(
        self, call: Call, before: list[Made], last: Made | None, own: Attention | None
    ) -> Made:
        """Evaluate the wanted rows of a call.

        Args:
            call: The call of the network.
            before: What the calls of this step made before it.
            last: What this call made at the step before, if there was one.
            own: The network's own attention, where perturbed attention has taken its place.
        """
        pattern, batch, count = self.pattern, self.batch, self.pattern.calls[len(before)]
        start = sum(pattern.calls[: len(before)])
        main = -1 if pattern.main is None else pattern.main - start
        wanted = [self.cond if i == main else self.others for i in range(count)]
        keep = [i * batch + row for i, rows in enumerate(wanted) for row in rows]
        has_cond = 0 <= main < count and len(wanted[main]) == batch and not self.measured
        if len(keep) == call.rows:
            return made_of(call.rows, call())
        if has_cond:
            return made_of(call.rows, self.with_cond(self.evaluated(call, keep, own), wanted, main))
        if last is None:  # there is nothing to fill in yet
            return made_of(call.rows, call(), stale=True, more=True)
        filled, stale = self.filled(before, last, start, count)
        if not keep:
            return made_of(call.rows, filled, stale)
        output = self.evaluated(call, keep, own)

        def insert(tensors: list[Tensor]) -> Tensor:
            made, old = tensors
            return old.index_copy(0, row_index(keep, made.device), made.to(old.dtype))

        output = with_rows([output, filled], insert, [len(keep), call.rows])
        return made_of(call.rows, output, stale)

    def evaluated(self, call: Call, keep: list[int], own: Attention | None) -> Any:
        """The network's output for some rows."""
        if own is None:
            return call(keep)
        # Perturbed attention takes the batch for its branches: the samples that have all of them
        # make one call, those that have one another, without it.
        whole = [row for row in keep if row % self.batch in self.others]
        alone = [row for row in keep if row % self.batch not in self.others]
        outputs = [call(whole)] if whole else []
        if alone:
            with _attention(call.network, own):
                outputs.append(call(alone))
        order = [*whole, *alone]
        places = [order.index(row) for row in keep]
        sizes = [len(rows) for rows in (whole, alone) if rows]
        return with_rows(outputs, lambda t: torch.cat(t)[row_index(places, t[0].device)], sizes)

    def with_cond(self, output: Any, wanted: list[list[int]], main: int) -> Any:
        """An output of all rows, of one that has the rows `wanted` of its branches."""
        begin = sum(map(len, wanted[:main]))

        def fill(tensors: list[Tensor]) -> Tensor:
            (made,) = tensors
            cond, parts, at = made[begin : begin + self.batch], [], 0
            for i, rows in enumerate(wanted):
                part = made[at : at + len(rows)]
                at += len(rows)
                if i != main and len(rows) < self.batch:
                    index = row_index(rows, made.device) if rows else None
                    part = cond if index is None else cond.index_copy(0, index, part)
                parts.append(part)
            return torch.cat(parts)

        return with_rows([output], fill, [sum(map(len, wanted))])

    def filled(self, before: list[Made], last: Made, start: int, count: int) -> tuple[Any, bool]:
        """What a call gives for rows that it does not evaluate, and whether that is stale.

        The conditional prediction, if an earlier call of this step made that of every sample;
        otherwise what the call made at the step before.
        """
        main, calls = self.pattern.main, self.pattern.calls
        if main is not None and main < start and len(self.cond) == self.batch and not self.measured:
            place, first = 0, 0
            while first + calls[place] <= main:
                first += calls[place]
                place += 1
            begin = (main - first) * self.batch

            def repeat(tensors: list[Tensor]) -> Tensor:
                part = tensors[0][begin : begin + self.batch]
                return torch.cat([part] * count) if count > 1 else part.clone()

            output = with_rows([before[place].output], repeat, [before[place].rows])
            alike = prediction_of(output).shape == last.prediction.shape
            if alike and type(output) is type(last.output):
                return output, False
        return with_rows([last.output], lambda tensors: tensors[0].clone(), [last.rows]), True


def own_attention(pipe: Any, denoisers: tuple[str, ...]) -> dict[str, Attention]:
    """The attention that perturbed attention takes the place of during a call, by network.

    Empty where a pipeline has none.
    """
    if not isinstance(pipe, PAGMixin):
        return {}
    networks = {name: getattr(pipe, name).attn_processors for name in denoisers}
    return {name: {key: _plain(p) for key, p in own.items()} for name, own in networks.items()}


def _plain(processor: Any) -> Any:
    """An attention processor; the plain one if it is one of perturbed attention.

    Some pipelines leave those behind at the end of a call.
    """
    name = type(processor).__name__
    if not name.startswith("PAG"):
        return processor
    kind = name.removeprefix("PAG").removeprefix("CFG").removeprefix("IdentitySelf")
    return getattr(attention_processor, kind)()


@contextlib.contextmanager
def _attention(network: Any, own: Attention) -> Iterator[None]:
    """A network's own attention, for rows without a branch of perturbed attention."""
    before = network.attn_processors
    network.set_attn_processor(dict(own))
    try:
        yield
    finally:
        network.set_attn_processor(before)
