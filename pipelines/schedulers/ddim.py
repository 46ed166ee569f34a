r"""DDIM steps, as `DDIMScheduler`, with the scheduler's own notation :math:`\bar\alpha`.

.. math:: x_{next} = \sqrt{\bar\alpha'} D + \sqrt{1 - \bar\alpha' - s^2} \, \varepsilon + s z,
    \qquad \varepsilon = \frac{x_t - \sqrt{\bar\alpha} D}{\sqrt{1 - \bar\alpha}}, \qquad
    s = \eta \sqrt{\frac{1 - \bar\alpha'}{1 - \bar\alpha}
        \left(1 - \frac{\bar\alpha}{\bar\alpha'}\right)}

with fresh noise z. The epsilon is that of the network's prediction, whatever clipping makes of D,
unless ``use_clipped_model_output`` asks for the one of the clipped D.

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
from ...guidance.ops.solver import advance, denoise, network_step
from ..seam.noise_levels import prediction_type_of
from .fused import FusedScheduler, table_of


class FusedDDIMScheduler(FusedScheduler, DDIMScheduler):
    """`DDIMScheduler` with its step in one kernel on CUDA, which never waits for the device.

    Its samples are those of the stock scheduler but for rounding. As there, a step depends on its
    timestep alone: the table has a row per training timestep. With `clip_sample` or `thresholding`
    a step is a few launches. At `eta` = 1 from zero SNR, where rounding makes the stock scheduler
    take the root of a negative number, it is finite.
    """

    config_name: Any  # diffusers' own bases disagree about its type
    _squares: list[float] = []  # alpha^2 of every training timestep
    _last_square: float
    _noise: tuple[float, bool] = (0.0, False)  # eta, use_clipped_model_output of the table

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
        eta, from_denoised = self._noise
        # s^2 and 1 - square_next - s^2, without a difference that rounding could make negative.
        left = square / square_next * (1 - square_next) / (1 - square)
        fresh = eta**2 * (1 - square_next) * (1 - left)
        rest = (1 - square_next) * (1 - eta**2 + eta**2 * left)
        along, alpha_next = rest.sqrt(), square_next.sqrt()  # weights of epsilon and D
        level = NoiseLevel(alpha, sigma, prediction_type_of(self))
        if from_denoised or level.prediction == "sample":
            weights = {"c_x": along / sigma, "k_d": alpha_next - along * alpha / sigma}
            if not from_denoised:  # epsilon of the prediction, D may be clipped
                weights |= {"c_p": -along * alpha / sigma, "k_d": alpha_next}
        elif level.prediction == "epsilon":
            weights = {"c_p": along, "k_d": alpha_next}
        else:
            weights = {"c_x": along * sigma, "c_p": along * alpha, "k_d": alpha_next}
        return table_of(len(square), level, k_n=fresh.sqrt(), **weights)

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
        if (eta, use_clipped_model_output) != self._noise:
            self._noise, self._table = (eta, use_clipped_model_output), None
        step = self.solver_row(self._row(timestep), sample.device)
        if self.config["thresholding"] or self.config["clip_sample"]:
            denoised = self._clipped(denoise(sample, model_output, step))
            prev_sample = advance(sample, model_output, denoised, None, step)
        else:
            prev_sample, denoised = cast(
                tuple[Tensor, Tensor], network_step(sample, model_output, None, step)
            )
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator, model_output.device, model_output.dtype
                )
            elif generator is not None:
                raise ValueError("pass either a generator or variance_noise, not both")
            prev_sample = prev_sample + step.k_n * variance_noise.to(prev_sample)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        prev_sample, denoised = prev_sample.to(dtype), denoised.to(dtype)
        if not return_dict:
            return prev_sample, denoised
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _clipped(self, denoised: Tensor) -> Tensor:
        if self.config["thresholding"]:
            return self._threshold_sample(denoised)
        limit = self.config["clip_sample_range"]
        return denoised.clamp(-limit, limit)

    def _training_squares(self) -> list[float]:
        if not self._squares:  # read once: `add_noise` moves the tensor to the device
            self._squares = self.alphas_cumprod.tolist()
            self._last_square = float(self.final_alpha_cumprod)
        return self._squares

    def _row(self, timestep: Tensor | float) -> int:
        value = self.host_timestep(timestep)
        return int(torch.as_tensor(timestep).reshape(-1)[0] if value is None else value)
