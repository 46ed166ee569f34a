r"""History-guided sampling (HiGS): away from an average of the past denoised images.

What the denoised image gained on an average of the earlier ones is added once more, without its
part along the image, which saturates, and without its low frequencies, which shift colours.

.. math::
    g_k &= \alpha \, D_k + (1 - \alpha) \, g_{k-1}, \qquad g_{-1} = 0, \qquad
    \Delta_k = D_k - g_{k-1} \\
    \hat D_k &= D_k + w_H \sqrt{\frac{t - t_0}{t_1 - t_0}} \;
    \mathrm{iDCT}\bigl(s(50 (R - R_c)) \, \mathrm{DCT}(\Delta^\perp_k
    + \eta \Delta^\parallel_k)\bigr) \qquad \text{for } t_0 < t \le t_1

with D the guided denoised image, or that of a pipeline that evaluates one branch, s the logistic
function, and R the distance of a frequency from 0, :math:`R^2 = (i / H)^2 + (j / W)^2`. The first
step changes nothing. Steps that a policy leaves without guidance are left alone.

References:
    Sadat, Salehi & Weber, "HiGS: History-Guided Sampling for Plug-and-Play Enhancement of Diffusion
    Models", equations 5 to 9 and Algorithms 1 to 3, https://arxiv.org/abs/2509.22300
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Predictions, Rule, Step
from ..prediction import Factor, at_least, inner
from ..registry import register
from .apg import TINY
from .cfg import cfg
from .past import noise_share, past

SHARPNESS = 50.0  # of the filter, in the paper for every model


@functools.lru_cache(maxsize=16)
def _cosines(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal DCT-II, with shape (size, size): a row for every frequency."""
    place = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    rows[0] *= math.sqrt(0.5)
    return rows.to(device, dtype)


def high_pass(image: Tensor, cutoff: float) -> Tensor:
    """An image without the frequencies below about `cutoff`.

    Args:
        image: With shape (..., H, W).
        cutoff: R_c, in units of the sampling frequency along a side of 1: the filter is 1/2 there.
    """
    height, width = image.shape[-2:]
    rows, columns = (_cosines(size, image.device, image.dtype) for size in (height, width))
    y = torch.arange(height, dtype=image.dtype, device=image.device)[:, None] / height
    x = torch.arange(width, dtype=image.dtype, device=image.device) / width
    kept = torch.sigmoid(SHARPNESS * (torch.hypot(y, x) - cutoff))
    return rows.T @ (kept * (rows @ image @ columns.T)) @ columns


@register
@dataclass(frozen=True)
class HiGS(Rule):
    """History-guided sampling on top of classifier-free guidance, or on one branch.

    Args:
        weight: w_H; 0 is classifier-free guidance. The paper has 1.75 for SDXL and SD 3, 0.75 to 2
            for others, and advises at most 3.
        eta: Weight of the part along the denoised image: 0 in the paper's table of distances, 1 in
            that of preferences (there with ``decay=0.5``).
        decay: alpha, the weight of the newest image in the average (paper: 0.75 or 0.5).
        noise_low, noise_high: t_0 and t_1, between which it acts; t is sigma / (alpha + sigma), the
            time of flow models. The paper takes the timestep for t, which no rule knows: on other
            models the same numbers mean other steps (timestep 400 of 1000 is at 0.538 with Stable
            Diffusion's noise schedule: the preset for SDXL).
        cutoff: R_c (paper: 0.05).

    The defaults are the paper's for SDXL and SD 3 (Table 10, 20 Euler steps, w = 2.5).

    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "higs"
    space = "x0"
    one_branch: ClassVar[bool] = True

    weight: float = 1.75
    eta: float = 0.0
    decay: float = 0.75
    noise_low: float = 0.4
    noise_high: float = 1.0
    cutoff: float = 0.05

    def __post_init__(self) -> None:
        for field in ("weight", "eta", "cutoff"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"HiGS: {field} must be finite, got {getattr(self, field)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"HiGS: decay must be above 0 and at most 1, got {self.decay}")
        if not 0 <= self.noise_low < self.noise_high <= 1:
            raise ValueError(
                "HiGS: noise_low < noise_high are from 0 to 1, got "
                f"{self.noise_low} and {self.noise_high}"
            )

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 3; the state is the average g."""
        denoised = cfg(*predictions.pair("x0"), w)
        if denoised.ndim not in (4, 5):
            raise ValueError(
                "HiGS: frequencies need predictions of shape (B, C, H, W) or (B, C, F, H, W), not "
                f"packed tokens; got {tuple(denoised.shape)}"
            )
        level, _ = step.known()
        # Without a past nothing is gained; the average begins at 0.
        gained = denoised - past(state, denoised)
        if self.eta != 1:
            share = inner(gained, denoised) / at_least(inner(denoised, denoised), TINY)
            gained = gained - (1 - self.eta) * share * denoised
        average = self.decay * denoised
        if state is not None:
            average = average + (1 - self.decay) * state
        scale = self._scale(noise_share(level))
        return denoised + scale * high_pass(gained, self.cutoff), average

    def _scale(self, t: Factor) -> Factor:
        """w_H at the time t."""
        low, high = self.noise_low, self.noise_high
        if isinstance(t, Tensor):
            inside = (t > low) & (t <= high)
            return self.weight * ((t - low).clamp(min=0) / (high - low)).sqrt() * inside
        return self.weight * math.sqrt((t - low) / (high - low)) if low < t <= high else 0.0
