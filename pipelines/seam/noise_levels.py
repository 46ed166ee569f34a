"""The noise level of a network call, from the scheduler's own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...guidance import NoiseLevel, PredictionType

# Schedulers whose network input at timestep t has alpha^2 = alphas_cumprod[t].
BY_TIMESTEP = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
}
# Schedulers with a table of sigma / alpha by step; the network's input has unit variance.
BY_SIGMA = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
# Flow matching: x_t = (1 - sigma) x_0 + sigma eps.
BY_FLOW_SIGMA = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}


class UnknownSchedulerError(ValueError):
    """The noise levels of a scheduler are not known to Pilotage."""


def check_scheduler(scheduler: Any) -> None:
    """Raise if the noise levels of `scheduler` cannot be read.

    Raises:
        UnknownSchedulerError: the scheduler, or what its network predicts, is not known.
    """
    name = type(scheduler).__name__
    known = BY_TIMESTEP | BY_SIGMA | BY_FLOW_SIGMA
    if name not in known:
        raise UnknownSchedulerError(
            f"the noise levels of {name} are not known, and this guidance needs denoised images: "
            f"use one of {', '.join(sorted(known))}, or a rule in native space"
        )
    prediction_type_of(scheduler)


def prediction_type_of(scheduler: Any) -> PredictionType:
    """What the network of a scheduler predicts."""
    if type(scheduler).__name__ in BY_FLOW_SIGMA:
        return "flow"
    name = scheduler.config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise UnknownSchedulerError(
            f"{type(scheduler).__name__} has the prediction type {name!r}: "
            f"expected one of {', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[name]


def noise_level(scheduler: Any, timestep: Tensor | float) -> NoiseLevel:
    """The noise level of the network's input at the scheduler's current step.

    Args:
        scheduler: A diffusers scheduler, or a fused one of ours, within its loop.
        timestep: What the pipeline's loop took from ``scheduler.timesteps``.

    Raises:
        UnknownSchedulerError: the scheduler is not known.
    """
    prediction = prediction_type_of(scheduler)
    own = getattr(scheduler, "noise_level", None)  # ours tell it without reading the device
    if own is not None:
        return own(timestep)
    name = type(scheduler).__name__
    if name in BY_TIMESTEP:
        square = _alpha_squared(scheduler, timestep)
        return NoiseLevel(square.sqrt(), (1 - square).sqrt(), prediction)
    sigma = float(_sigma(scheduler, timestep))
    if name in BY_FLOW_SIGMA or scheduler.config.get("use_flow_sigmas", False):
        if scheduler.config.get("invert_sigmas", False):  # the table holds the picture's share
            return NoiseLevel(sigma, 1 - sigma, prediction, sign=-1)
        return NoiseLevel(1 - sigma, sigma, prediction)
    if name in BY_SIGMA:
        alpha = (sigma * sigma + 1) ** -0.5
        return NoiseLevel(alpha, sigma * alpha, prediction)
    raise UnknownSchedulerError(f"the noise levels of {name} are not known")


def _alpha_squared(scheduler: Any, timestep: Tensor | float) -> Tensor:
    """alpha_t^2 of a timestep as the scheduler's table has it, on the timestep's device."""
    first = torch.as_tensor(timestep).reshape(-1)[0]
    if hasattr(scheduler, "alphas_cumprod"):
        return scheduler.alphas_cumprod.to(first.device)[first.long()]
    return scheduler._alpha_cumprod(first, first.device).squeeze()  # Wuerstchen's closed form


def _sigma(scheduler: Any, timestep: Tensor | float) -> Tensor:
    """The entry of the scheduler's sigma table (kept on the host) that its next step will use."""
    index = scheduler.step_index
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        # Before the first step. Some networks are given a rescaled timestep, not found in the
        # table; their pipelines set `begin_index` where they do not begin at the beginning.
        first = torch.as_tensor(timestep).reshape(-1)[0]
        found = (scheduler.timesteps == first.to(scheduler.timesteps.device)).nonzero()
        index = int(found[0]) if len(found) else 0
    if not getattr(scheduler, "state_in_first_order", True):
        name = type(scheduler).__name__
        if name == "KDPM2DiscreteScheduler":
            return scheduler.sigmas_interpol[index]
        if name == "KDPM2AncestralDiscreteScheduler":
            return scheduler.sigmas_interpol[index - 1]
    return scheduler.sigmas[index]


def ratio(level: NoiseLevel) -> float:
    """sigma / alpha, the variance-exploding noise level (a host read if on a device)."""
    alpha = torch.as_tensor(level.alpha, dtype=torch.float64)
    return float(torch.as_tensor(level.sigma, dtype=torch.float64) / alpha)
