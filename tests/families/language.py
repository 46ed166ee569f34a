"""Pictures from transformers whose prompts a language model reads."""

from functools import reduce
from types import SimpleNamespace

import diffusers as df
import numpy as np
import torch
import transformers as tr
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from diffusers.utils import is_torchvision_available
from tokenizers import processors

from .. import components as c
from .base import HEADS, JOINT_HEADS, SHORT, TRANSFORMER, UNET, family, flow
from .qwen import picture, seeing, settled


@family(
    "hidream",
    "HiDreamImagePipeline",
    "batch: uncond cond",
    TRANSFORMER,
    negated=True,
    settings={"default_sample_size": 8},
    **SHORT,
)
def hidream() -> dict:
    """Its Llama embeddings have layers in front of samples; every picture gets the default area."""
    transformer = df.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        caption_channels=[c.WIDTH, c.WIDTH],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
    )
    llama = c.language_model(tr.LlamaForCausalLM, tr.LlamaConfig, c.llama_tokenizer())
    return {
        "scheduler": df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": c.flow_vae(),
        **c.texts(c.clip(projection=True), c.clip(projection=True), c.t5(), llama),
        "transformer": c.wake(transformer),
    }


def quoted(batch: int) -> list[str]:
    """Prompts whose quoted parts have one length: their padding is not masked."""
    words = ("'red hen'", "'hen red'", "'her end'")
    return [words[i % 3] for i in range(batch)]


def glm_call(batch: int, negative: bool, **extra) -> dict:
    """The language model would draw the prior tokens of a whole batch from one seed."""
    tokens = c.per_sample(batch, 16, seed=700, low=0.0).mul(31).long()
    extra |= {"prompt": quoted(batch), "prior_token_ids": tokens}
    return c.text_call(batch, False, **extra)


@family(
    "glm_image",
    "GlmImagePipeline",
    "calls: cond uncond",
    TRANSFORMER,
    glm_call,
    negative=False,
    **SHORT,
)
def glm_image() -> dict:
    """Without its language model, whose picture of the prompt the call brings along."""
    transformer = df.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        text_embed_dim=c.WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return {
        **c.texts((c.t5()[0], tr.ByT5Tokenizer())),
        "processor": None,
        "vision_language_encoder": None,
        "vae": c.vae(**statistics),
        "transformer": c.wake(transformer),
        "scheduler": flow(use_dynamic_shifting=True, base_shift=0.25, time_shift_type="linear"),
    }


def glm_edit_call(batch: int, negative: bool, **extra) -> dict:
    tokens = list(c.per_sample(batch, 16, seed=800, low=0.0).mul(31).long())
    grid = torch.tensor([[1, 4, 4]])
    pictures = [[picture(400 + i, 16, 16)] for i in range(batch)]
    extra |= {"image": pictures, "prior_token_image_ids": tokens}  # read before the first step
    return glm_call(batch, negative, source_image_grid_thw=[grid] * batch, **extra)


family(
    "glm_image_edit",
    "GlmImagePipeline",
    "calls: cond uncond",
    TRANSFORMER,
    glm_edit_call,
    negative=False,
    steps=lambda arguments: bool(arguments["timestep"].any()),
    **SHORT,
)(glm_image)


@family("ernie_image", "ErnieImagePipeline", "batch: uncond cond", TRANSFORMER)
def ernie_image() -> dict:
    transformer = df.ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=c.WIDTH,
        rope_axes_dim=(8, 12, 12),
    )
    loud = ("text_proj", "to_v", "final_linear.weight")
    return {
        **c.texts(c.language_model(tr.MistralModel, tr.MistralConfig, c.llama_tokenizer())),
        "vae": df.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
        ).eval(),
        "transformer": c.amplify(c.wake(transformer), loud, 4.0),
        "scheduler": flow(shift=3.0),
    }


HUNYUAN = {"guidance_scale": None, "height": 64, "width": 64}
HUNYUAN_SETTINGS = {"tokenizer_max_length": 220, "tokenizer_2_max_length": 32}
HUNYUAN_SCALE = "distilled_guidance_scale"


def hunyuan_call(batch: int, negative: bool, **extra) -> dict:
    """With words between quotes, which a second encoder reads."""
    prompts = [p.replace("green hill", "'hill'") for p in c.cycle(c.PROMPTS, batch)]
    return c.text_call(batch, negative, prompt=prompts, distilled_guidance_scale=3.25, **extra)


def refiner_call(batch: int, negative: bool, **extra) -> dict:
    pictures = c.per_sample(batch, 3, 64, 64, low=0.0)
    return hunyuan_call(batch, negative, image=pictures, **extra) | {"height": 32, "width": 32}


