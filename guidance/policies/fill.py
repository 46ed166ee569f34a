r"""What fills in for predictions that are not evaluated, and corrects those that are.

Weighted sums of past predictions,

.. math:: \hat u_t = \sum_{i \le t} \beta^c_{t,i} \, c_i + \sum_{i < t} \beta^u_{t,i} \, u_i,
    \qquad \hat g_t = \sum_{i < t} \beta^g_{t,i} \, g_i

estimate the unconditional prediction of a step that evaluates the conditional branch alone, and the
guided prediction of a step that is skipped; :math:`g_i` is what the rule made of step i. Where
:math:`u_i` was itself estimated, the estimate takes its place; likewise where :math:`g_i` was
corrected, which is :math:`\hat g_t = \sum_{i \le t} \beta^g_{t,i} \, g_i` at a step t that is
evaluated. The weights are a formula (the last value held, or the last two continued) or fitted
(LinearAG, and solvers fitted to a model: see Bespoke solvers).

References:
    Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models", AAAI 2025, https://arxiv.org/abs/2312.12487 (LinearAG)
    Lu et al., "DPM-Solver++", https://arxiv.org/abs/2211.01095 (solvers of higher order use past
    predictions likewise, with weights of their own)
    Shaul et al., "Bespoke Solvers for Generative Flow Models", ICLR 2024,
    https://arxiv.org/abs/2310.19075 (a solver's coefficients fitted to one model)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..base import Fill, Weights
from ..prediction import Space, check_space
from ..registry import register


def _last(step: int, evaluated: Sequence[int], skipped: bool = False) -> int:
    if not evaluated:
        what, branch = ("skipped", "anything") if skipped else ("estimated", "both branches")
        raise ValueError(f"step {step} is to be {what}, but no step before it evaluates {branch}")
    return evaluated[-1]


@register
@dataclass(frozen=True)
class HoldDifference(Fill):
    r"""The last difference is held: :math:`\hat u_t = c_t - (c_k - u_k)`, k the last real step.

    So is the last guided prediction, where a step is skipped.

    Args:
        space: "native" holds the difference of network outputs, "x0" that of denoised images.
    """

    name: ClassVar[str] = "hold"

    space: Space = "native"

    def estimate(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        last = _last(step, evaluated)
        return Weights({step: 1.0, last: -1.0}, {last: 1.0})

    def reused(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        return Weights(guided={_last(step, evaluated, skipped=True): 1.0})


@register
@dataclass(frozen=True)
class ExtrapolateDifference(Fill):
    r"""The last two real differences are continued on a straight line over the steps.

    .. math:: \hat u_t = c_t - \left( \Delta_k + \frac{t - k}{k - j} (\Delta_k - \Delta_j) \right),
        \qquad \Delta_i = c_i - u_i

    with j < k the last two steps that evaluated both branches. With one such step it is held.
    Guided predictions of skipped steps likewise, from the last two steps that were not skipped.

    Args:
        space: "native" continues the difference of network outputs, "x0" that of denoised images.
    """

    name: ClassVar[str] = "extrapolate"

    space: Space = "native"

    def estimate(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        weights = self._line(step, evaluated, _last(step, evaluated))
        return Weights({step: 1.0} | {i: -weight for i, weight in weights.items()}, weights)

    def reused(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        return Weights(guided=self._line(step, evaluated, _last(step, evaluated, skipped=True)))

    def _line(self, step: int, evaluated: Sequence[int], last: int) -> dict[int, float]:
        """Weights with which values at the last two steps make the one at `step`."""
        if len(evaluated) < 2:
            return {last: 1.0}
        before = evaluated[-2]
        slope = (step - last) / (last - before)
        return {last: 1 + slope, before: -slope}


@register
@dataclass(frozen=True)
class Coefficients(Fill):
    """Fitted weights for a run of T steps: those of LinearAG, and those of skipped steps.

    Args:
        cond: Row t holds the weights of the conditional predictions 0 .. t.
        uncond: Row t holds the weights of the unconditional predictions 0 .. t - 1. Fitted to one
            schedule (`guided` is given), the estimate of any other step is left at c_t: none.
        guided: Row t holds the weights of the guided predictions 0 .. t - 1 at a skipped step t,
            all 0 where none was fitted; or those of 0 .. t, with which the prediction of an
            evaluated step t is corrected. Empty: no step can be skipped.
        space: The space of the predictions they were fitted on.
        identity: What they were fitted on (see `pilotage.pipelines.fitting.fitted`); pipelines
            refuse them elsewhere. None: not checked.

    Raises:
        ValueError: the rows are not as described.
    """

    name: ClassVar[str] = "linear"

    cond: tuple[tuple[float, ...], ...]
    uncond: tuple[tuple[float, ...], ...]
    guided: tuple[tuple[float, ...], ...] = ()
    space: Space = "native"
    identity: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("cond", "uncond", "guided"):
            object.__setattr__(self, name, tuple(tuple(row) for row in getattr(self, name)))
        steps = len(self.cond)
        lengths = [[len(row) for row in rows] for rows in (self.cond, self.uncond)]
        if lengths != [list(range(1, steps + 1)), list(range(steps))] or not steps:
            raise ValueError(
                "Coefficients: row t must hold t + 1 conditional and t unconditional weights, got "
                f"rows of {lengths[0]} and {lengths[1]}"
            )
        if self.guided and not (
            len(self.guided) == steps
            and all(len(row) in (t, t + 1) for t, row in enumerate(self.guided))
        ):
            raise ValueError(
                "Coefficients: row t must hold t or t + 1 weights of guided predictions"
            )
        if not all(
            math.isfinite(w)
            for of in (self.cond, self.uncond, self.guided)
            for row in of
            for w in row
        ):
            raise ValueError("Coefficients: a weight is NaN or infinite")
        check_space("Coefficients", self.space)

    def estimate(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        _last(step, evaluated)
        if self.guided and self.cond[step] == (0,) * step + (1,) and not any(self.uncond[step]):
            raise ValueError(
                f"these coefficients hold no estimate of step {step}: fit them to the schedule "
                "(pilotage fit --on-policy, pilotage search --fitted --between estimate)"
            )
        return Weights(dict(enumerate(self.cond[step])), dict(enumerate(self.uncond[step])))

    def reused(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        weights = dict(enumerate(self.guided[step])) if step < len(self.guided) else {}
        if step in weights or not any(weights.values()):
            raise ValueError(
                f"these coefficients hold no weights for skipping step {step}: fit them to the "
                "schedule (pilotage fit --on-policy --then forecast, pilotage search --fitted)"
            )
        return Weights(guided=weights)

    def corrected(self, step: int) -> Weights | None:
        """See `Fill`."""
        row = self.guided[step] if step < len(self.guided) else ()
        return Weights(guided=dict(enumerate(row))) if len(row) > step else None

    def check_total(self, total: int) -> None:
        """See `Fill`."""
        if total != len(self.cond):
            raise ValueError(
                f"coefficients fitted for {len(self.cond)} steps cannot guide a run of {total}: "
                "use as many steps, or fit them for that number"
            )

    def __str__(self) -> str:
        return f"Coefficients({len(self.cond)} steps)"
