"""Qwen-Image, Z-Image and their neighbours."""

from functools import partial

import diffusers as df
import torch
import transformers as tr
from torch import Tensor

from .. import components as c
from .base import JOINT_HEADS, TRANSFORMER, TRUE_CFG, family, flow

LATE = {"strength": 0.6, "num_inference_steps": 4}
Z_GUIDES = {"max_sequence_length": 128, "w": lambda scale: scale + 1, "negated": True}


@family("z_image", "ZImagePipeline", "batch: cond uncond", TRANSFORMER, **Z_GUIDES)
def z_image(**parts) -> dict:
    """Its guidance line is cond + w * (cond - uncond), on lists of samples."""
    return {
        **c.texts(c.language_model(tr.Qwen3Model, tr.Qwen3Config, c.qwen_tokenizer())),
        "vae": c.flow_vae(),
        "transformer": z_transformer(),
        "scheduler": flow(shift=3.0),
        **parts,
    }


def z_transformer(**config) -> df.ZImageTransformer2DModel:
    transformer = df.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=c.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        **config,
    )
    return c.wake(transformer)


Z_VARIANT = ("batch: cond uncond", TRANSFORMER)
family(
    "z_image_img2img",
    "ZImageImg2ImgPipeline",
    *Z_VARIANT,
    c.picture_call,
    first_step=1,
    **Z_GUIDES,
    **LATE,
)(z_image)
family(
    "z_image_inpaint",
    "ZImageInpaintPipeline",
    *Z_VARIANT,
    c.inpaint_call,
    first_step=1,
    **Z_GUIDES,
    **LATE,
)(z_image)


def z_control_call(batch: int, negative: bool, **extra) -> dict:
    return c.text_call(batch, negative, **extra) | {
        "control_image": c.per_sample(batch, 3, 16, 16, low=-1.0)
    }


def z_control_inpaint_call(batch: int, negative: bool, **extra) -> dict:
    call = c.inpaint_call(batch, negative, **extra)
    return call | {"control_image": c.per_sample(batch, 3, 16, 16, seed=500, low=-1.0)}


@family(
    "z_image_controlnet",
    "ZImageControlNetPipeline",
    *Z_VARIANT,
    z_control_call,
    whole=True,
    **Z_GUIDES,
)
def z_image_controlnet(channels: int = 4) -> dict:
    """The control network sees both branches and leaves its residuals by layer, in a dict."""
    controlnet = df.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    return z_image(controlnet=c.wake(controlnet, seed=1))


family(
    "z_image_controlnet_inpaint",
    "ZImageControlNetInpaintPipeline",
    *Z_VARIANT,
    z_control_inpaint_call,
    whole=True,
    **Z_GUIDES,
)(partial(z_image_controlnet, channels=9))


def z_omni_call(batch: int, negative: bool, **extra) -> dict:
    pictures = [picture(1, 64, 64), picture(2, 64, 64)]
    return c.text_call(batch, negative, **extra) | {"image": pictures}


@family("z_image_omni", "ZImageOmniPipeline", *Z_VARIANT, z_omni_call, **Z_GUIDES)
def z_image_omni() -> dict:
    """Two pictures that all samples share; the network's input is a list of lists."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4, "num_patches": 16}
    config = tr.Siglip2VisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    processor = getattr(tr, "Siglip2ImageProcessorPil", tr.Siglip2ImageProcessor)
    return z_image(
        transformer=z_transformer(siglip_feat_dim=16),
        vae=c.flow_vae().to(torch.bfloat16),
        siglip=tr.Siglip2VisionModel(config).eval(),
        siglip_processor=processor(patch_size=4, max_num_patches=16),
    )


QWEN = ("calls: cond uncond", TRANSFORMER)
QWEN_SIZE = {"height": 32, "width": 32, "max_sequence_length": 512}
QWEN_GUIDES = {"scale_name": "true_cfg_scale", "norm_matched": True, **TRUE_CFG, **QWEN_SIZE}


@family("qwen_image", "QwenImagePipeline", *QWEN, **QWEN_GUIDES)
def qwen_image(**parts) -> dict:
    """Two branches only with a negative prompt; each token gets the conditional one's norm."""
    return {
        **c.texts((c.qwen_vl(), c.qwen_tokenizer())),
        "vae": c.qwen_vae(),
        "transformer": qwen_transformer(),
        "scheduler": flow(use_dynamic_shifting=True, shift_terminal=0.02),
        **parts,
    }


