"""LTX-2: video and sound in one network, whose two outputs are guided and stepped side by side."""

from importlib import import_module

import diffusers as df
from torch import Tensor

from .. import components as c
from .base import HEADS, TRANSFORMER, VIDEO, family, flow
from .videos import free_tokens

CFG_ONLY = {
    **VIDEO,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
}
BOTH = {
    **CFG_ONLY,
    "audio_guidance_scale": 3.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
}
MORE = {
    "stg_scale": 1.0,
    "modality_scale": 3.0,
    "audio_stg_scale": 0.5,  # zero would mean the video's
    "audio_modality_scale": 2.0,
    "spatio_temporal_guidance_blocks": [1],
}
FRAME, ALL = 64, 192  # tokens


def of_ltx2(path: str) -> type:
    """A class that diffusers has next to the pipelines; not all its versions have all of them."""
    module, name = path.split(".")
    return getattr(import_module(f"diffusers.pipelines.ltx2.{module}"), name)


def all_guidances(branches: dict[str, Tensor], call: dict) -> tuple[Tensor, float]:
    """Away from no text, from attention that looks nowhere, and from the other modality unheard."""
    scales = {
        "uncond": call["guidance_scale"] - 1,
        "skipped": call["stg_scale"],
        "isolated": call["modality_scale"] - 1,
    }
    cond = branches["cond"]
    mixed = cond + sum(scale * (cond - branches[name]) for name, scale in scales.items())
    return mixed, 1 + sum(scales.values())


def later_frames(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """All frames but the first, which is given, and not what is appended to the video."""
    return (slice(None), slice(FRAME, ALL))


def picture_as_it_is(batch: int, negative: bool, **extra) -> dict:
    """A call with a picture per sample to begin with, not compressed first."""
    picture = c.per_sample(batch, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {"image": picture, "image_crf": 0}


def frames_call(batch: int, negative: bool, **extra) -> dict:
    """The first and the last latent frame are given, the same for all samples."""
    kind = of_ltx2("pipeline_ltx2_condition.LTX2VideoCondition")
    pictures = [255 * c.noise(1, 3, 32, 32, seed=seed, low=0.0) for seed in (100, 200)]
    given = [kind(frames=picture, index=2 * i, crf=0) for i, picture in enumerate(pictures)]
    return c.text_call(batch, negative, **extra) | {"conditions": given}


def reference_call(batch: int, negative: bool, kind: str, frames: bool = False, **extra) -> dict:
    """A video, the same for all samples, is appended to the tokens."""
    call = frames_call if frames else c.text_call
    reference = of_ltx2(kind)(frames=c.noise(1, 9, 3, 32, 32, seed=300, low=0.0))
    return call(batch, negative, **extra) | {"reference_conditions": [reference]}


def refine_call(batch: int, negative: bool, **extra) -> dict:
    """A video with its sound and its keyframes, as the pass before gives them."""
    return c.text_call(batch, negative, **extra) | {
        "latents": c.per_sample(batch, 4, 3, 8, 8),
        "keyframes_latents": c.per_sample(batch, 4, 2, 8, 8, seed=200),
        "keyframe_positions": [4, 8],
        "audio_latents": c.per_sample(batch, 2, 9, 2, seed=300),
    }


@family(
    "ltx2",
    "LTX2Pipeline",
    "batch: uncond cond",
    TRANSFORMER,
    **BOTH,
)
def ltx2(**parts) -> dict:
    transformer = df.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=c.WIDTH,
        rope_double_precision=False,
        rope_type="split",
        perturbed_attn=True,
        **parts.pop("network", {}),
    )
    connectors = of_ltx2("connectors.LTX2TextConnectors")(
        caption_channels=c.WIDTH,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    return {
        **c.texts(c.gemma3()),
        "vae": c.ltx2_vae(),
        "audio_vae": c.ltx2_audio_vae(),
        "connectors": connectors.eval(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "vocoder": None,
        "scheduler": flow(),
        **parts,
    }


@family(
    "ltx2_all_guidances",
    "LTX2Pipeline",
    "batch: uncond cond | skipped | isolated",
    TRANSFORMER,
    mix=all_guidances,
    **(BOTH | MORE),
)
def ltx2_all_guidances() -> dict:
    """One call for two branches, then one for each of the others, without negative prompts."""
    return ltx2()


@family(
    "ltx2_image",
    "LTX2ImageToVideoPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=picture_as_it_is,
    part=free_tokens(FRAME),
    **BOTH,
)
def ltx2_image() -> dict:
    """The scheduler sees all frames but the first, unpacked, and the sound packed."""
    return ltx2()


@family(
    "ltx2_condition",
    "LTX2ConditionPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=frames_call,
    part=later_frames,
    **BOTH,
)
def ltx2_condition() -> dict:
    """What is given is mixed into the guided denoised video, then turned back to a velocity."""
    return ltx2()


@family(
    "ltx2_in_context",
    "LTX2InContextPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=reference_call,
    kind="pipeline_ltx2_ic_lora.LTX2ReferenceCondition",
    frames=True,
    part=later_frames,
    **BOTH,
)
def ltx2_in_context() -> dict:
    return ltx2()


@family(
    "ltx2_hdr",
    "LTX2HDRPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    call=reference_call,
    kind="pipeline_ltx2_hdr_lora.LTX2HDRReferenceCondition",
    part=lambda output, x: (slice(None), slice(ALL)),
    **CFG_ONLY,
)
def ltx2_hdr() -> dict:
    """Its sound stays noise: the network hears it, the scheduler steps it with zeros."""
    return ltx2()


@family(
    "ltx2_dfr",
    "LTX2DFRPipeline",
    "one",
    TRANSFORMER,
    negative=False,
    sigmas=[1.0, 0.7, 0.4],
    num_inference_steps=None,
    guidance_scale=None,
    **VIDEO,
)
def ltx2_dfr(**parts) -> dict:
    """Hands the scheduler a velocity that it makes of the denoised video, not the network's."""
    return ltx2(network={"use_keyframes_abs_pos_embedding": True}, **parts)


@family(
    "ltx2_dfr_refine",
    "LTX2DFRTemporalRefinePipeline",
    "one",
    TRANSFORMER,
    call=refine_call,
    negative=False,
    sigmas=[0.7, 0.4],
    num_inference_steps=None,
    guidance_scale=None,
    **VIDEO,
)
def ltx2_dfr_refine() -> dict:
    """One loop for each piece of the video."""
    upsampler = of_ltx2("latent_upsampler.LTX2LatentUpsamplerModel")(
        in_channels=4,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=False,
        temporal_upsample=True,
    )
    return ltx2_dfr(
        temporal_latent_upsampler=upsampler.eval(),
        scheduler=df.LTXEulerAncestralRFScheduler(eta=0.5),
    )
