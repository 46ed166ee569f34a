r"""Prediction types: every network output is an affine view of the denoised image.

With :math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon`, the denoised image is

.. math:: D = a_x x_t + a_p \, \mathrm{pred}

for each of the four conventions in use (epsilon, v, flow velocity, sample).

References:
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    https://arxiv.org/abs/2202.00512 (v-prediction); Karras et al., "Elucidating the Design Space of
    Diffusion-Based Generative Models", https://arxiv.org/abs/2206.00364 (sigma_data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .device import on_host

PredictionType = Literal["epsilon", "v_prediction", "flow", "sample"]
Space = Literal["x0", "native"]
Factor = float | Tensor
"""What every sample is multiplied with: a number, or a tensor that broadcasts."""

PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
SPACES: tuple[str, ...] = get_args(Space)


@dataclass(frozen=True)
class NoiseLevel:
    r"""Noise level of one network call.

    Args:
        alpha: Signal coefficient :math:`\alpha_t` of the network's input (float or 0-d tensor).
        sigma: Noise coefficient :math:`\sigma_t` of the network's input (float or 0-d tensor).
        prediction: What the network predicts.
        sign: -1 if the network outputs the negative of that (some flow models do).
        sigma_data: Standard deviation of the data that a v-prediction was trained for: v is
            :math:`\alpha_t \sigma_{data} \varepsilon - \sigma_t x_0 / \sigma_{data}`, as in the
            preconditioning of Karras et al. (2022), and
            :math:`\alpha_t^2 \sigma_{data}^2 + \sigma_t^2 = 1`.

    Variance-exploding schedulers scale the network's input by :math:`1/\sqrt{\sigma^2 + 1}`; the
    coefficients here are those of the scaled input, so that :math:`\alpha^2 + \sigma^2 = 1`.
    """

    alpha: float | Tensor
    sigma: float | Tensor
    prediction: PredictionType
    sign: int = 1
    sigma_data: float = 1.0

    @property
    def ratio(self) -> float:
        """sigma / alpha, the variance-exploding noise level (a host read if on a device)."""
        alpha, sigma = float(self.alpha), float(self.sigma)
        return sigma / alpha if alpha else math.inf

    def coefficients(self) -> tuple[float | Tensor, float | Tensor]:
        """The pair (a_x, a_p) with ``D = a_x * x_t + a_p * pred``.

        Raises:
            ValueError: the prediction type is unknown.
        """
        alpha, sigma, sign = self.alpha, self.sigma, self.sign
        match self.prediction:
            case "epsilon":
                return 1 / alpha, -sign * sigma / alpha
            case "v_prediction":
                return alpha * self.sigma_data**2, -sign * sigma * self.sigma_data
            case "flow":
                return 1.0, -sign * sigma
            case "sample":
                return 0.0, float(sign)
        raise ValueError(
            f"unknown prediction type {self.prediction!r}: expected one of {PREDICTION_TYPES}"
        )

    def to_x0(self, pred: Tensor, x_t: Tensor) -> Tensor:
        """Denoised image of a prediction.

        Args:
            pred: Network output, with shape (B, \\*), any floating dtype.
            x_t: Network input, with shape (B, \\*).

        Returns:
            D, with shape (B, \\*), in float32 (float64 if the inputs are).
        """
        a_x, a_p = self.coefficients()
        return add_scaled(a_x * accumulate(x_t), accumulate(pred), a_p)

    def from_x0(self, denoised: Tensor, x_t: Tensor) -> Tensor:
        """The prediction whose denoised image is `denoised`; inverse of `to_x0`.

        0 where a denoised image says nothing of a prediction (at the end of the noise, sigma = 0).
        """
        a_x, a_p = self.coefficients()
        return (denoised - a_x * accumulate(x_t)) * inverse(a_p)


def inverse(factor: Factor) -> Factor:
    """1 / factor, and 0 where that is 0."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, 1 / factor)
    return 1 / factor if factor else 0.0


def accumulate(tensor: Tensor) -> Tensor:
    """The tensor in the precision that norms and dot products are computed in (>= float32)."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def add_scaled(a: Tensor, b: Tensor, factor: Factor) -> Tensor:
    """``a + factor * b`` in one pass."""
    if isinstance(factor, Tensor):
        return torch.addcmul(a, b, factor)
    return torch.add(a, b, alpha=factor)


def inner(a: Tensor, b: Tensor) -> Factor:
    """Inner product of every sample of `a` and `b` (float32 or wider), as a factor for samples.

    With shape (B, 1, ..., 1); a number for one sample on the CPU, where small tensors cost more
    than what is computed with them.
    """
    product = a * b
    readable = type(product) is Tensor and not product.requires_grad
    if readable and on_host(a.device) and a.shape[0] == 1 and not torch.compiler.is_compiling():
        return product.sum().item()
    return per_sample(product.flatten(1).sum(1), a)


def at_least(value: Factor, low: float) -> Factor:
    """`value`, but not below `low`."""
    return value.clamp(min=low) if isinstance(value, Tensor) else max(value, low)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample inner product over all non-batch dimensions, shape (B,), at least float32."""
    return (accumulate(a) * accumulate(b)).flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Per-sample L2 norm over all non-batch dimensions, shape (B,), at least float32."""
    return accumulate(a).flatten(1).norm(dim=1)


def cosine(pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
    """gamma_t per sample over all non-batch dimensions, shape (B,), at least float32.

    1 where the predictions are equal, also where both are zero.
    """
    product = norm(pred_cond) * norm(pred_uncond)
    ratio = dot(pred_cond, pred_uncond) / product.where(product > 0, 1)
    return ratio.where(product > 0, (norm(pred_cond) == norm(pred_uncond)).to(ratio))


def sum_of(tensor: Tensor) -> Tensor:
    """The sum of all elements, a 0-d tensor: finite if and only if all of them are."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.sum(dtype=torch.float32) if tensor.dtype.itemsize < 4 else tensor.sum()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1) so that it broadcasts against `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def check_space(owner: str, space: str) -> None:
    """Refuse a space that is neither "x0" nor "native".

    Raises:
        ValueError: so it is; the message begins with `owner`.
    """
    if space not in SPACES:
        raise ValueError(f"{owner}: space is 'x0' or 'native', got {space!r}")
