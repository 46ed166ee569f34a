r"""CFG-Zero*: guidance for flow models with an optimized scale and zeroed first steps.

The unconditional velocity is scaled to the best approximation of the conditional one before the
two are combined, and the first steps do not move at all, because there an underfitted velocity is
further from the truth than zero.

.. math::
    s = \frac{\langle v_c, v_u \rangle}{\|v_u\|^2}, \qquad
    \hat{v} = \begin{cases} 0 & \text{in the first } k \text{ steps} \\
    s \, v_u + w (v_c - s \, v_u) & \text{afterwards} \end{cases}

References:
    Fan, Zheng, Yeh & Liu, "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models",
    https://arxiv.org/abs/2503.18886
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import accumulate, dot, per_sample
from ..registry import register


def cfg_zero_star(
    pred_cond: Tensor,
    pred_uncond: Tensor,
    guidance_scale: float | Tensor,
    *,
    optimized_scale: bool = True,
) -> Tensor:
    """Guidance with an optimized scale of the unconditional velocity.

    Args:
        pred_cond: Conditional velocity v_c, with shape (B, \\*).
        pred_uncond: Unconditional velocity v_u, with shape (B, \\*).
        guidance_scale: w; 1 means no guidance. A number, or a tensor that broadcasts.
        optimized_scale: False sets s to 1.

    Returns:
        The guided velocity, with shape (B, \\*), in float32 (float64 if the inputs are).
    """
    cond, uncond = accumulate(pred_cond), accumulate(pred_uncond)
    if optimized_scale:
        # No epsilon, unlike the authors' code: an all-zero unconditional velocity stays zero.
        square = dot(uncond, uncond)
        uncond = per_sample(dot(cond, uncond) / square.where(square > 0, 1), uncond) * uncond
    return cond + (guidance_scale - 1) * (cond - uncond)


@register
@dataclass(frozen=True)
class CFGZeroStar(Rule):
    """CFG-Zero*, for flow models.

    Args:
        zero_steps: How many first steps of a run return a zero velocity where they are guided;
            network evaluations, so that a second-order scheduler has about two per step. The
            authors' code zeroes one step by default and recommends about 4 % of all steps (2 of 50
            for Wan 2.1 text to video).
        optimized_scale: Whether the unconditional velocity is scaled; False leaves zero-init alone.

    A zero prediction means "stay here" only for a velocity: pipelines whose network predicts noise
    or images refuse the rule unless ``zero_steps=0``. ``CFGZeroStar(0, False)`` is plain CFG.

    Raises:
        ValueError: zero_steps is negative or not a whole number.
    """

    name: ClassVar[str] = "cfg-zero*"

    zero_steps: int = 1
    optimized_scale: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.zero_steps, int) or self.zero_steps < 0:
            raise ValueError(
                f"CFGZeroStar: zero_steps must be a whole number >= 0, got {self.zero_steps!r}"
            )

    @property
    def needs_flow(self) -> bool:
        """Whether the first steps are zeroed, which only a velocity can be."""
        return self.zero_steps > 0

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, None]:
        """See `cfg_zero_star`; in the first steps of the run, guided or not, 0."""
        cond, uncond = predictions.pair("native")
        if step.index < self.zero_steps:
            return torch.zeros_like(cond), None
        return cfg_zero_star(cond, uncond, w, optimized_scale=self.optimized_scale), None


register(lambda: CFGZeroStar(), name="cfg-zero-star")  # a star is awkward in shells
