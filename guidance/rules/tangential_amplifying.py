r"""Tangential amplifying guidance (TAG): the step goes further along the shell of the noise.

A sample with noise lies near a sphere. Of the solver's step, the part along the sample follows from
the noise level; the part tangential to the sphere carries the content, and is amplified.

.. math::
    x' = x + P \, \delta + \eta \, P^\perp \delta, \qquad
    P = \frac{x x^\top}{\langle x, x \rangle}, \qquad P^\perp = 1 - P

A step of Euler or DDIM is linear in the sample and the prediction, :math:`\delta = a x + b p`, and
:math:`P^\perp x = 0`: so the same step is made of the prediction

.. math:: \hat p = p + (\eta - 1) \, P^\perp p

(equation 16), whatever the network predicts. p is the guided prediction, or that of a pipeline that
evaluates one branch. Steps that a policy leaves without guidance are left alone.

References:
    Cho, Ahn, Hong, Kim, Kim & Jin, "TAG: Tangential Amplifying Guidance for Hallucination-Resistant
    Sampling", Algorithm 1, ICML 2026, https://arxiv.org/abs/2510.04533
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import accumulate, at_least, inner
from ..registry import register
from .apg import TINY
from .cfg import cfg


def tangential(prediction: Tensor, x_t: Tensor) -> Tensor:
    """The part of a prediction that is orthogonal to the sample.

    Args:
        prediction: p, with shape (B, \\*).
        x_t: The network's input, with shape (B, \\*); only its direction counts.
    """
    prediction, x_t = accumulate(prediction), accumulate(x_t)
    share = inner(prediction, x_t) / at_least(inner(x_t, x_t), TINY)
    return prediction - share * x_t


@register
@dataclass(frozen=True)
class TAG(Rule):
    """Tangential amplifying guidance on top of classifier-free guidance, or on one branch.

    Args:
        eta: Weight of the tangential part; 1 is classifier-free guidance. The paper has 1.15 for
            Stable Diffusion 1.5 (the default) and 2.1, 1.2 for SDXL and 1.05 for SD 3, all without
            guidance over 50 steps.

    Under solvers of higher order, whose steps use earlier predictions, it is close to the paper's
    step, not equal. The paper's second form, for guided pictures, aligns the update instead; it is
    not offered, as we found no strength for it in the text.

    Raises:
        ValueError: eta is not finite.
    """

    name: ClassVar[str] = "tag"
    one_branch: ClassVar[bool] = True

    eta: float = 1.15

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta):
            raise ValueError(f"TAG: eta must be finite, got {self.eta}")

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, None]:
        """Equation 16, on what `cfg` gives."""
        if step.x_t is None:
            raise ValueError("TAG needs the network's input")
        cond, uncond = predictions.pair("native")
        guided = cfg(accumulate(cond), accumulate(uncond), w)
        return guided + (self.eta - 1) * tangential(guided, step.x_t), None
