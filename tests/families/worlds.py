"""Cosmos, and Kandinsky 5 and 6."""

from types import ModuleType, SimpleNamespace

import diffusers as df
import torch
import transformers as tr
from diffusers.models.controlnets import controlnet_cosmos
from torch import Tensor

from .. import components as c
from .base import TRANSFORMER, VIDEO, family, flow
from .wan import CALLS, FRAMES, later_frames, video_call

CHAT = {"max_sequence_length": 256}
SEEN = VIDEO | CHAT
LONG = VIDEO | {"max_sequence_length": 640}
SMALL = {"resolutions": [(32, 32)]}


class PassesAll(torch.nn.Module):
    """Cosmos refuses to run without something that checks texts and videos."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def one_more(scale: float) -> float:
    """cond + scale * (cond - uncond)"""
    return scale + 1


def from_timestep(scheduler, index: int, kwargs: dict, prediction: Tensor, x: Tensor) -> Tensor:
    """x0 of networks that are told the share of noise in their input."""
    share = kwargs["timestep"].double()
    share = share.reshape(*share.shape, *[1] * (x.ndim - share.ndim))
    return x - share[:, :, -x.shape[2] :] * prediction


def last_axis(output: Tensor, x: Tensor) -> tuple:
    """Channels come last, those of the latents first."""
    return (..., slice(output.shape[-1]))


def later_frames_last_axis(output: Tensor, x: Tensor) -> tuple:
    return (slice(None), slice(1, None), ..., slice(output.shape[-1]))


def frames_before_last(output: Tensor, x: Tensor) -> tuple:
    """The picture is given as the last frame."""
    return (slice(None), slice(-1), ..., slice(output.shape[-1]))


def frame_call(batch: int, negative: bool, **extra) -> dict:
    """The first frame, one per sample."""
    image = c.per_sample(batch, 3, 32, 32, low=0.0)
    return c.text_call(batch, negative, **extra) | {"image": image}


def photo_call(batch: int, negative: bool, size: int = 32, **extra) -> dict:
    photos = [c.photo(seed, size) for seed in range(batch)]
    return c.text_call(batch, negative, **extra) | {"image": photos}


def level_call(batch: int, negative: bool, **extra) -> dict:
    """Texts of equally many tokens: what pads a shorter one would be attended to."""
    call = c.text_call(batch, negative, **extra)
    count = c.qwen_tokenizer().tokenize
    for name in ("prompt", "negative_prompt"):
        if name in call:
            call[name] = [text + "," * (32 - len(count(text))) for text in call[name]]
    return call


def level_photo_call(batch: int, negative: bool, size: int = 32, **extra) -> dict:
    return photo_call(batch, negative, size) | level_call(batch, negative, **extra)


def controls_call(batch: int, negative: bool, **extra) -> dict:
    call = video_call(batch, negative, **extra)
    return call | {"controls": call.pop("video")}


def single_call(batch: int, negative: bool, **extra) -> dict:
    call = c.text_call(batch, negative, **extra)
    return call | {"generator": call["generator"][0]}


@family("cosmos", "CosmosTextToWorldPipeline", CALLS, TRANSFORMER, w=one_more, **VIDEO)
def cosmos(**parts) -> dict:
    """Denoised images are guided, and handed to the scheduler in place of a prediction."""
    vae = df.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    )
    return (
        cosmos2(
            vae=vae.eval(),
            transformer=cosmos_transformer(4),
            scheduler=df.EDMEulerScheduler(final_sigmas_type="sigma_min"),
        )
        | parts
    )


@family(
    "cosmos_v2w",
    "CosmosVideoToWorldPipeline",
    CALLS,
    TRANSFORMER,
    frame_call,
    w=one_more,
    part=later_frames,
    **VIDEO,
)
def cosmos_v2w() -> dict:
    """The branches see the given frame with different noise on it."""
    return cosmos(transformer=cosmos_transformer(4, given=1))


@family(
    "cosmos2",
    "Cosmos2TextToImagePipeline",
    CALLS,
    TRANSFORMER,
    w=one_more,
    x0=from_timestep,
    **(VIDEO | {"num_frames": None}),
)
def cosmos2(**parts) -> dict:
    return {
        **c.texts(c.t5()),
        "vae": c.wan_vae(),
        "transformer": cosmos_transformer(16),
        "scheduler": flow(use_karras_sigmas=True),
        "safety_checker": PassesAll(),
        **parts,
    }


@family(
    "cosmos2_v2w",
    "Cosmos2VideoToWorldPipeline",
    CALLS,
    TRANSFORMER,
    frame_call,
    w=one_more,
    part=later_frames,
    x0=from_timestep,
    **VIDEO,
)
def cosmos2_v2w() -> dict:
    return cosmos2(transformer=cosmos_transformer(16, given=1))


@family("cosmos25", "Cosmos2_5_PredictBasePipeline", CALLS, TRANSFORMER, w=one_more, **SEEN)
def cosmos25(**parts) -> dict:
    """Its text encoder's layers are joined."""
    scheduler = df.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_min=0.01,
        sigma_max=200.0,
    )
    return (
        cosmos2(
            text_encoder=c.qwen_vl(),
            tokenizer=c.qwen_tokenizer(),
            transformer=cosmos_transformer(16, given=1, text_embed_dim=2 * c.WIDTH),
            scheduler=scheduler,
        )
        | parts
    )


