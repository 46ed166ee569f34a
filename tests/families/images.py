"""Other transformers that make pictures."""

from functools import partial

import diffusers as df
import transformers as tr
from PIL import Image
from torch import Tensor

from .. import components as c
from .base import (
    HEADS,
    NO_CHECKER,
    PLAIN,
    SD_NOISE,
    SHORT,
    TRANSFORMER,
    VIDEO,
    ddim,
    family,
    flow,
)
from .pag import pag_mix


def control_call(batch: int, negative: bool, size: int = 16, **extra) -> dict:
    """A call with one control picture per sample."""
    picture = c.per_sample(batch, 3, size, size, low=0.0)
    return c.text_call(batch, negative, **extra) | {"control_image": picture}


def sprint_call(batch: int, negative: bool, **extra) -> dict:
    """Timesteps evenly spread, which is only the default for other numbers of steps than two."""
    return c.text_call(batch, negative, **extra) | {"intermediate_timesteps": None}


def sprint_picture_call(batch: int, negative: bool, **extra) -> dict:
    return c.picture_call(batch, negative, **extra) | {"intermediate_timesteps": None}


def easyanimate_call(batch: int, negative: bool, **extra) -> dict:
    """It fails without negative prompts: empty ones stand for none."""
    return {"negative_prompt": [""] * batch} | c.text_call(batch, negative, **extra)


def easyanimate_inpaint_call(batch: int, negative: bool, **extra) -> dict:
    call = easyanimate_call(batch, negative, **extra)
    mask = c.per_sample(batch, 1, 5, 32, 32, seed=300, low=0.0) > 0.5
    return call | {"video": c.per_sample(batch, 3, 5, 32, 32, low=0.0), "mask_video": mask.float()}


def face_call(batch: int, negative: bool, **extra) -> dict:
    """A call with one picture per sample, and one face for all."""
    return c.text_call(batch, negative, **extra) | {
        "image": c.per_sample(batch, 3, 32, 32, low=0.0),
        "id_cond": c.noise(1, 8),
        "id_vit_hidden": [c.noise(1, 4, 8)],
    }


def camera_call(batch: int, negative: bool, **extra) -> dict:
    """A call with one picture and a camera that moves ahead."""
    call = c.text_call(1, negative, **extra)
    call |= {name: call[name][0] for name in ("prompt", "negative_prompt") if name in call}
    picture = (255 * c.noise(32, 32, 3, low=0.0)).byte().numpy()
    return call | {
        "image": Image.fromarray(picture),
        "action": f"w-{call['num_frames']}",
        "intrinsics": [32.0, 32.0, 16.0, 16.0],
    }


def first_frame_call(batch: int, negative: bool, **extra) -> dict:
    """A call with one picture for all samples."""
    return c.text_call(batch, negative, **extra) | {"image": c.noise(1, 3, 32, 32, low=0.0)}


def later_frames(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """What image-to-video pipelines guide that hold the first frame."""
    return slice(None), slice(None), slice(1, None)


def latent_half(output: Tensor, x: Tensor) -> tuple[slice, ...]:
    """The latents of CogVideoX, frames before channels, beside those of a picture."""
    return slice(None), slice(None), slice(output.shape[2])


def control_mask_call(batch: int, negative: bool, **extra) -> dict:
    mask = c.per_sample(batch, 1, 16, 16, seed=300, low=0.0) > 0.5
    return control_call(batch, negative, **extra) | {"control_mask": mask.float()}


JOINT = ("attn1.to_v", "attn1.to_out.0.weight")  # where text and picture share an attention
SANA_SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    **HEADS,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": c.WIDTH,
    "sample_size": 8,
}
SD3 = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    **HEADS,
    "joint_attention_dim": c.WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * 16,
    "pos_embed_max_size": 16,
}


@family("sd3", "StableDiffusion3Pipeline", "batch: uncond cond", TRANSFORMER, **SHORT)
def sd3(vae=None, **config) -> dict:
    return {
        "transformer": c.wake(df.SD3Transformer2DModel(**(SD3 | config))),
        "scheduler": flow(shift=3.0),
        "vae": vae or c.flow_vae(),
        **c.texts(c.clip(projection=True), c.clip(projection=True), c.t5()),
    }


