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
from .families import controlnets, images, qwen, stable_diffusion, wan
from .families.base import PARTIAL, SPEC, TRANSFORMER, UNET, Family
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


def sdxl(controlnet: Any = None, adapter: bool = False, **config: Any) -> dict:
    """Stable Diffusion XL, with what its workflows add to it."""
    parts = stable_diffusion.sdxl(**config)
    if controlnet is not None:
        parts["controlnet"] = controlnet()
    if adapter:
        parts["unet"]._load_ip_adapter_weights([c.ip_adapter(parts["unet"])])
        parts["image_encoder"] = c.clip_vision()
    return parts


def sdxl_call(
    batch: int, negative: bool, task: str, control: bool, adapter: bool, **extra: Any
) -> dict:
    calls = {"image2image": c.picture_call, "inpainting": c.inpaint_call}
    call = calls.get(task, c.text_call)(batch, negative, **extra)
    if control:
        call["control_image"] = c.per_sample(batch, 3, 16, 16, seed=500, low=0.0)
    if adapter:
        call["ip_adapter_image"] = c.per_sample(batch, 3, 16, 16, seed=600)
    return call


def sdxl_workflows() -> None:
    """Each task, alone or with a ControlNet of either kind, each with and without pictures."""
    controls: dict[str, Any] = {
        "": None,
        "controlnet_": lambda: c.controlnet(**c.SDXL),
        "controlnet_union_": controlnets.union,
    }
    for adapter in ("", "ip_adapter_"):
        for control, network in controls.items():
            for task in ("text2image", "image2image", "inpainting"):
                later = {} if task == "text2image" else {"first_step": 1, **PARTIAL}
                later |= {"control_mode": [1]} if "union" in control else {}
                channels = 9 if task == "inpainting" and not control else 4
                workflow(
                    f"StableDiffusionXL {adapter}{control}{task}",
                    functools.partial(sdxl, network, bool(adapter), channels=channels),
                    functools.partial(
                        sdxl_call, task=task, control=bool(control), adapter=bool(adapter)
                    ),
                    denoisers=UNET,
                    **later,
                )


def qwen_workflows() -> None:
    """Each task, alone or with a ControlNet."""
    pictures = {"text2image": {}, "image2image": {"image": 3}}
    pictures["inpainting"] = {"image": 3, "mask_image": 1}
    for control in ("", "controlnet_"):
        for task, given in pictures.items():
            given = given | ({"control_image": 3} if control else {})
            later = {} if task == "text2image" else {"first_step": 1, **qwen.LATE}
            workflow(
                f"QwenImage {control}{task}",
                qwen.qwen_image_controlnet if control else qwen.qwen_image,
                qwen.big(c.text_call, **given),
                norm_matched=True,
                height=32,
                width=32,
                **later,
            )


sdxl_workflows()
qwen_workflows()
SD3_LATER = {"first_step": 1, "strength": 0.75, "num_inference_steps": 4}
workflow("StableDiffusion3 text2image", images.sd3)
workflow("StableDiffusion3 image2image", images.sd3, c.picture_call, **SD3_LATER)
Z = {"negated": True, "max_sequence_length": 128}
workflow("ZImage text2image", qwen.z_image, **Z)
workflow("ZImage image2image", qwen.z_image, c.picture_call, first_step=1, **qwen.LATE, **Z)
EDIT = {"norm_matched": True, "max_sequence_length": 1024}
EDIT["part"] = qwen.leading_tokens(16)
TALL = {"height": 4096, "width": 256}
workflow("QwenImageEdit image_conditioned", qwen.qwen_image_edit, qwen.edit_call, **EDIT, **TALL)
workflow(
    "QwenImageEdit image_conditioned_inpainting",
    qwen.qwen_image_edit,
    qwen.edit_inpaint_call,
    first_step=1,
    **qwen.LATE,
    **EDIT,
    **TALL,
)
workflow("QwenImageEditPlus", qwen.qwen_image_edit, qwen.edit_call, max_batch=1, **EDIT, **TALL)
VIDEO = {"height": 32, "width": 32, "num_frames": 9, "blocks": "Blocks"}
workflow("Wan", wan.wan, **VIDEO)
