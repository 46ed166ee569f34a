"""Videos by Stable Diffusion: AnimateDiff's motion modules, Stable Video Diffusion."""

import diffusers as df
import torch
import transformers as tr
from PIL import Image

from .. import components as c
from .base import PARTIAL, UNET, ddim, family
from .pag import PAG, perturbed
from .stable_diffusion import sd, sdxl

FRAMES = 5
GUIDED = ("batch: uncond cond", UNET)
CLIP = {"num_frames": FRAMES}


def video_call(batch: int, negative: bool, takes: tuple[str, ...] = ("video",), **extra) -> dict:
    """A call with one video per sample for each argument named."""
    shape = (batch, FRAMES, 3, 16, 16)
    videos = {
        name: list(c.per_sample(*shape, seed=600 + 100 * i, low=0.0))
        for i, name in enumerate(takes)
    }
    return c.text_call(batch, negative, **extra) | videos


def steered_call(batch: int, negative: bool, **extra) -> dict:
    """As many pictures as frames are one video; a video per sample is not to be had."""
    pictures = list(c.noise(FRAMES, 3, 16, 16, seed=700, low=0.0))
    return c.text_call(batch, negative, **extra) | {"conditioning_frames": pictures}


def animated(parts: dict, **config) -> dict:
    adapter = df.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        **config,
    )
    unused = ("safety_checker", "feature_extractor", "requires_safety_checker")
    kept = {name: part for name, part in parts.items() if name not in unused}
    return kept | {"motion_adapter": c.wake(adapter), "scheduler": ddim(beta_schedule="linear")}


@family("animatediff", "AnimateDiffPipeline", *GUIDED, **CLIP)
def animatediff() -> dict:
    """Channels before frames. Text has one row per frame, branches and samples outermost."""
    return animated(sd())


@family("animatediff_sdxl", "AnimateDiffSDXLPipeline", *GUIDED, **CLIP)
def animatediff_sdxl() -> dict:
    return animated(sdxl(), use_motion_mid_block=False)


@family(
    "animatediff_controlnet",
    "AnimateDiffControlNetPipeline",
    *GUIDED,
    steered_call,
    max_batch=1,
    **CLIP,
)
def animatediff_controlnet() -> dict:
    """The ControlNet sees every frame as a picture of its own."""
    return animatediff() | {"controlnet": c.controlnet()}


def sparse_call(batch: int, negative: bool, **extra) -> dict:
    pictures = (255 * c.noise(2, 16, 16, 3, seed=600, low=0.0)).byte()
    pictures = [Image.fromarray(picture.numpy()) for picture in pictures]
    sparse = {"conditioning_frames": pictures, "controlnet_frame_indices": [0, 3]}
    return c.text_call(batch, negative, **extra) | sparse


@family(
    "animatediff_sparse_controlnet",
    "AnimateDiffSparseControlNetPipeline",
    *GUIDED,
    sparse_call,
    **CLIP,
)
def animatediff_sparse_controlnet() -> dict:
    """A few frames given, the same for all samples."""
    controlnet = df.SparseControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        conditioning_channels=3,
        conditioning_embedding_out_channels=(8, 16),
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
        use_simplified_condition_embedding=False,
    )
    return animatediff() | {"controlnet": c.wake(controlnet)}


family(
    "animatediff_video2video",
    "AnimateDiffVideoToVideoPipeline",
    *GUIDED,
    video_call,
    first_step=1,
    **PARTIAL,
)(animatediff)
family(
    "animatediff_video2video_controlnet",
    "AnimateDiffVideoToVideoControlNetPipeline",
    *GUIDED,
    video_call,
    takes=("video", "conditioning_frames"),
    first_step=1,
    **PARTIAL,
)(animatediff_controlnet)


@family(
    "animatediff_pag",
    "AnimateDiffPAGPipeline",
    "batch: uncond cond perturbed",
    UNET,
    **CLIP,
    **PAG,
)
def animatediff_pag() -> dict:
    parts = perturbed(animatediff())
    return parts | {"pag_applied_layers": "mid_block.attentions"}


def svd_call(batch: int, negative: bool, **extra) -> dict:
    call = c.picture_call(batch, negative, prompt=None, guidance_scale=None, **CLIP, **extra)
    return call | {"max_guidance_scale": 5.0}


def per_frame(scale: float) -> torch.Tensor:
    """From the pipeline's min_guidance_scale, one, at the first frame."""
    return torch.linspace(1.0, scale, FRAMES).view(FRAMES, 1, 1, 1)


@family(
    "svd",
    "StableVideoDiffusionPipeline",
    *GUIDED,
    svd_call,
    scale_name="max_guidance_scale",
    negative=False,
    w=per_frame,
    part=lambda output, x: (slice(None), slice(None), slice(output.shape[2])),
)
def svd() -> dict:
    """Frames before channels, a scale for each frame, a picture in place of a prompt."""
    unet = df.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        num_frames=FRAMES,
    )
    vae = df.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    )
    scheduler = df.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    return {
        "vae": vae.eval(),
        "image_encoder": c.clip_vision(),
        "unet": c.condition_loudly(c.wake(unet)),
        "scheduler": scheduler,
        "feature_extractor": tr.CLIPImageProcessor(),
    }
