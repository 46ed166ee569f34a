r"""Schedules: what every step evaluates is fixed beforehand, the same for every sample.

A step evaluates

* ``both`` branches,
* the conditional one, and takes an ``estimate`` for the other,
* the conditional one, which stands alone (``cond``), or
* nothing: it takes a ``forecast`` of the guided prediction, so that the step is skipped.

The choices are listed one by one, as a search finds them, or follow a `Pattern`; a fill (see
`fill`) gives the weights of estimates and forecasts. What has a name of its own is a setting of
these two: `hold`, `extrapolate`, `linear_ag`, `forecast`, `gate`.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487 (searched schedules, LinearAG)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from ..base import BOTH, COND, Decision, Fill, Kind, Policy, PolicyState, SameForAll, Weights
from ..prediction import Space, check_space
from ..registry import register
from .fill import Coefficients, ExtrapolateDifference, HoldDifference

Choice = Literal["both", "estimate", "cond", "forecast"]
CHOICES: tuple[str, ...] = get_args(Choice)
NFE: dict[str, int] = {"both": 2, "estimate": 1, "cond": 1, "forecast": 0}
"""Network evaluations of each choice."""


@dataclass(frozen=True)
class Pattern:
    """Choices for runs of any length: a first part, and what follows it.

    Args:
        first: Share of the steps, from 0 to 1, in the first part (at least one step is).
        period: In the first part, both branches are evaluated at every `period`-th step.
        between: The choice of its other steps.
        then: The choice of the steps after it.
        then_period: Of these, every `then_period`-th evaluates both branches; 0: none does.

    Raises:
        ValueError: a setting is out of its range.
    """

    first: float = 1.0
    period: int = 1
    between: Choice = "estimate"
    then: Choice = "cond"
    then_period: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise ValueError(f"the first part is a share of 0 to 1 of the steps, got {self.first}")
        periods = self.period, self.then_period
        if not all(isinstance(n, int) for n in periods) or self.period < 1 or self.then_period < 0:
            raise ValueError(f"periods are whole numbers from 1 on, got {periods}")
        for choice in (self.between, self.then):
            if choice not in CHOICES:
                raise ValueError(f"a choice is one of {', '.join(CHOICES)}, got {choice!r}")

    def choices(self, total: int) -> tuple[Choice, ...]:
        """The choice of every one of `total` steps."""
        stop = max(round(self.first * total), 1)  # what follows is made of an evaluated step
        first: list[Choice] = [
            "both" if i % self.period == 0 else self.between for i in range(stop)
        ]
        # After a part that ends with an evaluated step, the next one is `then_period` steps later.
        skipped = 1 if self.period == 1 else 0
        periodic = self.then_period > 0
        later: list[Choice] = [
            "both" if periodic and i % self.then_period == 0 else self.then
            for i in range(skipped, total - stop + skipped)
        ]
        return (*first, *later)


@register
@dataclass(frozen=True)
class Schedule(Policy):
    """A table of choices and scales per step, and what fills in for predictions left out.

    Args:
        choices: "both", "estimate", "cond" or "forecast" for every step of the run, or a `Pattern`.
        factors: What w - 1 is multiplied with at every step; empty: 1 throughout. (A step may make
            up for others that are not guided.)
        fill: Gives the weights of estimates and forecasts.
        identity: What the schedule was found for (see `pilotage.pipelines.fitting.fitted`);
            pipelines refuse it elsewhere. None: not checked.

    Raises:
        ValueError: unknown choice, wrong number of factors, a factor that is not finite, or a step
            that cannot be estimated or skipped.
    """

    name: ClassVar[str] = "schedule"

    choices: tuple[Choice, ...] | Pattern = ()
    factors: tuple[float, ...] = ()
    fill: Fill = field(default_factory=HoldDifference)
    identity: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        check_space("Schedule", self.fill.space)
        if not isinstance(self.choices, Pattern):
            object.__setattr__(self, "choices", tuple(self.choices))
            unknown = sorted(set(self.choices) - set(CHOICES))
            if unknown or not self.choices:
                raise ValueError(
                    f"Schedule: expected a choice of {', '.join(CHOICES)} for every step, got "
                    f"{unknown or 'none'}"
                )
            if self.factors and len(self.factors) != len(self.choices):
                raise ValueError(
                    f"Schedule: {len(self.factors)} factors for {len(self.choices)} choices"
                )
        elif self.factors:
            raise ValueError("Schedule: factors need a choice for every step, not a pattern")
        if not all(math.isfinite(factor) for factor in self.factors):
            raise ValueError(f"Schedule: factors must be finite, got {self.factors}")
        if isinstance(self.fill, Coefficients):
            self.decisions(len(self.fill.cond))
        elif not isinstance(self.choices, Pattern):
            self.decisions(len(self.choices))

    @property
    def space(self) -> Space | None:
        """The fill's space, if any step is estimated, skipped or corrected."""
        fills = self._kinds & {"estimate", "forecast"}
        return self.fill.space if fills or self._corrects else None

    @property
    def identities(self) -> tuple[Mapping[str, Any], ...]:
        """The schedule's own and its fill's."""
        own, fill = super().identities, self.fill.identity
        return own if fill is None or fill in own or not self.space else (*own, fill)

    def choices_for(self, total: int) -> tuple[Choice, ...]:
        """The choice of every one of `total` steps (calls of the denoiser).

        Raises:
            ValueError: the schedule is for another number of steps.
        """
        if isinstance(self.choices, Pattern):
            return self.choices.choices(total)
        if total != len(self.choices):
            raise ValueError(
                f"a schedule of {len(self.choices)} steps cannot guide a run of {total}: use as "
                "many steps as it was made for"
            )
        return self.choices

    def nfe(self, total: int) -> int:
        """Network evaluations per sample of a run of `total` steps."""
        return sum(NFE[choice] for choice in self.choices_for(total))

    def decisions(self, total: int) -> Sequence[Decision]:
        """The decision of every step.

        Raises:
            ValueError: the schedule is for another number of steps, or a step cannot be filled in.
        """
        choices = self.choices_for(total)
        sums = _sums(choices, self.fill)
        factors = self.factors or (1.0,) * total
        evaluated = {"both": BOTH.evaluate, "forecast": ()}
        return [
            Decision(evaluated.get(choice, COND.evaluate), factor, sum_)
            for choice, factor, sum_ in zip(choices, factors, sums, strict=True)
        ]

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that follows the table."""
        return _Table(batch, self.decisions(total))

    def __str__(self) -> str:
        if isinstance(self.choices, Pattern):
            return f"Schedule({self.choices}, {self.fill})"
        letters = {"both": "B", "estimate": "e", "cond": "-", "forecast": "."}
        factors = ", ".join(f"{factor:g}" for factor in self.factors)
        marks = "".join(letters[choice] for choice in self.choices)
        return f"Schedule({marks}{f', factors {factors}' if factors else ''})"

    @property
    def _corrects(self) -> bool:
        """Whether an evaluated step's prediction is corrected: only fitted weights do that."""
        if not isinstance(self.fill, Coefficients):
            return False
        choices = self.choices_for(len(self.fill.cond))
        return any(c == "both" and self.fill.corrected(i) for i, c in enumerate(choices))

    @property
    def _kinds(self) -> set[str]:
        if not isinstance(self.choices, Pattern):
            return set(self.choices)
        pattern = self.choices
        return {"both", pattern.then} | ({pattern.between} if pattern.period > 1 else set())


