"""Other transformers that make pictures."""

import diffusers as df
import transformers as tr

from .. import components as c
from .base import HEADS, NO_CHECKER, PLAIN, SD_NOISE, SHORT, TRANSFORMER, ddim, family, flow


@family("sd3", "StableDiffusion3Pipeline", "batch: uncond cond", TRANSFORMER, **SHORT)
def sd3() -> dict:
    transformer = df.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=c.WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * 16,
        pos_embed_max_size=16,
    )
    return {
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=3.0),
        "vae": c.flow_vae(),
        **c.texts(c.clip(projection=True), c.clip(projection=True), c.t5()),
    }


@family("pixart_sigma", "PixArtSigmaPipeline", "batch: uncond cond", TRANSFORMER, **SHORT, **PLAIN)
def pixart_sigma() -> dict:
    """Learned variance, dropped after guidance."""
    transformer = df.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        **HEADS,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=c.WIDTH,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": df.DPMSolverMultistepScheduler(),
    }


@family(
    "sana",
    "SanaPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    height=32,
    width=32,
    complex_human_instruction=[],
    **SHORT,
    **PLAIN,
)
def sana() -> dict:
    transformer = df.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=c.WIDTH,
        sample_size=8,
        timestep_scale=0.001,
    )
    return {
        **c.texts(c.language_model(tr.Gemma2Model, tr.Gemma2Config, c.gemma_tokenizer())),
        "vae": c.dc_vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": df.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@family("aura_flow", "AuraFlowPipeline", "batch: uncond cond", TRANSFORMER, **SHORT)
def aura_flow() -> dict:
    transformer = df.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        **HEADS,
        caption_projection_dim=16,
        joint_attention_dim=c.WIDTH,
        pos_embed_max_size=64,
    )
    return {
        **c.texts(c.t5(umt5=True)),
        "vae": c.vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": flow(shift=1.73),
    }


@family(
    "hunyuan_dit",
    "HunyuanDiTPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    height=64,
    width=64,
    use_resolution_binning=False,
)
def hunyuan_dit() -> dict:
    """Learned variance, dropped before guidance; its rotary grid assumes a VAE that scales by 8."""
    transformer = df.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        **HEADS,
        hidden_size=16,
        in_channels=4,
        cross_attention_dim=c.WIDTH,
        cross_attention_dim_t5=c.WIDTH,
        pooled_projection_dim=16,
    )
    scheduler = df.DDPMScheduler(
        **(SD_NOISE | {"beta_end": 0.03}), prediction_type="v_prediction", clip_sample=False
    )
    return {
        "vae": c.vae(blocks=4),
        **c.texts(c.bert(), c.t5()),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": scheduler,
        **NO_CHECKER,
    }


@family("dit", "DiTPipeline", "batch: cond uncond", TRANSFORMER, c.class_call, negative=False)
def dit() -> dict:
    """Latents stay doubled from step to step; the variance channels are not guided."""
    transformer = df.DiTTransformer2DModel(
        sample_size=8, num_layers=2, **HEADS, in_channels=4, out_channels=8
    )
    return {
        "transformer": c.wake(transformer),
        "vae": c.vae(blocks=1),
        "scheduler": ddim(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    }


@family(
    "lumina",
    "LuminaPipeline",
    "batch: cond uncond",
    TRANSFORMER,
    height=64,
    width=64,
    clean_caption=False,
    negated=True,
    part=lambda output, x: (slice(None), slice(3)),
)
def lumina() -> dict:
    """Lumina-Next: three of the four latent channels are guided."""
    transformer = df.LuminaNextDiT2DModel(
        sample_size=32,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=c.WIDTH,
    )
    return {
        **c.texts(c.language_model(tr.GemmaModel, tr.GemmaConfig, c.gemma_tokenizer())),
        "vae": c.vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(),
    }


@family(
    "lumina2",
    "Lumina2Pipeline",
    "calls: cond uncond",
    TRANSFORMER,
    system_prompt="draw",
    height=64,
    width=64,
    max_sequence_length=32,
    negated=True,
    norm_matched=True,
)
def lumina2() -> dict:
    transformer = df.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=c.WIDTH,
    )
    return {
        **c.texts(c.language_model(tr.Gemma2Model, tr.Gemma2Config, c.gemma_tokenizer())),
        "vae": c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=6.0),
    }


@family("cogview4", "CogView4Pipeline", "calls: cond uncond", TRANSFORMER, max_sequence_length=64)
def cogview4() -> dict:
    transformer = df.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        text_embed_dim=c.WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    return {
        **c.texts(c.language_model(tr.GlmModel, tr.GlmConfig, c.qwen_tokenizer("left"))),
        "vae": c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": scheduler,
    }
