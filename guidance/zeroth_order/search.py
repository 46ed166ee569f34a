"""Searches: points to evaluate (`ask`), what was found there (`tell`), where it stands (`value`).

A search never calls a network. Its points follow from its state, the seed and the step, so that
processes that hold the same state only have to exchange losses.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .averaging import IterateAverage
from .cma_es import CMAES
from .estimators import Estimator
from .sphere import Sphere
from .steps import AdamStep, ScalarStep
from .subspace import SubspaceGradient
from .words import WordSearch


class Search(Protocol):
    """What the personalizer needs of a search."""

    @property
    def value(self) -> Tensor:
        """The result so far, with shape (d,), float32."""

    def ask(self) -> Tensor:
        """The points of the next step, with shape (K, d), float32."""

    def tell(self, losses: Tensor) -> None:
        """Take the step; `losses`, with shape (K,), belong to the points of `ask`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""


def _part_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a state holds of one of its parts."""
    mine = f"{name}."
    return {k.removeprefix(mine): v for k, v in state.items() if k.startswith(mine)}


class GradientSearch:
    """Descent along random gradient estimates.

    Args:
        initial: Where to begin, with shape (d,).
        estimator: Points of a step, and the estimate from their losses.
        step: From estimate to update.
        seed: Seed of the directions.
        subspace: SG, or None.
        sphere: Constraint of all points, or None.
        basis: Orthonormal rows, with shape (r, d), to search in; None is the whole space.
        average: Iterate averaging, or None.
    """

    def __init__(
        self,
        initial: Tensor,
        estimator: Estimator,
        step: AdamStep | ScalarStep,
        seed: int = 0,
        *,
        subspace: SubspaceGradient | None = None,
        sphere: Sphere | None = None,
        basis: Tensor | None = None,
        average: IterateAverage | None = None,
    ) -> None:
        self.estimator, self.step, self.seed = estimator, step, seed
        self.subspace, self.sphere, self.average = subspace, sphere, average
        self._basis = basis
        self._origin = initial.detach().float().cpu().clone()
        self._iterate = self._origin
        self._count = 0
        self._size = len(self._iterate) if basis is None else len(basis)

    @property
    def value(self) -> Tensor:
        """The average if there is one (on the sphere if there is one), else the last iterate."""
        if self.average is None or self.average.value is None:
            return self._iterate
        return self._constrain(self.average.value[None])[0]

    def begin(self, point: Tensor) -> None:
        """Begin at another point (d,) than the initial one; before the first step."""
        self._origin = self._iterate = self._constrain(point.detach().float().cpu()[None])[0]

    def _constrain(self, points: Tensor) -> Tensor:
        return points if self.sphere is None else self.sphere.project(points)

    def _lift(self, vectors: Tensor) -> Tensor:
        return vectors if self._basis is None else vectors @ self._basis

    def _coordinates(self) -> Tensor:
        """The iterate in the space that is searched."""
        if self._basis is None:
            return self._iterate
        return self._basis @ (self._iterate - self._origin)

    def ask(self) -> Tensor:
        """See `Search`."""
        offsets = self.estimator.offsets(self._size, self.seed, self._count)
        return self._constrain(self._iterate + self._lift(offsets))

    def tell(self, losses: Tensor) -> None:
        """See `Search`.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not losses.isfinite().all():
            raise FloatingPointError(f"losses of step {self._count} are not finite: {losses}")
        gradient = self.estimator.gradient(losses, self._size, self.seed, self._count)
        if self.subspace is not None:
            gradient = self.subspace.project(gradient)
        update = self._lift(self.step.update(gradient))
        self._iterate = self._constrain((self._iterate + update)[None])[0]
        self._count += 1
        if self.subspace is not None:
            self.subspace.record(self._coordinates())
        if self.average is not None:
            self.average.add(self._iterate)

    def _parts(self) -> dict[str, AdamStep | ScalarStep | SubspaceGradient | IterateAverage]:
        parts = {"step": self.step, "subspace": self.subspace, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Search`."""
        state = {"iterate": self._iterate, "count": torch.tensor(self._count)}
        if self._basis is not None:
            state["origin"] = self._origin
        for name, part in self._parts().items():
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Search`."""
        self._iterate, self._count = state["iterate"], int(state["count"])
        self._origin = state.get("origin", self._origin)
        for name, part in self._parts().items():
            part.load_state_dict(_part_of(state, name))


class FromWords:
    """Known words first, then a descent from the best of them.

    Args:
        words: Where to begin.
        descent: What follows.
    """

    def __init__(self, words: WordSearch, descent: GradientSearch) -> None:
        self.words, self.descent = words, descent

    @property
    def value(self) -> Tensor:
        """The descent's, once it has begun."""
        return self.descent.value if self.words.done else self.words.value

    def ask(self) -> Tensor:
        """See `Search`."""
        return self.descent.ask() if self.words.done else self.words.ask()

    def tell(self, losses: Tensor) -> None:
        """See `Search`.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if self.words.done:
            self.descent.tell(losses)
            return
        self.words.tell(losses)
        if self.words.done:
            self.descent.begin(self.words.value)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Search`."""
        parts = {"words": self.words, "descent": self.descent}
        return {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Search`."""
        self.words.load_state_dict(_part_of(state, "words"))
        self.descent.load_state_dict(_part_of(state, "descent"))


class EvolutionSearch:
    """CMA-ES on the coordinates in a basis around the initial token.

    Args:
        initial: Where to begin, with shape (d,).
        basis: Orthonormal rows, with shape (r, d).
        sigma: First standard deviation of each coordinate, in units of the token.
        population: Points of a step; 0 is Hansen's default.
        seed: Seed of the points.
        sphere: Constraint of all points, or None.
    """

    def __init__(
        self,
        initial: Tensor,
        basis: Tensor,
        sigma: float,
        population: int = 0,
        seed: int = 0,
        sphere: Sphere | None = None,
    ) -> None:
        self._initial, self._basis, self.sphere = initial.detach().float().cpu(), basis, sphere
        self.strategy = CMAES(torch.zeros(len(basis)), sigma, population, seed)

    def _points(self, coordinates: Tensor) -> Tensor:
        points = self._initial + coordinates.float() @ self._basis
        return points if self.sphere is None else self.sphere.project(points)

    @property
    def value(self) -> Tensor:
        """The centre of the search distribution."""
        return self._points(self.strategy.mean[None])[0]

    def ask(self) -> Tensor:
        """See `Search`."""
        return self._points(self.strategy.ask())

    def tell(self, losses: Tensor) -> None:
        """See `Search`.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not losses.isfinite().all():
            raise FloatingPointError(f"losses are not finite: {losses}")
        self.strategy.tell(losses)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Search`."""
        return self.strategy.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Search`."""
        self.strategy.load_state_dict(state)