def hunyuan_transformer(**config) -> df.HunyuanImageTransformer2DModel:
    sizes = {"in_channels": 4, "out_channels": 4, "patch_size": (1, 1), "rope_axes_dim": (4, 4)}
    transformer = df.HunyuanImageTransformer2DModel(
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=c.WIDTH,
        **(sizes | config),
    )
    return c.amplify(c.condition_loudly(c.wake(transformer)), ("norm_added_k",), 8.0)


def byte_t5() -> tuple:
    sizes = {"d_model": c.WIDTH, "d_kv": 8, "d_ff": c.WIDTH, "num_layers": 1, "num_heads": 2}
    encoder = tr.T5EncoderModel(tr.T5Config(vocab_size=384, **sizes))
    return encoder.eval(), tr.ByT5Tokenizer()


@family(
    "hunyuan_image",
    "HunyuanImagePipeline",
    "calls: cond uncond",
    TRANSFORMER,
    hunyuan_call,
    scale_name="ocr_guider.guidance_scale",
    settings=HUNYUAN_SETTINGS,
    **{"ocr_guider.guidance_scale": 3.5},
    **HUNYUAN,
)
def hunyuan_image(**parts) -> dict:
    """A guider of diffusers makes its branches and mixes them, at a scale of its own.

    One of two guiders, for the whole batch: the second where any of its prompts has quoted words.
    """
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    vae = df.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        sample_size=64,
    )
    return {
        "scheduler": flow(shift=5.0),
        "vae": vae.eval(),
        **c.texts((c.qwen_vl(), c.qwen_tokenizer()), byte_t5()),
        "transformer": hunyuan_transformer(text_embed_2_dim=c.WIDTH),
        "guider": AdaptiveProjectedMixGuidance(guidance_scale=3.5),
        "ocr_guider": AdaptiveProjectedMixGuidance(guidance_scale=3.5),
    } | parts


@family(
    "hunyuan_image_distilled",
    "HunyuanImagePipeline",
    "one",
    TRANSFORMER,
    hunyuan_call,
    scale_name=HUNYUAN_SCALE,
    settings=HUNYUAN_SETTINGS,
    **HUNYUAN,
)
def hunyuan_image_distilled() -> dict:
    options = {"guidance_embeds": True, "use_meanflow": True}
    transformer = hunyuan_transformer(text_embed_2_dim=c.WIDTH, **options)
    return hunyuan_image(transformer=transformer, guider=None, ocr_guider=None)


@family(
    "hunyuan_image_refiner",
    "HunyuanImageRefinerPipeline",
    "one",
    TRANSFORMER,
    refiner_call,
    scale_name=HUNYUAN_SCALE,
    settings={"tokenizer_max_length": 220},
    **HUNYUAN,
)
def hunyuan_image_refiner() -> dict:
    vae = df.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    sizes = {"in_channels": 16, "out_channels": 8, "rope_axes_dim": (2, 2, 4)}
    return {
        "scheduler": flow(shift=4.0),
        "vae": vae.eval(),
        **c.texts((c.qwen_vl(), c.qwen_tokenizer())),
        "transformer": hunyuan_transformer(patch_size=(1, 1, 1), guidance_embeds=True, **sizes),
    }


def qwen3_vl(layers: int = 2) -> tr.Qwen3VLForConditionalGeneration:
    text = {
        "vocab_size": c.VOCAB,
        "hidden_size": c.WIDTH,
        "intermediate_size": c.WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e4},
        "initializer_range": 0.2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": c.WIDTH,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = tr.Qwen3VLConfig(text_config=text, vision_config=vision)
    return tr.Qwen3VLForConditionalGeneration(config).eval()


@family(
    "nucleus",
    "NucleusMoEImagePipeline",
    "calls: cond uncond",
    TRANSFORMER,
    height=32,
    width=32,
    max_sequence_length=512,
    return_index=-1,
    negated=True,
    norm_matched=True,
)
def nucleus() -> dict:
    """Each expert chooses among the tokens of one sample; norms as in Qwen-Image."""
    transformer = df.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=c.WIDTH,
        axes_dims_rope=(8, 4, 4),
        mlp_ratio=8.0,
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for block in (b for b in transformer.transformer_blocks if b.moe_enabled):
        for weight in block.img_mlp.experts.parameters():  # uninitialised memory
            torch.nn.init.normal_(weight, std=0.2)
    parts = seeing(qwen3_vl(), tr.Qwen3VLProcessor)
    return {
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": flow(use_dynamic_shifting=True),
        "vae": c.qwen_vae(),
        "text_encoder": parts["text_encoder"],
        "processor": parts["processor"],
    }


