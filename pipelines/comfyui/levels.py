"""ComfyUI's denoised images as network outputs, with their noise levels.

ComfyUI's samplers see denoised images only; a model's ``model_sampling`` says how they are made of
its network's output. All kinds in use are affine,

.. math:: D = A_x(\\sigma) \\, x + A_p(\\sigma) \\, \\mathrm{pred},

so that what a network predicts is told by the two factors, whatever the class is called.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...guidance import Guidance, NoiseLevel, PredictionType

PROBE = 0.5  # a noise level at which the factors of all prediction types differ


class Levels:
    """Noise levels of one model, for one guidance.

    Args:
        model_sampling: ComfyUI's ``model_sampling`` of the model.
        guidance: Where it acts on denoised images alone, they are taken as they are, as a network
            would predict them that outputs images.
        device: Where to look at `model_sampling`.

    Raises:
        ValueError: the guidance acts on network outputs, and how denoised images are made of them
            is not known here; or it is for flow models only and this is none.
    """

    def __init__(self, model_sampling: Any, guidance: Guidance, device: torch.device) -> None:
        self.sampling = model_sampling
        self.sigma_data = float(getattr(model_sampling, "sigma_data", 1.0))
        self.prediction: PredictionType | None = None
        self.sign, self.of_data = 1, False  # of_data: sigma / (sigma + 1) is the share of noise
        self._look(device)
        rule, spaces = guidance.rule, {guidance.policy.space}
        spaces |= set() if rule.is_pipelines_own else {rule.space}  # CFG is the same in both
        if rule.needs_flow and self.prediction != "flow":
            raise ValueError(
                f"'{rule}' is for networks that predict a flow velocity, the one of this model "
                f"predicts {self.prediction or 'something else'!r}"
            )
        self.denoised = "native" not in spaces
        if self.prediction is None and not self.denoised:
            raise ValueError(
                f"'{guidance}' acts on the network's output, and what {type(model_sampling)} makes "
                "of it is not known here: use a setting with space='x0'"
            )

    def level(self, sigma: float) -> NoiseLevel:
        """The noise level of the network's input at ComfyUI's `sigma`."""
        if self.prediction == "flow":
            share = sigma / (sigma + 1) if self.of_data else sigma
            alpha, noise, spread = 1 - share, share, 1.0
        else:
            alpha = (sigma**2 + self.sigma_data**2) ** -0.5
            noise, spread = sigma * alpha, self.sigma_data
        if self.denoised:
            return NoiseLevel(alpha, noise, "sample")
        assert self.prediction is not None
        return NoiseLevel(alpha, noise, self.prediction, self.sign, spread)

    def network_input(self, x: Tensor, timestep: Tensor) -> Tensor:
        """What the network is given of the sampler's `x`, with shape (B, \\*).

        Args:
            x: The sampler's latents, with shape (B, \\*).
            timestep: ComfyUI's sigma of every sample, with shape (B,).
        """
        return self.sampling.calculate_input(timestep, x)

    def _look(self, device: torch.device) -> None:
        """Tell the prediction type by the factors at one noise level."""
        sigma = torch.full((1,), PROBE, device=device)
        one = torch.ones(1, 1, 1, 1, device=device)
        into = float(self.sampling.calculate_input(sigma, one))
        of_x = float(self.sampling.calculate_denoised(sigma, 0 * one, one))
        of_pred = float(self.sampling.calculate_denoised(sigma, one, 0 * one))
        spread, size = self.sigma_data, abs(of_pred)
        alpha = (PROBE**2 + spread**2) ** -0.5
        self.sign, share = (-1 if of_pred > 0 else 1), PROBE / (PROBE + 1)

        def are(*pairs: tuple[float, float]) -> bool:
            return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) for a, b in pairs)

        if are((of_x, 0), (of_pred, 1)):
            self.prediction, self.sign = "sample", 1
        elif are((into, 1), (of_x, 1), (size, PROBE)):
            self.prediction = "flow"
        elif are((into, 1 - share), (of_x, 1 - share), (size, share)):
            self.prediction, self.of_data = "flow", True
        elif are((into, alpha), (of_x, 1), (size, PROBE)):
            self.prediction = "epsilon"
        elif are((into, alpha), (of_x, (spread * alpha) ** 2), (size, PROBE * spread * alpha)):
            self.prediction = "v_prediction"