def qwen_transformer(**config) -> df.QwenImageTransformer2DModel:
    transformer = df.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **JOINT_HEADS,
        joint_attention_dim=c.WIDTH,
        axes_dims_rope=(8, 4, 4),
        **config,
    )
    # The template is most of what the text says: attention that picks tokens hears the prompt.
    return c.amplify(c.condition_loudly(c.wake(transformer)), ("norm_added_k",), 8.0)


def big(call, **pictures):
    """A call whose pictures have 32 pixels a side."""

    def made(batch: int, negative: bool, **extra) -> dict:
        given = {
            name: c.per_sample(batch, channels, 32, 32, seed=400 + 100 * i, low=0.0)
            for i, (name, channels) in enumerate(pictures.items())
        }
        masks = {name: (x > 0.5).float() for name, x in given.items() if "mask" in name}
        return call(batch, negative, **extra) | given | masks

    return made


family(
    "qwen_image_img2img",
    "QwenImageImg2ImgPipeline",
    *QWEN,
    big(c.text_call, image=3),
    first_step=1,
    **QWEN_GUIDES,
    **LATE,
)(qwen_image)
family(
    "qwen_image_inpaint",
    "QwenImageInpaintPipeline",
    *QWEN,
    big(c.text_call, image=3, mask_image=1),
    first_step=1,
    **QWEN_GUIDES,
    **LATE,
)(qwen_image)


@family(
    "qwen_image_controlnet",
    "QwenImageControlNetPipeline",
    *QWEN,
    big(c.text_call, control_image=3),
    **QWEN_GUIDES,
)
def qwen_image_controlnet(extra: int = 0, **parts) -> dict:
    """One pass of the control network, on the prompt, serves both branches."""
    controlnet = df.QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        **JOINT_HEADS,
        joint_attention_dim=c.WIDTH,
        axes_dims_rope=(8, 4, 4),
        extra_condition_channels=extra,
    )
    return qwen_image(controlnet=c.wake(controlnet, seed=1), **parts)


@family(
    "qwen_image_controlnet_inpaint",
    "QwenImageControlNetInpaintPipeline",
    *QWEN,
    big(c.text_call, control_image=3, control_mask=1),
    **QWEN_GUIDES,
)
def qwen_image_controlnet_inpaint() -> dict:
    return qwen_image_controlnet(extra=4, vae=settled(c.qwen_vae()))


def settled(vae):
    """For pipelines that draw from the posterior without a generator: too narrow to show it.

    Its means lie around 1000, where adding 3e-7 changes no float32.
    """
    half = vae.config.z_dim
    vae.register_to_config(latents_mean=[1000.0] * half, latents_std=[1.0] * half)
    with torch.no_grad():
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[:half], vae.quant_conv.bias[half:] = 1000.0, -30.0
    return vae


def picture(seed: int, width: int, height: int):
    from PIL import Image

    values = c.noise(height, width, 3, seed=seed, low=0.0)
    return Image.fromarray((255 * values).to(torch.uint8).numpy())


def leading_tokens(count: int):
    """Only the first tokens are the picture's; those of the pictures given follow."""

    def part(output: Tensor, x: Tensor) -> tuple[slice, ...]:
        return (slice(None), slice(count))

    return part


LISTED = c.CHAT_TEMPLATE.replace(
    "m['content'] }}", "m['content'] if m['content'] is string else m['content'][0]['text'] }}"
)


