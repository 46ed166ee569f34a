"""Every modular pipeline of diffusers with a place for a guider: tiny, with random weights.

`MODULAR` has an entry for every workflow of every such pipeline, so that each loop is run with
everything that may be in it. `modular_report` says of each whether our guider guides it: with "cfg"
as diffusers' own guider does, bit for bit; with APG as the paper's algorithm in float64 does within
the stock pipeline; and with Adaptive Guidance only as many passes as it promises.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffusers as df
import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline

from pilotage.guidance import APG, CFG, AdaptiveGuidance, Guidance
from pilotage.pipelines.guiders import Guider, slots_of

from . import components as c
from .families import images, qwen, stable_diffusion, wan
from .families.base import SPEC, TRANSFORMER, UNET, Family
from .pipelines.checks import PaperGuidance, equal, run

SCALE = 6.0
MODULAR: dict[str, Family] = {}


def workflow(
    name: str,
    parts: Callable[[], dict],
    call: Callable[..., dict] = c.text_call,
    blocks: str = "AutoBlocks",
    denoisers: tuple[str, ...] = TRANSFORMER,
    scales: tuple[str, ...] = ("guider",),
    output: str = "latents",
    without: tuple[str, ...] = ("decode",),
    **extra: Any,
) -> None:
    """Registers a modular pipeline in one of its workflows.

    Args:
        name: Name of its class without "ModularPipeline", and the workflow.
        parts: Makes its components.
        call: (batch, negative prompts?) -> the arguments of a call.
        blocks: How the name of its blocks ends.
        denoisers: Components that hold the networks of the loop.
        scales: Components that are guiders.
        output: What of the pipeline's state is compared.
        without: Blocks that are left out.
        extra: Fields of `Family`, and what goes to `call`.
    """
    family, _, _ = name.partition(" ")
    spec = {key: extra.pop(key) for key in SPEC if key in extra}
    extra |= {f"{guider}.guidance_scale": SCALE for guider in scales}
    MODULAR[name] = Family(
        name,
        family + "ModularPipeline",
        functools.partial(_build, family + blocks, parts, output, without),
        functools.partial(call, output_type=None, guidance_scale=None, **extra),
        f"{scales[0]}.guidance_scale",
        "calls: cond uncond",
        denoisers,
        True,
        **spec,
    )


def _build(blocks: str, parts: Callable[[], dict], output: str, without: tuple[str, ...]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = parts()
    built = getattr(df, blocks)()
    for block in without:
        built.sub_blocks.pop(block)
    quiet(built)
    pipe = built.init_pipeline()
    pipe.update_components(**{k: v for k, v in components.items() if k in pipe.components})
    guiders = {name: df.ClassifierFreeGuidance() for name in slots_of(pipe)}
    pipe.update_components(**guiders)
    pipe.__class__ = ending_in(type(pipe), output)
    return pipe


@functools.cache
def ending_in(cls: type[ModularPipeline], output: str) -> type[ModularPipeline]:
    """A class whose call returns what is compared, in a tuple, as ordinary pipelines do."""

    def call(self: Any, **kwargs: Any) -> tuple:
        found = cls.__call__(self, **kwargs, output=output)
        return (torch.cat(found, 2) if isinstance(found, list) else found,)

    return type(cls.__name__, (cls,), {"__call__": call})


def quiet(blocks: Any) -> None:
    """Switches the progress bars of all loops off; a modular pipeline only reaches the top ones."""
    for block in getattr(blocks, "sub_blocks", {}).values():
        quiet(block)
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def use(pipe: Any, guider: Any) -> Any:
    """Makes `guider` the guider of `pipe`, and one like it of its second loop, if there is one."""
    parts = {"guider": guider}
    if "guider_2" in slots_of(pipe):
        own = isinstance(guider, Guider)
        scale = guider.guidance_scale
        parts["guider_2"] = guider.partner(scale) if own else guider.new(guidance_scale=scale)
    pipe.update_components(**parts)
    return guider


def guided_latents(
    name: str, guidance: str | Guidance | None, pipe: Any = None, **extra: Any
) -> tuple[torch.Tensor, Any]:
    """What a pipeline returns with a guidance (None: diffusers' own guider), and its guider."""
    family = MODULAR[name]
    pipe = family.build() if pipe is None else pipe
    call = family.call(family.max_batch, True) | extra
    if guidance is None:
        guider = use(pipe, df.ClassifierFreeGuidance(SCALE))
    else:
        guider = use(pipe, Guider(guidance, SCALE).bind(pipe))
    return run(pipe, call)[0], guider


def modular_cfg_bit_equal(name: str) -> bool:
    """Whether "cfg" is diffusers' own guider, for one sample and several."""
    pipe = MODULAR[name].build()
    expected, _ = guided_latents(name, None, pipe)
    found, _ = guided_latents(name, "cfg", pipe)
    return equal(found, expected)


def modular_apg_error(name: str) -> float:
    """Relative difference from the stock pipeline led by the paper's algorithm in float64."""
    family = MODULAR[name]
    eta, r, beta = 0.2, 2.0, -0.6
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    found, _ = guided_latents(name, rule)
    plain, _ = guided_latents(name, None)
    paper = PaperGuidance(family, lambda: family.call(family.max_batch, True), eta, r, beta).run()
    found, plain, expected = (v.double() for v in (found, plain, paper[0]))
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((found - expected).norm() / expected.norm()).item()


def modular_passes_ok(name: str) -> bool:
    """Whether the network is asked as often as Adaptive Guidance promises."""
    for threshold, guided_steps in ((-1.0, 1), (1.5, None)):
        pipe, calls = MODULAR[name].build(), []
        for denoiser in MODULAR[name].denoisers:
            getattr(pipe, denoiser).register_forward_pre_hook(
                lambda *_: calls.append(1), with_kwargs=True
            )
        _, guider = guided_latents(name, CFG() | AdaptiveGuidance(threshold), pipe)
        steps = len(guider.guidance_trace.steps)
        if guider.passes != steps + (guided_steps or steps) or len(calls) != guider.passes:
            return False
    return True


SDXL = {"denoisers": UNET}
workflow("StableDiffusionXL text2image", stable_diffusion.sdxl, **SDXL)
workflow("StableDiffusion3 text2image", images.sd3)
workflow("QwenImage text2image", qwen.qwen_image, norm_matched=True, height=32, width=32)
workflow("ZImage text2image", qwen.z_image, negated=True, max_sequence_length=128)
VIDEO = {"height": 32, "width": 32, "num_frames": 9, "blocks": "Blocks"}
workflow("Wan text2video", wan.wan, **VIDEO)
