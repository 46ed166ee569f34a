"""How well pictures show what their prompts say.

`CLIPAlignment` is the CLIP score of published figures (Hessel et al. 2021, arXiv:2104.08718, in
the form 100 max(cos, 0); figures compare for the same CLIP model only). `RidgeAlignment` needs no
hub: a linear map from image features to sentence vectors, fitted on captioned pictures. It is much
weaker than CLIP, knows only what it was fitted on, and its values compare with its own only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .extractors import HubFeatures, from_pretrained
from .ridge import RidgeAlignment

__all__ = ["Alignment", "CLIPAlignment", "RidgeAlignment", "load_scorer"]


class Alignment(Protocol):
    """What scores pictures by their prompts.

    Attributes:
        name: What it is, for reports.
    """

    name: str

    def score(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """A value a picture, shape (N,), of pictures (N, 3, H, W) in [0, 1] and N texts."""


class CLIPAlignment(HubFeatures):
    """CLIP score.

    Args:
        model: Folder or hub name.

    Raises:
        FileNotFoundError, ValueError: see `extractors.from_pretrained`.
    """

    def __init__(self, model: str) -> None:
        super().__init__("clip", model)
        from transformers import AutoTokenizer

        self.tokenizer = from_pretrained(AutoTokenizer, model)

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 max(cos, 0) of each picture and its prompt, shape (N,).

        Args:
            images: Pictures, with shape (N, 3, H, W), in [0, 1].
            prompts: N texts; more than the model's context is cut off, as for published figures.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures, but {len(prompts)} prompts")
        text = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.network.device)
        vectors = self.network.text_projection(self.network.text_model(**text).pooler_output)
        return 100 * torch.cosine_similarity(self(images), vectors.float()).clamp(min=0)


def load_scorer(
    clip: str | None = None, ridge: Path | None = None
) -> CLIPAlignment | RidgeAlignment:
    """The scorer of a CLIP folder or hub name, or of the file of a ridge map; one of the two.

    Raises:
        ValueError: neither or both are named.
    """
    if clip is not None and ridge is None:
        return CLIPAlignment(clip)
    if ridge is not None and clip is None:
        return RidgeAlignment.load(ridge)
    raise ValueError("name one of --clip and --ridge")
