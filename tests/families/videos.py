"""Other video models."""

from collections.abc import Callable

import diffusers as df
import transformers as tr
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


def leading_channels_of_frames(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """Where the frames come before the channels."""
    return (slice(None), slice(None), slice(output.shape[2]))


def free_tokens(count: int) -> Callable:
    """The part without the first `count` tokens, which hold what is given."""
    return lambda output, x: (slice(None), slice(count, None))


def first_picture(batch: int, negative: bool, **extra) -> dict:
    """A call with a picture per sample to begin with."""
    picture = c.per_sample(batch, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {"image": picture}


def whole_video(batch: int, negative: bool, argument: str, **extra) -> dict:
    """A call with nine frames per sample, as the argument of that name."""
    frames = c.per_sample(batch, 9, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {argument: frames}


def two_pictures(batch: int, negative: bool, **extra) -> dict:
    """The first frame is given as it is; what is to be at frame 8 precedes the tokens."""
    kind = df.pipelines.ltx.pipeline_ltx_condition.LTXVideoCondition
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
    prompt_template={"template": "draw {}", "crop_start": 1},
    **(TRUE_CFG | VIDEO),
)
def hunyuan_video() -> dict:
    """Two branches only with a negative prompt; the distilled guidance_scale is an input."""
    transformer = df.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=c.WIDTH,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    language_model = c.language_model(tr.LlamaModel, tr.LlamaConfig, c.llama_tokenizer(), 3)
    return {
        **c.texts(language_model, c.clip()),
        "vae": c.hunyuan_video_vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=7.0),
    }
