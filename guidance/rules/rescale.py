r"""CFG rescale: guidance whose standard deviation is that of the conditional prediction.

Classifier-free guidance raises the spread of a prediction with its scale, which overexposes the
picture. The guided prediction is brought back to the spread of the conditional one, and mixed with
the unrescaled one, since full rescaling looks plain.

.. math::
    p_{cfg} &= p_u + w (p_c - p_u), \qquad
    p_r = \frac{\mathrm{std}(p_c)}{\mathrm{std}(p_{cfg})} \, p_{cfg} \\
    \hat{p} &= \phi \, p_r + (1 - \phi) \, p_{cfg}

References:
    Lin, Liu, Li & Yang, "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024,
    section 3.4, https://arxiv.org/abs/2305.08891
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Space, accumulate, check_space, norm, per_sample
from ..registry import register
from .cfg import cfg


def cfg_rescale(
    pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float | Tensor, *, phi: float = 0.7
) -> Tensor:
    """Classifier-free guidance with its standard deviation rescaled.

    Args:
        pred_cond: Conditional prediction p_c, with shape (B, \\*).
        pred_uncond: Unconditional prediction p_u, with shape (B, \\*).
        guidance_scale: w; 1 means no guidance. A number, or a tensor that broadcasts.
        phi: Share of the rescaled prediction; 0 is classifier-free guidance.

    Returns:
        The guided prediction, with shape (B, \\*), in float32 (float64 if the inputs are).
    """
    cond = accumulate(pred_cond)
    guided = cfg(cond, accumulate(pred_uncond), guidance_scale)
    spread = _deviation(guided)
    # A prediction that is constant to rounding has no spread to rescale and is left alone.
    varies = spread > 16 * torch.finfo(guided.dtype).eps * norm(guided)
    ratio = (_deviation(cond) / spread.where(varies, 1)).where(varies, 1)
    return per_sample(1 + phi * (ratio - 1), guided) * guided


def _deviation(pred: Tensor) -> Tensor:
    """sqrt(n) times the standard deviation per sample, shape (B,); n cancels in the ratio."""
    flat = pred.flatten(1)
    return norm(flat - flat.mean(1, keepdim=True))


@register
@dataclass(frozen=True)
class CFGRescale(Rule):
    """Classifier-free guidance with its standard deviation rescaled.

    Args:
        phi: Share of the rescaled prediction, from 0 (classifier-free guidance) to 1 (paper: 0.7).
        space: "native" (the network's output: v in the paper) or "x0".

    Raises:
        ValueError: phi is not between 0 and 1, or the space is unknown.
    """

    name: ClassVar[str] = "rescale"

    phi: float = 0.7
    space: Space = "native"

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise ValueError(f"CFGRescale: phi must be between 0 and 1, got {self.phi}")
        check_space("CFGRescale", self.space)

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, None]:
        """See `cfg_rescale`."""
        return cfg_rescale(*predictions.pair(self.space), w, phi=self.phi), None
