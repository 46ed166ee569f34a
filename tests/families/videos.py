"""Other video models."""

import diffusers as df
import transformers as tr

from .. import components as c
from .base import HEADS, TRANSFORMER, TRUE_CFG, VIDEO, family, flow


@family("ltx", "LTXPipeline", "batch: uncond cond", TRANSFORMER, **VIDEO)
def ltx() -> dict:
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
    }


@family(
    "cogvideox",
    "CogVideoXPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    **VIDEO,
)
def cogvideox() -> dict:
    """v-prediction with zero terminal signal: the first step has an infinite sigma / alpha."""
    transformer = df.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=c.WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
    )
    scheduler = df.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    return {
        **c.texts(c.t5()),
        "vae": c.cogvideox_vae(),
        "transformer": c.wake(transformer),
        "scheduler": scheduler,
    }


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
