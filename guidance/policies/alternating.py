"""Real and estimated guidance in turn: the pattern of LinearAG, and its simplest stand-ins.

In the head of a run both branches are evaluated at every `period`-th step and the unconditional
one is estimated at the others. In the tail the conditional prediction stands alone, or every step
is estimated, or both branches are evaluated at every `period`-th step and the guided prediction is
forecast at the others. With ``period=2, head=0.5`` a run of 20 steps costs 25 network evaluations,
as in https://arxiv.org/abs/2312.12487, whichever tail it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..prediction import Space
from .fill import ExtrapolateDifference, HoldDifference, StandIn
from .schedule import Choice, Stepwise


def alternating(total: int, period: int, head: float, tail: Choice) -> tuple[Choice, ...]:
    """The choices of a run of `total` steps; see the module's docstring.

    Args:
        total: Number of steps.
        period, head: See `Alternating`.
        tail: "cond", "estimate" or "forecast".
    """
    stop = max(round(head * total), 1)  # a tail can only be made of a step that was evaluated
    first: list[Choice] = ["estimate" if i % period else "both" for i in range(stop)]
    if tail != "forecast":
        return (*first, *[tail] * (total - stop))
    return (*first, *("forecast" if i % period else "both" for i in range(total - stop)))


@dataclass(frozen=True)
class Alternating(Stepwise):
    """Base of the policies that follow this pattern.

    Args:
        period: In the head, both branches are evaluated at every `period`-th step.
        head: Share of the steps that make up the head, from 0 to 1 (1: periodic refresh to the
            end).
        tail: After the head, "cond", the name of the estimate or "forecast".

    Raises:
        ValueError: a setting is out of its range.
    """

    estimated: ClassVar[str]

    period: int = 2
    head: float = 0.5
    tail: str = "cond"

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"{type(self).__name__}: period must be >= 1, got {self.period}")
        if not 0 <= self.head <= 1:
            raise ValueError(f"{type(self).__name__}: head is a share of 0 to 1, got {self.head}")
        if self.tail not in ("cond", self.estimated, "forecast"):
            raise ValueError(
                f"{type(self).__name__}: tail is 'cond', {self.estimated!r} or 'forecast', got "
                f"{self.tail!r}"
            )

    def choices_for(self, total: int) -> tuple[Choice, ...]:
        """Real and estimated steps in turn, then the tail."""
        tail: Choice = "estimate" if self.tail == self.estimated else self.tail
        return alternating(total, self.period, self.head, tail)


@dataclass(frozen=True)
class Hold(Alternating):
    """The last difference of the two predictions is held between real steps.

    Others ship this rule as LinearAG; it is a baseline for it.

    Args:
        period, head, tail: See `Alternating`; tail is "cond", "hold" or "forecast".
        space: "native" holds the difference of network outputs, "x0" of denoised images.
    """

    name: ClassVar[str] = "hold"
    estimated: ClassVar[str] = "hold"

    space: Space = "native"

    @property
    def stands_in(self) -> StandIn:
        """The difference held."""
        return HoldDifference(self.space)


@dataclass(frozen=True)
class Extrapolate(Alternating):
    """The last two differences of the two predictions are continued between real steps.

    Args:
        period, head, tail: See `Alternating`; tail is "cond", "extrapolate" or "forecast".
        space: "native" continues network outputs, "x0" denoised images.
    """

    name: ClassVar[str] = "extrapolate"
    estimated: ClassVar[str] = "extrapolate"

    space: Space = "native"

    @property
    def stands_in(self) -> StandIn:
        """The difference extrapolated."""
        return ExtrapolateDifference(self.space)
