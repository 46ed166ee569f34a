"""The noise level of a network call, from the scheduler's own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...guidance import Guidance, NoiseLevel, PredictionType

# The schedulers that are known, by what their tables hold.
TABLES: dict[str, str] = {
    # alphas_cumprod; the network's input at timestep t has alpha^2 = alphas_cumprod[t].
    "timestep": """
        CogVideoXDDIMScheduler CogVideoXDPMScheduler DDIMParallelScheduler DDIMScheduler
        DDPMParallelScheduler DDPMScheduler DDPMWuerstchenScheduler LCMScheduler PNDMScheduler
        TCDScheduler""",
    # sigma / alpha by step; the network's input has unit variance, and so have samples ...
    "unit": """
        DEISMultistepScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler
        SASolverScheduler UniPCMultistepScheduler""",
    # ... or they are data plus sigma times noise, scaled for the network only.
    "exploding": """
        EulerAncestralDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler
        KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LMSDiscreteScheduler""",
    # sigma of flow matching: x_t = (1 - sigma) x_0 + sigma eps.
    "flow": "FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler",
}
BY_TIMESTEP, UNIT, EXPLODING, BY_FLOW_SIGMA = (set(names.split()) for names in TABLES.values())
BY_SIGMA = UNIT | EXPLODING
KNOWN = BY_TIMESTEP | BY_SIGMA | BY_FLOW_SIGMA
# Solvers whose step is one of `check_first_order`, the fused ones included (they have these names).
FIRST_ORDER = {"DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"}
PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}


class UnknownSchedulerError(ValueError):
    """The noise levels of a scheduler are not known to Pilotage."""


def check_guidance(guidance: Guidance, scheduler: Any, detailed: bool, eta: float) -> None:
    """Raise if a rule or policy does not fit a scheduler and what its network predicts.

    Args:
        detailed: Whether cosines and norms are recorded at every step.
        eta: DDIM's share of added noise in this call.

    Raises:
        UnknownSchedulerError: the scheduler is not known, or not one that the rule is for.
        ValueError: the rule is for flow models only.
    """
    if guidance.needs_level or detailed:
        check_scheduler(scheduler)
    if guidance.rule.needs_next_level:
        check_first_order(scheduler, eta)
    if guidance.rule.needs_flow and prediction_type_of(scheduler) != "flow":
        raise ValueError(
            f"'{guidance.rule}' is for networks that predict a flow velocity, the one of this "
            f"pipeline predicts {prediction_type_of(scheduler)!r}"
        )


def check_scheduler(scheduler: Any) -> None:
    """Raise UnknownSchedulerError if the scheduler, or what its network predicts, is not known."""
    name = type(scheduler).__name__
    if name not in KNOWN:
        raise UnknownSchedulerError(
            f"the noise levels of {name} are not known, and this guidance needs denoised images: "
            f"use one of {', '.join(sorted(KNOWN))}, or a rule in native space"
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
    return of_sigma(scheduler, float(_sigma(scheduler, timestep)))


def knows_levels(scheduler: Any) -> bool:
    """Whether the noise levels of a scheduler are known; see `check_scheduler`."""
    try:
        check_scheduler(scheduler)
    except UnknownSchedulerError:
        return False
    return True


def check_first_order(scheduler: Any, eta: float) -> None:
    """Raise UnknownSchedulerError unless it is Euler or DDIM, without clipping or added noise."""
    name, config = type(scheduler).__name__, scheduler.config
    changed = [o for o in ("clip_sample", "thresholding", "stochastic_sampling") if config.get(o)]
    if name not in FIRST_ORDER or changed or (name == "DDIMScheduler" and eta):
        found = ", ".join([name, *changed, *(["eta"] if eta else [])])
        raise UnknownSchedulerError(
            f"this rule is for {', '.join(sorted(FIRST_ORDER))} without clipping and without added "
            f"noise (eta = 0), got {found}"
        )


def check_falling_noise(scheduler: Any) -> None:
    """Raise UnknownSchedulerError if a step of this run stays at its noise level.

    For a scheduler of `check_first_order` whose timesteps are set: a rule that divides by the
    difference of the two levels has no scale there.
    """
    if type(scheduler).__name__ != "DDIMScheduler":
        levels = scheduler.sigmas.tolist()
    else:
        levels = [noise_level(scheduler, t).ratio for t in scheduler.timesteps]
        levels.append(next_noise_level(scheduler, scheduler.timesteps[-1]).ratio)
    for step, (now, later) in enumerate(zip(levels, levels[1:], strict=False)):
        if abs(now - later) <= 1e-5 * now:  # equal but for rounding
            raise UnknownSchedulerError(
                f"this rule needs every step to change the noise level, but step {step} of "
                f"{type(scheduler).__name__} stays at its own: look at set_alpha_to_one, "
                "steps_offset, timestep_spacing or final_sigmas_type"
            )


def next_noise_level(scheduler: Any, timestep: Tensor | float) -> NoiseLevel:
    """The noise level that the scheduler's current step leads to; see `check_first_order`."""
    if type(scheduler).__name__ != "DDIMScheduler":
        return of_sigma(scheduler, float(scheduler.sigmas[_sigma_index(scheduler, timestep) + 1]))
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    following = torch.as_tensor(timestep).reshape(-1)[0].long() - stride
    table = scheduler.alphas_cumprod.to(following.device)
    final = scheduler.final_alpha_cumprod.to(following.device)
    square = torch.where(following >= 0, table[following.clamp(min=0)], final)
    return NoiseLevel(square.sqrt(), (1 - square).sqrt(), prediction_type_of(scheduler))


def of_sigma(scheduler: Any, sigma: float | Tensor) -> NoiseLevel:
    """The noise level of the network's input at entries of a scheduler's sigma table."""
    name, prediction = type(scheduler).__name__, prediction_type_of(scheduler)
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


def _sigma_index(scheduler: Any, timestep: Tensor | float) -> int:
    """Place in the scheduler's sigma table (kept on the host) that its next step will use."""
    index = scheduler.step_index
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        # Before the first step. Some networks are given a rescaled timestep, not found in the
        # table; their pipelines set `begin_index` where they do not begin at the beginning.
        first = torch.as_tensor(timestep).reshape(-1)[0]
        found = (scheduler.timesteps == first.to(scheduler.timesteps.device)).nonzero()
        index = int(found[0]) if len(found) else 0
    return index


def _sigma(scheduler: Any, timestep: Tensor | float) -> Tensor:
    """The entry of the sigma table that the scheduler's next step will use."""
    index = _sigma_index(scheduler, timestep)
    if not getattr(scheduler, "state_in_first_order", True):
        name = type(scheduler).__name__
        if name == "KDPM2DiscreteScheduler":
            return scheduler.sigmas_interpol[index]
        if name == "KDPM2AncestralDiscreteScheduler":
            return scheduler.sigmas_interpol[index - 1]
    return scheduler.sigmas[index]
