"""Flux and what is built like it."""

import diffusers as df
import transformers as tr
from PIL import Image
from torch import Tensor, nn

from .. import components as c
from .base import JOINT_HEADS, SHORT, TRANSFORMER, TRUE_CFG, family, flow

SIZES = {"num_layers": 1, "num_single_layers": 1, **JOINT_HEADS, "joint_attention_dim": c.WIDTH}
ROPE = {"axes_dims_rope": (4, 4, 8)}
LATE = {"strength": 0.75, "num_inference_steps": 4}
LATER = {**LATE, "first_step": 1}
TWO = ("calls: cond uncond", TRANSFORMER)
ONE = ("one", TRANSFORMER)
TEXT_ENTERS = ("context_embedder", "txt_in", "caption_projection")
DISTILLED = {"negative": False, **SHORT}


def first_half(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """Tokens of a reference picture, as many, stand behind those of the latents."""
    return (slice(None), slice(x.shape[1] // 2))


def loud(model: nn.Module) -> nn.Module:
    return c.amplify(c.wake(model), ("add_v_proj", *TEXT_ENTERS), 10.0)


def dynamic_flow() -> df.FlowMatchEulerDiscreteScheduler:
    return flow(shift=3.0, use_dynamic_shifting=True)


def flux_model(in_channels: int = 16, **config) -> nn.Module:
    config = SIZES | ROPE | {"pooled_projection_dim": 16, "guidance_embeds": True} | config
    model = df.FluxTransformer2DModel(in_channels=in_channels, out_channels=16, **config)
    return c.wake(model)


def flux_parts(in_channels: int = 16, **config) -> dict:
    transformer = flux_model(in_channels, **config)
    return {
        **c.texts(c.clip(), c.t5()),
        "vae": c.flow_vae(),
        "transformer": transformer,
        "scheduler": dynamic_flow(),
    }


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


USER_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
LAYERS = {"text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 96}


def picture(seed: int = 500, width: int = 64, height: int = 64) -> Image.Image:
    pixels = c.noise(height, width, 3, seed=seed, low=0.0)
    return Image.fromarray((255 * pixels).byte().numpy())


def flux2_vae(blocks: int = 2) -> nn.Module:
    return df.AutoencoderKLFlux2(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def flux2_model(guidance_embeds: bool = False) -> nn.Module:
    model = df.Flux2Transformer2DModel(
        in_channels=16,
        **SIZES | {"joint_attention_dim": 3 * c.WIDTH},
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return loud(model)


def mistral() -> nn.Module:
    text = {
        "vocab_size": c.VOCAB,
        "hidden_size": c.WIDTH,
        "intermediate_size": c.WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = tr.Mistral3Config(
        text_config=text | {"model_type": "mistral"},
        vision_config=vision | {"model_type": "pixtral"},
        image_token_index=1,
    )
    return tr.Mistral3ForConditionalGeneration(config).eval()


@family("flux2", "Flux2Pipeline", *ONE, negative=False, **LAYERS)
def flux2() -> dict:
    """The system message would fill the sequence, so the chat template leaves it out."""
    tokenizer = c.llama_tokenizer()
    tokenizer.chat_template = USER_ONLY
    return {
        **c.texts((mistral(), tokenizer)),
        "vae": flux2_vae(),
        "transformer": flux2_model(guidance_embeds=True),
        "scheduler": dynamic_flow(),
    }


def klein_parts(blocks: int = 2) -> dict:
    """Its unconditional branch is the empty prompt."""
    return {
        **c.texts(c.language_model(tr.Qwen3ForCausalLM, tr.Qwen3Config, c.qwen_tokenizer())),
        "vae": flux2_vae(blocks),
        "transformer": flux2_model(),
        "scheduler": dynamic_flow(),
    }


def small_klein_parts() -> dict:
    """Reference pictures have at least 64 pixels a side, and all samples share them."""
    return klein_parts(blocks=4)


def reference_call(batch: int, negative: bool, **extra) -> dict:
    return c.text_call(batch, negative, height=64, width=64, **extra) | {"image": picture()}


family("flux2_klein", "Flux2KleinPipeline", *TWO, negative=False, **LAYERS)(klein_parts)
family(
    "flux2_klein_edit",
    "Flux2KleinPipeline",
    *TWO,
    reference_call,
    negative=False,
    part=first_half,
    **LAYERS,
)(small_klein_parts)
family(
    "flux2_klein_inpaint",
    "Flux2KleinInpaintPipeline",
    *TWO,
    c.inpaint_call,
    negative=False,
    part=first_half,
    **LAYERS,
    **LATER,
)(klein_parts)
family(
    "flux2_klein_kv",
    "Flux2KleinKVPipeline",
    *ONE,
    reference_call,
    negative=False,
    guidance_scale=None,
    **LAYERS,
)(small_klein_parts)


def cloze_call(batch: int, negative: bool, **extra) -> dict:
    """A row as example, and one to be completed."""
    rows = [
        [[picture(3 * i, 16, 16), picture(3 * i + 1, 16, 16)], [picture(3 * i + 2, 16, 16), None]]
        for i in range(batch)
    ]
    call = c.text_call(batch, negative, height=None, width=None, **extra)
    prompts = {"task_prompt": ["fill in the last"] * batch, "content_prompt": call.pop("prompt")}
    return call | prompts | {"image": rows}


def visual_cloze() -> dict:
    parts = flux_parts(16 + 16 + 16)
    return {**parts, "transformer": loud(parts["transformer"]), "resolution": 16}


CLOZE = {"negative": False, "max_sequence_length": 192}
family("visual_cloze_generation", "VisualClozeGenerationPipeline", *ONE, cloze_call, **CLOZE)(
    visual_cloze
)
# The loop of the first, which a second one of the same network would make larger.
family("visual_cloze", "VisualClozePipeline", *ONE, cloze_call, upsampling_strength=0.0, **CLOZE)(
    visual_cloze
)
