"""The noise level of a network call, from the scheduler's own tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        TCDScheduler UnCLIPScheduler""",
    # alphas and betas by step, which are alpha and sigma.
    "step": "IPNDMScheduler",
    # sigma / alpha by step; the network's input has unit variance, and so have samples ...
    "unit": """
        DEISMultistepScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler
        SASolverScheduler UniPCMultistepScheduler""",
    # ... or they are data plus sigma times noise, scaled for the network only ...
    "exploding": """
        DPMSolverSDEScheduler EulerAncestralDiscreteScheduler EulerDiscreteScheduler
        HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler
        LMSDiscreteScheduler""",
    # ... or so they are, for a network preconditioned for data of a standard deviation sigma_data.
    "edm": """
        CosineDPMSolverMultistepScheduler EDMDPMSolverMultistepScheduler EDMEulerScheduler""",
    # sigma of flow matching: x_t = (1 - sigma) x_0 + sigma eps.
    "flow": """
        FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler
        HeliosDMDScheduler HeliosScheduler LTXEulerAncestralRFScheduler MiniMaxH3Scheduler""",
}
BY_TIMESTEP, BY_STEP, UNIT, EXPLODING, EDM, BY_FLOW_SIGMA = (
    set(names.split()) for names in TABLES.values()
)
BY_SIGMA = UNIT | EXPLODING
KNOWN = BY_TIMESTEP | BY_STEP | BY_SIGMA | EDM | BY_FLOW_SIGMA
TOKENS = "it samples tokens, not images"
BACKWARDS = "it steps towards noise"
# Those of diffusers that pipelines have and that give no denoised image of a network's output.
REFUSED: dict[str, str] = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DDIMInverseScheduler": BACKWARDS,
    "DPMSolverMultistepInverseScheduler": BACKWARDS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": "its network predicts the mean velocity of a whole step",
    "PiflowScheduler": "its network predicts a policy for many substeps",
    "SCMScheduler": "its pipelines rotate the prediction before the scheduler has it",
    "VQDiffusionScheduler": TOKENS,
}
# Solvers whose step is one of `check_first_order`, the fused ones included (they have these names).
FIRST_ORDER = {"DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"}
PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}


# The networks behind these schedulers predict v of the scaled data, or its negative.
EDM_SIGNS = {"epsilon": -1, "v_prediction": 1}


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
    name = scheduler_name(scheduler)
    if name not in KNOWN:
        reason = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise UnknownSchedulerError(
            f"the noise levels of {_spelt(scheduler)} are not known{reason}, and this guidance "
            "needs denoised images:\nuse a rule in native space, or a known scheduler, such "
            "as DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler"
        )
    prediction_type_of(scheduler)


def scheduler_name(scheduler: Any) -> str:
    """Name of a scheduler's class, or of the most derived of its bases that is known here.

    A subclass is taken to keep the tables of that base and what they mean.
    """
    cls: Any = scheduler.__class__  # also of what only stands for a scheduler
    return _known_base(cls)


@functools.cache
def _known_base(cls: Any) -> str:
    names = [base.__name__ for base in cls.__mro__]
    return next((name for name in names if name in KNOWN or name in REFUSED), cls.__name__)


def _spelt(scheduler: Any) -> str:
    """What a message calls a scheduler: its class, and the base that it is known by."""
    own, name = scheduler.__class__.__name__, scheduler_name(scheduler)
    return own if own == name else f"{own}, a {name},"