def level_call(batch: int, negative: bool, **extra) -> dict:
    """Prompts of one length: for networks that make something of the padding."""
    prompts = (
        "a red cat on a green hill",
        "a green cat on a red hill",
        "a red hill on a green cat",
    )
    call = c.text_call(batch, False, prompt=c.cycle(prompts, batch), **extra)
    unwanted = ("too dark blurry text", "too blurry dark text", "text too dark blurry")
    return call | ({"negative_prompt": c.cycle(unwanted, batch)} if negative else {})


def qwen_21_edit_call(batch: int, negative: bool, **extra) -> dict:
    pictures = [picture(401, 64, 64), picture(402, 64, 64)]
    return level_call(batch, negative, image=pictures, **extra)


QWEN_21 = {
    "whole": True,
    "scale_name": "true_cfg_scale",
    "part": lambda output, x: (slice(None), slice(-16, None)),
    "true_cfg_scale": 4.0,
    "guidance_scale": None,
    "height": 64,
    "width": 64,
    "output_resolution": 64,
}


@family(
    "qwen_image_21",
    "QwenImage21Pipeline",
    "calls: cond uncond",
    TRANSFORMER,
    level_call,
    **QWEN_21,
)
def qwen_image_21() -> dict:
    """The first step fills a cache for each branch, the later ones read it; no norm is matched.

    The picture's tokens come last, after those of the text in what the first step returns.
    """
    transformer = df.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **JOINT_HEADS,
        context_in_dim=c.WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    loud = ("to_v", "to_out.0.weight", "proj_out")
    vae = df.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        is_residual=False,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    parts = seeing(qwen3_vl(), tr.Qwen3VLProcessor)
    tokenizer = parts.pop("tokenizer")
    nothing = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = nothing
    return {
        **parts,
        "transformer": c.amplify(c.amplify(c.wake(transformer), loud, 4.0), ("norm_k",), 8.0),
        "vae": vae.eval(),
        "scheduler": flow(use_dynamic_shifting=True, shift_terminal=0.02),
    }


family(
    "qwen_image_21_edit",
    "QwenImage21Pipeline",
    "calls: cond uncond",
    TRANSFORMER,
    qwen_21_edit_call,
    **QWEN_21,
)(qwen_image_21)


