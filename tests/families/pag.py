"""Stable Diffusion with perturbed-attention guidance."""

from .. import components as c
from .base import PARTIAL, UNET, ddim, family
from .controlnets import steered
from .stable_diffusion import sd, sdxl

SELF_ATTENTION = ("attn1.to_v", "attn1.to_out.0.weight")


def perturbed(parts: dict) -> dict:
    """Random self-attention says little: raises it, so that its perturbation can be told."""
    c.amplify(parts["unet"], SELF_ATTENTION, 4.0)
    return parts | {"pag_applied_layers": "mid"}


def pag_mix(branches: dict, call: dict) -> tuple:
    """Perturbed-attention guidance: uncond + s * (cond - uncond) + p * (cond - perturbed)."""
    cond, uncond, perturbed = (branches[name] for name in ("cond", "uncond", "perturbed"))
    scale, pag_scale = call["guidance_scale"], call["pag_scale"]
    return uncond + scale * (cond - uncond) + pag_scale * (cond - perturbed), scale + pag_scale


PAG = {"pag_scale": 2.0, "mix": pag_mix}
GUIDED = ("batch: uncond cond perturbed", UNET)


@family("sd_pag", "StableDiffusionPAGPipeline", *GUIDED, **PAG)
def sd_pag() -> dict:
    """Three branches, [uncond, cond, cond with perturbed attention]."""
    return perturbed(sd(ddim()))


LATE = {"first_step": 1, **PAG}  # its strength is just under 1
SIZED = {"height": None, "width": None}  # by the picture
SOME = {"first_step": 1, **PARTIAL, **PAG}
IMG2IMG = SOME | SIZED
family("sd_pag_img2img", "StableDiffusionPAGImg2ImgPipeline", *GUIDED, c.picture_call, **IMG2IMG)(
    sd_pag
)


@family("sd_pag_inpaint", "StableDiffusionPAGInpaintPipeline", *GUIDED, c.inpaint_call, **LATE)
def sd_pag_inpaint() -> dict:
    return perturbed(sd(channels=9))


@family("sd_controlnet_pag", "StableDiffusionControlNetPAGPipeline", *GUIDED, c.picture_call, **PAG)
def sd_controlnet_pag() -> dict:
    return sd_pag() | {"controlnet": c.controlnet()}


family(
    "sd_controlnet_pag_inpaint",
    "StableDiffusionControlNetPAGInpaintPipeline",
    *GUIDED,
    steered(c.inpaint_call),
    **SOME,
)(sd_controlnet_pag)


@family("sdxl_pag", "StableDiffusionXLPAGPipeline", *GUIDED, **PAG)
def sdxl_pag() -> dict:
    return perturbed(sdxl())


family(
    "sdxl_pag_img2img",
    "StableDiffusionXLPAGImg2ImgPipeline",
    *GUIDED,
    c.picture_call,
    **IMG2IMG,
)(sdxl_pag)
family("sdxl_pag_inpaint", "StableDiffusionXLPAGInpaintPipeline", *GUIDED, c.inpaint_call, **SOME)(
    sdxl_pag
)


@family(
    "sdxl_controlnet_pag", "StableDiffusionXLControlNetPAGPipeline", *GUIDED, c.picture_call, **PAG
)
def sdxl_controlnet_pag() -> dict:
    return sdxl_pag() | {"controlnet": c.controlnet(**c.SDXL)}


family(
    "sdxl_controlnet_pag_img2img",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    *GUIDED,
    steered(c.picture_call),
    **SOME,
)(sdxl_controlnet_pag)
