"""Searches: points to evaluate (`ask`), their losses (`tell`), the result so far (`value`).

A search never calls a network. Its points follow from its state, the seed and the step, so that
processes that hold the same state only have to exchange losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .adam import AdamStep
from .averaging import IterateAverage
from .estimators import Estimator
from .subspace import SubspaceGradient
from .words import WordSearch


class Stateful(Protocol):
    """What keeps its state in tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""


class Search(Stateful, Protocol):
    """What the personalizer needs of a search."""

    @property
    def value(self) -> Tensor:
        """The result so far, with shape (d,), float32."""

    def ask(self) -> Tensor:
        """The points of the next step, with shape (K, d), float32."""

    def tell(self, losses: Tensor) -> None:
        """Take the step; `losses`, with shape (K,), belong to the points of `ask`.

        Raises:
            FloatingPointError: a loss is not finite.
        """


def _save(parts: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """The states of named parts in one dictionary."""
    return {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}


def _load(parts: Mapping[str, Stateful], state: dict[str, Tensor]) -> None:
    for name, part in parts.items():
        mine = f"{name}."
        part.load_state_dict(
            {k.removeprefix(mine): v for k, v in state.items() if k.startswith(mine)}
        )


class GradientSearch:
    """Descent along random gradient estimates.

    Args:
        initial: Where to begin, with shape (d,).
        estimator: Points of a step, and the estimate from their losses.
        step: From estimate to update.
        seed: Seed of the directions.
        subspace: Subspace Gradient, or None.
        average: Iterate averaging, or None.
    """

    def __init__(
        self,
        initial: Tensor,
        estimator: Estimator,
        step: AdamStep,
        seed: int = 0,
        *,
        subspace: SubspaceGradient | None = None,
        average: IterateAverage | None = None,
    ) -> None:
        self.estimator, self.step, self.seed = estimator, step, seed
        self.subspace, self.average = subspace, average
        self._count = 0
        self.begin(initial)

    @property
    def value(self) -> Tensor:
        """The average if there is one, else the last iterate."""
        if self.average is None or self.average.value is None:
            return self._iterate
        return self.average.value

    def begin(self, point: Tensor) -> None:
        """Begin at this point, with shape (d,); before the first step."""
        self._iterate = point.detach().float().cpu().clone()

    def ask(self) -> Tensor:
        """See `Search`."""
        return self._iterate + self.estimator.offsets(len(self._iterate), self.seed, self._count)

    def tell(self, losses: Tensor) -> None:
        """See `Search`."""
        if not losses.isfinite().all():
            raise FloatingPointError(f"losses of step {self._count} are not finite: {losses}")
        size = len(self._iterate)
        gradient = self.estimator.gradient(losses, size, self.seed, self._count)
        if self.subspace is not None:
            gradient = self.subspace.project(gradient)
        self._iterate = self._iterate + self.step.update(gradient)
        self._count += 1
        if self.subspace is not None:
            self.subspace.record(self._iterate)
        if self.average is not None:
            self.average.add(self._iterate)

    def _parts(self) -> dict[str, Stateful]:
        parts = {"step": self.step, "subspace": self.subspace, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Search`."""
        own = {"iterate": self._iterate, "count": torch.tensor(self._count)}
        return own | _save(self._parts())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Search`."""
        self._iterate, self._count = state["iterate"], int(state["count"])
        _load(self._parts(), state)


class FromWords:
    """Known words first, then a descent from the best of them.

    Args:
        words: Where to begin.
        descent: What follows.
    """

    def __init__(self, words: WordSearch, descent: GradientSearch) -> None:
        self.words, self.descent = words, descent
        self._parts: dict[str, Stateful] = {"words": words, "descent": descent}

    @property
    def value(self) -> Tensor:
        """The descent's, once it has begun."""
        return self.descent.value if self.words.done else self.words.value

    def ask(self) -> Tensor:
        """See `Search`."""
        return self.descent.ask() if self.words.done else self.words.ask()

    def tell(self, losses: Tensor) -> None:
        """See `Search`."""
        if self.words.done:
            self.descent.tell(losses)
            return
        self.words.tell(losses)
        if self.words.done:
            self.descent.begin(self.words.value)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Search`."""
        return _save(self._parts)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Search`."""
        _load(self._parts, state)
