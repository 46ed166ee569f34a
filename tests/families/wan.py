"""Wan and what is built like it."""

import diffusers as df
import torch
import transformers as tr
from torch import Tensor

from .. import components as c
from .base import TRANSFORMER, VIDEO, family

FRAMES = VIDEO["num_frames"]
PAIR = ("transformer", "transformer_2")
CALLS = "calls: cond uncond"


def later_frames(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """Of the frames, the first is given: whatever is predicted for it, it stays as it is."""
    return (slice(None), slice(output.shape[1]), slice(1, None))


def two_scales(call: dict, timestep: float) -> float:
    """One scale for the noisy part, another for the clean part."""
    return call["guidance_scale" if timestep >= 875 else "guidance_scale_2"]


def image_call(batch: int, negative: bool, **extra) -> dict:
    """One picture for all samples: the pipelines repeat it."""
    return c.text_call(batch, negative, **extra) | {"image": c.noise(1, 3, 32, 32, low=0.0)}


def video_call(batch: int, negative: bool, frames: int = FRAMES, **extra) -> dict:
    """One video per sample."""
    video = c.per_sample(batch, frames, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {"video": video}


def single_call(batch: int, negative: bool, **extra) -> dict:
    """Of a pipeline that takes one text and one generator."""
    call = c.text_call(batch, negative, **extra)
    return call | {k: v[0] for k, v in call.items() if isinstance(v, list) and len(v) == batch == 1}


def animate_call(batch: int, negative: bool, **extra) -> dict:
    call = c.text_call(batch, negative, **extra)
    pictures = [c.photo(seed) for seed in range(2 * FRAMES + 1)]
    return call | {
        "image": pictures[0],
        "pose_video": pictures[1 : FRAMES + 1],
        "face_video": pictures[FRAMES + 1 :],
    }


@family("wan", "WanPipeline", CALLS, TRANSFORMER, **VIDEO)
def wan(**parts) -> dict:
    return {
        **c.texts(c.t5(umt5=True)),
        "vae": c.wan_vae(),
        "transformer": wan_transformer(0),
        "scheduler": unipc(),
        **parts,
    }


@family(
    "wan2",
    "WanPipeline",
    CALLS,
    PAIR,
    guidance_scale_2=3.0,
    scale_at=two_scales,
    **VIDEO,
)
def wan2() -> dict:
    """Wan 2.2: one network and one scale for the noisy part, others for the clean part."""
    return wan(transformer_2=wan_transformer(1), boundary_ratio=0.875)


@family("wan_ti2v", "WanPipeline", CALLS, TRANSFORMER, **VIDEO)
def wan_ti2v() -> dict:
    """Wan 2.2's smaller model: a timestep for every token."""
    return wan(expand_timesteps=True)


@family("wan_i2v", "WanImageToVideoPipeline", CALLS, TRANSFORMER, image_call, **VIDEO)
def wan_i2v() -> dict:
    """Wan 2.1: the picture is in further channels and, encoded, in the attention."""
    return wan(transformer=wan_transformer(0, in_channels=36, image_dim=16), **eyes())


@family(
    "wan2_i2v",
    "WanImageToVideoPipeline",
    CALLS,
    PAIR,
    image_call,
    guidance_scale_2=3.0,
    scale_at=two_scales,
    **VIDEO,
)
def wan2_i2v() -> dict:
    both = (wan_transformer(seed, in_channels=36) for seed in (0, 1))
    return wan(**dict(zip(PAIR, both, strict=True)), boundary_ratio=0.875)


@family(
    "wan_ti2v_i2v",
    "WanImageToVideoPipeline",
    CALLS,
    TRANSFORMER,
    image_call,
    part=later_frames,
    **VIDEO,
)
def wan_ti2v_i2v() -> dict:
    return wan(expand_timesteps=True)


@family(
    "wan_v2v",
    "WanVideoToVideoPipeline",
    CALLS,
    TRANSFORMER,
    video_call,
    first_step=1,
    **(VIDEO | {"num_frames": None, "num_inference_steps": 4}),
)
def wan_v2v() -> dict:
    return wan()


@family("wan_vace", "WanVACEPipeline", CALLS, TRANSFORMER, single_call, max_batch=1, **VIDEO)
def wan_vace() -> dict:
    return wan(
        transformer=wan_like(df.WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=96)
    )


@family(
    "wan_animate",
    "WanAnimatePipeline",
    CALLS,
    TRANSFORMER,
    animate_call,
    **(VIDEO | {"num_frames": None, "segment_frame_length": FRAMES}),
)
def wan_animate() -> dict:
    """Without the prompt it does without the face, too."""
    transformer = wan_like(
        df.WanAnimateTransformer3DModel,
        in_channels=36,
        latent_channels=16,
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return wan(transformer=transformer, **eyes())


@family("chrono_edit", "ChronoEditPipeline", CALLS, TRANSFORMER, image_call, **VIDEO)
def chrono_edit() -> dict:
    transformer = wan_like(df.ChronoEditTransformer3DModel, in_channels=36, image_dim=16)
    return wan(transformer=transformer, **eyes())


@family("lucy_edit", "LucyEditPipeline", CALLS, TRANSFORMER, video_call, **VIDEO)
def lucy_edit() -> dict:
    return wan(transformer=wan_transformer(0, in_channels=32), expand_timesteps=True)


@family("skyreels", "SkyReelsV2Pipeline", CALLS, TRANSFORMER, **VIDEO)
def skyreels(**parts) -> dict:
    return wan(transformer=skyreels_transformer(), scheduler=unipc(8.0)) | parts


@family("skyreels_i2v", "SkyReelsV2ImageToVideoPipeline", CALLS, TRANSFORMER, image_call, **VIDEO)
def skyreels_i2v() -> dict:
    return skyreels(transformer=skyreels_transformer(in_channels=36, image_dim=16), **eyes())


@family("skyreels_df", "SkyReelsV2DiffusionForcingPipeline", CALLS, TRANSFORMER, **VIDEO)
def skyreels_df() -> dict:
    """A noise level for every frame, here the same for all."""
    return skyreels()


def frame_levels(scheduler, index: int, kwargs: dict, prediction: Tensor, x: Tensor) -> Tensor:
    """x0 of frames that each have a timestep of their own."""
    distances = kwargs["timestep"][..., None].double() - scheduler.timesteps
    sigmas = scheduler.sigmas[distances.abs().argmin(-1)].double()
    return x - sigmas[:, None, -x.shape[2] :, None, None] * prediction


@family(
    "skyreels_df_one_by_one",
    "SkyReelsV2DiffusionForcingPipeline",
    CALLS,
    TRANSFORMER,
    ar_step=1,
    causal_block_size=1,
    x0=frame_levels,
    **VIDEO,
)
def skyreels_df_one_by_one() -> dict:
    """Each frame is one step behind the frame before it."""
    return skyreels_df()


@family(
    "skyreels_df_i2v",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    CALLS,
    TRANSFORMER,
    image_call,
    part=later_frames,
    max_batch=2,
    **VIDEO,
)
def skyreels_df_i2v() -> dict:
    """Half of the pictures' rows, rounded up, is written into the batch: one if there are two."""
    return skyreels_df()


@family(
    "skyreels_df_v2v",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    CALLS,
    TRANSFORMER,
    video_call,
    part=later_frames,
    frames=5,
    overlap_history=1,
    base_num_frames=FRAMES,
    **VIDEO,
)
def skyreels_df_v2v() -> dict:
    return skyreels_df()


@family(
    "any_flow",
    "AnyFlowPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    space="native",
    **VIDEO,
)
def any_flow() -> dict:
    """It predicts the mean velocity on the way to the next noise level."""
    return wan(
        transformer=wan_like(df.AnyFlowTransformer3DModel),
        scheduler=df.FlowMapEulerDiscreteScheduler(shift=5.0),
    )


@family(
    "any_flow_far",
    "AnyFlowFARPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    steps=lambda kwargs: not (kwargs["kv_cache_flag"] or {}).get("is_cache_step"),
    **VIDEO,
)
def any_flow_far() -> dict:
    """One chunk of frames after another, the finished ones in a cache."""
    return wan(
        transformer=wan_like(
            df.AnyFlowFARTransformer3DModel, full_chunk_limit=2, chunk_partition=(1, 2)
        ),
        scheduler=df.FlowMapEulerDiscreteScheduler(shift=5.0),
    )


@family(
    "helios",
    "HeliosPipeline",
    CALLS,
    TRANSFORMER,
    num_latent_frames_per_chunk=2,
    history_sizes=[4, 2, 1],
    **VIDEO,
)
def helios(**parts) -> dict:
    """Two chunks of frames, each denoised from noise with the earlier ones as its history."""
    scheduler = df.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    transformer = wan_like(df.HeliosTransformer3DModel, rope_dim=(4, 4, 4))
    return wan(transformer=transformer, scheduler=scheduler) | parts


def zero_star(branches: dict[str, Tensor], call: dict) -> tuple[Tensor, float]:
    """CFG-Zero*: away from the part of the conditional prediction that lies along the other."""
    cond, uncond = branches["cond"], branches["uncond"]
    dims = tuple(range(1, cond.ndim))
    share = (cond * uncond).sum(dims, keepdim=True) / (uncond**2).sum(dims, keepdim=True)
    w = call["guidance_scale"]
    return share * uncond + w * (cond - share * uncond), w


@family(
    "helios_pyramid",
    "HeliosPyramidPipeline",
    CALLS,
    TRANSFORMER,
    mix=zero_star,
    use_zero_init=False,
    pyramid_num_inference_steps_list=[2, 2],
    num_latent_frames_per_chunk=3,
    history_sizes=[4, 2, 1],
    **(VIDEO | {"num_inference_steps": None, "height": 64, "width": 64}),
)
def helios_pyramid() -> dict:
    """From coarse to fine: each stage goes to a picture with some noise, not to a clean one.

    The published gamma, 1/3, gives the noise between stages a singular covariance, whose Cholesky
    factor torch does not find on every machine.
    """
    scheduler = df.HeliosScheduler(
        stages=2, stage_range=[0, 0.5, 1], gamma=0.3, use_dynamic_shifting=True
    )
    return helios(scheduler=scheduler, is_cfg_zero_star=True)


def unipc(shift: float = 3.0) -> df.UniPCMultistepScheduler:
    return df.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def eyes() -> dict:
    """The encoder of the first picture."""
    return {
        "image_encoder": c.clip_vision(),
        "image_processor": tr.CLIPImageProcessor(crop_size=16, size=16),
    }


def wan_like(cls: type, seed: int = 0, **config) -> torch.nn.Module:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": c.WIDTH,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    if cls is not df.HeliosTransformer3DModel:
        sizes["rope_max_seq_len"] = 32
    return c.condition_loudly(c.wake(cls(**(sizes | config)), seed))


def wan_transformer(seed: int, **config) -> df.WanTransformer3DModel:
    return wan_like(df.WanTransformer3DModel, seed, **config)


def skyreels_transformer(**config) -> df.SkyReelsV2Transformer3DModel:
    return wan_like(df.SkyReelsV2Transformer3DModel, **config)
