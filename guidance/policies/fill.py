r"""What stands in for predictions that are not evaluated.

The estimate of an unconditional prediction is one weighted sum of predictions that a run has
already seen,

.. math:: \hat u_t = \sum_{i \le t} \beta^c_{t,i} \, c_i + \sum_{i < t} \beta^u_{t,i} \, u_i + b_t

so a stand-in only has to name its weights. Where :math:`u_i` was itself estimated, the estimate
takes its place.

At a step that evaluates neither branch the guided prediction is forecast from earlier ones,

.. math:: \hat g_t = \sum_{i < t} \beta^g_{t,i} \, g_i

with :math:`g_i` what the rule made of step i. (Solvers of higher order do likewise with weights of
their own, https://arxiv.org/abs/2211.01095; fitted, the weights know the network as well.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..prediction import Space


@dataclass(frozen=True)
class Weights:
    """The weighted sum that estimates one prediction.

    Args:
        cond: Step i -> weight of the conditional prediction of step i.
        uncond: Step i -> weight of the unconditional prediction of step i.
        intercept: Added to every element.
        guided: Step i -> weight of the guided prediction of step i.
    """

    cond: dict[int, float] = field(default_factory=dict)
    uncond: dict[int, float] = field(default_factory=dict)
    intercept: float = 0.0
    guided: dict[int, float] = field(default_factory=dict)


class StandIn:
    """Base of all stand-ins. Subclasses are frozen dataclasses of their settings.

    Attributes:
        name: The name in saved settings.
        space: The space of the predictions that are summed.
        identity: What it was fitted on; None: it holds anywhere.
    """

    name: ClassVar[str]
    space: Space = "native"
    identity: Mapping[str, Any] | None = None

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """The sum that estimates the unconditional prediction of `step`.

        Args:
            step: Network evaluation within the run, from 0.
            evaluated: The earlier steps at which both branches were evaluated, ascending.

        Raises:
            ValueError: this step cannot be estimated.
        """
        raise NotImplementedError

    def forecast(self, step: int, evaluated: Sequence[int]) -> Weights:
        """The sum of guided predictions that takes the place of the one of `step`.

        Args:
            step: Step within the run, from 0.
            evaluated: The earlier steps that were not forecast themselves, ascending.

        Raises:
            ValueError: this step cannot be forecast.
        """
        raise ValueError(f"{self.name}: guided predictions cannot be forecast")

    def check_total(self, total: int) -> None:
        """Refuse runs of a length that the stand-in does not fit.

        Raises:
            ValueError: `total` network evaluations are not what it was made for.
        """

    def _last(self, step: int, evaluated: Sequence[int], forecast: bool = False) -> int:
        if not evaluated:
            what = "anything" if forecast else "the unconditional branch"
            raise ValueError(
                f"{self.name}: step {step} is to be {'forecast' if forecast else 'estimated'}, but "
                f"no step before it evaluates {what}"
            )
        return evaluated[-1]


@dataclass(frozen=True)
class HoldDifference(StandIn):
    r"""The last difference is held: :math:`\hat u_t = c_t - (c_k - u_k)`, k the last real step.

    So is the last guided prediction, where one is to be forecast.

    Args:
        space: "native" holds the difference of network outputs, "x0" that of denoised images.
    """

    name: ClassVar[str] = "hold"

    space: Space = "native"

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        last = self._last(step, evaluated)
        return Weights({step: 1.0, last: -1.0}, {last: 1.0})

    def forecast(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        return Weights(guided={self._last(step, evaluated, forecast=True): 1.0})


@dataclass(frozen=True)
class ExtrapolateDifference(StandIn):
    r"""The last two real differences are continued on a straight line over the steps.

    .. math:: \hat u_t = c_t - \left( \Delta_k + \frac{t - k}{k - j} (\Delta_k - \Delta_j) \right),
        \qquad \Delta_i = c_i - u_i

    with j < k the last two steps that evaluated both branches. With one such step it is held.
    Guided predictions are forecast likewise, from the last two that were not forecast themselves.

    Args:
        space: "native" continues the difference of network outputs, "x0" that of denoised images.
    """

    name: ClassVar[str] = "extrapolate"

    space: Space = "native"

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        weights = self._line(step, evaluated, self._last(step, evaluated))
        cond = {step: 1.0} | {i: -weight for i, weight in weights.items()}
        return Weights(cond, weights)

    def forecast(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        return Weights(guided=self._line(step, evaluated, self._last(step, evaluated, True)))

    def _line(self, step: int, evaluated: Sequence[int], last: int) -> dict[int, float]:
        """Weights with which values at the last two steps make the one at `step`."""
        if len(evaluated) < 2:
            return {last: 1.0}
        before = evaluated[-2]
        slope = (step - last) / (last - before)
        return {last: 1 + slope, before: -slope}
