"""The pipeline families of the test suite: tiny real pipelines, and a call for each.

`FAMILIES[name].build()` gives a stock diffusers pipeline with random weights in float32;
`pipe(**FAMILIES[name].call(batch, negative))[0]` gives its latents (pixels for DiT, which cannot
return latents). Both are seeded: the same build and call give the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import diffusers as df
import torch
import transformers as tr
from diffusers import DiffusionPipeline

from . import components as c


@dataclass(frozen=True)
class Family:
    """One family: how to build its pipeline, how to call it, and where its branches are."""

    name: str
    cls: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[int, bool], dict]
    scale_name: str
    layout: str
    denoisers: tuple[str, ...]
    negative: bool


FAMILIES: dict[str, Family] = {}
UNET = ("unet",)
TRANSFORMER = ("transformer",)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
JOINT_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SHORT = {"max_sequence_length": 16}
PARTIAL = {"strength": 0.8, "num_inference_steps": 4}
PLAIN = {"use_resolution_binning": False, "clean_caption": False}
VIDEO = {"height": 32, "width": 32, "num_frames": 9, **SHORT}
TRUE_CFG = {"true_cfg_scale": 4.0, "guidance_scale": None, **SHORT}
SD_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def family(
    name: str,
    cls: str,
    layout: str,
    denoisers: tuple[str, ...],
    call: Callable[..., dict] = c.text_call,
    scale_name: str = "guidance_scale",
    negative: bool = True,
    **extra,
) -> Callable:
    """Registers a function that returns a pipeline's components; `extra` goes to its call."""

    def register(parts: Callable[[], dict]) -> Callable[[], dict]:
        build = partial(_build, cls, parts)
        arguments = partial(call, **extra)
        FAMILIES[name] = Family(
            name, cls, build, arguments, scale_name, layout, denoisers, negative
        )
        return parts

    return register


def _build(cls: str, parts: Callable[[], dict]) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = getattr(df, cls)(**parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**config) -> df.FlowMatchEulerDiscreteScheduler:
    return df.FlowMatchEulerDiscreteScheduler(**config)


def ddim(**config) -> df.DDIMScheduler:
    return df.DDIMScheduler(**(SD_NOISE | {"clip_sample": False} | config))


@family("sd", "StableDiffusionPipeline", "uncond_cond", UNET)
def sd(scheduler=None, channels: int = 4) -> dict:
    """Stable Diffusion 1, whose PNDM scheduler asks for one evaluation more than it has steps."""
    return {
        "vae": c.vae(),
        **c.texts(c.clip()),
        "unet": c.unet(in_channels=channels),
        "scheduler": scheduler or df.PNDMScheduler(**SD_NOISE, skip_prk_steps=True),
        **NO_CHECKER,
    }


@family(
    "sd_img2img",
    "StableDiffusionImg2ImgPipeline",
    "uncond_cond",
    UNET,
    c.picture_call,
    **PARTIAL,
)
def sd_img2img() -> dict:
    """With the v-prediction of Stable Diffusion 2.1."""
    return sd(ddim(prediction_type="v_prediction"))


@family("sd_controlnet", "StableDiffusionControlNetPipeline", "uncond_cond", UNET, c.picture_call)
def sd_controlnet() -> dict:
    return sd(ddim(set_alpha_to_one=False)) | {"controlnet": c.controlnet()}


@family("pix2pix", "StableDiffusionInstructPix2PixPipeline", "three_way", UNET, c.picture_call)
def pix2pix() -> dict:
    """Three branches, [text and picture, picture, neither]."""
    return sd(df.EulerAncestralDiscreteScheduler(**SD_NOISE), channels=8)


@family("sd_pag", "StableDiffusionPAGPipeline", "three_way", UNET, pag_scale=2.0)
def sd_pag() -> dict:
    """Three branches, [uncond, cond, cond with perturbed attention]."""
    return sd(ddim()) | {"pag_applied_layers": "mid"}


@family("sdxl", "StableDiffusionXLPipeline", "uncond_cond", UNET)
def sdxl(channels: int = 4) -> dict:
    return {
        "vae": c.vae(),
        **c.texts(c.clip(), c.clip(projection=True)),
        "unet": c.unet(in_channels=channels, **c.SDXL),
        "scheduler": df.EulerDiscreteScheduler(**SD_NOISE),
    }


