"""Flux and what is built like it."""

import copy
import json

import diffusers as df
import torch
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


USER_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
LAYERS = {"text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 64}


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
    return {**flux_parts(16 + 16 + 16), "resolution": 16}


CLOZE = {"negative": False, "max_sequence_length": 64}
family("visual_cloze_generation", "VisualClozeGenerationPipeline", *ONE, cloze_call, **CLOZE)(
    visual_cloze
)
# Two loops: what the first has made, the second makes larger.
family(
    "visual_cloze",
    "VisualClozePipeline",
    *ONE,
    cloze_call,
    upsampling_height=16,
    upsampling_width=16,
    upsampling_strength=0.75,
    **CLOZE | {"num_inference_steps": 4},
)(visual_cloze)


@family("bria", "BriaPipeline", "batch: uncond cond", TRANSFORMER, **SHORT)
def bria() -> dict:
    """Without a negative prompt its unconditional branch has zeros for text."""
    model = df.BriaTransformer2DModel(in_channels=16, **SIZES, **ROPE)
    return {
        **c.texts(c.t5()),
        "vae": c.flow_vae(),
        "transformer": loud(model),
        "scheduler": dynamic_flow(),
    }


def fibo_vae() -> nn.Module:
    """Scales by 16."""
    return df.AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_spatial=16,
    ).eval()


def fibo_parts() -> dict:
    """Each block reads a layer of the language model; an empty prompt is one token, 128000."""
    model = df.BriaFiboTransformer2DModel(
        in_channels=16,
        **SIZES | {"joint_attention_dim": 2 * c.WIDTH},
        **ROPE,
        text_encoder_dim=c.WIDTH,
    )
    reader = c.language_model(tr.SmolLM3ForCausalLM, tr.SmolLM3Config, c.qwen_tokenizer())
    reader[0].resize_token_embeddings(128_001, mean_resizing=False)
    return {
        **c.texts(reader),
        "vae": fibo_vae(),
        "transformer": loud(model),
        "scheduler": dynamic_flow(),
    }


FIBO = {"height": 64, "width": 64, "max_sequence_length": 64}
family("bria_fibo", "BriaFiboPipeline", "batch: uncond cond", TRANSFORMER, **FIBO)(fibo_parts)


def fibo_edit_call(batch: int, negative: bool, **extra) -> dict:
    call = c.text_call(batch, negative, **extra)
    call["prompt"] = [json.dumps({"edit_instruction": text}) for text in call["prompt"]]
    return call | {"image": picture()}


family(
    "bria_fibo_edit",
    "BriaFiboEditPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    fibo_edit_call,
    part=first_half,
    **FIBO,
)(fibo_parts)