SD3_PARTIAL = {"strength": 0.75, "num_inference_steps": 4, **SHORT}
family(
    "sd3_img2img",
    "StableDiffusion3Img2ImgPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    c.picture_call,
    first_step=1,
    **SD3_PARTIAL,
)(sd3)


def sd3_inpaint(in_channels: int) -> dict:
    """16 channels: what is kept is put back after every step; 33: mask and picture are inputs."""
    return sd3(c.flow_vae(16), in_channels=in_channels, out_channels=16)


SD3_INPAINT = ("StableDiffusion3InpaintPipeline", "batch: uncond cond", TRANSFORMER, c.inpaint_call)
for _name, _channels in {"sd3_inpaint": 16, "sd3_inpaint_33": 33}.items():
    family(_name, *SD3_INPAINT, first_step=1, **SD3_PARTIAL)(partial(sd3_inpaint, _channels))


@family(
    "sd3_controlnet",
    "StableDiffusion3ControlNetPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    control_call,
    **SHORT,
)
def sd3_controlnet(**config) -> dict:
    """The picture is encoded by a draw without a generator, once for each branch."""
    controlnet = df.SD3ControlNetModel(
        **(SD3 | {"num_layers": 1, "force_zeros_for_pooled_projection": False} | config)
    )
    return sd3(c.certain(c.flow_vae())) | {"controlnet": c.wake(controlnet)}


@family(
    "sd3_controlnet_inpaint",
    "StableDiffusion3ControlNetInpaintingPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    control_mask_call,
    **SHORT,
)
def sd3_controlnet_inpaint() -> dict:
    """Mask and masked picture go into the ControlNet only; nothing is put back."""
    return sd3_controlnet(extra_conditioning_channels=1, force_zeros_for_pooled_projection=True)


PAG = {"pag_scale": 2.0, "mix": pag_mix}
PERTURBED = ("batch: uncond cond perturbed", TRANSFORMER)


@family("sd3_pag", "StableDiffusion3PAGPipeline", *PERTURBED, **PAG, **SHORT)
def sd3_pag() -> dict:
    return sd3() | {"pag_applied_layers": "blocks"}


family(
    "sd3_pag_img2img",
    "StableDiffusion3PAGImg2ImgPipeline",
    *PERTURBED,
    c.picture_call,
    first_step=1,
    **PAG,
    **SD3_PARTIAL,
)(sd3_pag)


@family("pixart_sigma", "PixArtSigmaPipeline", "batch: uncond cond", TRANSFORMER, **SHORT, **PLAIN)
def pixart_sigma(**config) -> dict:
    """Learned variance, dropped after guidance."""
    sizes = {
        "sample_size": 8,
        "num_layers": 2,
        **HEADS,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 16,
        "caption_channels": c.WIDTH,
    }
    transformer = df.PixArtTransformer2DModel(**(sizes | config))
    return {
        **c.texts(c.t5()),
        "vae": c.vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": df.DPMSolverMultistepScheduler(),
    }


@family("pixart_alpha", "PixArtAlphaPipeline", "batch: uncond cond", TRANSFORMER, **SHORT, **PLAIN)
def pixart_alpha() -> dict:
    """Size and aspect ratio are inputs, but only with the sample size of the published model."""
    return pixart_sigma(sample_size=128, num_attention_heads=3, cross_attention_dim=24)


@family("pixart_sigma_pag", "PixArtSigmaPAGPipeline", *PERTURBED, **PAG, **SHORT, **PLAIN)
def pixart_sigma_pag() -> dict:
    return pixart_sigma() | {"pag_applied_layers": "blocks"}


SANA = {"complex_human_instruction": [], **SHORT, **PLAIN}
SANA_SIZE = {"height": 32, "width": 32}


