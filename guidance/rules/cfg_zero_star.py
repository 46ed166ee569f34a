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

from ..base import Rule
from ..prediction import accumulate, dot, per_sample


def cfg_zero_star(
    pred_cond: Tensor,
    pred_uncond: Tensor,
    guidance_scale: float,
    steps_done: Tensor | None = None,
    *,
    zero_steps: int = 1,
    optimized_scale: bool = True,
) -> tuple[Tensor, Tensor]:
    """Guidance with an optimized scale and zeroed first steps, on velocities.

    Args:
        pred_cond: Conditional velocity v_c, with shape (B, \\*).
        pred_uncond: Unconditional velocity v_u, with shape (B, \\*).
        guidance_scale: w; 1 means no guidance.
        steps_done: Steps already taken by each sample, with shape (B, 1); None at the first.
        zero_steps: k, the number of first steps whose velocity is zero.
        optimized_scale: False sets s to 1.

    Returns:
        The guided velocity, with shape (B, \\*), in float32 (float64 if the inputs are), and the
        new number of steps, with shape (B, 1).
    """
    cond, uncond = accumulate(pred_cond), accumulate(pred_uncond)
    if steps_done is None:
        steps_done = torch.zeros(len(cond), 1, dtype=torch.int32, device=cond.device)
    if optimized_scale:
        # No epsilon, unlike the authors' code: an all-zero unconditional velocity stays zero.
        square = dot(uncond, uncond)
        uncond = per_sample(dot(cond, uncond) / square.where(square > 0, 1), uncond) * uncond
    guided = cond + (guidance_scale - 1) * (cond - uncond)
    moving = per_sample(steps_done >= zero_steps, guided)
    return guided.where(moving, 0), steps_done + 1


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
    counts_steps: ClassVar[bool] = True

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
        self, pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `cfg_zero_star`; the state is the number of steps done."""
        return cfg_zero_star(
            pred_cond,
            pred_uncond,
            guidance_scale,
            state,
            zero_steps=self.zero_steps,
            optimized_scale=self.optimized_scale,
        )
