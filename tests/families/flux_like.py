"""What is built like Flux by others: Bria, LongCat, Ovis, Ideogram, Krea, PRX."""

import copy
import json

import diffusers as df
import torch
import transformers as tr
from torch import Tensor, nn

from .. import components as c
from .base import JOINT_HEADS, SHORT, TRANSFORMER, family, flow
from .flux import ROPE, SIZES, TWO, USER_ONLY, dynamic_flow, first_half, flux2_vae, loud, picture


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


class NoVideos:
    """Lets a processor do without torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


class Qwen3Reader(NoVideos, tr.Qwen3VLProcessor):
    pass


class Qwen2Reader(NoVideos, tr.Qwen2VLProcessor):
    pass


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


def longcat_parts() -> dict:
    """Without negative prompts all samples share a single row of text."""
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
    norm_matched="capped",
    enable_prompt_rewrite=False,
)(longcat_parts)


def longcat_edit_call(batch: int, negative: bool, **extra) -> dict:
    call = c.text_call(batch, negative, height=None, width=None, **extra)
    return call | {"image": picture()}


@family(
    "longcat_image_edit",
    "LongCatImageEditPipeline",
    *TWO,
    longcat_edit_call,
    part=first_half,
    max_batch=1,
)
def longcat_image_edit() -> dict:
    """Pictures are brought to a million pixels, of which a VAE that scales by 64 leaves little."""
    encoder, tokenizer = c.qwen_vl(), seeing_tokenizer()
    for name in ("vision_start", "vision_end", "image", "video"):
        mark = f"<|{name}|>" if name.startswith("vision") else f"<|{name}_pad|>"
        setattr(encoder.config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(mark))
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    pictures = getattr(tr, "Qwen2VLImageProcessorPil", tr.Qwen2VLImageProcessor)(size=pixels)
    parts = {
        **c.texts((encoder, tokenizer)),
        "text_processor": Qwen2Reader(pictures, tokenizer, None),
        "vae": c.flow_vae(16, blocks=7),
    }
    return longcat_parts() | parts


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
    height=32,
    width=32,
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
        "transformer": c.amplify(c.wake(model), ("to_v", "to_out", "time_mod_proj"), 4.0),
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
