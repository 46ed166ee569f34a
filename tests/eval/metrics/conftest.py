"""Folders of tiny models with random weights, in the form in which real ones are published."""

import json

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2}
CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Folder of a CLIP model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = [chr(c) for c in range(97, 123)]
    vocabulary = [*words, *(w + "</w>" for w in words), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=8,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        **SIZES,
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SIZES)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(**CROP).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(image_size=16, patch_size=8, **SIZES | {"hidden_size": 10})
    ).save_pretrained(folder)
    return str(folder)