@family(
    "sdxl_controlnet", "StableDiffusionXLControlNetPipeline", "uncond_cond", UNET, c.picture_call
)
def sdxl_controlnet() -> dict:
    return sdxl() | {"controlnet": c.controlnet(**c.SDXL)}


family(
    "sdxl_img2img",
    "StableDiffusionXLImg2ImgPipeline",
    "uncond_cond",
    UNET,
    c.picture_call,
    **PARTIAL,
)(sdxl)
INPAINT = ("StableDiffusionXLInpaintPipeline", "uncond_cond", UNET, c.inpaint_call)
family("sdxl_inpaint", *INPAINT, **PARTIAL)(partial(sdxl, channels=9))
family("sdxl_inpaint_4", *INPAINT, **PARTIAL)(sdxl)


@family("sd3", "StableDiffusion3Pipeline", "uncond_cond", TRANSFORMER, **SHORT)
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


@family("pixart_sigma", "PixArtSigmaPipeline", "uncond_cond", TRANSFORMER, **SHORT, **PLAIN)
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
    "uncond_cond",
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


@family("aura_flow", "AuraFlowPipeline", "uncond_cond", TRANSFORMER, **SHORT)
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
    "uncond_cond",
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


@family("kandinsky22", "KandinskyV22Pipeline", "uncond_cond", UNET, c.image_embeds_call)
def kandinsky22() -> dict:
    """Learned variance: the scheduler uses the conditional half's variance channels."""
    unet = c.unet(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = df.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )
    return {"unet": unet, "scheduler": scheduler, "movq": c.movq()}


@family("kandinsky3", "Kandinsky3Pipeline", "uncond_cond", UNET, height=64, width=64)
def kandinsky3() -> dict:
    """Its guidance line is (w + 1) * cond - w * uncond: its scale is one less than the others'."""
    unet = df.Kandinsky3UNet(
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=c.WIDTH,
    )
    return {
        **c.texts(c.t5()),
        "unet": c.wake(unet),
        "scheduler": df.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        "movq": c.movq(),
    }


@family("dit", "DiTPipeline", "cond_uncond_channels", TRANSFORMER, c.class_call, negative=False)
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
    "cond_uncond_channels",
    TRANSFORMER,
    height=64,
    width=64,
    clean_caption=False,
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


@family("z_image", "ZImagePipeline", "list", TRANSFORMER, max_sequence_length=128)
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
    "stable_cascade", "StableCascadeDecoderPipeline", "cond_uncond", ("decoder",), c.cascade_call
)
def stable_cascade() -> dict:
    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    decoder = df.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(block, block),
        clip_text_pooled_in_channels=16,
        effnet_in_channels=4,
        timestep_conditioning_type=("sca",),
    )
    return {
        **c.texts(c.clip(projection=True)),
        "vqgan": c.paella(),
        "decoder": c.wake(decoder),
        "scheduler": df.DDPMWuerstchenScheduler(),
        "latent_dim_scale": 4.0,
    }


@family(
    "flux",
    "FluxPipeline",
    "two_calls_cache_context",
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


@family(
    "qwen_image",
    "QwenImagePipeline",
    "two_calls_cache_context",
    TRANSFORMER,
    scale_name="true_cfg_scale",
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


@family("chroma", "ChromaPipeline", "two_calls", TRANSFORMER, **SHORT)
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


@family(
    "lumina2",
    "Lumina2Pipeline",
    "two_calls",
    TRANSFORMER,
    system_prompt="draw",
    height=64,
    width=64,
    max_sequence_length=32,
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


@family(
    "cogview4", "CogView4Pipeline", "two_calls_cache_context", TRANSFORMER, max_sequence_length=64
)
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


@family("wan", "WanPipeline", "two_calls_cache_context", TRANSFORMER, **VIDEO)
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
    "two_calls_cache_context",
    ("transformer", "transformer_2"),
    guidance_scale_2=3.0,
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


@family("ltx", "LTXPipeline", "uncond_cond", TRANSFORMER, **VIDEO)
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
    "uncond_cond",
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


@family("mochi", "MochiPipeline", "uncond_cond", TRANSFORMER, **(VIDEO | {"num_frames": 7}))
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
    "two_calls_cache_context",
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