def qwen3_vl(model: type, layers: int = 2) -> nn.Module:
    rope = {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e4}
    text = {
        "vocab_size": c.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": rope,
        "initializer_range": 0.2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }
    return model(tr.Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


class Qwen3Reader(tr.Qwen3VLProcessor):
    """Reads text only, and so works without torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


def seeing_tokenizer():
    tokenizer = c.qwen_tokenizer()
    marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


@family("bria_fibo2", "BriaFibo2Pipeline", *TWO)
def bria_fibo2() -> dict:
    """Its layers of the language model are fixed: the last is the 35th."""
    model = df.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * 16,
        injection_layer_ids=(0, 1),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=32,
        gist_max_text_len=256,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 64, 64),
    )
    return {
        "text_encoder": qwen3_vl(tr.Qwen3VLForConditionalGeneration, layers=36),
        "processor": Qwen3Reader(None, seeing_tokenizer(), None),
        "vae": flux2_vae(),
        "transformer": loud(model),
        "scheduler": dynamic_flow(),
    }


def longcat_call(batch: int, negative: bool, **extra) -> dict:
    """A single negative prompt, its default too, fits a single sample only."""
    return {"negative_prompt": [""] * batch} | c.text_call(batch, negative, **extra)


def longcat_parts() -> dict:
    model = df.LongCatImageTransformer2DModel(in_channels=64, **SIZES, **ROPE)
    return {
        **c.texts((c.qwen_vl(), c.qwen_tokenizer())),
        "text_processor": None,
        "vae": c.flow_vae(16),
        "transformer": loud(model),
        "scheduler": dynamic_flow(),
    }


family(
    "longcat_image",
    "LongCatImagePipeline",
    *TWO,
    longcat_call,
    norm_matched="capped",
    enable_prompt_rewrite=False,
)(longcat_parts)


@family("ovis_image", "OvisImagePipeline", *TWO, max_sequence_length=192)
def ovis_image() -> dict:
    model = df.OvisImageTransformer2DModel(in_channels=16, out_channels=16, **SIZES, **ROPE)
    return {
        **c.texts(c.language_model(tr.Qwen3Model, tr.Qwen3Config, c.qwen_tokenizer())),
        "vae": c.flow_vae(),
        "transformer": loud(model),
        "scheduler": dynamic_flow(),
    }


def last_tokens(count: int):
    def part(output: Tensor, x: Tensor) -> tuple[slice, ...]:
        return (slice(None), slice(-count, None))

    return part


def ideogram_call(batch: int, negative: bool, **extra) -> dict:
    """One scale for all steps; the default is one for each."""
    return c.text_call(batch, negative, **extra) | {"guidance_schedule": None}


@family(
    "ideogram4",
    "Ideogram4Pipeline",
    "calls: cond uncond",
    ("transformer", "unconditional_transformer"),
    ideogram_call,
    negative=False,
    negated=True,
    part=last_tokens(16),
    max_sequence_length=48,
)
def ideogram4() -> dict:
    """Each branch has a network of its own, and only one has text tokens in front of the latents.

    Its layers of the language model are fixed: the last is the 36th.
    """

    model = df.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        **JOINT_HEADS,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=13 * 16,
        mrope_section=(4, 2, 2),
    )
    tokenizer = c.qwen_tokenizer()
    tokenizer.chat_template = USER_ONLY
    return {
        **c.texts((qwen3_vl(tr.Qwen3VLModel, layers=36), tokenizer)),
        "vae": flux2_vae(),
        "transformer": c.wake(model),
        "unconditional_transformer": c.amplify(copy.deepcopy(model), ("input_proj",), 1.2),
        "scheduler": flow(),
    }


@family(
    "krea2",
    "Krea2Pipeline",
    *TWO,
    w=lambda scale: 1.0 + scale,
    max_sequence_length=192,
)
def krea2() -> dict:
    """Its scale is what is added to the conditional prediction: w - 1."""
    model = df.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        **JOINT_HEADS,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        **c.texts((qwen3_vl(tr.Qwen3VLModel), c.qwen_tokenizer())),
        "text_encoder_select_layers": (0, 1, 2),
        "vae": c.qwen_vae(),
        "transformer": loud(model),
        "scheduler": flow(use_dynamic_shifting=True, max_image_seq_len=6400),
    }


def prx_model(channels: int, **config) -> nn.Module:
    model = df.PRXTransformer2DModel(
        in_channels=channels,
        context_in_dim=c.WIDTH,
        hidden_size=32,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
        **config,
    )
    return loud(model)


def embeds_call(batch: int, negative: bool, **extra) -> dict:
    """Texts as embeddings: the pipeline cleans prompts with a library which tests do without."""
    call = c.text_call(batch, False, prompt=None, **extra)
    for name, seed in (("prompt", 100), ("negative_prompt", 200)):
        embeds = c.per_sample(batch, 8, c.WIDTH, seed=seed)
        if name == "negative_prompt" and not negative:
            embeds = torch.zeros_like(embeds)
        mask = torch.ones(batch, 8, dtype=torch.bool)
        call |= {f"{name}_embeds": embeds, f"{name}_attention_mask": mask}
    return call


def returned(scheduler, index, kwargs, prediction, x) -> Tensor:
    return prediction


READ = {"text_encoder": None, "tokenizer": None}
PRX = {"call": embeds_call, "use_resolution_binning": False, "max_batch": 1}


@family("prx", "PRXPipeline", "batch: uncond cond", TRANSFORMER, **PRX)
def prx() -> dict:
    """Two timesteps for the two branches, however many samples: it guides one at a time only."""
    return {**READ, "vae": c.flow_vae(), "transformer": prx_model(4), "scheduler": flow(shift=3.0)}


@family("prx_pixel", "PRXPixelPipeline", "batch: uncond cond", TRANSFORMER, x0=returned, **PRX)
def prx_pixel() -> dict:
    """No latents; the network returns the picture, which is made a velocity once it is guided."""
    transformer = prx_model(3, bottleneck_size=8, resolution_embeds=True)
    return {**READ, "transformer": transformer, "scheduler": flow(shift=3.0)}
