r"""Euler steps on noise levels :math:`\sigma` (variance exploding), as `EulerDiscreteScheduler`.

.. math:: x_{next} = \frac{\sigma'}{\sigma} x_t + \left(1 - \frac{\sigma'}{\sigma}\right) D

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364
"""

from __future__ import annotations

import math

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from ...guidance import NoiseLevel
from ...guidance.ops.solver import network_step
from ..seam.noise_levels import prediction_type_of
from .fused import FusedScheduler, refuse_integer, table_of


class FusedEulerScheduler(FusedScheduler, EulerDiscreteScheduler):
    """See `EulerDiscreteScheduler`; the same trajectory, one launch a step, no host syncs.

    With `s_churn` > 0 its own step is taken.
    """

    def check_config(self) -> None:
        """Raise ValueError for a prediction type that is not known."""
        prediction_type_of(self)

    def coefficients(self) -> Tensor:
        """See `FusedScheduler.coefficients`."""
        sigma, sigma_next = self.sigmas[:-1].double(), self.sigmas[1:].double()
        scale = (sigma**2 + 1).rsqrt()
        match prediction_type_of(self):
            case "epsilon":
                d_x, d_p = 1.0, -sigma
            case "v_prediction":
                d_x, d_p = scale**2, -sigma * scale
            case _:
                d_x, d_p = 0.0, 1.0
        return table_of(
            len(sigma),
            k_x=sigma_next / sigma,
            k_d=1 - sigma_next / sigma,
            d_x=d_x,
            d_p=d_p,
            scale_in=scale,
            input_scale=(sigma_next**2 + 1).rsqrt(),
        )

    def noise_level(self, timestep: Tensor | float) -> NoiseLevel:
        """See `FusedScheduler.noise_level`."""
        sigma = self._levels[self.current_index(timestep, default=0)]
        alpha = 1 / math.sqrt(sigma * sigma + 1)
        return NoiseLevel(alpha, sigma * alpha, prediction_type_of(self))

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """The network's input, x_t / sqrt(sigma^2 + 1)."""
        self._step_index = self.current_index(timestep)
        self.is_scale_input_called = True
        return sample * (1 / math.sqrt(self._levels[self._step_index] ** 2 + 1))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """See `EulerDiscreteScheduler.step`."""
        refuse_integer(timestep)
        self._step_index = self.current_index(timestep)
        if s_churn > 0:
            churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
            return super().step(
                model_output,
                timestep,
                sample,
                **churn,
                generator=generator,
                return_dict=return_dict,
            )
        step = self.solver_row(self._step_index, sample.device)
        dtype = model_output.dtype
        prev_sample, denoised = network_step(sample, model_output, None, step, dtype=dtype)
        self._step_index += 1
        if not return_dict:
            return prev_sample, denoised
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)
