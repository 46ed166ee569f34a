"""Flux and what is built like it."""

import diffusers as df
from torch import Tensor, nn

from .. import components as c
from .base import JOINT_HEADS, SHORT, TRANSFORMER, TRUE_CFG, family, flow

SIZES = {"num_layers": 1, "num_single_layers": 1, **JOINT_HEADS, "joint_attention_dim": c.WIDTH}
ROPE = {"axes_dims_rope": (4, 4, 8)}
LATE = {"strength": 0.75, "num_inference_steps": 4}
LATER = {**LATE, "first_step": 1}
TWO = ("calls: cond uncond", TRANSFORMER)
ONE = ("one", TRANSFORMER)
DISTILLED = {"negative": False, **SHORT}


def first_half(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """Tokens of a reference picture, as many, stand behind those of the latents."""
    return (slice(None), slice(x.shape[1] // 2))


def dynamic_flow() -> df.FlowMatchEulerDiscreteScheduler:
    return flow(shift=3.0, use_dynamic_shifting=True)


def flux_model(in_channels: int = 16, **config) -> nn.Module:
    config = SIZES | ROPE | {"pooled_projection_dim": 16, "guidance_embeds": True} | config
    model = df.FluxTransformer2DModel(in_channels=in_channels, out_channels=16, **config)
    return c.wake(model)


def flux_parts(in_channels: int = 16, **config) -> dict:
    return {
        **c.texts(c.clip(), c.t5()),
        "vae": c.flow_vae(),
        "transformer": flux_model(in_channels, **config),
        "scheduler": dynamic_flow(),
    }


def true_cfg_call(batch: int, negative: bool, make=c.text_call, **extra) -> dict:
    return make(batch, negative, **TRUE_CFG, **extra)


def control_call(batch: int, negative: bool, make=c.text_call, **extra) -> dict:
    """A call with a picture to be led by, next to those that `make` gives."""
    picture = c.per_sample(batch, 3, 16, 16, seed=500, low=0.0)
    return make(batch, negative, **extra) | {"control_image": picture}


@family("flux", "FluxPipeline", *TWO, scale_name="true_cfg_scale", **TRUE_CFG)
def flux() -> dict:
    """Two branches only with a negative prompt; the distilled guidance_scale is an input."""
    return flux_parts()


family(
    "flux_img2img",
    "FluxImg2ImgPipeline",
    *TWO,
    c.picture_call,
    "true_cfg_scale",
    **TRUE_CFG,
    **LATER,
)(flux_parts)
family(
    "flux_inpaint",
    "FluxInpaintPipeline",
    *TWO,
    c.inpaint_call,
    "true_cfg_scale",
    **TRUE_CFG,
    **LATER,
)(flux_parts)


def flux_controlnet_parts() -> dict:
    config = SIZES | ROPE | {"pooled_projection_dim": 16}
    controlnet = df.FluxControlNetModel(in_channels=16, guidance_embeds=True, **config)
    return {**flux_parts(), "controlnet": c.wake(controlnet)}


family(
    "flux_controlnet",
    "FluxControlNetPipeline",
    *TWO,
    control_call,
    "true_cfg_scale",
    **TRUE_CFG,
)(flux_controlnet_parts)
family(
    "flux_controlnet_img2img",
    "FluxControlNetImg2ImgPipeline",
    *ONE,
    control_call,
    make=c.picture_call,
    **DISTILLED,
    **LATE,
)(flux_controlnet_parts)
family(
    "flux_controlnet_inpaint",
    "FluxControlNetInpaintPipeline",
    *ONE,
    control_call,
    make=c.inpaint_call,
    **DISTILLED,
    **LATE,
)(flux_controlnet_parts)


def flux_control_parts() -> dict:
    """The picture's latents are further channels of the input."""
    return flux_parts(32)


family("flux_control", "FluxControlPipeline", *ONE, control_call, **DISTILLED)(flux_control_parts)
family(
    "flux_control_img2img",
    "FluxControlImg2ImgPipeline",
    *ONE,
    control_call,
    make=c.picture_call,
    **DISTILLED,
    **LATE,
)(flux_control_parts)
family(
    "flux_control_inpaint",
    "FluxControlInpaintPipeline",
    *ONE,
    control_call,
    make=c.inpaint_call,
    **DISTILLED,
    **LATE,
)(flux_control_parts)


@family("flux_fill", "FluxFillPipeline", *ONE, c.inpaint_call, **DISTILLED)
def flux_fill() -> dict:
    """The masked picture and the mask are further channels of the input."""
    return flux_parts(16 + 16 + 16)


family(
    "flux_kontext",
    "FluxKontextPipeline",
    *TWO,
    c.picture_call,
    "true_cfg_scale",
    max_area=16 * 16,
    _auto_resize=False,
    part=first_half,
    **TRUE_CFG,
)(flux_parts)
family(
    "flux_kontext_inpaint",
    "FluxKontextInpaintPipeline",
    *TWO,
    c.inpaint_call,
    "true_cfg_scale",
    max_area=16 * 16,
    _auto_resize=False,
    part=first_half,
    **TRUE_CFG,
    **LATER,
)(flux_parts)


def chroma_parts() -> dict:
    transformer = df.ChromaTransformer2DModel(
        in_channels=16,
        **SIZES,
        **ROPE,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": dynamic_flow(),
    }


family("chroma", "ChromaPipeline", *TWO, **SHORT)(chroma_parts)
family("chroma_img2img", "ChromaImg2ImgPipeline", *TWO, c.picture_call, **SHORT, **LATER)(
    chroma_parts
)


@family("chroma_inpaint", "ChromaInpaintPipeline", *TWO, c.inpaint_call, **SHORT, **LATER)
def chroma_inpaint() -> dict:
    """The pipeline asks the transformer's config for a key which that class does not have."""
    parts = chroma_parts()
    parts["transformer"].register_to_config(guidance_embeds=False)
    return parts
