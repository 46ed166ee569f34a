"""Flux and what is built like it."""

import diffusers as df

from .. import components as c
from .base import JOINT_HEADS, SHORT, TRANSFORMER, TRUE_CFG, family, flow


@family(
    "flux",
    "FluxPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    scale_name="true_cfg_scale",
    **TRUE_CFG,
)
def flux() -> dict:
    """Two branches only with a negative prompt; the distilled guidance_scale is an input."""
    transformer = df.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **JOINT_HEADS,
        joint_attention_dim=c.WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        **c.texts(c.clip(), c.t5()),
        "vae": c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=3.0, use_dynamic_shifting=True),
    }


@family("chroma", "ChromaPipeline", "calls: cond uncond", TRANSFORMER, **SHORT)
def chroma() -> dict:
    transformer = df.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **JOINT_HEADS,
        joint_attention_dim=c.WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=3.0, use_dynamic_shifting=True),
    }
