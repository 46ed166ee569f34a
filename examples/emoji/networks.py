"""The embedded model's networks, their sizes, and the stock pipeline they make up."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.emoji import data as emoji

MAX_TOKENS = 24
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


@dataclass(frozen=True)
class Preset:
    """What differs between a run on two CPU cores and one on a GPU."""

    everyday: bool
    autoencoder_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    unet_attention: tuple[bool, ...]
    autoencoder_batch: int
    crop: int
    batch: int
    learning_rate: float
    autoencoder_learning_rate: float


PRESETS = {
    "cpu": Preset(True, (16, 32, 96), (64, 128, 160), (False, True, False), 64, 32, 32, 6e-4, 2e-3),
    "gpu": Preset(
        False, (32, 64, 96), (80, 144, 144), (False, True, True), 128, 64, 512, 1e-3, 1e-3
    ),
}


def build_autoencoder(preset: Preset) -> AutoencoderKL:
    """A convolutional AutoencoderKL, 64x64x3 to 16x16x4."""
    levels = len(preset.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=preset.autoencoder_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=emoji.RESOLUTION,
        mid_block_add_attention=False,
    )


def build_tokenizer(captions: list[str], vocabulary: int = 2048) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-cased byte-pair encoding) trained on the captions."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    empty = CLIPTokenizer(vocab={token: i for i, token in enumerate(specials)}, merges=[])
    trained = empty.train_new_from_iterator([captions], vocabulary)
    trained.model_max_length = MAX_TOKENS
    return trained


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIPTextModel of the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(preset: Preset) -> UNet2DConditionModel:
    """A UNet2DConditionModel on 4x16x16 latents."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in preset.unet_attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(preset.unet_attention)]
    return UNet2DConditionModel(
        sample_size=emoji.RESOLUTION // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=preset.unet_channels,
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Reconstruction(nn.Module):
    """The autoencoder as it is trained: encode, sample, decode."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded pictures (B, 3, H, W) and KL terms (B,), from standard normal noise."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.kl()


class Denoiser(nn.Module):
    """UNet and text encoder trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Predict v for latents (B, 4, 16, 16), timesteps (B,) and tokens (B, L)."""
        states = self.text_encoder(tokens).last_hidden_state
        return self.unet(x_t, t, encoder_hidden_states=states).sample


def assemble(
    autoencoder: AutoencoderKL, network: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """A stock pipeline of the trained parts, with DPM++ 2M."""
    scheduler = DPMSolverMultistepScheduler(
        **NOISE_SCHEDULE, timestep_spacing="trailing", steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
