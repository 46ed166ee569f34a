r"""Sliding mode control (SMC-CFG): the update of flow models is held back by a constant.

The difference of the two velocities is taken for an error that a controller is to bring to 0. It is
switched by the sign of a weighted sum of the error and of its change since the last step, element
by element.

.. math::
    s_t = (e_t - \tilde e_{t-1}) + \lambda \, \tilde e_{t-1}, \qquad
    \tilde e_t = e_t - k \, \mathrm{sign}(s_t), \qquad \hat v = v_u + w \, \tilde e_t, \qquad
    e_t = v_c - v_u

with :math:`\tilde e_{-1} = e_0`: what is remembered is the corrected error, as in the authors'
code. At w = 1 the result is not the conditional velocity, but k away from it.

References:
    Wang, Liu, Chi, Liu, Xue & Duan, "CFG-Ctrl: Control-Based Classifier-Free Diffusion Guidance",
    CVPR 2026, https://arxiv.org/abs/2603.03281; code at https://github.com/hanyang-21/CFG-Ctrl
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import accumulate
from ..registry import register
from .past import past


def sliding_mode(
    error: Tensor, before: Tensor | None, *, decay: float = 5.0, gain: float = 0.2
) -> Tensor:
    """The corrected difference of the two velocities.

    Args:
        error: e_t, with shape (B, \\*).
        before: The corrected one of the last step, with shape (B, \\*); None or all 0 at a sample's
            first step: the error itself.
        decay: lambda.
        gain: k, in units of the network's output.
    """
    last = past(before, error)
    return error - gain * ((error - last) + decay * last).sign()


@register
@dataclass(frozen=True)
class SMC(Rule):
    """Sliding mode control for flow models.

    Args:
        decay: lambda. The authors recommend 5 with ``gain=0.2`` for Flux (w = 2 to 3, with the
            first two steps unguided), Qwen-Image (w = 4), SD 3 and 3.5 (w = 7.5) and Wan (w = 5);
            their code's own defaults are 0.05 and 0.3, and the paper's text is said to have a gain
            of 0.1.
        gain: k, in units of the network's output: 0 is classifier-free guidance. The values are for
            velocities, so the rule is refused on networks that predict something else.

    Raises:
        ValueError: a setting is negative or not finite.
    """

    name: ClassVar[str] = "smc"

    decay: float = 5.0
    gain: float = 0.2

    def __post_init__(self) -> None:
        for field in ("decay", "gain"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(
                    f"SMC: {field} must be finite and >= 0, got {getattr(self, field)}"
                )

    @property
    def needs_flow(self) -> bool:
        """Whether anything is subtracted, in units of a velocity."""
        return self.gain > 0

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `sliding_mode`; the state is the corrected error."""
        cond, uncond = (accumulate(velocity) for velocity in predictions.pair("native"))
        error = sliding_mode(cond - uncond, state, decay=self.decay, gain=self.gain)
        return uncond + w * error, error