@family(
    "cosmos25_v2w",
    "Cosmos2_5_PredictBasePipeline",
    CALLS,
    TRANSFORMER,
    video_call,
    w=one_more,
    part=later_frames,
    num_latent_conditional_frames=1,
    max_batch=1,
    **SEEN,
)
def cosmos25_v2w() -> dict:
    return cosmos25()


@family(
    "cosmos25_transfer",
    "Cosmos2_5_TransferPipeline",
    CALLS,
    TRANSFORMER,
    controls_call,
    w=one_more,
    num_frames_per_chunk=FRAMES,
    **SEEN,
)
def cosmos25_transfer() -> dict:
    """A control network is evaluated before each branch."""
    do_without_torchvision(controlnet_cosmos)
    context = {"img_context_dim_in": c.WIDTH, "img_context_dim_out": c.WIDTH}
    controlnet = df.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        text_embed_dim=2 * c.WIDTH,
        extra_pos_embed_type="learnable",
        **context,
        **COSMOS,
    )
    transformer = cosmos_transformer(
        16,
        given=1,
        text_embed_dim=2 * c.WIDTH,
        controlnet_block_every_n=1,
        img_context_num_tokens=4,
        **context,
    )
    return cosmos25(transformer=transformer, controlnet=c.wake(controlnet))


@family(
    "cosmos3",
    "Cosmos3OmniPipeline",
    CALLS,
    TRANSFORMER,
    single_call,
    latents="vision_tokens",
    max_batch=1,
    use_system_prompt=False,
    add_resolution_template=False,
    add_duration_template=False,
    **(VIDEO | {"max_sequence_length": None}),
)
def cosmos3() -> dict:
    """Text and picture are one sequence of tokens; only the first prompt counts."""
    tokenizer = c.qwen_tokenizer()
    tokenizer.add_tokens(["<|vision_start|>"], special_tokens=True)
    transformer = df.Cosmos3OmniTransformer(
        head_dim=6,
        hidden_size=12,
        intermediate_size=24,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_axes_dim=[1, 1, 1],
        vocab_size=c.VOCAB,
    )
    return {
        "transformer": c.amplify(c.wake(transformer), ("self_attn.to_v.", "to_add_out"), 4.0),
        "text_tokenizer": tokenizer,
        "vae": c.wan_vae(),
        "scheduler": df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "enable_safety_checker": False,
    }


@family(
    "kandinsky5",
    "Kandinsky5T2IPipeline",
    CALLS,
    TRANSFORMER,
    level_call,
    part=last_axis,
    **(LONG | {"num_frames": None}),
)
def kandinsky5(**parts) -> dict:
    """It makes pictures of a few sizes only, all large: here of one small size."""
    tokenizer = c.qwen_tokenizer()
    tokenizer.model_max_length = 1024
    return {
        **c.texts((c.qwen_vl(), tokenizer), c.clip()),
        "vae": c.flow_vae(blocks=4),
        "transformer": kandinsky_transformer(),
        "scheduler": flow(shift=3.0),
        "attributes": SMALL,
        **parts,
    }


@family(
    "kandinsky5_i2i",
    "Kandinsky5I2IPipeline",
    CALLS,
    TRANSFORMER,
    level_photo_call,
    part=last_axis,
    size=112,
    **(LONG | {"num_frames": None}),
)
def kandinsky5_i2i() -> dict:
    """The picture is in further channels and in the prompt."""
    encoder, tokenizer = seeing()
    return kandinsky5(
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=kandinsky_transformer(True),
        attributes=SMALL,
    )


@family(
    "kandinsky5_t2v",
    "Kandinsky5T2VPipeline",
    CALLS,
    TRANSFORMER,
    level_call,
    part=last_axis,
    **LONG,
)
def kandinsky5_t2v() -> dict:
    return kandinsky5(
        vae=c.hunyuan_video_vae(), transformer=kandinsky_transformer(True), attributes={}
    )


