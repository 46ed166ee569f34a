"""Policies that fix beforehand what every step evaluates: schedules, and what they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ..base import Policy, PolicyState, Step
from ..prediction import Space
from .fill import HoldDifference, StandIn, Weights
from .history import History, HistoryPlan

Choice = Literal["both", "estimate", "cond", "forecast"]
CHOICES: tuple[str, ...] = get_args(Choice)
NFE: dict[str, int] = {"both": 2, "estimate": 1, "cond": 1, "forecast": 0}


class Stepwise(Policy):
    """Base of policies whose choices depend on the step alone, the same for every sample.

    A step evaluates ``both`` branches, or the conditional one and takes an ``estimate`` for the
    other, or lets the conditional one (``cond``) stand alone, or evaluates neither and takes a
    ``forecast`` of the guided prediction.
    """

    def choices_for(self, total: int) -> tuple[Choice, ...]:
        """The choice of every one of `total` steps (calls of the denoiser)."""
        raise NotImplementedError

    @property
    def stands_in(self) -> StandIn:
        """What estimates and forecasts the predictions left out."""
        raise NotImplementedError

    def factor(self, index: int) -> float:
        """What w - 1 is multiplied with at a step."""
        return 1.0

    def nfe(self, total: int) -> int:
        """Network evaluations per sample of a run of `total` steps."""
        return sum(NFE[choice] for choice in self.choices_for(total))

    def may_forecast(self, total: int) -> bool:
        """Whether any step is forecast."""
        return "forecast" in self.choices_for(total)

    def replaces_combination(self, total: int) -> bool:
        """Whether any step is forecast, or guided at another scale."""
        return self.may_forecast(total) or any(self.factor(i) != 1 for i in range(total))

    @property
    def identities(self) -> tuple[Mapping[str, Any], ...]:
        """The policy's own and its stand-in's."""
        own, parts = super().identities, self.stands_in.identity
        return own if parts is None or parts in own else (*own, parts)

    @property
    def needs_history(self) -> bool:
        """Whether any step may be estimated or forecast."""
        return True

    @property
    def space(self) -> Space:
        """The space of the predictions kept: the stand-in's."""
        return self.stands_in.space

    def start(self, batch: int, on_cpu: bool) -> PolicyState:
        """A state that has kept nothing yet."""
        return _Planned(self, batch)


class _Planned(PolicyState):
    """Follows the choices of a `Stepwise` policy."""

    def __init__(self, policy: Stepwise, batch: int) -> None:
        self.policy, self.batch = policy, batch
        self.choices: tuple[Choice, ...] = ()
        self.history: History | None = None

    def begin(self, step: Step) -> None:
        self.choices = self.policy.choices_for(step.total)
        self.history = History(HistoryPlan(sums(self.choices, self.policy.stands_in)))

    def wanted(self, step: Step) -> list[bool]:
        if self.history is None:
            self.begin(step)
        return [self.choices[step.index] == "both"] * self.batch

    def scale(self, step: Step, guidance_scale: float) -> float:
        factor = self.policy.factor(step.index)
        return guidance_scale if factor == 1 else 1 + factor * (guidance_scale - 1)

    def estimate(self, step: Step, pred_cond: Tensor) -> Tensor | None:
        self.history.write("cond", step.index, pred_cond)
        if self.history.plan.weights[step.index] is None:
            return None
        estimate = self.history.estimate(step.index)
        # A later sum may use the estimate of a step that is not guided by it.
        self.history.write("uncond", step.index, estimate)
        return estimate if self.choices[step.index] == "estimate" else None

    def keep(self, step: Step, pred_cond: Tensor, pred_uncond: Tensor) -> None:
        if self.choices[step.index] == "both":
            self.history.write("cond", step.index, pred_cond)
            self.history.write("uncond", step.index, pred_uncond)

    def resting(self, step: Step) -> list[int]:
        return list(range(self.batch)) if self.choices[step.index] == "forecast" else []

    def forecast(self, step: Step) -> Tensor:
        return self.history.estimate(step.index)

    def wants_guided(self, step: Step) -> bool:
        if self.history is None:  # the pipeline did not guide its first step
            self.begin(step)
        return ("guided", step.index) in self.history.plan.place_of

    def keep_guided(self, step: Step, guided: Tensor) -> None:
        self.history.write("guided", step.index, guided)


