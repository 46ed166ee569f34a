"""What policy searches try, keep on disk, and conclude."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...guidance import (
    Coefficients,
    Fill,
    Guidance,
    HoldDifference,
    Pattern,
    Schedule,
    save_guidance,
)
from ...guidance.policies.schedule import Choice
from ...pipelines.fitting.runs import read_tried, write_tried
from .trials import Trials

Between = Literal["forecast", "estimate"]
Key = tuple[tuple[Choice, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Candidate:
    """A schedule and what it was found to do."""

    schedule: Schedule
    nfe: float
    quality: float


@dataclass(frozen=True)
class Search:
    """What a policy search found.

    Args:
        front: Candidates that no other beats in both cost and quality, cheapest first.
        tried: Number of schedules tried.
        guidance: The cheapest on the front that reaches the floor, ready for ``guidance=``.
        best: The same with its figures.
    """

    front: tuple[Candidate, ...]
    tried: int
    guidance: Guidance
    best: Candidate

    def save(self, path: Path | str) -> None:
        """Write `guidance` as JSON, with the figures of the front (see `save_guidance`)."""
        measured = {
            "nfe": self.best.nfe,
            "quality": self.best.quality,
            "front": [[c.nfe, round(c.quality, 5), str(c.schedule)] for c in self.front],
        }
        save_guidance(path, self.guidance, measured)


def pareto(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in both cost and quality, cheapest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nfe, -c.quality)):
        if not front or candidate.quality > front[-1].quality:
            front.append(candidate)
    return tuple(front)


class TrialLog:
    """Tries schedules, each once; with a file, across interruptions.

    A search that goes on runs from its beginning: it asks for the same schedules again, up to those
    not yet known.

    Args:
        trials: What they are tried on.
        bar: A tqdm bar to update.
        path: JSON file of what was tried.
        between: What the steps are that do not evaluate both branches, by weights fitted to each
            schedule; None: any choice, and differences are held.
        measure: Schedule -> its candidate; default: `trials` judge it as it is.
        finer: See `ScheduleFitter`.

    Attributes:
        known: All that was ever measured.
        asked: What this search has asked for, the only thing that what it does next depends on.

    Raises:
        ValueError: the file is damaged, or of another search.
    """

    def __init__(
        self,
        trials: Trials,
        bar: Any,
        path: Path | None = None,
        between: Between | None = None,
        measure: Callable[[Schedule], Candidate] | None = None,
        finer: int = 1,
    ) -> None:
        self.trials, self.bar, self.path, self.between = trials, bar, path, between
        self.measure = measure or self._judged
        self.known: dict[Key, Candidate] = {}
        self.asked: dict[Key, Candidate] = {}
        self.identity = trials.identity()
        # Version 0.1 could also search with given coefficients: files of those are refused.
        fill = None if between else HoldDifference()
        self.plan: dict[str, Any] = {
            "identity": self.identity,
            "prompts": trials.prompts,
            "seed": trials.seed,
            "rule": str(trials.rule),
            "fill": hashlib.sha256(repr(fill).encode()).hexdigest(),
            "between": between,
            "finer": finer,
        }
        if path is not None:
            for candidate in read_tried(path, self.plan, self._read):
                self.known[key_of(candidate.schedule)] = candidate

    def _read(self, entry: Any) -> Candidate:
        choices, factors, nfe, quality, *fitted = entry
        fill: Fill = HoldDifference()
        if self.between:
            cond, uncond, guided, space = (*fitted, "native")[:4]  # version 0.1 kept no space
            fill = Coefficients(cond, uncond, guided, space, self.identity)
        return Candidate(Schedule(tuple(choices), tuple(factors), fill), nfe, quality)

    def _write(self, path: Path) -> None:
        tried = []
        for c in self.known.values():
            entry: list[Any] = [c.schedule.choices, c.schedule.factors, c.nfe, c.quality]
            if isinstance(fitted := c.schedule.fill, Coefficients):
                entry += [fitted.cond, fitted.uncond, fitted.guided, fitted.space]
            tried.append(entry)
        write_tried(path, self.plan, tried)

    def __call__(self, schedule: Schedule) -> Candidate:
        """The schedule with its figures; measured only the first time."""
        key = key_of(schedule)
        if key not in self.known:
            self.known[key] = self.measure(schedule)
            if self.path is not None:
                self._write(self.path)
            self.bar.update()
        self.asked[key] = self.known[key]
        return self.asked[key]

    def _judged(self, schedule: Schedule) -> Candidate:
        quality, nfe = self.trials.judge(self.trials.plain | schedule)
        return Candidate(schedule, nfe, quality)

    def conclude(self, floor: float) -> Search:
        """The front of everything tried; its schedules know what they were found for.

        Raises:
            ValueError: nothing reaches the floor.
        """
        front = tuple(
            replace(c, schedule=replace(c.schedule, identity=self.identity))
            for c in pareto(self.known.values())
        )
        best = next((c for c in front if c.quality >= floor), None)
        if best is None:
            raise ValueError(
                f"no schedule reaches a quality of {floor:g}: the highest gives "
                f"{front[-1].quality:.6g} at {front[-1].nfe:g} evaluations"
            )
        return Search(front, len(self.known), self.trials.plain | best.schedule, best)


def choices_of(schedule: Schedule) -> tuple[Choice, ...]:
    """The choices of a schedule that lists them, as those of a search do."""
    if isinstance(schedule.choices, Pattern):
        raise TypeError(f"expected a choice for every step, got {schedule.choices}")
    return schedule.choices


def key_of(schedule: Schedule) -> Key:
    """What tells two schedules of one search apart: choices and factors."""
    return choices_of(schedule), schedule.factors


def check_floor(floor: float) -> None:
    """Raise ValueError unless 0 < floor < 1."""
    if not 0 < floor < 1:
        raise ValueError(f"quality_floor must be between 0 and 1, got {floor}")
