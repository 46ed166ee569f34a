"""Tiny real components for pipelines (tokenizers, text encoders, autoencoders, UNets), and inputs.

Everything is built from a config with random weights, nothing is downloaded. The tokenizers are the
classes which the published pipelines use, trained here on the prompts of the tests.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

import diffusers as df
import torch
import transformers as tr
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn

PROMPTS = (
    "a red cat on a green hill",
    "three small boats at dawn",
    "an old lighthouse in the rain, oil painting",
    "a bowl of ripe lemons",
    "two foxes asleep under a birch",
    "a paper kite above the harbour",
)
NEGATIVES = (
    "blurry",
    "low quality, text",
    "too dark",
    "deformed hands",
    "washed out colours",
    "a frame around it",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (*PROMPTS, *NEGATIVES, "abcdefghijklmnopqrstuvwxyz 0123456789 <>|{}\n:,._")
END = "</w>"
VOCAB = 320
WIDTH = 32
STEPS = 3
LOUD = ("attn2.to_v", "attn2.to_out.0.weight", "add_v_proj", "time_step_proj")


def wake(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Draws the parameters that start at zero (adaLN-zero gates, zero convolutions, biases) anew.

    Without it a fresh transformer returns the same for every input and every condition. Padding
    tokens start as uninitialised memory in some models, so they are drawn whatever they hold.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("pad_token") or not parameter.abs().max() > 1e-3:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def amplify(module: nn.Module, names: tuple[str, ...], gain: float) -> nn.Module:
    """Multiplies the weights whose name contains one of `names`, to make a weak path audible."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in names):
                parameter.mul_(gain)
    return module


def condition_loudly(network: nn.Module) -> nn.Module:
    """Random attention hardly tells prompts apart: raises what text writes into the picture."""
    return amplify(network, LOUD, 4.0)


@cache
def pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The letters and the merges of a byte-pair encoding trained on the prompts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    letters = sorted(token for token in bpe.get_vocab() if len(token) == 1)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return tuple(letters), tuple((a, b) for a, b in merges)


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def clip_tokenizer():
    """Every piece inside a word and at its end.

    Like the next two it derives its vocabulary: trainers that mark words break ties at random.
    """
    letters, merges = pieces()
    inner = [*letters, *(a + b for a, b in merges)]
    special = ("<|startoftext|>", "<|endoftext|>")
    vocab = vocabulary(*special, *inner, *(piece + END for piece in inner))
    pairs = [pair for a, b in merges for pair in ((a, b), (a, b + END))]
    if tr.__version__ < "5":  # the lower bound of pyproject.toml: from files only
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
            files[0].write_text(json.dumps(vocab))
            files[1].write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]))
            return tr.CLIPTokenizer(*map(str, files), model_max_length=77)
    return tr.CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=77)


def t5_tokenizer():
    letters, merges = pieces()
    inner = [*letters, *(a + b for a, b in merges)]
    scored = [(mark + piece, -1.0 / len(piece)) for piece in inner for mark in ("", "▁")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return tr.T5Tokenizer(vocab=special + scored, extra_ids=0, model_max_length=64)


def bert_tokenizer():
    letters, merges = pieces()
    inner = [*letters, *(a + b for a, b in merges)]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocab = vocabulary(*special, *inner, *("##" + piece for piece in inner))
    return tr.BertTokenizer(vocab=vocab, model_max_length=77)


def trained(cls: type, prefix: str, side: str = "right", **attributes):
    """A tokenizer of class `cls` trained on the prompts; it puts the token `prefix` in front.

    The prefix keeps an empty negative prompt from having no token at all.
    """
    result = cls().train_new_from_iterator(CORPUS, 280, show_progress=False)
    result.padding_side, result.model_max_length = side, 600
    for name, value in attributes.items():
        setattr(result, name, value)
    special = [(prefix, result.convert_tokens_to_ids(prefix))]
    result.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[prefix, "$A"], special_tokens=special
    )
    return result


def gemma_tokenizer():
    return trained(tr.GemmaTokenizer, "<bos>")


def llama_tokenizer():
    return trained(tr.LlamaTokenizer, "<s>", pad_token="</s>")


def qwen_tokenizer(side: str = "right"):
    return trained(tr.Qwen2Tokenizer, "<|endoftext|>", side, chat_template=CHAT_TEMPLATE)


def texts(*pairs: tuple) -> dict:
    """Text encoders and their tokenizers under the names which pipelines give them."""
    parts = {}
    for i, (encoder, tokenizer) in enumerate(pairs):
        suffix = f"_{i + 1}" if i else ""
        parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
    return parts