@family("sana", "SanaPipeline", "batch: uncond cond", TRANSFORMER, **SANA_SIZE, **SANA)
def sana(**config) -> dict:
    transformer = df.SanaTransformer2DModel(**(SANA_SIZES | {"timestep_scale": 0.001} | config))
    return {
        **c.texts(c.language_model(tr.Gemma2Model, tr.Gemma2Config, c.gemma_tokenizer())),
        "vae": c.dc_vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": df.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@family(
    "sana_controlnet",
    "SanaControlNetPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    control_call,
    size=32,
    **SANA_SIZE,
    **SANA,
)
def sana_controlnet() -> dict:
    controlnet = df.SanaControlNetModel(**(SANA_SIZES | {"num_layers": 1}))
    return sana() | {"controlnet": c.wake(controlnet)}


@family("sana_pag", "SanaPAGPipeline", *PERTURBED, **PAG, **SANA_SIZE, **SANA)
def sana_pag() -> dict:
    return sana() | {"pag_applied_layers": "transformer_blocks"}


SPRINT = {"negative": False, "num_inference_steps": 4, **SANA_SIZE, **SANA}


@family("sana_sprint", "SanaSprintPipeline", "one", TRANSFORMER, sprint_call, **SPRINT)
def sana_sprint() -> dict:
    """A consistency model: its guidance scale is an input of the network."""
    parts = sana(timestep_scale=1.0, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return parts | {"scheduler": df.SCMScheduler(prediction_type="trigflow", sigma_data=0.5)}


family(
    "sana_sprint_img2img",
    "SanaSprintImg2ImgPipeline",
    "one",
    TRANSFORMER,
    sprint_picture_call,
    first_step=1,
    strength=0.75,
    **SPRINT,
)(sana_sprint)


SANA_VIDEO = {"frames": 9, **SANA_SIZE, **SANA}


@family("sana_video", "SanaVideoPipeline", "batch: uncond cond", TRANSFORMER, **SANA_VIDEO)
def sana_video(**parts) -> dict:
    transformer = df.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=c.WIDTH,
        rope_max_seq_len=32,
    )
    return sana() | {
        "vae": c.wan_vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        **parts,
    }


@family(
    "sana_i2v",
    "SanaImageToVideoPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    first_frame_call,
    part=later_frames,
    **SANA_VIDEO,
)
def sana_i2v() -> dict:
    """The first frame is the picture: not noisy, at timestep 0, and not stepped."""
    return sana_video(scheduler=flow(shift=8.0))


@family(
    "sana_wm",
    "SanaWMPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    camera_call,
    part=later_frames,
    chi_prompt=[" "],
    num_frames=9,
    max_batch=1,
    **SANA_SIZE,
    **SHORT,
)
def sana_wm() -> dict:
    """One sample, whose first frame is held; its camera is an input.

    The network's output is negated, as the scheduler counts its steps the other way round when
    each token has its timestep.
    """
    transformer = df.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        softmax_every_n=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        chunk_plucker_channels=6 * 4,
        caption_channels=c.WIDTH,
    )
    vae = df.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
    )
    return sana() | {
        "vae": vae.eval(),
        "transformer": c.wake(transformer),
        "scheduler": flow(shift=3.0),
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


HUNYUAN_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    **HEADS,
    "hidden_size": 16,
    "in_channels": 4,
    "cross_attention_dim": c.WIDTH,
    "cross_attention_dim_t5": c.WIDTH,
    "pooled_projection_dim": 16,
}
BIG = {"height": 64, "width": 64, "use_resolution_binning": False}


@family("hunyuan_dit", "HunyuanDiTPipeline", "batch: uncond cond", TRANSFORMER, **BIG)
def hunyuan_dit(layers: int = 2) -> dict:
    """Learned variance, dropped before guidance; its rotary grid assumes a VAE that scales by 8."""
    transformer = df.HunyuanDiT2DModel(num_layers=layers, **HUNYUAN_DIT)
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


@family(
    "hunyuan_dit_controlnet",
    "HunyuanDiTControlNetPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    control_call,
    size=64,
    **BIG,
)
def hunyuan_dit_controlnet() -> dict:
    """Its ControlNet has one block less than half of the transformer's."""
    controlnet = df.HunyuanDiT2DControlNetModel(transformer_num_layers=4, **HUNYUAN_DIT)
    vae = c.certain(c.vae(blocks=4))
    return hunyuan_dit(4) | {"controlnet": c.wake(controlnet), "vae": vae}


