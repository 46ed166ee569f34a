r"""Momentum guidance: the velocity is pushed away from an average of the past ones.

The average of the velocities on the way so far is a smoothed one, as that of a weaker model; the
step goes further from it, as guidance goes further from the unconditional prediction.

.. math::
    \hat v_i = v_i + a \, (v_i - m_i), \qquad m_{i+1} = (1 - \beta) \, v_i + \beta \, m_i, \qquad
    m_0 = v_0

The average is one of the velocities before they are pushed: the guided ones, or those of a pipeline
that evaluates one branch. Steps that a policy leaves without guidance are left alone.

References:
    Liao, Yu, Su, Zhang, Chen & Liu, "Momentum Guidance: Plug-and-Play Guidance for Flow Models",
    https://arxiv.org/abs/2602.20360, equations 12 and 13. Not confirmed in the paper's own text:
    formula and settings are those of re-implementations that agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Factor, NoiseLevel, accumulate, inverse
from ..registry import register
from .cfg import cfg
from .past import noise_share, past


def velocity(denoised: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """Direction in which the noise level changes a sample, with shape (B, \\*).

    Args:
        denoised: A denoised image D, with shape (B, \\*).
        x_t: The network's input, with shape (B, \\*).
        level: Its noise level.

    Returns:
        The velocity of flow models, eps - D; the noise eps of all others, which is the derivative
        of x_t / alpha by sigma / alpha.
    """
    share = 1.0 if level.prediction == "flow" else level.alpha
    return (accumulate(x_t) - share * denoised) * inverse(level.sigma)


def momentum(
    current: Tensor, average: Tensor | None, *, weight: float = 0.5, decay: float = 0.6
) -> tuple[Tensor, Tensor]:
    """A velocity pushed away from the average of the past ones.

    Args:
        current: v_i, with shape (B, \\*).
        average: m_i, with shape (B, \\*); None or all 0 at a sample's first step: v_i itself.
        weight: a, how far it is pushed; 0 not at all.
        decay: beta, the share of the old average in the new one.

    Returns:
        The pushed velocity and m_{i+1}, both with shape (B, \\*).
    """
    mean = past(average, current)
    return current + weight * (current - mean), (1 - decay) * current + decay * mean


@register
@dataclass(frozen=True)
class Momentum(Rule):
    """Momentum guidance on top of classifier-free guidance, or on one branch.

    Args:
        weight: a; 0 is classifier-free guidance. 0.5 for Flux at w = 2.5 to 3.5 in the paper, 1 to
            1.5 at low w.
        decay: beta, from 0 to below 1 (paper: 0.6).
        noise_low, noise_high: The velocity is pushed while ``noise_low <= sigma / (alpha + sigma)
            <= noise_high``, which is sigma for flow models; the average always goes on. The paper's
            times 0.05 to 0.7, which count from the noise.

    The paper treats flow models and Euler steps. For networks that predict something else the
    velocity is the noise, so that Euler and DDIM steps are pushed likewise: that is ours. Solvers
    of higher order use past predictions as well, which adds up (``decay=0, weight=0.5`` makes
    Adams-Bashforth's second order of Euler). The average moves once a network evaluation.

    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "momentum"
    space = "x0"
    one_branch: ClassVar[bool] = True

    weight: float = 0.5
    decay: float = 0.6
    noise_low: float = 0.3
    noise_high: float = 0.95

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"Momentum: weight must be finite, got {self.weight}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"Momentum: decay must be from 0 to below 1, got {self.decay}")
        if not 0 <= self.noise_low < self.noise_high <= 1:
            raise ValueError(
                "Momentum: noise_low < noise_high are from 0 to 1, got "
                f"{self.noise_low} and {self.noise_high}"
            )

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `momentum`; the state is the average."""
        denoised = cfg(*predictions.pair("x0"), w)
        level, x_t = step.known()
        current = velocity(denoised, x_t, level)
        pushed, average = momentum(current, state, weight=self.weight, decay=self.decay)
        inside = self._inside(noise_share(level))
        # The denoised image of another velocity; where alpha is 0, at a first step, there is none.
        factor: Factor = level.sigma
        if level.prediction != "flow":
            factor = factor * inverse(level.alpha)
        return denoised - inside * factor * (pushed - current), average

    def _inside(self, share: Factor) -> Factor:
        inside = (share >= self.noise_low) * (share <= self.noise_high)
        return inside.float() if isinstance(inside, Tensor) else float(inside)