def without_videos(cls: type) -> type:
    """A processor that reads no videos, so that transformers can build it without torchvision."""
    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda *_: None})


def seeing(encoder, processor: type = tr.Qwen2VLProcessor) -> dict:
    """A text encoder, its tokenizer and its processor that take pictures, four tokens each."""
    tokenizer = c.qwen_tokenizer()
    marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    names = ("vision_start_token_id", "image_token_id", "video_token_id", "vision_end_token_id")
    for name, mark in zip(names, marks, strict=True):
        setattr(encoder.config, name, tokenizer.convert_tokens_to_ids(mark))
    reader = getattr(tr, "Qwen2VLImageProcessorPil", tr.Qwen2VLImageProcessor)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    read = without_videos(processor)(reader(size=pixels), tokenizer, chat_template=LISTED)
    return {"text_encoder": encoder, "tokenizer": tokenizer, "processor": read}


def coarse_vae(blocks: int, width: int = 2) -> df.AutoencoderKLQwenImage:
    """For pipelines that bring every picture to a million pixels: few latents remain of it.

    It divides pixels by their norms over `width` channels: where results are its pictures, few
    channels are both near zero somewhere, which magnifies rounding ten thousand times.
    """
    model = df.AutoencoderKLQwenImage(
        base_dim=width,
        z_dim=4,
        dim_mult=[1] * (blocks + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * blocks,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return c.amplify(model.eval(), ("weight",), 2.0)  # or nothing but biases reach its end


def edit_call(batch: int, negative: bool, **extra) -> dict:
    """Tall pictures: torch is slow to convolve a million pixels where one axis has fewer."""
    pictures = [picture(400 + i, 8, 128) for i in range(batch)]
    return c.text_call(batch, negative, **extra) | {"image": pictures}


def edit_inpaint_call(batch: int, negative: bool, **extra) -> dict:
    masks = c.per_sample(batch, 1, 32, 32, seed=300, low=0.0) > 0.5
    return edit_call(batch, negative, **extra) | {"mask_image": masks.float()}


def layered_call(batch: int, negative: bool, **extra) -> dict:
    extra |= {"layers": 1, "output_type": "pt"}
    return edit_call(batch, negative, **extra)


EDIT = QWEN_GUIDES | {"height": 4096, "width": 256, "max_sequence_length": 1024}


@family(
    "qwen_image_edit",
    "QwenImageEditPipeline",
    *QWEN,
    edit_call,
    part=leading_tokens(16),
    **EDIT,
)
def qwen_image_edit(**parts) -> dict:
    return qwen_image(**seeing(c.qwen_vl()), vae=coarse_vae(7), **parts)


family(
    "qwen_image_edit_inpaint",
    "QwenImageEditInpaintPipeline",
    *QWEN,
    edit_inpaint_call,
    part=leading_tokens(16),
    first_step=1,
    **EDIT,
    **LATE,
)(qwen_image_edit)
family(
    "qwen_image_edit_plus",
    "QwenImageEditPlusPipeline",
    *QWEN,
    edit_call,
    part=leading_tokens(16),
    max_batch=1,
    **EDIT,
)(qwen_image_edit)


@family(
    "qwen_image_layered",
    "QwenImageLayeredPipeline",
    *QWEN,
    layered_call,
    scale_name="true_cfg_scale",
    part=leading_tokens(40),
    max_batch=1,
    **(TRUE_CFG | {"height": None, "width": None, "max_sequence_length": 512}),
)
def qwen_image_layered() -> dict:
    """Layers and a picture of all of them, one sequence; no norm is matched unless asked.

    It loses its latents on the way out, so that it returns layers; and those of several samples
    mixed up.
    """
    transformer = qwen_transformer(use_additional_t_cond=True, use_layer3d_rope=True)
    return qwen_image(**seeing(c.qwen_vl()), transformer=transformer, vae=coarse_vae(6, width=6))
