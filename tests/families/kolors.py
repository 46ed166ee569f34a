"""Kolors: the UNet of SDXL with one text encoder, a language model."""

import diffusers as df
import torch
import transformers as tr
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

from .. import components as c
from .base import PARTIAL, SD_NOISE, UNET, family
from .pag import PAG, perturbed

# The package itself has the pipelines only where sentencepiece is installed, for their tokenizer.
MODULE = "diffusers.pipelines.kolors.pipeline_kolors"
GUIDED = ("batch: uncond cond", UNET)


class PositionTokenizer:
    """A tokenizer that also numbers the tokens of every prompt, from behind what pads it."""

    def __init__(self) -> None:
        self.tokenizer = c.trained(tr.LlamaTokenizer, "<s>", "left", pad_token="</s>")

    def __call__(self, *args, **kwargs) -> tr.BatchEncoding:
        tokens = self.tokenizer(*args, **kwargs)
        tokens["position_ids"] = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return tokens


@family("kolors", "KolorsPipeline", *GUIDED, module=MODULE, max_sequence_length=16)
def kolors() -> dict:
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=c.VOCAB,
        hidden_size=c.WIDTH,
        ffn_hidden_size=c.WIDTH,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
        seq_length=16,
    )
    encoder = ChatGLMModel(config, empty_init=False).eval()
    for name, parameter in encoder.named_parameters():  # its norms leave theirs as it was found
        if "layernorm" in name:
            torch.nn.init.ones_(parameter)
    projected = {"projection_class_embeddings_input_dim": 6 * 8 + c.WIDTH}
    return {
        "vae": c.vae(),
        "text_encoder": encoder,
        "tokenizer": PositionTokenizer(),
        "unet": c.unet(**c.SDXL | projected),
        "scheduler": df.EulerDiscreteScheduler(**SD_NOISE),
    }


family(
    "kolors_img2img",
    "KolorsImg2ImgPipeline",
    *GUIDED,
    c.picture_call,
    module=f"{MODULE}_img2img",
    max_sequence_length=16,
    first_step=1,
    **PARTIAL,
)(kolors)


@family(
    "kolors_pag",
    "KolorsPAGPipeline",
    "batch: uncond cond perturbed",
    UNET,
    module="diffusers.pipelines.pag.pipeline_pag_kolors",
    max_sequence_length=16,
    **PAG,
)
def kolors_pag() -> dict:
    return perturbed(kolors())
