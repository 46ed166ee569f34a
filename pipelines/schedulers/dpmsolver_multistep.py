r"""DPM-Solver++ of first and second order (2M), as `DPMSolverMultistepScheduler`.

With :math:`s = \sigma / \alpha`, :math:`h = \log(s / s')`, :math:`r = h_{prev} / h` and
:math:`\varphi = \alpha' (1 - e^{-h})` the midpoint form is

.. math:: x_{next} = \frac{\sigma'}{\sigma} x_t + \varphi \left(1 + \frac{1}{2r}\right) D
    - \frac{\varphi}{2r} D_{prev}

and the first order is the same with :math:`1/r = 0`. The stochastic form (SDE) has
:math:`1 - e^{-2h}` in place of :math:`1 - e^{-h}` and adds noise.

References:
    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    2022, https://arxiv.org/abs/2211.01095
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...guidance import NoiseLevel
from ...guidance.ops.solver import network_step
from ..seam.noise_levels import of_sigma
from .fused import FusedScheduler, table_of


class FusedDPMSolverMultistepScheduler(FusedScheduler, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with its step in one kernel on CUDA.

    Its samples are those of the stock scheduler but for rounding; no step waits for the device. It
    has the algorithms "dpmsolver++" and "sde-dpmsolver++", of orders 1 and 2. With `thresholding`
    the stock scheduler's own step is taken.
    """

    config_name: Any  # diffusers' own bases disagree about its type
    model_outputs: list[Any]

    def check_config(self) -> None:
        """Raise ValueError for other algorithms and orders, and for mixed up noise levels."""
        super().check_config()
        if (
            self.config["prediction_type"] == "flow_prediction"
            and not self.config["use_flow_sigmas"]
        ):
            raise ValueError(
                "FusedDPMSolverMultistepScheduler: prediction_type 'flow_prediction' is of samples "
                "with flow sigmas, expected use_flow_sigmas=True, got False"
            )
        algorithm, order = self.config["algorithm_type"], self.config["solver_order"]
        if algorithm not in ("dpmsolver++", "sde-dpmsolver++") or order not in (1, 2):
            raise ValueError(
                "FusedDPMSolverMultistepScheduler has algorithm_type 'dpmsolver++' and "
                f"'sde-dpmsolver++' (got {algorithm!r}), solver_order 1 and 2 (got {order})"
            )

    def coefficients(self) -> Tensor:
        """The rows of the first order, then those of the second."""
        self.check_begun()
        sigmas = self.sigmas.double()
        now, following = of_sigma(self, sigmas[:-1]), of_sigma(self, sigmas[1:])
        alpha, sigma, alpha_next, sigma_next = map(
            torch.as_tensor, (now.alpha, now.sigma, following.alpha, following.sigma)
        )
        count = len(self.timesteps)
        shrink = (sigma_next / alpha_next) / (sigma / alpha)  # e^-h, 0 in a last step to sigma = 0
        h = -shrink.log()
        c_x, k_n = sigma_next / sigma, torch.zeros_like(sigma)
        if self.config["algorithm_type"] == "sde-dpmsolver++":
            c_x, k_n = c_x * shrink, sigma_next * (1 - shrink**2).clamp(min=0).sqrt()
            phi, slope = alpha_next * (1 - shrink**2), -2 * h
        else:
            phi, slope = alpha_next * (1 - shrink), -h
        share: dict[str, Any] = {"level": now, "c_x": c_x, "k_n": k_n}
        first = table_of(count, k_d=phi, **share)
        before = torch.cat([h.new_full((1,), torch.nan), h[:-1]])  # no step before the first
        weight = phi / 2 if self.config["solver_type"] == "midpoint" else phi / slope + alpha_next
        change = weight * h / before
        second = table_of(count, k_d=phi + change, k_p=-change, **share)
        return torch.cat([first, second])

    def noise_level(self, timestep: Tensor | float) -> NoiseLevel:
        """See `FusedScheduler.noise_level`."""
        self.check_begun()  # until then the sigmas run the other way
        return super().noise_level(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """See `DPMSolverMultistepScheduler.step`."""
        if self.config["thresholding"]:
            return super().step(
                model_output, timestep, sample, generator, variance_noise, return_dict
            )
        index = self._step_index = self.current_index(timestep)
        if self.config["prediction_type"] == "epsilon" and self.config["variance_type"] is not None:
            model_output = model_output[:, :3]  # the rest is the learned variance
        order = self.config["solver_order"]
        second = order == 2 and self.lower_order_nums > 0 and not self._ends_in_first_order(index)
        row = index + len(self.timesteps) * second
        step = self.solver_row(row, sample.device, has_previous=second)
        prev_sample, denoised = network_step(
            sample, model_output, self.model_outputs[-1], step, want_denoised=order == 2
        )
        if self.config["algorithm_type"] == "sde-dpmsolver++":
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
            prev_sample = prev_sample + step.k_n * variance_noise.to(prev_sample)
        self.model_outputs = [*self.model_outputs[1:], denoised]
        self.lower_order_nums = min(self.lower_order_nums + 1, order)
        self._step_index += 1
        prev_sample = prev_sample.to(model_output.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _ends_in_first_order(self, index: int) -> bool:
        """Whether the stock scheduler takes its last step at first order, and this is it."""
        count, config = len(self.timesteps), self.config
        return index == count - 1 and (
            config["euler_at_final"]
            or (config["lower_order_final"] and count < 15)
            or config["final_sigmas_type"] == "zero"
        )
