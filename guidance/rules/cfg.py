r"""Classifier-free guidance (CFG).

.. math:: \hat{p} = p_u + w (p_c - p_u)

References:
    Ho & Salimans, "Classifier-Free Diffusion Guidance", https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import accumulate
from ..registry import register


def cfg(pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance; the same in every affine prediction space.

    Args:
        pred_cond: Conditional prediction p_c, with shape (B, \\*).
        pred_uncond: Unconditional prediction p_u, with shape (B, \\*).
        guidance_scale: w; 1 means no guidance. A number, or a tensor that broadcasts.

    Returns:
        The guided prediction, with shape (B, \\*) and the inputs' dtype.
    """
    return pred_uncond + guidance_scale * (pred_cond - pred_uncond)


@register
@dataclass(frozen=True)
class CFG(Rule):
    """Plain classifier-free guidance, the pipelines' own rule."""

    name: ClassVar[str] = "cfg"
    is_pipelines_own: ClassVar[bool] = True

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, None]:
        """See `cfg`."""
        cond, uncond = predictions.pair("native")
        return cfg(accumulate(cond), accumulate(uncond), w), None
