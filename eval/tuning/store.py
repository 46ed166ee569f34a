"""What policy searches try, keep on disk, and conclude."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...guidance import (
    Coefficients,
    Fill,
    Guidance,
    Pattern,
    Schedule,
    resolve,
    save_guidance,
)
from ...guidance.files import write_json
from ...guidance.policies.schedule import Choice
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

    def save(self, path: Path | str, candidate: Candidate | None = None) -> None:
        """Write a schedule as JSON (see `save_guidance`).

        Args:
            path: File to write.
            candidate: A member of the front; default: `best`.
        """
        chosen = candidate or self.best
        measured = {
            "nfe": chosen.nfe,
            "quality": chosen.quality,
            "front": [[c.nfe, round(c.quality, 5), str(c.schedule)] for c in self.front],
        }
        save_guidance(path, replace(self.guidance, policy=chosen.schedule), measured)


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
        fill: What their estimates are made with; None: fitted to each.
        bar: A tqdm bar to update.
        path: JSON file of what was tried.
        between: What the steps are that do not evaluate both branches; None: any choice.
        measure: Schedule -> its candidate; default: `trials` judge it as it is.

    Attributes:
        known: All that was ever measured.
        asked: What this search has asked for, the only thing that what it does next depends on.

    Raises:
        ValueError: the file is damaged, or of another search.
    """

    def __init__(
        self,
        trials: Trials,
        fill: Fill | None,
        bar: Any,
        path: Path | None = None,
        between: Between | None = None,
        measure: Callable[[Schedule], Candidate] | None = None,
    ) -> None:
        self.trials, self.fill, self.bar, self.path = trials, fill, bar, path
        self.measure = measure or self._judged
        self.known: dict[Key, Candidate] = {}
        self.asked: dict[Key, Candidate] = {}
        self.identity = trials.identity()
        self.plan: dict[str, Any] = {
            "identity": self.identity,
            "prompts": trials.prompts,
            "seed": trials.settings.seed,
            "rule": str(trials.rule),
            "fill": _digest(fill),
            "between": between,
        }
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        damaged = ValueError(f"{path} is damaged: remove it and run again")
        try:
            content = json.loads(path.read_text())
            plan, tried = content["plan"], content["tried"]
            # Of version 0.1.
            plan["identity"].pop("pilotage", None)
            plan.setdefault("fill", plan.get("stand_in"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged from error
        for name, value in json.loads(json.dumps(self.plan)).items():
            if plan.get(name) != value:
                raise ValueError(f"{path} is of another search: its {name} differs; name another")
        try:
            for choices, factors, nfe, quality, *fitted in tried:
                fill = self.fill
                if fill is None:
                    cond, uncond, guided = fitted
                    fill = Coefficients(cond, uncond, guided, identity=self.identity)
                schedule = Schedule(tuple(choices), tuple(factors), fill)
                self.known[key_of(schedule)] = Candidate(schedule, nfe, quality)
        except (ValueError, TypeError) as error:
            raise damaged from error

    def _write(self, path: Path) -> None:
        tried = []
        for c in self.known.values():
            entry: list[Any] = [c.schedule.choices, c.schedule.factors, c.nfe, c.quality]
            if self.fill is None and isinstance(fitted := c.schedule.fill, Coefficients):
                entry += [fitted.cond, fitted.uncond, fitted.guided]
            tried.append(entry)
        write_json(path, {"plan": self.plan, "tried": tried})

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
        quality, nfe = self.trials.judge(self.trials.compose(schedule))
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
        return Search(front, len(self.known), resolve(self.trials.compose(best.schedule)), best)


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


def _digest(fill: Fill | None) -> str:
    """Hash of a fill, its numbers to six digits: fits on other threads differ in the last."""
    number = r"-?\d+\.\d+(e[-+]?\d+)?"
    text = re.sub(number, lambda match: f"{float(match[0]):.6g}", repr(fill))
    return hashlib.sha256(text.encode()).hexdigest()
