"""Other video models."""

from collections.abc import Callable
from importlib import import_module

import diffusers as df
import torch
import transformers as tr
from PIL import Image
from torch import Tensor

from .. import components as c
from .base import HEADS, PARTIAL, TRANSFORMER, TRUE_CFG, VIDEO, family, flow

CLIP = {name: value for name, value in VIDEO.items() if name != "num_frames"}
COGVIDEOX_NOISE = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}


LOUD = ("add_v_proj", "to_out.0.weight")
HUNYUAN = TRUE_CFG | VIDEO | {"prompt_template": {"template": "draw {}", "crop_start": 1}}
HUNYUAN15 = {**VIDEO, "guidance_scale": None, "max_sequence_length": None}
HUNYUAN_NETWORK = {
    "out_channels": 4,
    **HEADS,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": c.WIDTH,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (2, 2, 4),
}


def leading_channels_of_frames(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """Where the frames come before the channels."""
    return (slice(None), slice(None), slice(output.shape[2]))


def later_frames(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    return (slice(None), slice(None), slice(1, None))


def free_tokens(count: int) -> Callable:
    """The part without the first `count` tokens, which hold what is given."""
    return lambda output, x: (slice(None), slice(count, None))


def first_picture(batch: int, negative: bool, **extra) -> dict:
    """A call with a picture per sample to begin with."""
    picture = c.per_sample(batch, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {"image": picture}


def hunyuan_embeds_call(batch: int, negative: bool, **extra) -> dict:
    """Texts as embeddings, some padded."""
    call = first_picture(batch, False, prompt=None, **extra)
    mask = torch.ones(batch, 12)
    mask[1:, 9:] = 0
    for i, prefix in enumerate(("", "negative_") if negative else ("",)):
        call |= {
            f"{prefix}prompt_embeds": c.per_sample(batch, 12, c.WIDTH, seed=500 + 10 * i),
            f"{prefix}prompt_attention_mask": mask,
            f"{prefix}pooled_prompt_embeds": c.per_sample(batch, 16, seed=600 + 10 * i),
        }
    return call


def hunyuan15_call(batch: int, negative: bool, picture: bool = False, **extra) -> dict:
    """Texts as embeddings, some padded; without negative ones, zeros stand for no text."""
    call = c.text_call(batch, False, prompt=None, **extra)
    mask = torch.ones(batch, 12)
    mask[1:, 9:] = 0
    for i, prefix in enumerate(("", "negative_")):
        for suffix, seed in (("", 500), ("_2", 600)):
            embeds = c.per_sample(batch, 12, c.WIDTH, seed=seed + 10 * i)
            embeds = embeds if negative or not prefix else torch.zeros_like(embeds)
            call |= {
                f"{prefix}prompt_embeds{suffix}": embeds,
                f"{prefix}prompt_embeds_mask{suffix}": mask,
            }
    if picture:
        pixels = (255 * c.noise(32, 32, 3, low=0.0)).byte().numpy()
        call["image"] = Image.fromarray(pixels)
    return call


def whole_video(batch: int, negative: bool, argument: str, **extra) -> dict:
    """A call with nine frames per sample, as the argument of that name."""
    frames = c.per_sample(batch, 9, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {argument: frames}


def two_pictures(batch: int, negative: bool, **extra) -> dict:
    """The first frame is given as it is; what is to be at frame 8 precedes the tokens."""
    kind = import_module("diffusers.pipelines.ltx.pipeline_ltx_condition").LTXVideoCondition
    pictures = [c.per_sample(batch, 3, 32, 32, seed=seed, low=0.0) for seed in (100, 200)]
    given = [kind(image=picture, frame_index=8 * i) for i, picture in enumerate(pictures)]
    return c.text_call(batch, negative, **extra) | {"conditions": given}


def prompts_in_turn(batch: int, negative: bool, **extra) -> dict:
    """One sample, whose windows have a prompt each."""
    assert batch == 1, "the pipeline makes one video"
    call = c.text_call(2, False, **extra) | {"generator": c.generators(1)}
    return call | ({"negative_prompt": c.NEGATIVES[0]} if negative else {})


@family("ltx", "LTXPipeline", "batch: uncond cond", TRANSFORMER, **VIDEO)
def ltx(**parts) -> dict:
    transformer = df.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        **HEADS,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=c.WIDTH,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.ltx_vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": flow(use_dynamic_shifting=True, shift_terminal=0.1),
        **parts,
    }


@family(
    "ltx_image",
    "LTXImageToVideoPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=first_picture,
    part=free_tokens(64),
    **VIDEO,
)
def ltx_image() -> dict:
    """The network sees tokens with a time each, the scheduler all frames but the first."""
    return ltx()


@family(
    "ltx_condition",
    "LTXConditionPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=two_pictures,
    part=free_tokens(128),
    **VIDEO,
)
def ltx_condition() -> dict:
    """Hands the scheduler the negated output with a time per token: steps up, not down.

    Not `negated`: both signs together make it the usual step.
    """
    return ltx(scheduler=flow())


@family(
    "ltx_long",
    "LTXI2VLongMultiPromptPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=prompts_in_turn,
    max_batch=1,
    temporal_tile_size=16,
    temporal_overlap=8,
    **(VIDEO | {"num_frames": 17}),
)
def ltx_long() -> dict:
    """Two windows with a loop each, which skips the last timestep.

    The second sees the last frames of the first behind its own.
    """
    return ltx(scheduler=df.LTXEulerAncestralRFScheduler())


@family("cogvideox", "CogVideoXPipeline", "batch: uncond cond", TRANSFORMER, **VIDEO)
def cogvideox(channels: int = 4, **parts) -> dict:
    """v-prediction with zero terminal signal: the first step has an infinite sigma / alpha."""
    transformer = df.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=c.WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.cogvideox_vae(),
        "transformer": c.wake(transformer),
        "scheduler": df.CogVideoXDDIMScheduler(**COGVIDEOX_NOISE),
        **parts,
    }


@family(
    "cogvideox_image",
    "CogVideoXImageToVideoPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=first_picture,
    part=leading_channels_of_frames,
    **VIDEO,
)
def cogvideox_image() -> dict:
    return cogvideox(channels=8)


@family(
    "cogvideox_video",
    "CogVideoXVideoToVideoPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=whole_video,
    argument="video",
    first_step=1,
    **(CLIP | PARTIAL),
)
def cogvideox_video() -> dict:
    """Steps with CogVideoX's own DPM solver, which hands the last denoised video to the next."""
    return cogvideox(scheduler=df.CogVideoXDPMScheduler(**COGVIDEOX_NOISE))


@family(
    "cogvideox_control",
    "CogVideoXFunControlPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=whole_video,
    argument="control_video",
    part=leading_channels_of_frames,
    **CLIP,
)
def cogvideox_control() -> dict:
    return cogvideox(channels=8)


@family("mochi", "MochiPipeline", "batch: uncond cond", TRANSFORMER, **(VIDEO | {"num_frames": 7}))
def mochi() -> dict:
    """Its scheduler's sigma is the share of the picture, not of the noise."""
    transformer = df.MochiTransformer3DModel(
        **HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=c.WIDTH,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.mochi_vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(invert_sigmas=True),
    }


@family(
    "hunyuan_video",
    "HunyuanVideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    scale_name="true_cfg_scale",
    **HUNYUAN,
)
def hunyuan_video(channels: int = 4, **parts) -> dict:
    """Two branches only with a negative prompt; the distilled guidance_scale is an input."""
    return {
        **hunyuan_texts(),
        "vae": c.hunyuan_video_vae(),
        "transformer": c.wake(
            df.HunyuanVideoTransformer3DModel(in_channels=channels, **HUNYUAN_NETWORK)
        ),
        "scheduler": flow(shift=7.0),
        **parts,
    }


def hunyuan_texts() -> dict:
    llama = c.language_model(tr.LlamaModel, tr.LlamaConfig, c.llama_tokenizer(), 3)
    return c.texts(llama, c.clip())


@family(
    "hunyuan_skyreels",
    "HunyuanSkyreelsImageToVideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=first_picture,
    scale_name="true_cfg_scale",
    **HUNYUAN,
)
def hunyuan_skyreels() -> dict:
    return hunyuan_video(channels=8)


@family(
    "hunyuan_image_to_video",
    "HunyuanVideoImageToVideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=hunyuan_embeds_call,
    scale_name="true_cfg_scale",
    **(TRUE_CFG | VIDEO),
)
def hunyuan_image_to_video(**parts) -> dict:
    """The picture is more channels of the input; what it returns lacks the first frame.

    Texts as embeddings: it encodes negative prompts together with one black picture for all.
    """
    network = HUNYUAN_NETWORK | {"image_condition_type": "latent_concat"}
    transformer = df.HunyuanVideoTransformer3DModel(in_channels=9, **network)
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts = {"transformer": c.wake(transformer), "image_processor": None, **encoders, **parts}
    return hunyuan_video(**parts)


@family(
    "hunyuan_image_as_tokens",
    "HunyuanVideoImageToVideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=hunyuan_embeds_call,
    part=later_frames,
    scale_name="true_cfg_scale",
    **(TRUE_CFG | VIDEO),
)
def hunyuan_image_as_tokens() -> dict:
    """The picture is the first frame of the input, which is not stepped."""
    network = HUNYUAN_NETWORK | {"image_condition_type": "token_replace"}
    transformer = df.HunyuanVideoTransformer3DModel(in_channels=4, **network)
    return hunyuan_image_to_video(transformer=c.wake(transformer))


@family(
    "framepack",
    "HunyuanVideoFramepackPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=first_picture,
    scale_name="true_cfg_scale",
    latent_window_size=2,
    **(HUNYUAN | {"num_frames": 7, "output_type": "pt"}),
)
def framepack() -> dict:
    """Two loops, the last frames first; decoded, as its latents come as lists of all so far."""
    network = HUNYUAN_NETWORK | {"patch_size": 2}
    transformer = df.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True, **network
    )
    encoder, processor = c.siglip()
    parts = {"image_encoder": encoder, "feature_extractor": processor}
    return hunyuan_video(transformer=c.amplify(c.wake(transformer), LOUD, 6.0), **parts)


@family(
    "hunyuan15",
    "HunyuanVideo15Pipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=hunyuan15_call,
    scale_name="guider.guidance_scale",
    **HUNYUAN15,
)
def hunyuan15(**parts) -> dict:
    """Its guider evaluates and mixes the branches. Texts as embeddings: 1256 tokens otherwise."""
    transformer = df.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        **HEADS,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=c.WIDTH,
        text_embed_2_dim=c.WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        target_size=32,
    )
    return {
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        "vae": c.hunyuan15_vae(),
        "transformer": c.amplify(c.wake(transformer), LOUD, 6.0),
        "scheduler": flow(shift=7.0),
        "guider": df.ClassifierFreeGuidance(guidance_scale=5.0),
        **parts,
    }


