"""Sound: AudioLDM 2, Stable Audio, ACE-Step, LongCat-AudioDiT."""

import diffusers as df
import transformers as tr
from torch import Tensor
from torch.nn.functional import normalize

from .. import components as c
from .base import TRANSFORMER, UNET, ddim, family, flow

SOUND = {"height": None, "width": None}


def oobleck(channels: int = 4) -> df.AutoencoderOobleck:
    """Two samples of sound per latent, sixteen a second."""
    model = df.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=channels,
        audio_channels=2,
        sampling_rate=16,
    )
    return model.eval()


def clap() -> tuple:
    tokenizer = c.trained(tr.RobertaTokenizer, "<s>", model_max_length=77)
    text = {
        "vocab_size": c.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 100,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sound = {
        "spec_size": 8,
        "num_mel_bins": 8,
        "window_size": 4,
        "patch_size": 2,
        "patch_stride": 2,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
    }
    config = tr.ClapConfig(text_config=text, audio_config=sound, projection_dim=16)
    return tr.ClapModel(config).eval(), tokenizer


@family(
    "audioldm2",
    "AudioLDM2Pipeline",
    "batch: uncond cond",
    UNET,
    audio_length_in_s=4.0,
    max_new_tokens=4,
    **SOUND,
)
def audioldm2() -> dict:
    """Two texts for the network: T5's, and what a language model makes of T5's and CLAP's."""
    unet = df.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, c.WIDTH), (None, 16, c.WIDTH)),
        attention_head_dim=2,
    )
    language = tr.GPT2Config(vocab_size=c.VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=128)
    vocoder = tr.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16,
        upsample_initial_channel=4,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    )
    return {
        **c.texts(clap(), c.t5()),
        "projection_model": df.AudioLDM2ProjectionModel(16, c.WIDTH, 16),
        "language_model": tr.GPT2LMHeadModel(language).eval(),
        "unet": c.condition_loudly(c.wake(unet)),
        "scheduler": ddim(),
        "vae": c.vae(in_channels=1, out_channels=1),
        "vocoder": tr.SpeechT5HifiGan(vocoder).eval(),
        "feature_extractor": None,
    }


@family("stable_audio", "StableAudioPipeline", "batch: uncond cond", TRANSFORMER, **SOUND)
def stable_audio() -> dict:
    """The published scheduler draws its noise from torchsde; this one has its preconditioning."""
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    transformer = df.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        attention_head_dim=16,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        global_states_input_dim=32,
        time_proj_dim=8,
    )
    scheduler = df.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3,
        sigma_max=500.0,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )
    projection = StableAudioProjectionModel(c.WIDTH, 16, 0, 32)
    return {
        **c.texts(c.t5()),
        "vae": oobleck(),
        "projection_model": projection.eval(),
        "transformer": c.condition_loudly(c.wake(transformer)),
        "scheduler": scheduler,
    }


def reference_call(batch: int, negative: bool, **extra) -> dict:
    sound = c.per_sample(batch, 2, 64)
    return c.text_call(batch, negative, **SOUND, guidance_scale=None, **extra) | {"audio": sound}


ONE_AUDIO = {"scale_name": "", "negative": False, "duration": 2.0}


@family(
    "stable_audio3",
    "StableAudio3Pipeline",
    "batch: uncond cond",
    TRANSFORMER,
    duration=2.0,
    **SOUND,
)
@family(
    "stable_audio3_audio2audio",
    "StableAudio3AudioToAudioPipeline",
    "one",
    TRANSFORMER,
    reference_call,
    init_noise_level=0.8,
    **ONE_AUDIO,
)
@family(
    "stable_audio3_inpaint",
    "StableAudio3InpaintPipeline",
    "one",
    TRANSFORMER,
    reference_call,
    mask_start_seconds=0.5,
    mask_end_seconds=1.5,
    **ONE_AUDIO,
)
def stable_audio3() -> dict:
    """Given a sound to start from or to fill in it is never guided."""
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import (
        StableAudio3DurationEmbedder,
    )
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    transformer = df.StableAudio3DiTModel(
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=c.WIDTH,
        global_cond_dim=c.WIDTH,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=2,
    )
    vae = df.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=32,
    )
    tokenizer = c.gemma_tokenizer()
    tokenizer.model_max_length = 64
    half = T5GemmaModuleConfig(
        vocab_size=c.VOCAB,
        hidden_size=c.WIDTH,
        intermediate_size=c.WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    ).to_dict()
    encoder = tr.T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False)
    return {
        **c.texts((tr.T5GemmaEncoderModel(encoder).eval(), tokenizer)),
        "vae": vae.eval(),
        "duration_embedder": StableAudio3DurationEmbedder(c.WIDTH, 16),
        "transformer": c.amplify(c.wake(transformer), ("cross_attn.to_",), 6.0),
        "scheduler": flow(num_train_timesteps=1),
    }


def song_call(batch: int, negative: bool, **extra) -> dict:
    lyrics = [f"[verse]\n{line}" for line in c.cycle(c.PROMPTS[::-1], batch)]
    return c.text_call(batch, False, **SOUND, lyrics=lyrics, **extra)


def ace_step_mix(branches: dict[str, Tensor], call: dict) -> tuple[Tensor, float]:
    """Adaptive projected guidance along time: each channel by itself, with reverse momentum."""
    cond, w = branches["cond"], call["guidance_scale"]
    away = cond - branches["uncond"] - 0.75 * call.get("momentum", 0.0)
    call["momentum"] = away
    away = away * (2.5 / away.norm(dim=1, keepdim=True)).clamp(max=1.0)
    along = normalize(cond, dim=1)
    return cond + (w - 1) * (away - (away * along).sum(dim=1, keepdim=True) * along), w


@family(
    "ace_step",
    "AceStepPipeline",
    "batch: cond uncond",
    TRANSFORMER,
    song_call,
    negative=False,
    mix=ace_step_mix,
    audio_duration=2.0,
)
def ace_step() -> dict:
    """Its own guidance is APG with momentum; a learned embedding stands for no condition."""
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

    sizes = {
        "hidden_size": c.WIDTH,
        "intermediate_size": c.WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 8,
    }
    transformer = df.AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, **sizes
    )
    encoder = AceStepConditionEncoder(
        text_hidden_dim=c.WIDTH,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **sizes,
    )
    return {
        **c.texts(c.language_model(tr.Qwen3Model, tr.Qwen3Config, c.qwen_tokenizer())),
        "vae": oobleck(),
        "condition_encoder": encoder.eval(),
        "transformer": c.amplify(c.wake(transformer), ("cross_attn.to_v",), 4.0),
        "scheduler": flow(num_train_timesteps=1),
    }


@family(
    "longcat_audio",
    "LongCatAudioDiTPipeline",
    "calls: cond uncond",
    TRANSFORMER,
    audio_duration_s=2.0,
    **SOUND,
)
def longcat_audio() -> dict:
    """The clock runs forwards: 0 is noise, and what is predicted is sound less noise."""
    transformer = df.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=c.WIDTH, latent_dim=4
    )
    vae = df.LongCatAudioDiTVae(
        channels=4,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=4,
        encoder_latent_dim=8,
        downsampling_ratio=2,
        sample_rate=16,
    )
    return {
        **c.texts(c.t5(umt5=True)),
        "vae": vae.eval(),
        "transformer": c.amplify(c.wake(transformer), ("cross_attn.to_v",), 4.0),
        "scheduler": flow(invert_sigmas=True),
    }
