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
from ...guidance.ops.solver import network_step, solver_step
from ..seam.noise_levels import prediction_type_of
from .fused import FusedScheduler, table_of


class FusedDPMSolverMultistepScheduler(FusedScheduler, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with its step in one kernel on CUDA.

    Its samples are those of the stock scheduler but for rounding; no step waits for the device. It
    has the algorithms "dpmsolver++" and "sde-dpmsolver++", of orders 1 and 2.
    """

    config_name: Any  # diffusers' own bases disagree about its type

    def check_config(self) -> None:
        """Raise ValueError for other algorithms and orders."""
        prediction_type_of(self)
        algorithm, order = self.config["algorithm_type"], self.config["solver_order"]
        if algorithm not in ("dpmsolver++", "sde-dpmsolver++"):
            raise ValueError(
                "FusedDPMSolverMultistepScheduler has algorithm_type 'dpmsolver++' and "
                f"'sde-dpmsolver++', got {algorithm!r}"
            )
        if order not in (1, 2):
            raise ValueError(
                f"FusedDPMSolverMultistepScheduler has solver_order 1 and 2, got {order}"
            )

    @property
    def index_of_unknown(self) -> int:
        """The last step, as the stock scheduler."""
        return len(self.timesteps) - 1

    def coefficients(self) -> Tensor:
        """The rows of the first order, then those of the second."""
        sigmas = self.sigmas.double()
        now, following = self.level(sigmas[:-1]), self.level(sigmas[1:])
        d_x, d_p = now.coefficients()
        alpha, sigma, alpha_next, sigma_next = map(
            torch.as_tensor, (now.alpha, now.sigma, following.alpha, following.sigma)
        )
        count = len(self.timesteps)
        shrink = (sigma_next / alpha_next) / (sigma / alpha)  # e^-h, 0 in a last step to sigma = 0
        h = -shrink.log()
        k_x, k_n = sigma_next / sigma, torch.zeros_like(sigma)
        if self.config["algorithm_type"] == "sde-dpmsolver++":
            k_x, k_n = k_x * shrink, sigma_next * (1 - shrink**2).clamp(min=0).sqrt()
            phi, slope = alpha_next * (1 - shrink**2), -2 * h
        else:
            phi, slope = alpha_next * (1 - shrink), -h
        share = {"k_x": k_x, "k_n": k_n, "d_x": d_x, "d_p": d_p}
        first = table_of(count, k_d=phi, **share)
        before = torch.cat([h.new_full((1,), torch.nan), h[:-1]])  # no step before the first
        weight = phi / 2 if self.config["solver_type"] == "midpoint" else phi / slope + alpha_next
        change = weight * h / before
        second = table_of(count, k_d=phi + change, k_p=-change, **share)
        return torch.cat([first, second])

    def level(self, sigma: float | Tensor) -> NoiseLevel:
        """See `FusedScheduler.level`."""
        kind = prediction_type_of(self)
        if self.config["use_flow_sigmas"]:
            return NoiseLevel(1 - sigma, sigma, kind)
        alpha = (sigma * sigma + 1) ** -0.5
        return NoiseLevel(alpha, sigma * alpha, kind)

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
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        index = self._step_index = self.current_index(timestep)
        if self.config["prediction_type"] == "epsilon" and self.config["variance_type"] is not None:
            model_output = model_output[:, :3]  # the rest is the learned variance
        second = self.config["solver_order"] == 2 and self.lower_order_nums > 0
        second = second and not self._ends_in_first_order(index)
        row = index + len(self.timesteps) * second
        step = self.solver_row(row, sample.device, has_previous=second)
        previous = self.model_outputs[-1]
        prev_sample, denoised = network_step(
            sample,
            model_output,
            previous,
            step,
            want_denoised=self.config["solver_order"] == 2 or self.config["thresholding"],
        )
        if self.config["thresholding"]:
            denoised = self._threshold_sample(denoised)
            prev_sample = solver_step(sample, denoised, previous, step)
        if self.config["algorithm_type"] == "sde-dpmsolver++":
            prev_sample = prev_sample + step.k_n * self._noise(
                prev_sample, generator, variance_noise
            )
        self.model_outputs = [*self.model_outputs[1:], denoised]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config["solver_order"])
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

    def _noise(
        self, like: Tensor, generator: torch.Generator | None, given: Tensor | None
    ) -> Tensor:
        if given is not None:
            return given.to(device=like.device, dtype=torch.float32)
        return randn_tensor(like.shape, generator, like.device, torch.float32)
