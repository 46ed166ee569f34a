r"""DDIM steps, as `DDIMScheduler`, with the scheduler's own notation :math:`\bar\alpha`.

.. math:: x_{next} = \sqrt{\bar\alpha'} D
    + \sqrt{1 - \bar\alpha' - \eta^2 v} \, \varepsilon + \eta \sqrt v \, n, \qquad
    \varepsilon = \frac{x_t - \sqrt{\bar\alpha} D}{\sqrt{1 - \bar\alpha}}

References:
    Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021,
    https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...guidance import NoiseLevel
from ...guidance.device import to_device
from ...guidance.ops.solver import SolverStep, network_step, solver_step
from ..seam.noise_levels import prediction_type_of
from .fused import FusedScheduler, table_of


class FusedDDIMScheduler(FusedScheduler, DDIMScheduler):
    """`DDIMScheduler` with its step in one kernel on CUDA, which never waits for the device.

    Its samples are those of the stock scheduler but for rounding. As there, a step depends on its
    timestep alone: the table has a row per training timestep.
    """

    config_name: Any  # diffusers' own bases disagree about its type
    _eta = 0.0
    _squares: list[float] = []  # alpha^2 of every training timestep
    _last_square: float

    def check_config(self) -> None:
        """Raise ValueError for a network whose first prediction says nothing of the picture."""
        kind = prediction_type_of(self)
        if self.config["rescale_betas_zero_snr"] and kind == "epsilon":
            raise ValueError(
                "FusedDDIMScheduler: with rescale_betas_zero_snr the first sample is noise alone, "
                "from which an epsilon prediction gives no picture; got prediction_type 'epsilon', "
                "expected 'v_prediction' or 'sample'"
            )

    def coefficients(self) -> Tensor:
        """One row per training timestep, at the `eta` last asked for."""
        if not self._squares:  # read once: `add_noise` moves the tensor to the device
            self._squares = self.alphas_cumprod.tolist()
            self._last_square = float(self.final_alpha_cumprod)
        square = torch.tensor(self._squares, dtype=torch.float64)
        stride = self.config["num_train_timesteps"] // self.num_inference_steps
        last = torch.full((stride,), self._last_square, dtype=torch.float64)
        square_next = torch.cat([last, square])[: len(square)]
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        variance = (1 - square_next) / (1 - square) * (1 - square / square_next)
        std = self._eta * variance.sqrt()
        along = (1 - square_next - std**2).sqrt()  # weight of the noise's direction
        d_x, d_p = NoiseLevel(alpha, sigma, prediction_type_of(self)).coefficients()
        return table_of(
            len(square),
            k_x=along / sigma,
            k_d=square_next.sqrt() - along * alpha / sigma,
            k_a=square_next.sqrt(),
            k_n=std,
            d_x=d_x,
            d_p=d_p,
        )

    def noise_level(self, timestep: Tensor | float) -> NoiseLevel:
        """See `FusedScheduler.noise_level`."""
        value = self.host_timestep(timestep)
        square: float | Tensor
        if isinstance(value, Tensor):
            table = self.alphas_cumprod.to(value.device)
            square = table.index_select(0, value.long()).squeeze()
        else:
            square = self._squares[int(value)]
        return NoiseLevel(square**0.5, (1 - square) ** 0.5, prediction_type_of(self))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """See `DDIMScheduler.step`."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("pass a generator or variance_noise, not both")
        step = self._row_of(timestep, eta, sample.device)
        prev_sample, denoised = cast(
            tuple[Tensor, Tensor], network_step(sample, model_output, None, step)
        )
        if self.config["thresholding"] or self.config["clip_sample"]:
            clipped = self._clipped(denoised)
            if use_clipped_model_output:
                prev_sample = solver_step(sample, clipped, None, step)
            else:
                prev_sample = prev_sample + step.k_a * (clipped - denoised)
            denoised = clipped
        if eta > 0:
            shape, device, dtype = sample.shape, sample.device, model_output.dtype
            if variance_noise is None:
                variance_noise = randn_tensor(shape, generator, device, dtype)
            prev_sample = prev_sample + step.k_n * variance_noise
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        prev_sample, denoised = prev_sample.to(dtype), denoised.to(dtype)
        if not return_dict:
            return prev_sample, denoised
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _row_of(self, timestep: Tensor | int, eta: float, device: torch.device) -> SolverStep:
        if eta != self._eta:
            self._eta = eta
            self._table = to_device(self.coefficients().float(), self._table.device)
        value = self.host_timestep(timestep)
        if isinstance(value, Tensor):
            return SolverStep(self.table_on(device).index_select(0, value.to(device).long())[0])
        return self.solver_row(int(value), device)

    def _clipped(self, denoised: Tensor) -> Tensor:
        if self.config["thresholding"]:
            return self._threshold_sample(denoised)
        limit = self.config["clip_sample_range"]
        return denoised.clamp(-limit, limit)
