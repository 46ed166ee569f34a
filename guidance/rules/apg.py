r"""Adaptive projected guidance (APG): high guidance scales without oversaturation.

The update of classifier-free guidance is given momentum, rescaled into a ball, and split into a
part parallel to the conditional prediction (which saturates) and one orthogonal to it (which
improves quality); the parallel part is damped.

.. math::
    g &= D_c - D_u, \qquad m = g + \beta m_{prev}, \qquad g' = \min(1, r / \|m\|) \, m \\
    g'_\parallel &= \frac{\langle g', D_c \rangle}{\langle D_c, D_c \rangle} D_c, \qquad
    g'_\perp = g' - g'_\parallel \\
    D &= D_c + (w - 1) (g'_\perp + \eta \, g'_\parallel)

References:
    Sadat, Hilliges & Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in
    Diffusion Models", ICLR 2025, Algorithm 1, https://arxiv.org/abs/2410.02416
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Space, accumulate, add_scaled, at_least, check_space, inner
from ..registry import register

ThresholdUnit = Literal["l2", "rms"]
TINY = 1e-37  # about the smallest square that float32 holds to full precision


def apg(
    pred_cond: Tensor,
    pred_uncond: Tensor,
    guidance_scale: float | Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    threshold_unit: ThresholdUnit = "l2",
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance on denoised images.

    Args:
        pred_cond: Conditional denoised image D_c, with shape (B, \\*).
        pred_uncond: Unconditional denoised image D_u, with shape (B, \\*).
        guidance_scale: w; 1 means no guidance. A number, or a tensor that broadcasts.
        momentum_buffer: The unscaled m of the previous step, with shape (B, \\*), or None.
        eta: Weight of the parallel part; 1 keeps all of it, 0 (the paper) removes it.
        norm_threshold: r, the radius of the ball the update is rescaled into; 0 switches it off.
        momentum: beta, negative in the paper (each update is pushed away from the last one).
        threshold_unit: "l2" reads r as the norm over all elements of a sample, "rms" per element
            (r / sqrt(n)), so that one value carries over resolutions.

    Returns:
        The guided denoised image and the new momentum buffer, both with shape (B, \\*), in float32
        (float64 if the inputs are).
    """
    denoised = accumulate(pred_cond)
    buffer = denoised - accumulate(pred_uncond)
    if momentum_buffer is not None and momentum != 0:
        buffer = buffer.add_(momentum_buffer, alpha=momentum)
    scale = guidance_scale - 1
    if norm_threshold > 0:
        elements = buffer.numel() / len(buffer) if threshold_unit == "rms" else 1
        radius = norm_threshold * math.sqrt(elements)
        scale = scale * (radius / at_least(inner(buffer, buffer) ** 0.5, radius))
    update = buffer
    if eta != 1:
        # An all-zero conditional prediction has no parallel part.
        share = inner(buffer, denoised) / at_least(inner(denoised, denoised), TINY)
        update = add_scaled(buffer, denoised, (eta - 1) * share)
    return add_scaled(denoised, update, scale), buffer


@register
@dataclass(frozen=True)
class APG(Rule):
    """Adaptive projected guidance.

    Args:
        eta: Weight of the part parallel to the conditional prediction (paper: 0).
        norm_threshold: Radius of the update, in `threshold_unit` of the latents; 0 is off.
        momentum: Negative momentum (paper: -0.5 or -0.75).
        threshold_unit: "rms" (per element, the default) or "l2" (over all elements, the paper).
        space: "x0" (the paper) or "native" (raw network outputs).

    The defaults are the paper's for SDXL, its threshold of 15 over 4x128x128 latents expressed
    per element (15/256). The neutral setting ``APG(1, 0, 0)`` is classifier-free guidance.

    Raises:
        ValueError: a setting is not finite, or the threshold is negative.
    """

    name: ClassVar[str] = "apg"

    eta: float = 0.0
    norm_threshold: float = 15 / 256
    momentum: float = -0.5
    threshold_unit: ThresholdUnit = "rms"
    space: Space = "x0"

    def __post_init__(self) -> None:
        for field in ("eta", "norm_threshold", "momentum"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"APG: {field} must be finite, got {getattr(self, field)}")
        if self.norm_threshold < 0:
            raise ValueError(f"APG: norm_threshold must be >= 0, got {self.norm_threshold}")
        if self.threshold_unit not in ("l2", "rms"):
            raise ValueError(f"APG: threshold_unit is 'l2' or 'rms', got {self.threshold_unit!r}")
        check_space("APG", self.space)

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `apg`; the state is its momentum buffer."""
        guided, buffer = apg(
            *predictions.pair(self.space),
            w,
            state,
            eta=self.eta,
            norm_threshold=self.norm_threshold,
            momentum=self.momentum,
            threshold_unit=self.threshold_unit,
        )
        return guided, buffer if self.momentum != 0 else None