def clip(width: int = 16, projection: bool = False) -> tuple:
    config = tr.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    cls = tr.CLIPTextModelWithProjection if projection else tr.CLIPTextModel
    return cls(config).eval(), clip_tokenizer()


def t5(umt5: bool = False) -> tuple:
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH}
    sizes |= {"num_layers": 1, "num_heads": 2}
    if umt5:
        encoder = tr.UMT5EncoderModel(tr.UMT5Config(**sizes))
    else:
        encoder = tr.T5EncoderModel(tr.T5Config(**sizes))
    return encoder.eval(), t5_tokenizer()


def bert() -> tuple:
    config = tr.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    return tr.BertModel(config).eval(), bert_tokenizer()


def language_model(model: type, config: type, tokenizer, layers: int = 2) -> tuple:
    """A decoder-only language model used as text encoder (Gemma, Llama, GLM, Qwen)."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    return model(config(**sizes)).eval(), tokenizer


def qwen_vl() -> nn.Module:
    rope = {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e4}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = tr.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tr.Qwen2_5_VLForConditionalGeneration(config).eval()


def vae(channels: int = 4, blocks: int = 2, **config) -> df.AutoencoderKL:
    """An image autoencoder that scales by 2 ** (blocks - 1)."""
    return df.AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
        **config,
    ).eval()


def flow_vae(channels: int = 4, blocks: int = 2) -> df.AutoencoderKL:
    """The same with the shift which flow models use, and without the quantisation convolutions."""
    config = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(channels, blocks, shift_factor=0.0609, scaling_factor=1.5305, **config)


def movq() -> df.VQModel:
    return df.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()


def dc_vae() -> nn.Module:
    model = df.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        scaling_factor=0.41407,
    )
    return model.eval()


def qwen_vae() -> nn.Module:
    model = df.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return model.eval()


def wan_vae() -> nn.Module:
    model = df.AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return model.eval()


def ltx_vae() -> nn.Module:
    model = df.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return model.eval()


def cogvideox_vae() -> nn.Module:
    model = df.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return model.eval()


def mochi_vae() -> nn.Module:
    model = df.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return model.eval()


def hunyuan_video_vae() -> nn.Module:
    model = df.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return model.eval()


def paella() -> nn.Module:
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    return PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8).eval()


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SDXL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "cross_attention_dim": 2 * 16,
}


def unet(**config) -> df.UNet2DConditionModel:
    config = (
        UNET | {"sample_size": 8, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")} | config
    )
    return condition_loudly(wake(df.UNet2DConditionModel(**config)))


def controlnet(**config) -> df.ControlNetModel:
    extra = {"conditioning_embedding_out_channels": (8, 16)}
    return wake(df.ControlNetModel(**(UNET | extra | config)))


def generators(batch: int) -> list[torch.Generator]:
    """One generator per sample, so that a sample's noise does not depend on its batch mates."""
    return [torch.Generator().manual_seed(i) for i in range(batch)]


def cycle(texts: tuple[str, ...], batch: int) -> list[str]:
    """The first `batch` texts, numbered once they start again."""
    n = len(texts)
    return [texts[i % n] + (f" {i // n}" if i >= n else "") for i in range(batch)]


def noise(*shape: int, seed: int = 100, low: float | None = None) -> torch.Tensor:
    """Seeded noise for embeddings; uniform from `low` to 1 for pictures."""
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator)
    return low + (1 - low) * torch.rand(shape, generator=generator)


def per_sample(batch: int, *shape: int, seed: int = 100, low: float | None = None) -> torch.Tensor:
    """The same with one seed per sample: the first rows do not depend on the batch size."""
    return torch.stack([noise(*shape, seed=seed + i, low=low) for i in range(batch)])


def text_call(batch: int, negative: bool, **extra) -> dict:
    """The call of a text-to-image pipeline; `extra` adds to it and overrides it."""
    call = {
        "prompt": cycle(PROMPTS, batch),
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "generator": generators(batch),
        "output_type": "latent",
        "height": 16,
        "width": 16,
    }
    if negative:
        call["negative_prompt"] = cycle(NEGATIVES, batch)
    call |= extra
    return {name: value for name, value in call.items() if value is not None}


def picture_call(batch: int, negative: bool, **extra) -> dict:
    """A call with one picture per sample."""
    return text_call(batch, negative, **extra) | {"image": per_sample(batch, 3, 16, 16, low=0.0)}


def inpaint_call(batch: int, negative: bool, **extra) -> dict:
    mask = per_sample(batch, 1, 16, 16, seed=300, low=0.0) > 0.5
    return picture_call(batch, negative, **extra) | {"mask_image": mask.float()}


