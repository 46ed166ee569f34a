r"""Euler steps of flow matching, :math:`x_t = (1 - \sigma) x_0 + \sigma \varepsilon`.

.. math:: x_{next} = x_t + (\sigma' - \sigma) v

References:
    Lipman et al., "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747;
    Esser et al., 2024, https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from ...guidance.ops.solver import network_step
from ..seam.noise_levels import of_sigma
from .fused import FusedScheduler, refuse_integer, table_of


class FusedFlowMatchEulerScheduler(FusedScheduler, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with its step in one kernel on CUDA.

    Its samples are those of the stock scheduler but for rounding; no step waits for the device, as
    the sigmas are kept on the host. With `stochastic_sampling` the stock scheduler's own step is
    taken; timesteps that differ from token to token are refused.
    """

    config_name: Any  # diffusers' own bases disagree about its type

    def coefficients(self) -> Tensor:
        """See `FusedScheduler.coefficients`."""
        sigmas = self.sigmas.double()
        level, delta = of_sigma(self, sigmas[:-1]), sigmas.diff()
        return table_of(len(delta), level, c_x=1.0, c_p=delta)

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """See `FlowMatchEulerDiscreteScheduler.step`, which does not use `s_*` either."""
        if per_token_timesteps is not None:
            raise ValueError(
                "per_token_timesteps: every token would have coefficients of its own; use "
                "diffusers' FlowMatchEulerDiscreteScheduler"
            )
        refuse_integer(timestep)
        self._step_index = self.current_index(timestep)
        if self.config["stochastic_sampling"]:
            stock: Any = super()  # whose annotations are narrower than what it takes
            return stock.step(
                model_output, timestep, sample, generator=generator, return_dict=return_dict
            )
        step = self.solver_row(self._step_index, sample.device)
        prev_sample, _ = network_step(
            sample, model_output, None, step, want_denoised=False, dtype=model_output.dtype
        )
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(cast(torch.FloatTensor, prev_sample))
