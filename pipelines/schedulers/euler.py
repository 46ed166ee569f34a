r"""Euler steps on noise levels :math:`\sigma` (variance exploding), as `EulerDiscreteScheduler`.

.. math:: x_{next} = \frac{\sigma'}{\sigma} x_t + \left(1 - \frac{\sigma'}{\sigma}\right) D

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_euler_discrete import (
    EulerDiscreteScheduler,
    EulerDiscreteSchedulerOutput,
)
from torch import Tensor

from ...guidance.ops.solver import network_step
from ..seam.noise_levels import of_sigma
from .fused import FusedScheduler, refuse_integer, table_of


class FusedEulerScheduler(FusedScheduler, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` with its step in one kernel on CUDA, without device reads.

    Its samples are those of the stock scheduler but for rounding. With `s_churn` > 0 the stock
    scheduler's own step is taken.
    """

    config_name: Any  # diffusers' own bases disagree about its type

    def coefficients(self) -> Tensor:
        """See `FusedScheduler.coefficients`."""
        sigma, sigma_next = self.sigmas[:-1].double(), self.sigmas[1:].double()
        level, ratio = of_sigma(self, sigma), sigma_next / sigma
        weights = {"c_x": ratio, "k_d": 1 - ratio}
        if level.prediction == "epsilon":  # the same with less rounding
            weights = {"c_x": torch.ones_like(sigma), "c_p": sigma_next - sigma}
        return table_of(len(sigma), level, level.alpha, **weights)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """The network's input, x_t / sqrt(sigma^2 + 1)."""
        self._step_index = self.current_index(timestep)
        self.is_scale_input_called = True
        return sample * of_sigma(self, self._levels[self._step_index]).alpha

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
            return super().step(
                model_output, timestep, sample,
                s_churn, s_tmin, s_tmax, s_noise, generator, return_dict,
            )  # fmt: skip
        step = self.solver_row(self._step_index, sample.device)
        prev_sample, denoised = cast(
            tuple[Tensor, Tensor],
            network_step(sample, model_output, None, step, dtype=model_output.dtype),
        )
        self._step_index += 1
        if not return_dict:
            return prev_sample, denoised
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)