def prediction_type_of(scheduler: Any) -> PredictionType:
    """What the network of a scheduler predicts.

    Raises:
        UnknownSchedulerError: it is none of `PREDICTIONS`, or the scheduler does not say and is not
            known.
    """
    name, own = scheduler_name(scheduler), scheduler.config.get("prediction_type")
    if name in BY_FLOW_SIGMA:
        return "flow"
    if name in EDM:
        if own not in EDM_SIGNS:
            raise UnknownSchedulerError(
                f"{scheduler.__class__.__name__} has the prediction type {own!r}: "
                f"expected one of {', '.join(EDM_SIGNS)}"
            )
        return "v_prediction"
    if name in BY_STEP:
        return "v_prediction"
    if own is None and name not in KNOWN:
        raise UnknownSchedulerError(
            f"what the network of {scheduler.__class__.__name__} predicts is not known: "
            f"its prediction_type is none of {', '.join(PREDICTIONS)}"
        )
    kind = "epsilon" if own is None else own
    if kind not in PREDICTIONS:
        raise UnknownSchedulerError(
            f"{scheduler.__class__.__name__} has the prediction type {kind!r}: "
            f"expected one of {', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[kind]


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
    name = scheduler_name(scheduler)
    if name in BY_TIMESTEP:
        square = _alpha_squared(scheduler, timestep)
        return NoiseLevel(square.sqrt(), (1 - square).sqrt(), prediction)
    if name in BY_STEP:
        index = _sigma_index(scheduler, timestep)
        return NoiseLevel(float(scheduler.alphas[index]), float(scheduler.betas[index]), prediction)
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
    config, cls = scheduler.config, scheduler.__class__
    # The class whose step it is: a subclass with one of its own may do anything.
    name = next((base.__name__ for base in cls.__mro__ if "step" in vars(base)), cls.__name__)
    changed = [o for o in ("clip_sample", "thresholding", "stochastic_sampling") if config.get(o)]
    if name not in FIRST_ORDER or changed or (name == "DDIMScheduler" and eta):
        own = cls.__name__ if name == cls.__name__ else f"{cls.__name__} with the step of {name}"
        found = ", ".join([own, *changed, *(["eta"] if eta else [])])
        raise UnknownSchedulerError(
            f"this rule is for {', '.join(sorted(FIRST_ORDER))} without clipping and without added "
            f"noise (eta = 0), got {found}"
        )


def check_falling_noise(scheduler: Any) -> None:
    """Raise UnknownSchedulerError if a step of this run stays at its noise level.

    For a scheduler of `check_first_order` whose timesteps are set: a rule that divides by the
    difference of the two levels has no scale there.
    """
    if scheduler_name(scheduler) != "DDIMScheduler":
        levels = scheduler.sigmas.tolist()
    else:
        levels = [noise_level(scheduler, t).ratio for t in scheduler.timesteps]
        levels.append(next_noise_level(scheduler, scheduler.timesteps[-1]).ratio)
    for step, (now, later) in enumerate(zip(levels, levels[1:], strict=False)):
        if abs(now - later) <= 1e-5 * now:  # equal but for rounding
            raise UnknownSchedulerError(
                f"this rule needs every step to change the noise level, but step {step} of "
                f"{scheduler.__class__.__name__} stays at its own: look at set_alpha_to_one, "
                "steps_offset, timestep_spacing or final_sigmas_type"
            )


def next_noise_level(scheduler: Any, timestep: Tensor | float) -> NoiseLevel:
    """The noise level that the scheduler's current step leads to; see `check_first_order`."""
    if scheduler_name(scheduler) != "DDIMScheduler":
        return of_sigma(scheduler, float(scheduler.sigmas[_sigma_index(scheduler, timestep) + 1]))
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    following = torch.as_tensor(timestep).reshape(-1)[0].long() - stride
    table = scheduler.alphas_cumprod.to(following.device)
    final = scheduler.final_alpha_cumprod.to(following.device)
    square = torch.where(following >= 0, table[following.clamp(min=0)], final)
    return NoiseLevel(square.sqrt(), (1 - square).sqrt(), prediction_type_of(scheduler))


def of_sigma(scheduler: Any, sigma: float | Tensor) -> NoiseLevel:
    """The noise level of the network's input at entries of a scheduler's sigma table."""
    return _by_sigma(scheduler)(sigma)


def _by_sigma(scheduler: Any) -> Callable[[float | Tensor], NoiseLevel]:
    """`of_sigma` of one scheduler."""
    name, prediction = scheduler_name(scheduler), prediction_type_of(scheduler)
    if name in BY_FLOW_SIGMA or scheduler.config.get("use_flow_sigmas", False):
        if scheduler.config.get("invert_sigmas", False):  # the table holds the picture's share
            return lambda sigma: NoiseLevel(sigma, 1 - sigma, prediction, sign=-1)
        sign = -1 if name == "MiniMaxH3Scheduler" else 1  # whose velocity points to the picture
        return lambda sigma: NoiseLevel(1 - sigma, sigma, prediction, sign)
    if name in BY_SIGMA:
        sign, spread = 1, 1.0
    elif name in EDM:
        sign = EDM_SIGNS[scheduler.config["prediction_type"]]
        spread = float(scheduler.config["sigma_data"])
    else:
        raise UnknownSchedulerError(f"the noise levels of {name} are not known")

    def level(sigma: float | Tensor) -> NoiseLevel:
        alpha = (sigma * sigma + spread**2) ** -0.5
        return NoiseLevel(alpha, sigma * alpha, prediction, sign, spread)

    return level


class Levels:
    """The noise levels of one run of a scheduler.

    The same as `noise_level`; what does not change from step to step is looked up once.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, name = scheduler, scheduler_name(scheduler)
        self.sigmas: Any = None  # the scheduler's table, and the numbers in it
        self.listed: list[float] = []
        self.by_sigma: Callable[[float | Tensor], NoiseLevel] | None = None
        own = hasattr(scheduler, "noise_level") or hasattr(scheduler, "state_in_first_order")
        if not own and name in BY_SIGMA | EDM | BY_FLOW_SIGMA:
            self.by_sigma = _by_sigma(scheduler)
        self.scales = name in EXPLODING | EDM

    def __call__(self, timestep: Tensor | float) -> NoiseLevel:
        """See `noise_level`."""
        if self.by_sigma is None:
            return noise_level(self.scheduler, timestep)
        if self.scheduler.sigmas is not self.sigmas:
            self.sigmas = self.scheduler.sigmas
            self.listed = self.sigmas.tolist()
        return self.by_sigma(self.listed[_sigma_index(self.scheduler, timestep)])

    def network_input(self, sample: Tensor, timestep: Any, level: NoiseLevel | None) -> Tensor:
        """A sample as the network has it."""
        if self.scales and level is not None:
            return sample * level.alpha
        scale = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, timestep)


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
        name = scheduler_name(scheduler)
        if name == "DPMSolverSDEScheduler":
            return scheduler.mid_point_sigma
        if name == "KDPM2DiscreteScheduler":
            return scheduler.sigmas_interpol[index]
        if name == "KDPM2AncestralDiscreteScheduler":
            return scheduler.sigmas_interpol[index - 1]
    return scheduler.sigmas[index]