class _Table(SameForAll):
    """The same decision for every sample, and which predictions later ones are made of."""

    def __init__(self, batch: int, decisions: Sequence[Decision]) -> None:
        super().__init__(batch, lambda step: decisions[step.index])
        self.last_use: dict[tuple[Kind, int], int] = {}
        for step, decision in enumerate(decisions):
            if isinstance(decision.reuse, Weights):
                self.last_use |= {(kind, i): step for kind, i, _ in decision.reuse.terms()}

    def keep_until(self, kind: Kind, step: int) -> int:
        return self.last_use.get((kind, step), -1)


def _sums(choices: Sequence[Choice], fill: Fill) -> list[Weights | None]:
    """The weights of every estimate and forecast, in terms of what is evaluated or estimated.

    Raises:
        ValueError: the fill cannot make one, or makes it of what is not evaluated.
    """
    fill.check_total(len(choices))
    both = [step for step, choice in enumerate(choices) if choice == "both"]
    evaluated = [step for step, choice in enumerate(choices) if choice != "forecast"]
    result: list[Weights | None] = []
    for step, choice in enumerate(choices):
        if choice == "forecast":
            result.append(fill.reused(step, [i for i in evaluated if i < step]))
        elif choice == "estimate":
            result.append(_estimate(step, choices, fill, both))
        else:
            result.append(fill.corrected(step) if choice == "both" else None)
    for step, sum_ in enumerate(result):
        for kind, i, _ in sum_.terms() if sum_ else ():
            if choices[i] == "forecast" and kind != "guided":
                raise ValueError(
                    f"the estimate of step {step} is made of predictions of step {i}, which is "
                    "skipped and evaluates none: fit estimates to this schedule"
                )
    return result


