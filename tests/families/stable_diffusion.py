"""Stable Diffusion 1, 2 and XL, with their adapters, ControlNets and PAG."""

from functools import partial

import diffusers as df

from .. import components as c
from .base import (
    NO_CHECKER,
    PARTIAL,
    SD_NOISE,
    UNET,
    ddim,
    family,
)


def pag_mix(branches: dict, call: dict) -> tuple:
    """Perturbed-attention guidance: uncond + s * (cond - uncond) + p * (cond - perturbed)."""
    cond, uncond, perturbed = (branches[name] for name in ("cond", "uncond", "perturbed"))
    scale, pag_scale = call["guidance_scale"], call["pag_scale"]
    return uncond + scale * (cond - uncond) + pag_scale * (cond - perturbed), scale + pag_scale


def pix2pix_mix(branches: dict, call: dict) -> tuple:
    """InstructPix2Pix, https://arxiv.org/abs/2211.09800, eq. 3."""
    cond, image, uncond = (branches[name] for name in ("cond", "image", "uncond"))
    text, picture = call["guidance_scale"], call.get("image_guidance_scale", 1.5)
    return uncond + picture * (image - uncond) + text * (cond - image), text


@family("sd", "StableDiffusionPipeline", "batch: uncond cond", UNET)
def sd(scheduler=None, channels: int = 4) -> dict:
    """Stable Diffusion 1, whose PNDM scheduler asks for one evaluation more than it has steps."""
    return {
        "vae": c.vae(),
        **c.texts(c.clip()),
        "unet": c.unet(in_channels=channels),
        "scheduler": scheduler or df.PNDMScheduler(**SD_NOISE, skip_prk_steps=True),
        **NO_CHECKER,
    }


@family(
    "sd_img2img",
    "StableDiffusionImg2ImgPipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
    first_step=1,
    **PARTIAL,
)
def sd_img2img() -> dict:
    """With the v-prediction of Stable Diffusion 2.1."""
    return sd(ddim(prediction_type="v_prediction"))


@family(
    "sd_controlnet", "StableDiffusionControlNetPipeline", "batch: uncond cond", UNET, c.picture_call
)
def sd_controlnet() -> dict:
    return sd(ddim(set_alpha_to_one=False)) | {"controlnet": c.controlnet()}


@family(
    "pix2pix",
    "StableDiffusionInstructPix2PixPipeline",
    "batch: cond image uncond",
    UNET,
    c.picture_call,
    mix=pix2pix_mix,
)
def pix2pix() -> dict:
    """Three branches, [text and picture, picture, neither]."""
    return sd(df.EulerAncestralDiscreteScheduler(**SD_NOISE), channels=8)


@family(
    "sd_pag",
    "StableDiffusionPAGPipeline",
    "batch: uncond cond perturbed",
    UNET,
    pag_scale=2.0,
    mix=pag_mix,
)
def sd_pag() -> dict:
    """Three branches, [uncond, cond, cond with perturbed attention]."""
    return sd(ddim()) | {"pag_applied_layers": "mid"}


@family("sdxl", "StableDiffusionXLPipeline", "batch: uncond cond", UNET)
def sdxl(channels: int = 4) -> dict:
    return {
        "vae": c.vae(),
        **c.texts(c.clip(), c.clip(projection=True)),
        "unet": c.unet(in_channels=channels, **c.SDXL),
        "scheduler": df.EulerDiscreteScheduler(**SD_NOISE),
    }


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
    "sdxl_img2img",
    "StableDiffusionXLImg2ImgPipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
    first_step=1,
    **PARTIAL,
)(sdxl)
INPAINT = ("StableDiffusionXLInpaintPipeline", "batch: uncond cond", UNET, c.inpaint_call)
family("sdxl_inpaint", *INPAINT, **PARTIAL)(partial(sdxl, channels=9))
family("sdxl_inpaint_4", *INPAINT, **PARTIAL)(sdxl)