def image_embeds_call(batch: int, negative: bool, **extra) -> dict:
    """Kandinsky 2.2's decoder: negative embeddings are not optional, zeros stand for none."""
    unwanted = per_sample(batch, 16, seed=200)
    embeds = {
        "image_embeds": per_sample(batch, 16),
        "negative_image_embeds": unwanted if negative else torch.zeros_like(unwanted),
    }
    return text_call(batch, False, prompt=None, **embeds, **extra)


def cascade_call(batch: int, negative: bool, **extra) -> dict:
    embeddings = per_sample(batch, 4, 2, 2)
    call = text_call(batch, negative, height=None, width=None, **extra)
    return call | {"image_embeddings": embeddings}


def class_call(batch: int, negative: bool, **extra) -> dict:
    """DiT: class labels, whose only negative is the null class; no latents as output."""
    labels = [(207 + 31 * i) % 1000 for i in range(batch)]
    free = {"prompt": None, "height": None, "width": None, "output_type": "pt"}
    return text_call(batch, False, **free, **extra) | {"class_labels": labels}


# Stable Diffusion's relatives.


def clip_vision(size: int = 16, width: int = 16) -> nn.Module:
    """An image encoder for pictures of `size` x `size`, four patches each."""
    config = tr.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
        initializer_range=0.2,
    )
    return tr.CLIPVisionModelWithProjection(config).eval()


def ip_adapter(unet: nn.Module, tokens: int = 4, width: int = 16) -> dict:
    """Random weights of an IP-Adapter for a UNet, in the layout its loader reads."""
    generator = torch.Generator().manual_seed(0)
    cross = unet.config.cross_attention_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    projections, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            projections[f"{key}.to_k_ip.weight"] = draw(hidden, cross)
            projections[f"{key}.to_v_ip.weight"] = draw(hidden, cross)
            key += 2
    image_projection = {
        "proj.weight": draw(tokens * cross, width),
        "proj.bias": draw(tokens * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return {"image_proj": image_projection, "ip_adapter": projections}


def t2i_adapter(kind: str, downscale_factor: int) -> df.T2IAdapter:
    sizes = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": downscale_factor}
    return wake(df.T2IAdapter(in_channels=3, adapter_type=kind, **sizes))


# For tests/families/images.py


def certain(vae: nn.Module, mean: float = 128.0, gain: float = 32.0) -> nn.Module:
    """An autoencoder whose posterior is a point, for pipelines that draw from it unseeded.

    Its latents lie around `mean`, where the smallest standard deviation that diffusers allows,
    exp(-15), is lost in rounding; `gain` spreads them, and the scaling factor takes it back.
    """
    channels = vae.config.latent_channels
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    with torch.no_grad():
        last.weight[:channels] *= gain
        last.bias[:channels] = mean
        last.weight[channels:] = 0.0
        last.bias[channels:] = -30.0
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / gain)
    return vae


def allegro_vae() -> nn.Module:
    model = df.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return model.eval()


def magvit_vae() -> nn.Module:
    blocks = ("Spatial{}Block3D", *("SpatialTemporal{}Block3D",) * 3)
    model = df.AutoencoderKLMagvit(
        down_block_types=tuple(block.format("Down") for block in blocks),
        up_block_types=tuple(block.format("Up") for block in blocks),
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return model.eval()


# Of Kandinsky's priors and decoders, and of the audio pipelines.


def xlm_roberta_tokenizer():
    letters, merges = pieces()
    inner = [*letters, *(a + b for a, b in merges)]
    scored = [(mark + piece, -1.0 / len(piece)) for piece in inner for mark in ("", "▁")]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = [*special, ("▁", -2.0), *scored, ("<mask>", 0.0)]
    return tr.XLMRobertaTokenizer(vocab=vocab, model_max_length=77)


def siglip(size: int = 16) -> tuple:
    """An encoder of pictures, and what prepares them for it."""
    config = tr.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=8,
    )
    processor = tr.SiglipImageProcessor(size={"height": size, "width": size})
    return tr.SiglipVisionModel(config).eval(), processor


def hunyuan15_vae() -> nn.Module:
    model = df.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return model.eval()


def gemma3() -> tuple:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = tr.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    tokenizer = trained(tr.GemmaTokenizer, "<bos>", "left")
    return tr.Gemma3ForConditionalGeneration(config).eval(), tokenizer


def ltx2_vae() -> nn.Module:
    model = df.AutoencoderKLLTX2Video(
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
        upsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        patch_size=1,
    )
    return model.eval()


def ltx2_audio_vae() -> nn.Module:
    model = df.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    return model.eval()


def photo(seed: int = 0, size: int = 32) -> Image.Image:
    values = (noise(size, size, 3, seed=seed, low=0.0) * 255).to(torch.uint8)
    return Image.fromarray(values.numpy())