@family(
    "hunyuan15_image",
    "HunyuanVideo15ImageToVideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=hunyuan15_call,
    picture=True,
    scale_name="guider.guidance_scale",
    **(HUNYUAN15 | {"height": None, "width": None}),
)
def hunyuan15_image() -> dict:
    """One picture for all samples."""
    encoder, processor = c.siglip()
    return hunyuan15(image_encoder=encoder, feature_extractor=processor)


@family(
    "motif_video",
    "MotifVideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    scale_name="guider.guidance_scale",
    guidance_scale=None,
    **VIDEO,
)
def motif_video(**parts) -> dict:
    transformer = df.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        patch_size_t=1,
        qk_norm="rms_norm",
        text_embed_dim=c.WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    text = tr.T5Gemma2TextConfig(
        vocab_size=c.VOCAB,
        hidden_size=c.WIDTH,
        intermediate_size=c.WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        dropout_rate=0.0,
    )
    vision = tr.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    encoder = tr.T5Gemma2Encoder(tr.T5Gemma2EncoderConfig(text_config=text, vision_config=vision))
    return {
        **c.texts((encoder.eval(), c.gemma_tokenizer())),
        "vae": c.wan_vae(),
        "transformer": c.amplify(c.wake(transformer), LOUD, 6.0),
        "scheduler": flow(shift=7.0),
        "guider": df.ClassifierFreeGuidance(guidance_scale=5.0),
        "feature_extractor": None,
        **parts,
    }


@family(
    "motif_video_image",
    "MotifVideoImage2VideoPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    call=first_picture,
    scale_name="guider.guidance_scale",
    guidance_scale=None,
    max_batch=1,
    **VIDEO,
)
def motif_video_image() -> dict:
    return motif_video(feature_extractor=c.siglip()[1])
