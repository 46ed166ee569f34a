"""Stable Diffusion 1, 2 and XL, their adapters, and other models built like them."""

from functools import partial

import diffusers as df
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import Tensor

from .. import components as c
from .base import (
    NO_CHECKER,
    PARTIAL,
    SD_NOISE,
    UNET,
    ddim,
    family,
)


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


@family("sd_inpaint", "StableDiffusionInpaintPipeline", "batch: uncond cond", UNET, c.inpaint_call)
def sd_inpaint() -> dict:
    """With a network that sees mask and masked picture in five channels more."""
    return sd(channels=9)


@family(
    "sd_inpaint_4",
    "StableDiffusionInpaintPipeline",
    "batch: uncond cond",
    UNET,
    c.inpaint_call,
    first_step=1,
    **PARTIAL,
)
def sd_inpaint_4() -> dict:
    """With any network: after each step what lies outside the mask is put back."""
    return sd(ddim())


def depth_call(batch: int, negative: bool, **extra) -> dict:
    call = c.picture_call(batch, negative, height=None, width=None, **extra)
    return call | {"depth_map": c.per_sample(batch, 16, 16, seed=400, low=0.0)}


@family(
    "sd_depth2img",
    "StableDiffusionDepth2ImgPipeline",
    "batch: uncond cond",
    UNET,
    depth_call,
    first_step=1,
    **PARTIAL,
)
def sd_depth2img() -> dict:
    """The depth comes with the call, so there is no estimator."""
    parts = sd(channels=5) | {"depth_estimator": None}
    del parts["safety_checker"], parts["requires_safety_checker"]
    return parts


@family(
    "sd_image_variation",
    "StableDiffusionImageVariationPipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
    negative=False,
    prompt=None,
)
def sd_image_variation() -> dict:
    """A picture's embedding in place of a prompt, zeros in place of a negative one."""
    parts = sd() | {"image_encoder": c.clip_vision()}
    del parts["text_encoder"], parts["tokenizer"]
    return parts


UPSCALE = {"height": None, "width": None}


@family(
    "sd_upscale",
    "StableDiffusionUpscalePipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
    **UPSCALE,
)
def sd_upscale() -> dict:
    """The small picture in three channels more, its noise level as a class."""
    scheduler = ddim(prediction_type="v_prediction", set_alpha_to_one=False)
    parts = sd(scheduler) | {
        "vae": c.vae(blocks=3),
        "unet": c.unet(in_channels=7, num_class_embeds=1000),
        "low_res_scheduler": df.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    del parts["requires_safety_checker"]
    return parts


def preconditioned(scheduler, index: int, kwargs: dict, prediction: Tensor, x: Tensor) -> Tensor:
    """Karras et al. (2022), eq. 7 at a data deviation of one; `x` is scaled for the network."""
    sigma = scheduler.sigmas[index].double()
    scale = (sigma**2 + 1) ** 0.5
    return x / scale + sigma / scale * prediction


@family(
    "sd_latent_upscale",
    "StableDiffusionLatentUpscalePipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
    part=lambda output, x: (slice(None), slice(4)),
    x0=preconditioned,
    **UPSCALE,
)
def sd_latent_upscale() -> dict:
    """Karras et al.'s preconditioning in the pipeline itself, and a channel which it drops."""
    text_encoder, tokenizer = c.clip()
    unet = df.UNet2DConditionModel(
        in_channels=8,
        out_channels=5,
        block_out_channels=(32, 64, 64),
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=None,
        attention_head_dim=8,
        cross_attention_dim=16,
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        time_cond_proj_dim=128 + 16,
        timestep_post_act="gelu",
    )
    return {
        "vae": c.vae(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": c.condition_loudly(c.wake(unet)),
        "scheduler": df.EulerDiscreteScheduler(**SD_NOISE, prediction_type="sample"),
    }


@family("sd_adapter", "StableDiffusionAdapterPipeline", "batch: uncond cond", UNET, c.picture_call)
def sd_adapter() -> dict:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return sd() | {"unet": c.unet(**blocks), "adapter": c.t2i_adapter("full_adapter", 2)}


def unclip_parts() -> dict:
    """What StableUnCLIP adds: embeddings of pictures, noised, as classes."""
    unet = c.unet(
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * 16,
        use_linear_projection=True,
    )
    parts = sd(ddim(prediction_type="v_prediction", set_alpha_to_one=False)) | {
        "unet": unet,
        "image_normalizer": StableUnCLIPImageNormalizer(16),
        "image_noising_scheduler": df.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    del parts["safety_checker"], parts["requires_safety_checker"]
    return parts


@family(
    "stable_unclip",
    "StableUnCLIPPipeline",
    "batch: uncond cond",
    UNET,
    prior_num_inference_steps=2,
)
def stable_unclip() -> dict:
    """A prior with guidance of its own makes the picture's embedding first."""
    encoder, tokenizer = c.clip(projection=True)
    prior = df.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1
    )
    scheduler = df.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    )
    parts = unclip_parts() | {
        "prior_tokenizer": tokenizer,
        "prior_text_encoder": encoder,
        "prior": c.wake(prior),
        "prior_scheduler": scheduler,
    }
    del parts["feature_extractor"]
    return parts


@family(
    "stable_unclip_img2img",
    "StableUnCLIPImg2ImgPipeline",
    "batch: uncond cond",
    UNET,
    c.picture_call,
)
def stable_unclip_img2img() -> dict:
    return unclip_parts() | {"image_encoder": c.clip_vision()}


LCM = {"negative": False, "num_inference_steps": 4}


@family("lcm", "LatentConsistencyModelPipeline", "one", UNET, **LCM)
def lcm() -> dict:
    """Distilled: the scale is embedded and goes into the network."""
    unet = c.unet(time_cond_proj_dim=8)
    return sd(df.LCMScheduler(**SD_NOISE)) | {"unet": unet}


family(
    "lcm_img2img",
    "LatentConsistencyModelImg2ImgPipeline",
    "one",
    UNET,
    c.picture_call,
    height=None,
    width=None,
    strength=0.8,
    **LCM,
)(lcm)


@family(
    "ldm_text2img",
    "LDMTextToImagePipeline",
    "batch: uncond cond",
    UNET,
    negative=False,
    height=64,
    width=64,
    output_type="pt",
)
def ldm_text2img() -> dict:
    """Latent Diffusion, which returns no latents."""
    bert, tokenizer = c.bert()
    return {
        "vqvae": c.vae(),
        "bert": bert,
        "tokenizer": tokenizer,
        "unet": c.condition_loudly(c.unet(cross_attention_dim=c.WIDTH)),
        "scheduler": ddim(),
    }


@family("sdxl", "StableDiffusionXLPipeline", "batch: uncond cond", UNET)
def sdxl(channels: int = 4) -> dict:
    return {
        "vae": c.vae(),
        **c.texts(c.clip(), c.clip(projection=True)),
        "unet": c.unet(in_channels=channels, **c.SDXL),
        "scheduler": df.EulerDiscreteScheduler(**SD_NOISE),
    }


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


@family(
    "sdxl_pix2pix",
    "StableDiffusionXLInstructPix2PixPipeline",
    "batch: cond image uncond",
    UNET,
    c.picture_call,
    mix=pix2pix_mix,
)
def sdxl_pix2pix() -> dict:
    return sdxl(channels=8)


@family(
    "sdxl_adapter", "StableDiffusionXLAdapterPipeline", "batch: uncond cond", UNET, c.picture_call
)
def sdxl_adapter() -> dict:
    return sdxl() | {"adapter": c.t2i_adapter("full_adapter_xl", 4)}