@family("hunyuan_dit_pag", "HunyuanDiTPAGPipeline", *PERTURBED, **PAG, **BIG)
def hunyuan_dit_pag() -> dict:
    return hunyuan_dit() | {"pag_applied_layers": "blocks"}


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


@family("cogview3_plus", "CogView3PlusPipeline", "batch: uncond cond", TRANSFORMER, **SHORT)
def cogview3_plus() -> dict:
    transformer = df.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        text_embed_dim=c.WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = df.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0
    )
    return {
        **c.texts(c.t5()),
        "vae": c.vae(),
        "transformer": c.wake(transformer),
        "scheduler": scheduler,
    }


@family("cogview4", "CogView4Pipeline", "calls: cond uncond", TRANSFORMER, max_sequence_length=64)
def cogview4(vae=None, in_channels: int = 4) -> dict:
    transformer = df.CogView4Transformer2DModel(
        in_channels=in_channels,
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
        "vae": vae or c.flow_vae(),
        "transformer": c.wake(transformer),
        "scheduler": scheduler,
    }


@family(
    "cogview4_control",
    "CogView4ControlPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    control_call,
    max_sequence_length=64,
)
def cogview4_control() -> dict:
    """The picture is encoded by a draw without a generator, and beside the latents in the input."""
    parts = cogview4(c.certain(c.flow_vae()), in_channels=8)
    return parts | {"transformer": c.amplify(parts["transformer"], JOINT, 4.0)}


@family(
    "latte",
    "LattePipeline",
    "batch: uncond cond",
    TRANSFORMER,
    video_length=3,
    clean_caption=False,
    mask_feature=False,
)
def latte() -> dict:
    """Learned variance, dropped after guidance.

    With `mask_feature` a batch of one would be shortened to its tokens, and others not.
    """
    transformer = df.LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        **HEADS,
        caption_channels=c.WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": ddim(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    }


@family(
    "allegro",
    "AllegroPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    height=32,
    width=32,
    num_frames=8,
    clean_caption=False,
    **SHORT,
)
def allegro() -> dict:
    transformer = df.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=c.WIDTH,
    )
    return {
        **c.texts(c.t5()),
        "vae": c.allegro_vae(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": df.EulerAncestralDiscreteScheduler(beta_start=0.0001, beta_end=0.02),
    }


EASYANIMATE = {"height": 32, "width": 32, "num_frames": 5}


@family(
    "easyanimate",
    "EasyAnimatePipeline",
    "batch: uncond cond",
    TRANSFORMER,
    easyanimate_call,
    **EASYANIMATE,
)
def easyanimate(in_channels: int = 4) -> dict:
    """The text's attention mask never reaches the transformer."""
    transformer = df.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=c.WIDTH,
        resize_inpaint_mask_directly=False,
        add_noise_in_inpaint_model=False,
    )
    return {
        **c.texts((c.qwen_vl(), c.qwen_tokenizer())),
        "vae": c.certain(c.magvit_vae()),
        "transformer": c.amplify(c.wake(transformer), JOINT, 4.0),
        "scheduler": flow(shift=3.0),
    }


family(
    "easyanimate_inpaint",
    "EasyAnimateInpaintPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    easyanimate_inpaint_call,
    first_step=1,
    strength=0.75,
    num_inference_steps=4,
    **EASYANIMATE,
)(partial(easyanimate, 12))


@family(
    "consisid",
    "ConsisIDPipeline",
    "batch: uncond cond",
    TRANSFORMER,
    face_call,
    module="diffusers.pipelines.consisid.pipeline_consisid",
    part=latent_half,
    **VIDEO,
)
def consisid() -> dict:
    """The face's embeddings have one row, whatever the batch.

    Diffusers shows the class only where OpenCV is installed, with which it draws key points.
    """
    transformer = df.ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=c.WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=1,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    scheduler = df.CogVideoXDPMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    return {
        **c.texts(c.t5()),
        "vae": c.cogvideox_vae(),
        "transformer": c.amplify(c.wake(transformer), JOINT, 4.0),
        "scheduler": scheduler,
    }