@family(
    "kandinsky5_i2v",
    "Kandinsky5I2VPipeline",
    CALLS,
    TRANSFORMER,
    level_photo_call,
    part=later_frames_last_axis,
    **(LONG | {"num_frames": 17}),
)
def kandinsky5_i2v() -> dict:
    return kandinsky5_t2v()


@family(
    "kandinsky6",
    "Kandinsky6TI2VAPipeline",
    CALLS,
    TRANSFORMER,
    part=last_axis,
    **SEEN,
)
def kandinsky6() -> dict:
    """Video and sound, with one scale and a scheduler each."""
    transformer = df.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=c.WIDTH,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
        visual_token_type_num_embeddings=2,
    )
    audio = df.MMAudioVAE(
        mel_bins=16, latent_channels=20, hidden_channels=16, layers_per_block=1, n_fft=64
    )
    vocoder = df.MMAudioVocoder(num_mels=16, upsample_initial_channel=64)
    return kandinsky5_t2v() | {
        "transformer": loud(c.wake(transformer)),
        "audio_vae": audio.eval(),
        "vocoder": vocoder.eval(),
    }


@family(
    "kandinsky6_i2v",
    "Kandinsky6TI2VAPipeline",
    CALLS,
    TRANSFORMER,
    photo_call,
    part=frames_before_last,
    sample_audio=False,
    **SEEN,
)
def kandinsky6_i2v() -> dict:
    return kandinsky6()


def upscale_call(batch: int, negative: bool) -> dict:
    return {
        "video": c.per_sample(batch, 1, 3, 64, 64, low=0.0),
        "resolution_scale": 2,
        "num_inference_steps": c.STEPS,
        "generator": c.generators(batch),
        "output_type": "pt",
    }


@family(
    "kandinsky6_sr", "Kandinsky6SRPipeline", "one", TRANSFORMER, upscale_call, "", negative=False
)
def kandinsky6_sr() -> dict:
    """It knows no text, and goes through the samples' tiles one by one; no latents as output."""
    transformer = df.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=8,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        tile_sizes=((128, 128),),
    )
    vae = df.Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 5,
        decoder_block_out_channels=(8,) * 5,
        layers_per_block=1,
    )
    return {
        "transformer": c.wake(transformer),
        "vae": vae.eval(),
        "scheduler": df.PiflowScheduler(n_grid=2),
    }


COSMOS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
}


def cosmos_transformer(channels: int, given: int = 0, **config) -> df.CosmosTransformer3DModel:
    sizes = {"in_channels": channels + given, "out_channels": channels, "num_layers": 2}
    sizes |= {"text_embed_dim": c.WIDTH, "concat_padding_mask": False, **COSMOS}
    return c.condition_loudly(c.wake(df.CosmosTransformer3DModel(**(sizes | config))))


def do_without_torchvision(module: ModuleType) -> None:
    """All that Cosmos' ControlNet needs of torchvision is to resize a mask."""
    if not hasattr(module, "transforms"):

        def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
            return torch.nn.functional.interpolate(mask, size, mode=interpolation)

        module.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize),
            InterpolationMode=SimpleNamespace(NEAREST="nearest"),
        )


def kandinsky_transformer(given: bool = False) -> df.Kandinsky5Transformer3DModel:
    transformer = df.Kandinsky5Transformer3DModel(
        in_text_dim=c.WIDTH,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
        visual_cond=given,
    )
    return loud(c.wake(transformer))


def loud(transformer: torch.nn.Module) -> torch.nn.Module:
    return c.amplify(
        transformer, ("cross_attention.to_value", "cross_attention.out_layer.weight"), 4.0
    )


class PictureReader(tr.Qwen2VLProcessor):
    """Reads no videos, so that it works without torchvision."""

    def check_argument_for_proper_class(self, *_):
        return None


def seeing() -> tuple:
    """A text encoder that is given pictures, and what prepares them."""
    tokenizer = c.qwen_tokenizer()
    marks = {
        "vision_start_token_id": "<|vision_start|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    tokenizer.add_tokens(list(marks.values()), special_tokens=True)
    encoder = c.qwen_vl()
    for name, mark in marks.items():
        setattr(encoder.config, name, tokenizer.convert_tokens_to_ids(mark))
    reader = getattr(tr, "Qwen2VLImageProcessorPil", tr.Qwen2VLImageProcessor)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    return encoder, PictureReader(reader(size=pixels), tokenizer)
