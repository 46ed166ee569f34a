"""Stable Diffusion with ControlNets."""

import diffusers as df

from .. import components as c
from .base import PARTIAL, UNET, ddim, family
from .stable_diffusion import sd, sdxl

GUIDED = ("batch: uncond cond", UNET)


def steered(call, many: bool = False):
    """A call with one picture per sample for the ControlNet as well; `many` kinds of them."""

    def steered_call(batch: int, negative: bool, **extra) -> dict:
        control = c.per_sample(batch, 3, 16, 16, seed=500, low=0.0)
        return call(batch, negative, **extra) | {"control_image": [control] if many else control}

    return steered_call


def union() -> df.ControlNetUnionModel:
    """One ControlNet for several kinds of picture. Its own attention is over the whole batch."""
    config = c.UNET | c.SDXL | {"conditioning_embedding_out_channels": (8, 16)}
    tasks = {"num_control_type": 3, "num_trans_channel": 8, "num_trans_head": 2}
    return c.wake(df.ControlNetUnionModel(**config, **tasks, num_proj_channel=8))


@family(
    "sd_controlnet", "StableDiffusionControlNetPipeline", "batch: uncond cond", UNET, c.picture_call
)
def sd_controlnet() -> dict:
    return sd(ddim(set_alpha_to_one=False)) | {"controlnet": c.controlnet()}


family(
    "sd_controlnet_img2img",
    "StableDiffusionControlNetImg2ImgPipeline",
    *GUIDED,
    steered(c.picture_call),
    first_step=1,
    **PARTIAL,
)(sd_controlnet)


@family(
    "sd_controlnet_inpaint",
    "StableDiffusionControlNetInpaintPipeline",
    *GUIDED,
    steered(c.inpaint_call),
)
def sd_controlnet_inpaint() -> dict:
    return sd(channels=9) | {"controlnet": c.controlnet()}


@family(
    "sdxl_controlnet",
    "StableDiffusionXLControlNetPipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
)
def sdxl_controlnet() -> dict:
    return sdxl() | {"controlnet": c.controlnet(**c.SDXL)}


family(
    "sdxl_controlnet_img2img",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    *GUIDED,
    steered(c.picture_call),
    first_step=1,
    **PARTIAL,
)(sdxl_controlnet)
family(
    "sdxl_controlnet_inpaint",
    "StableDiffusionXLControlNetInpaintPipeline",
    *GUIDED,
    steered(c.inpaint_call),
    first_step=1,
    **PARTIAL,
)(sdxl_controlnet)


@family(
    "sdxl_controlnet_union",
    "StableDiffusionXLControlNetUnionPipeline",
    *GUIDED,
    steered(c.text_call, many=True),
    control_mode=[1],
)
def sdxl_controlnet_union() -> dict:
    return sdxl() | {"controlnet": union()}


family(
    "sdxl_controlnet_union_img2img",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    *GUIDED,
    steered(c.picture_call, many=True),
    first_step=1,
    control_mode=[1],
    **PARTIAL,
)(sdxl_controlnet_union)
family(
    "sdxl_controlnet_union_inpaint",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    *GUIDED,
    steered(c.inpaint_call, many=True),
    first_step=1,
    control_mode=[1],
    **PARTIAL,
)(sdxl_controlnet_union)