def coarse_wan_vae() -> df.AutoencoderKLWan:
    """Eight latents a side of the million pixels to which every picture is brought."""
    model = df.AutoencoderKLWan(
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=0,
        temperal_downsample=[False] * 4,
        patch_size=8,
        in_channels=3 * 8 * 8,
        out_channels=3 * 8 * 8,
        scale_factor_spatial=128,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return c.amplify(model.eval(), ("weight",), 2.0)


def joy_call(batch: int, negative: bool, **extra) -> dict:
    return level_call(batch, negative, image=joy_pictures(batch), **extra)


def joy_pictures(batch: int) -> list:
    return [picture(400 + i, 32, 32) for i in range(batch)]


JOY = {"height": 1024, "width": 1024, "max_sequence_length": 512}
JOY_GUIDES = {"norm_matched": True, "norm_axis": 2}


@family(
    "joy_image_edit",
    "JoyImageEditPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    joy_call,
    part=lambda output, x: (slice(None), slice(-1, None)),
    **JOY,
    **JOY_GUIDES,
)
def joy_image_edit(transformer: type = df.JoyImageEditTransformer3DModel) -> dict:
    """The picture comes after the one it is made from, which every step puts back."""
    network = transformer(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=c.WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    loud = ("txt_attn_qkv.weight", "img_attn_proj.weight")
    return {
        "transformer": c.amplify(c.amplify(c.wake(network), loud, 4.0), ("txt_attn_k_norm",), 8.0),
        "scheduler": flow(shift=4.0),
        "vae": settled(coarse_wan_vae()),
        **seeing(qwen3_vl(), tr.Qwen3VLProcessor),
    }


def joy_plus_call(batch: int, negative: bool, **extra) -> dict:
    """One picture for every other sample, two for the rest and for the first."""
    pictures = [[p] * (2 - i % 2) for i, p in enumerate(joy_pictures(batch))]
    return c.text_call(batch, negative, images=pictures, **extra)


@family(
    "joy_image_edit_plus",
    "JoyImageEditPlusPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    joy_plus_call,
    **JOY,
    **JOY_GUIDES,
)
def joy_image_edit_plus() -> dict:
    """Patches of the picture, of those it is made from, and padding: guided and returned alike."""
    return joy_image_edit(df.JoyImageEditPlusTransformer3DModel)


def left_half(output, x) -> tuple[slice, ...]:
    return (slice(None), slice(None), slice(None), slice(x.shape[3] // 2))


def one_prompt(batch: int, negative: bool, **extra) -> dict:
    call = c.text_call(batch, negative, **extra)
    texts = {"prompt", "negative_prompt"}
    return call | {name: value[0] for name, value in call.items() if name in texts}


def dreamlite_edit_call(batch: int, negative: bool, **extra) -> dict:
    extra |= {"image": picture(400, 16, 16), "image_guidance_scale": 1.5}
    return one_prompt(batch, negative, **extra)


def dreamlite_mix(branches: dict, call: dict):
    uncond, image = branches["uncond"], branches["image"]
    text, picture = call["guidance_scale"], call["image_guidance_scale"]
    mixed = uncond + text * (branches["cond"] - image) + picture * (image - uncond)
    return mixed, text


DREAMLITE = {"max_batch": 1, "part": left_half}


@family("dreamlite", "DreamLitePipeline", "batch: uncond cond", UNET, one_prompt, **DREAMLITE)
def dreamlite() -> dict:
    """Beside the picture lies the one it is made from, or zeros, along the width."""
    unet = df.DreamLiteUNetModel(
        sample_size=8,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(8, 16),
        cross_attention_dim=c.WIDTH,
        attention_head_dim=2,
        layers_per_block=1,
        norm_num_groups=4,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
    )
    vae = df.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return {
        **seeing(qwen3_vl(), tr.Qwen3VLProcessor),
        "vae": vae.eval(),
        "unet": c.condition_loudly(c.wake(unet)),
        "scheduler": flow(use_dynamic_shifting=True),
    }


family(
    "dreamlite_edit",
    "DreamLitePipeline",
    "batch: uncond image cond",
    UNET,
    dreamlite_edit_call,
    mix=dreamlite_mix,
    **DREAMLITE,
)(dreamlite)

family(
    "dreamlite_mobile",
    "DreamLiteMobilePipeline",
    "one",
    UNET,
    one_prompt,
    negative=False,
    **DREAMLITE,
)(dreamlite)


def omnigen_mix(branches: dict, call: dict):
    uncond, image = branches["uncond"], branches["image"]
    text, picture = call["guidance_scale"], call["img_guidance_scale"]
    return uncond + picture * (image - uncond) + text * (branches["cond"] - image), text


def level_tokens(batch: int) -> list[str]:
    """All rows are given the positions of the first, those of a text of its length."""
    prompts = ("red hill, green cat", "green cat, red hill", "a green cat on a red hill")
    return c.cycle(prompts, batch)


def omnigen_call(batch: int, negative: bool, **extra) -> dict:
    return c.text_call(batch, False, prompt=level_tokens(batch), **extra)


def omnigen_edit_call(batch: int, negative: bool, **extra) -> dict:
    prompts = [f"<img><|image_1|></img> {prompt}" for prompt in level_tokens(batch)]
    pictures = [[picture(400 + i, 32, 32)] for i in range(batch)]
    extra |= {"input_images": pictures, "img_guidance_scale": 1.6}
    return c.text_call(batch, False, prompt=prompts, **extra)


def omnigen() -> dict:
    """The network reads prompts itself; the pictures it is given are not in rows of the batch."""
    transformer = df.OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=2,
        vocab_size=c.VOCAB,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        time_step_dim=16,
    )
    vae = c.vae(blocks=4, scaling_factor=0.001)
    with torch.no_grad():  # as `settled`: it draws from the posterior without a generator
        vae.quant_conv.weight[:4] *= 1000.0
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[:4], vae.quant_conv.bias[4:] = 1000.0, -30.0
    return {
        "transformer": c.wake(transformer),
        "scheduler": flow(invert_sigmas=True, num_train_timesteps=1),
        "vae": vae,
        "tokenizer": c.llama_tokenizer(),
    }


OMNIGEN = {"negative": False, "height": 64, "width": 64, "whole": True}
if not is_torchvision_available():
    # Its pipeline prepares pictures with torchvision and cannot be built without: the same by hand.
    processor_omnigen.transforms = SimpleNamespace(
        Compose=lambda steps: lambda picture: reduce(lambda p, step: step(p), steps, picture),
        Lambda=lambda function: function,
        ToTensor=lambda: lambda picture: torch.tensor(np.asarray(picture)).movedim(2, 0) / 255,
        Normalize=lambda mean, std, inplace: lambda picture: (picture - mean[0]) / std[0],
    )
    pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
family(
    "omnigen",
    "OmniGenPipeline",
    "batch: cond uncond",
    TRANSFORMER,
    omnigen_call,
    **OMNIGEN,
)(omnigen)
family(
    "omnigen_edit",
    "OmniGenPipeline",
    "batch: cond uncond image",
    TRANSFORMER,
    omnigen_edit_call,
    mix=omnigen_mix,
    **OMNIGEN,
)(omnigen)