def _estimate(step: int, choices: Sequence[Choice], fill: Fill, both: Sequence[int]) -> Weights:
    """The estimate of a step; where it is made of one that no step is guided by, of its terms."""
    sum_ = fill.estimate(step, [i for i in both if i < step])
    cond, uncond = dict(sum_.cond), dict(sum_.uncond)
    for i in reversed(range(step)):
        if choices[i] == "cond" and uncond.get(i, 0.0) != 0:
            weight = uncond.pop(i)
            inner = fill.estimate(i, [k for k in both if k < i])
            for known, terms in ((cond, inner.cond), (uncond, inner.uncond)):
                for k, value in terms.items():
                    known[k] = known.get(k, 0.0) + weight * value
    return Weights(cond, uncond)


def hold(
    period: int = 2, first: float = 0.5, then: Choice = "estimate", space: Space = "native"
) -> Schedule:
    """Guidance in turn with estimates that hold the last difference of the two predictions.

    Others ship this as LinearAG; it is a baseline for it. The defaults are LinearAG's pattern in
    its paper: ten alternating steps of 20, then ten estimated ones, 25 network evaluations.

    Args:
        period, first: See `Pattern`.
        then: What follows the first part: "estimate" (the paper), "cond" (the paper's "naive"
            variant), or "forecast" (skipped steps in turn with guided ones). All cost the same.
        space: "native" holds the difference of network outputs, "x0" of denoised images.
    """
    return Schedule(_alternating(period, first, then), fill=HoldDifference(space))


def extrapolate(
    period: int = 2, first: float = 0.5, then: Choice = "estimate", space: Space = "native"
) -> Schedule:
    """Like `hold`, but the last two differences are continued on a straight line."""
    return Schedule(_alternating(period, first, then), fill=ExtrapolateDifference(space))


def linear_ag(
    coefficients: Coefficients | None = None,
    period: int = 2,
    first: float = 0.5,
    then: Choice = "estimate",
) -> Schedule:
    """LinearAG: guidance in turn with estimates that are linear in past predictions.

    An estimated unconditional prediction is fed back as the estimate.

    Args:
        coefficients: What `pilotage.pipelines.fitting.fit` found for this model, scheduler, number
            of steps, scale and negative prompt.
        period, first, then: See `hold`; the defaults are the paper's pattern.

    Raises:
        ValueError: no coefficients, or they hold no weights for a step.
    """
    if coefficients is None:
        raise ValueError(
            "linear-ag needs coefficients fitted for this model: make them with 'pilotage fit' "
            "(or pilotage.pipelines.fitting.fit), then guidance=load_guidance(file)"
        )
    return Schedule(_alternating(period, first, then), fill=coefficients)


def forecast(first: float = 0.2, period: int = 2, space: Space = "x0") -> Schedule:
    """All steps at first, then one of `period`; the others are skipped.

    Uniform step skipping after a full beginning: which steps are skipped is fixed beforehand, and
    the guided denoised image is held over them. The solver still makes all its steps, and the
    first ones, which decide what the picture will be, are those of the full run; a run with fewer
    steps has others from the start. Nothing is fitted.

    Args:
        first: Share of the steps, from 0 to 1, that are all evaluated (at least one step is).
        period: After them, one step of so many is evaluated, the last of them. The defaults make
            24 network evaluations of 20 steps' 40.
        space: "x0" holds the guided denoised image, "native" the guided network output.
    """
    if period < 1:
        raise ValueError(f"forecast: period must be >= 1, got {period}")
    pattern = Pattern(first, then="forecast", then_period=period)
    return Schedule(pattern, fill=HoldDifference(space))


def gate(first: float = 0.5, space: Space = "native") -> Schedule:
    """Both branches in the first part; afterwards the last difference of the two is held.

    Args:
        first: Share of the steps, from 0 to 1, that evaluate both branches (at least one does).
        space: "native" holds the difference of network outputs, "x0" of denoised images.
    """
    return Schedule(Pattern(first, then="estimate"), fill=HoldDifference(space))


def _alternating(period: int, first: float, then: Choice) -> Pattern:
    return Pattern(first, period, "estimate", then, period if then == "forecast" else 0)


for _make, _name in (
    (linear_ag, "linear-ag"),
    (hold, "hold"),
    (extrapolate, "extrapolate"),
    (forecast, "forecast"),
    (gate, "gate"),
):
    register(_make, name=_name)
