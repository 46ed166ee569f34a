"""Qwen-Image, Z-Image and their neighbours."""

import diffusers as df
import transformers as tr

from .. import components as c
from .base import JOINT_HEADS, TRANSFORMER, TRUE_CFG, family, flow


@family(
    "z_image",
    "ZImagePipeline",
    "batch: cond uncond",
    TRANSFORMER,
    max_sequence_length=128,
    w=lambda scale: scale + 1,
    negated=True,
)
def z_image() -> dict:
    """Its guidance line is cond + w * (cond - uncond), on lists of samples."""
    transformer = df.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=c.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return {
        **c.texts(c.language_model(tr.Qwen3Model, tr.Qwen3Config, c.qwen_tokenizer())),
        "vae": c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=3.0),
    }


@family(
    "qwen_image",
    "QwenImagePipeline",
    "calls: cond uncond",
    TRANSFORMER,
    scale_name="true_cfg_scale",
    norm_matched=True,
    **(TRUE_CFG | {"height": 32, "width": 32, "max_sequence_length": 512}),
)
def qwen_image() -> dict:
    """Two branches only with a negative prompt; each token gets the conditional one's norm."""
    transformer = df.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **JOINT_HEADS,
        joint_attention_dim=c.WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return {
        **c.texts((c.qwen_vl(), c.qwen_tokenizer())),
        "vae": c.qwen_vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": flow(use_dynamic_shifting=True, shift_terminal=0.02),
    }
