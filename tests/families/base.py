"""What a family is, and the list of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import diffusers as df
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .. import components as c

UNET = ("unet",)
TRANSFORMER = ("transformer",)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
JOINT_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SHORT = {"max_sequence_length": 16}
PARTIAL = {"strength": 0.8, "num_inference_steps": 4}
PLAIN = {"use_resolution_binning": False, "clean_caption": False}
VIDEO = {"height": 32, "width": 32, "num_frames": 9, **SHORT}
TRUE_CFG = {"true_cfg_scale": 4.0, "guidance_scale": None, **SHORT}
SD_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def leading_channels(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """What most pipelines guide: as many channels as input and output have in common."""
    return (slice(None), slice(min(x.shape[1], output.shape[1])))


@dataclass(frozen=True)
class Family:
    """One family: how to build its pipeline, how to call it, and how it guides.

    How it guides is read from the pipeline's source, never from Pilotage: the oracle of
    tests/pipelines/checks.py follows it.

    Args:
        name: Ours.
        cls: The pipeline's class in diffusers.
        build: Makes the stock pipeline, with random weights in float32.
        call: (batch, negative prompts?) -> the arguments of a call that returns latents.
        scale_name: Argument of the call for the guidance scale ("guider.guidance_scale": an
            attribute of a component).
        layout: How a step evaluates its branches: "batch: " or "calls: " and the branches in order
            (cond, uncond, and names of others), or "one". A "|" after "batch: " starts a
            new call.
        denoisers: Attributes of the pipeline that hold the networks of the loop.
        negative: Whether the call takes negative prompts.
        w: The call's scale -> w in ``uncond + w * (cond - uncond)``.
        mix: For more than two branches: predictions by name and the call's arguments -> what the
            pipeline makes of them before it steps, and the weight of "cond" in it.
        negated: The pipeline negates what the network returns before it steps.
        part: (output of one branch, network's input) -> index of what is guided, in both.
        first_step: The first of the scheduler's timesteps that the call uses.
        norm_matched: The guided prediction is given the norm of the conditional one ("capped":
            where it is longer).
        norm_axis: The axis of that norm.
        scale_at: (the call's arguments, timestep) -> the scale, where it is not one for all steps.
        x0: (scheduler, index, keyword arguments of the network, prediction, network's input) ->
            the denoised image, where the scheduler is not handed what the network predicts.
        steps: keyword arguments of the network -> whether this call is a branch of a step.
        latents: Argument of the network that holds what is denoised, if it is not the first.
        space: Where rules can act: "native" if the scheduler's noise levels say nothing of x0.
        max_batch: How many samples a call can have, up to 3.
        scheduler: Attribute of the pipeline that holds the loop's scheduler.
        whole: The network mixes samples or counts them, so that a branch can only be evaluated for
            all of them.
    """

    name: str
    cls: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[int, bool], dict]
    scale_name: str
    layout: str
    denoisers: tuple[str, ...]
    negative: bool
    w: Callable[[float], float | Tensor] = float
    mix: Callable[[dict[str, Tensor], dict], tuple[Tensor, float]] | None = None
    negated: bool = False
    part: Callable[[Tensor, Tensor], tuple[slice, ...]] = leading_channels
    first_step: int = 0
    norm_matched: bool | str = False
    norm_axis: int = -1
    scale_at: Callable[[dict, float], float] | None = None
    x0: Callable[..., Tensor] | None = None
    steps: Callable[[dict], bool] = lambda kwargs: True
    latents: str = ""
    space: str = "x0"
    max_batch: int = 3
    scheduler: str = "scheduler"
    whole: bool = False


FAMILIES: dict[str, Family] = {}
SPEC = (
    *("w", "mix", "negated", "part", "first_step"),
    *("norm_matched", "scale_at", "x0", "steps", "latents", "max_batch"),
    *("norm_axis", "scheduler", "space", "whole"),
)


def family(
    name: str,
    cls: str,
    layout: str,
    denoisers: tuple[str, ...],
    call: Callable[..., dict] = c.text_call,
    scale_name: str = "guidance_scale",
    negative: bool = True,
    module: str = "diffusers",
    settings: dict | None = None,
    **extra,
) -> Callable:
    """Registers a function that returns a pipeline's components (and attributes to be set).

    `module` is where the class is imported from, `settings` are attributes that the built pipeline
    is given, such as its default size. `extra` holds the last fields of `Family`; the rest goes to
    its call.
    """

    def register(parts: Callable[[], dict]) -> Callable[[], dict]:
        build = partial(_build, module, cls, parts, settings or {})
        spec = {key: extra[key] for key in SPEC if key in extra}
        arguments = partial(call, **{key: v for key, v in extra.items() if key not in SPEC})
        assert name not in FAMILIES, f"two families are called {name}"
        FAMILIES[name] = Family(
            name, cls, build, arguments, scale_name, layout, denoisers, negative, **spec
        )
        return parts

    return register


def _build(module: str, cls: str, parts: Callable[[], dict], settings: dict) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = parts()
        settings = settings | components.pop("attributes", {})
        pipe = getattr(import_module(module), cls)(**components)
    for name, value in settings.items():
        assert hasattr(pipe, name)
        setattr(pipe, name, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**config) -> df.FlowMatchEulerDiscreteScheduler:
    return df.FlowMatchEulerDiscreteScheduler(**config)


def ddim(**config) -> df.DDIMScheduler:
    return df.DDIMScheduler(**(SD_NOISE | {"clip_sample": False} | config))
