r"""LinearAG: the unconditional prediction as a linear function of what the run has already seen.

.. math:: \hat u_t = \sum_{i \le t} \beta^c_{t,i} \, c_i + \sum_{i < t} \beta^u_{t,i} \, u_i

with scalar coefficients for every step, fitted by least squares on trajectories of ordinary
guidance. Real and estimated guidance alternate over the first half of the run: 25 network
evaluations for 20 steps. What the second half does is not settled by the paper, so both ways are
offered, and one of our own at the same cost: real guidance in turn with a forecast of the guided
prediction, linear in earlier ones. An estimated :math:`u_i` is fed back as the estimate.

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..prediction import Space
from .alternating import Alternating
from .fill import StandIn, Weights
from .schedule import sums

Target = Literal["uncond", "difference"]


@dataclass(frozen=True)
class Coefficients(StandIn):
    """The coefficients of LinearAG for a run of T steps.

    Args:
        cond: Row t holds the weights of the conditional predictions 0 .. t.
        uncond: Row t holds the weights of the unconditional predictions 0 .. t - 1. Fitted to one
            schedule (`guided` is given), the estimate of any other step is left at c_t: none.
        intercept: b_t, added to every element of an estimate; empty: none.
        guided: Row t holds the weights of the guided predictions 0 .. t - 1 in the forecast of
            step t, all 0 where none was fitted; empty: no step can be forecast.
        space: The space of the predictions they were fitted on.
        identity: What they were fitted on (see `pilotage.pipelines.fitting.identity`); pipelines refuse
            them elsewhere. None: not checked.

    Raises:
        ValueError: the rows are not as described.
    """

    name: ClassVar[str] = "linear"

    cond: tuple[tuple[float, ...], ...]
    uncond: tuple[tuple[float, ...], ...]
    intercept: tuple[float, ...] = ()
    guided: tuple[tuple[float, ...], ...] = ()
    space: Space = "native"
    identity: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("cond", "uncond", "guided"):
            object.__setattr__(self, name, tuple(tuple(row) for row in getattr(self, name)))
        object.__setattr__(self, "intercept", tuple(self.intercept))
        steps = len(self.cond)
        lengths = [[len(row) for row in rows] for rows in (self.cond, self.uncond)]
        if lengths != [list(range(1, steps + 1)), list(range(steps))] or not steps:
            raise ValueError(
                "Coefficients: row t must hold t + 1 conditional and t unconditional weights, got "
                f"rows of {lengths[0]} and {lengths[1]}"
            )
        if len(self.intercept) not in (0, steps):
            raise ValueError(f"Coefficients: {len(self.intercept)} intercepts for {steps} steps")
        if self.guided and [len(row) for row in self.guided] != list(range(steps)):
            raise ValueError("Coefficients: row t must hold t weights of guided predictions")
        if self.space not in ("x0", "native"):
            raise ValueError(f"Coefficients: space is 'x0' or 'native', got {self.space!r}")

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        self._last(step, evaluated)
        if self.guided and self.cond[step] == (0,) * step + (1,) and not any(self.uncond[step]):
            raise ValueError(
                f"linear: these coefficients hold no estimate of step {step}: fit them to the "
                "schedule (pilotage fit --steered, pilotage search --fitted --between estimate)"
            )
        return Weights(
            dict(enumerate(self.cond[step])),
            dict(enumerate(self.uncond[step])),
            self.intercept[step] if self.intercept else 0.0,
        )

    def forecast(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        weights = dict(enumerate(self.guided[step])) if step < len(self.guided) else {}
        if not any(weights.values()):
            raise ValueError(
                f"linear: these coefficients hold no forecast of step {step}: fit them to the "
                "schedule (pilotage fit --steered --tail forecast, pilotage search --fitted)"
            )
        return Weights(guided=weights)

    def check_total(self, total: int) -> None:
        """See `StandIn`."""
        if total != len(self.cond):
            raise ValueError(
                f"coefficients fitted for {len(self.cond)} steps cannot guide a run of {total}: "
                "use as many steps, or fit them for that number"
            )

    def __str__(self) -> str:
        return f"Coefficients({len(self.cond)} steps)"


@dataclass(frozen=True)
class LinearAG(Alternating):
    """LinearAG: real and linearly estimated guidance in turn, then a cheap tail.

    Args:
        period, head: See `Alternating`. The defaults are the paper's.
        tail: "cond" (the conditional prediction alone), "linear" (still estimated) or "forecast"
            (real guidance and forecasts in turn).
        coefficients: What `pilotage.pipelines.fitting.fit` found for this model, scheduler, number of
            steps, scale and negative prompt.

    Raises:
        ValueError: no coefficients, a setting is out of its range, or the coefficients hold no
            forecasts.
    """

    name: ClassVar[str] = "linear-ag"
    estimated: ClassVar[str] = "linear"

    coefficients: Coefficients | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients is None:
            raise ValueError(
                "linear-ag needs coefficients fitted for this model: make them with 'pilotage fit' "
                "(or pilotage.pipelines.fitting.fit), then guidance=load_guidance(file)"
            )
        sums(self.choices_for(len(self.coefficients.cond)), self.coefficients)

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """What the coefficients were fitted on."""
        return self.coefficients.identity

    @property
    def stands_in(self) -> StandIn:
        """The coefficients."""
        return self.coefficients
