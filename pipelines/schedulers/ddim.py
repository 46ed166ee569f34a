r"""DDIM steps, as `DDIMScheduler`, with the scheduler's own notation :math:`\bar\alpha`.

.. math:: x_{next} = \sqrt{\bar\alpha'} D + \sqrt{1 - \bar\alpha'} \, \varepsilon, \qquad
    \varepsilon = \frac{x_t - \sqrt{\bar\alpha} D}{\sqrt{1 - \bar\alpha}}

References:
    Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021,
    https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from torch import Tensor

from ...guidance import NoiseLevel
from ...guidance.ops.solver import network_step
from ..seam.noise_levels import prediction_type_of
from .fused import FusedScheduler, table_of


class FusedDDIMScheduler(FusedScheduler, DDIMScheduler):
    """`DDIMScheduler` with its step in one kernel on CUDA, which never waits for the device.

    Its samples are those of the stock scheduler but for rounding. As there, a step depends on its
    timestep alone: the table has a row per training timestep. With `eta` > 0,
    `use_clipped_model_output` or `thresholding` the stock scheduler's own step is taken.
    """

    config_name: Any  # diffusers' own bases disagree about its type
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
        """One row per training timestep."""
        self.check_begun()
        square = torch.tensor(self._training_squares(), dtype=torch.float64)
        stride = self.config["num_train_timesteps"] // self.num_inference_steps
        last = torch.full((stride,), self._last_square, dtype=torch.float64)
        square_next = torch.cat([last, square])[: len(square)]
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        along = (1 - square_next).sqrt()  # weight of the noise's direction
        d_x, d_p = NoiseLevel(alpha, sigma, prediction_type_of(self)).coefficients()
        return table_of(
            len(square),
            k_x=along / sigma,
            k_d=square_next.sqrt() - along * alpha / sigma,
            k_a=square_next.sqrt(),
            d_x=d_x,
            d_p=d_p,
        )

    def noise_level(self, timestep: Tensor | float) -> NoiseLevel:
        """See `FusedScheduler.noise_level`."""
        square = self._training_squares()[self._row(timestep)]
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
        if eta > 0 or use_clipped_model_output or self.config["thresholding"]:
            return self.stock_class.step(
                self, model_output, timestep, sample, eta, use_clipped_model_output,
                generator, variance_noise, return_dict,
            )  # fmt: skip
        step = self.solver_row(self._row(timestep), sample.device)
        prev_sample, denoised = cast(
            tuple[Tensor, Tensor], network_step(sample, model_output, None, step)
        )
        if self.config["clip_sample"]:
            limit = self.config["clip_sample_range"]
            clipped = denoised.clamp(-limit, limit)
            prev_sample, denoised = prev_sample + step.k_a * (clipped - denoised), clipped
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        prev_sample, denoised = prev_sample.to(dtype), denoised.to(dtype)
        if not return_dict:
            return prev_sample, denoised
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _training_squares(self) -> list[float]:
        if not self._squares:  # read once: `add_noise` moves the tensor to the device
            self._squares = self.alphas_cumprod.tolist()
            self._last_square = float(self.final_alpha_cumprod)
        return self._squares

    def _row(self, timestep: Tensor | float) -> int:
        value = self.host_timestep(timestep)
        return int(torch.as_tensor(timestep).reshape(-1)[0] if value is None else value)
