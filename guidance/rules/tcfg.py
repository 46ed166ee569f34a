r"""Tangential damping (TCFG): the unconditional prediction loses what disagrees with the condition.

The two predictions of a sample, stacked as rows, have two right singular vectors. The second,
tangential one carries what they do not share; the unconditional prediction is projected onto the
first before the two are combined.

.. math::
    \begin{pmatrix} p_c \\ p_u \end{pmatrix} = U \Sigma V^T, \qquad
    p'_u = \langle p_u, v_1 \rangle v_1, \qquad
    \hat{p} = p'_u + w (p_c - p'_u)

The projection has a closed form in the three inner products of the predictions,

.. math::
    p'_u = \frac{\langle p_c, p_u \rangle}{h} \, p_c
    + \frac{1}{2} \left(1 + \frac{\|p_u\|^2 - \|p_c\|^2}{h} \right) p_u, \qquad
    h^2 = (\|p_u\|^2 - \|p_c\|^2)^2 + 4 \langle p_c, p_u \rangle^2

because :math:`v_1 \sigma_1 = x p_c + y p_u` with (x, y) the first eigenvector of the 2x2 Gram
matrix, whence :math:`p'_u = y (x p_c + y p_u)`, whatever the sign of (x, y).

References:
    Kwon et al., "TCFG: Tangential Damping Classifier-free Guidance", CVPR 2025,
    https://arxiv.org/abs/2503.18137
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Space, accumulate, check_space, dot, per_sample
from ..registry import register


def tangential_damping(pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
    """The unconditional prediction without its tangential component.

    Args:
        pred_cond: Conditional prediction p_c, with shape (B, \\*).
        pred_uncond: Unconditional prediction p_u, with shape (B, \\*).

    Returns:
        p'_u, with shape (B, \\*), in float32 (float64 if the inputs are). Where the predictions are
        orthogonal and equally long, so that no direction is the first, it is half of p_u.
    """
    cond, uncond = accumulate(pred_cond), accumulate(pred_uncond)
    product = dot(cond, uncond)
    excess = dot(uncond - cond, uncond + cond)
    # hypot: the squares of inner products leave the range of float32.
    root = torch.hypot(excess, 2 * product)
    root = root.where(root > 0, 1)
    share_cond, share_uncond = product / root, (1 + excess / root) / 2
    return per_sample(share_cond, cond) * cond + per_sample(share_uncond, uncond) * uncond


def tcfg(pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance with tangential damping.

    Args:
        pred_cond: Conditional prediction p_c, with shape (B, \\*).
        pred_uncond: Unconditional prediction p_u, with shape (B, \\*).
        guidance_scale: w; 1 means no guidance. A number, or a tensor that broadcasts.

    Returns:
        The guided prediction, with shape (B, \\*), in float32 (float64 if the inputs are).
    """
    cond = accumulate(pred_cond)
    return cond + (guidance_scale - 1) * (cond - tangential_damping(pred_cond, pred_uncond))


@register
@dataclass(frozen=True)
class TCFG(Rule):
    """Classifier-free guidance with tangential damping. It has no strength to set.

    Args:
        space: "native" (the network's output, as in the public implementations; the paper speaks
            of scores, of which noise predictions are multiples) or "x0".

    Raises:
        ValueError: the space is unknown.
    """

    name: ClassVar[str] = "tcfg"

    space: Space = "native"

    def __post_init__(self) -> None:
        check_space("TCFG", self.space)

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, None]:
        """See `tcfg`."""
        return tcfg(*predictions.pair(self.space), w), None