def sums(choices: tuple[Choice, ...], stand_in: StandIn) -> list[Weights | None]:
    """The estimates that a run needs: those it is guided by, and those that these are made of.

    Raises:
        ValueError: the stand-in cannot make one, or makes it of what is not evaluated.
    """
    stand_in.check_total(len(choices))
    both = [step for step, choice in enumerate(choices) if choice == "both"]
    seen = [step for step, choice in enumerate(choices) if choice != "forecast"]
    needed = {step for step, choice in enumerate(choices) if choice == "estimate"}
    result: list[Weights | None] = [None] * len(choices)
    for step in reversed(range(len(choices))):
        if choices[step] == "forecast":
            result[step] = stand_in.forecast(step, [i for i in seen if i < step])
        elif step in needed:
            result[step] = sum_ = stand_in.weights(step, [i for i in both if i < step])
            made_of = {i for i, weight in sum_.uncond.items() if weight != 0}
            needed |= made_of.difference(both)
            made_of |= {i for i, weight in sum_.cond.items() if weight != 0}
            if missing := sorted(made_of.difference(seen)):
                raise ValueError(
                    f"the estimate of step {step} is made of predictions of step {missing[0]}, "
                    "which is forecast and evaluates none: fit estimates to this schedule"
                )
    return result


@dataclass(frozen=True)
class Schedule(Stepwise):
    """An explicit choice for every step, such as a policy search finds.

    Args:
        choices: "both", "estimate", "cond" or "forecast" for every step of the run.
        factors: What w - 1 is multiplied with at every step; empty: 1 throughout. (A step may make
            up for others that are not guided.)
        stand_in: What estimates the unconditional predictions and forecasts the guided ones.
        identity: What the schedule was found for (see `pilotage.pipelines.fitting.identity`); pipelines
            refuse it elsewhere. None: not checked.

    Raises:
        ValueError: unknown choice, wrong number of factors, a factor that is not finite, or a step
            that cannot be estimated or forecast.
    """

    name: ClassVar[str] = "schedule"

    choices: tuple[Choice, ...] = ()
    factors: tuple[float, ...] = ()
    stand_in: StandIn = field(default_factory=HoldDifference)
    identity: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "factors", tuple(self.factors))
        unknown = sorted(set(self.choices) - set(CHOICES))
        if unknown or not self.choices:
            known = ", ".join(CHOICES)
            raise ValueError(
                f"Schedule: expected a choice of {known} for every step, got {unknown or 'none'}"
            )
        if self.factors and len(self.factors) != len(self.choices):
            raise ValueError(
                f"Schedule: {len(self.factors)} factors for {len(self.choices)} choices"
            )
        if not all(math.isfinite(factor) for factor in self.factors):
            raise ValueError(f"Schedule: factors must be finite, got {self.factors}")
        sums(self.choices, self.stand_in)

    def choices_for(self, total: int) -> tuple[Choice, ...]:
        """The choices as given.

        Raises:
            ValueError: the run has another number of steps.
        """
        if total != len(self.choices):
            raise ValueError(
                f"a schedule of {len(self.choices)} steps cannot guide a run of {total}: use as "
                "many steps as it was made for"
            )
        return self.choices

    @property
    def stands_in(self) -> StandIn:
        """The stand-in given."""
        return self.stand_in

    @property
    def needs_history(self) -> bool:
        """Whether any step is estimated or forecast."""
        return not {"estimate", "forecast"}.isdisjoint(self.choices)

    def factor(self, index: int) -> float:
        """The factor given."""
        return self.factors[index] if self.factors else 1.0

    def __str__(self) -> str:
        letters = {"both": "B", "estimate": "e", "cond": "-", "forecast": "."}
        factors = ", ".join(f"{factor:g}" for factor in self.factors)
        marks = "".join(letters[choice] for choice in self.choices)
        return f"Schedule({marks}{f', factors {factors}' if factors else ''})"
