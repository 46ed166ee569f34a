"""Wan and what is built like it."""

import diffusers as df

from .. import components as c
from .base import TRANSFORMER, VIDEO, family


def two_scales(call: dict, timestep: float) -> float:
    """One scale for the noisy part, another for the clean part."""
    return call["guidance_scale" if timestep >= 875 else "guidance_scale_2"]


@family("wan", "WanPipeline", "calls: cond uncond", TRANSFORMER, **VIDEO)
def wan(**parts) -> dict:
    return {
        **c.texts(c.t5(umt5=True)),
        "vae": c.wan_vae(),
        "transformer": wan_transformer(0),
        "scheduler": df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **parts,
    }


@family(
    "wan2",
    "WanPipeline",
    "calls: cond uncond",
    ("transformer", "transformer_2"),
    guidance_scale_2=3.0,
    scale_at=two_scales,
    **VIDEO,
)
def wan2() -> dict:
    """Wan 2.2: one network and one scale for the noisy part, others for the clean part."""
    return wan(transformer_2=wan_transformer(1), boundary_ratio=0.875)


def wan_transformer(seed: int) -> df.WanTransformer3DModel:
    transformer = df.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=c.WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return c.condition_loudly(c.wake(transformer, seed))
