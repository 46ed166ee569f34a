"""Drivers that evaluate all calls of a step together, at the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .calls import Call
from .driver import Driver
from .filling import Made, made_of
from .layouts import LayoutError
from .patterns import Pattern


class DeferringDriver(Driver):
    """A driver of pipelines that call their network once a branch.

    A call whose output has to wait gives the pipeline tensors of NaN, which are filled in place at
    the last call of the step. So views of them that the pipeline has taken are right by the time
    that it combines them; copies are not, which shows as NaN and is refused.

    Attributes:
        calls, outputs: Of the step now evaluated, as far as its calls are deferred.
        sizes: Of the inputs of every call of the step before.
        foreseen: Whether the call now evaluated has an input of that size, so an output like that.
        waits: Whether the pipeline was given something in the place of an output.
        sound: Whether the pipeline has taken no copies, once that was seen.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[Call] = []
        self.outputs: list[Any] = []
        self.sizes: dict[int, Any] = {}
        self.foreseen = self.waits = self.sound = False

    def output_of(self, place: int, call: Call, like: Any) -> Any:
        """The output of a call, or what stands in its place until `complete`.

        Args:
            place: Of the call within the step.
            call: The call.
            like: The output of the same call at the step before; None if it has another shape, so
                that nothing can stand in its place.
        """
        raise NotImplementedError

    def complete(self) -> None:
        """Fill `outputs` with what all `calls` give."""
        raise NotImplementedError

    def unforeseen(self) -> str:
        """The message of a network that returned another shape than the step before."""
        return (
            f"the network of {type(self.pipe).__name__} returned another shape than at the step "
            f"before: leave out {self.wish}"
        )

    def combined(self, mixed: Tensor) -> None:
        """Correct what the pipeline made of its predictions, in place, if need be."""

    def defers(self, pattern: Pattern) -> bool:
        """Whether the calls of a step of this pattern can wait for each other."""
        return len(pattern.calls) > 1 and not (pattern.aside or self.layout.others)

    def evaluate(self, name: str, call: Call) -> Made:
        """Evaluate the wanted rows of a call; the others get what does no harm."""
        place, size = len(self.made), [tensor.shape for tensor in tensors_of(call.first)]
        self.foreseen = place < len(self.last) and self.sizes.get(place) == size
        if self.layout.whole and self.run is not None and self.run.step.index < 2:
            self.foreseen = False  # what fills a cache at the first step may return more
        self.sizes[place] = size
        return super().evaluate(name, call)

    def evaluate_whole(self, call: Call) -> Made:
        """Evaluate all rows of a call, at the last call of the step if it can wait."""
        assert self.wanted is not None
        pattern, place = self.wanted.pattern, len(self.made)
        if not self.defers(pattern):
            return super().evaluate_whole(call)
        if not place:
            self.calls, self.outputs, self.waits = [], [], False
        self.calls.append(call)
        output = self.output_of(place, call, self.last[place].output if self.foreseen else None)
        self.outputs.append(output)
        self.waits |= self.foreseen
        if place + 1 == len(pattern.calls):
            self.fill(self.made)
        return made_of(call.rows, self.outputs[place])

    def fill(self, made: list[Made]) -> None:
        """Fill what waits, `made` included."""
        self.complete()
        self.calls = []
        made[:] = [made_of(m.rows, o) for m, o in zip(made, self.outputs, strict=False)]

    def end_step(self, made: list[Made], mixed: Tensor, sample: Tensor) -> Tensor:
        """What the scheduler is to step instead of `mixed`."""
        if self.outputs:
            if self.calls:  # the pipeline went without the calls that were still to come
                self.fill(made)
            self.combined(mixed)
            self.outputs = []
            if self.waits and not self.sound:
                self.check_sound(made, mixed)
        return super().end_step(made, mixed, sample)

    def check_sound(self, made: list[Made], mixed: Tensor) -> None:
        """Refuse pipelines that go on from copies of the outputs of their first calls."""
        if all(m.prediction.isfinite().all() for m in made) and not mixed.isfinite().all():
            raise LayoutError(
                f"{type(self.pipe).__name__} copies the prediction of one branch before it has "
                "evaluated the next, so that its branches cannot be evaluated together: leave out "
                f"{self.wish}"
            )
        self.sound = True


def shapes_of(outputs: list[Any]) -> list[tuple[int, ...]]:
    """Of every tensor in several outputs."""
    return [tuple(tensor.shape) for output in outputs for tensor in tensors_of(output)]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a network returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(value)


def placeholder(like: Any) -> Any:
    """An output of the same kind and shapes, all NaN (zeros where there is none)."""
    if isinstance(like, Tensor):
        blank = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return blank.fill_(float("nan") if blank.is_floating_point() else 0)
    if isinstance(like, Mapping):  # an output object of diffusers
        return type(like)(**{name: placeholder(value) for name, value in like.items()})
    if isinstance(like, (list, tuple)):
        return type(like)(placeholder(item) for item in like)
    return like
