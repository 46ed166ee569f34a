r"""What stands in for an unconditional prediction that is not evaluated.

Every estimate is one weighted sum of predictions that a run has already seen,

.. math:: \hat u_t = \sum_{i \le t} \beta^c_{t,i} \, c_i + \sum_{i < t} \beta^u_{t,i} \, u_i + b_t

so a stand-in only has to name its weights. Where :math:`u_i` was itself estimated, the estimate
takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .prediction import Space


@dataclass(frozen=True)
class Weights:
    """The weighted sum that estimates one unconditional prediction.

    Args:
        cond: Step i -> weight of the conditional prediction of step i.
        uncond: Step i -> weight of the unconditional prediction of step i.
        intercept: Added to every element.
    """

    cond: dict[int, float] = field(default_factory=dict)
    uncond: dict[int, float] = field(default_factory=dict)
    intercept: float = 0.0


class StandIn:
    """Base of all stand-ins. Subclasses are frozen dataclasses of their settings.

    Attributes:
        name: The name in saved settings.
        space: The space of the predictions that are summed.
    """

    name: ClassVar[str]
    space: Space = "native"

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """The sum that estimates the unconditional prediction of `step`.

        Args:
            step: Network evaluation within the run, from 0.
            evaluated: The earlier steps at which both branches were evaluated, ascending.

        Raises:
            ValueError: this step cannot be estimated.
        """
        raise NotImplementedError

    def check_total(self, total: int) -> None:
        """Refuse runs of a length that the stand-in does not fit.

        Raises:
            ValueError: `total` network evaluations are not what it was made for.
        """

    def _last(self, step: int, evaluated: Sequence[int]) -> int:
        if not evaluated:
            raise ValueError(
                f"{self.name}: step {step} is to be estimated, but no step before it evaluates "
                "the unconditional branch"
            )
        return evaluated[-1]


@dataclass(frozen=True)
class HoldDifference(StandIn):
    r"""The last difference is held: :math:`\hat u_t = c_t - (c_k - u_k)`, k the last real step.

    Args:
        space: "native" holds the difference of network outputs, "x0" that of denoised images.
    """

    name: ClassVar[str] = "hold"

    space: Space = "native"

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        last = self._last(step, evaluated)
        return Weights({step: 1.0, last: -1.0}, {last: 1.0})


@dataclass(frozen=True)
class ExtrapolateDifference(StandIn):
    r"""The last two real differences are continued on a straight line over the steps.

    .. math:: \hat u_t = c_t - \left( \Delta_k + \frac{t - k}{k - j} (\Delta_k - \Delta_j) \right),
        \qquad \Delta_i = c_i - u_i

    with j < k the last two steps that evaluated both branches. With one such step it is held.

    Args:
        space: "native" continues the difference of network outputs, "x0" that of denoised images.
    """

    name: ClassVar[str] = "extrapolate"

    space: Space = "native"

    def weights(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `StandIn`."""
        last = self._last(step, evaluated)
        if len(evaluated) < 2:
            return Weights({step: 1.0, last: -1.0}, {last: 1.0})
        before = evaluated[-2]
        slope = (step - last) / (last - before)
        cond = {step: 1.0, last: -(1 + slope), before: slope}
        return Weights(cond, {last: 1 + slope, before: -slope})
