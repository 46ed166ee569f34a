"""How well pictures show what their prompts say.

`CLIPAlignment` is the CLIP score of published figures (Hessel et al. 2021, arXiv:2104.08718, in
the form 100 max(cos, 0); figures compare for the same CLIP model only). `RidgeAlignment` needs no
hub: a linear map from image features to sentence vectors, fitted on captioned pictures. It is much
weaker than CLIP, knows only what it was fitted on, and its values compare with its own only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .hub import CLIPFeatures, from_pretrained
from .ridge import RidgeAlignment

__all__ = ["Alignment", "CLIPAlignment", "CLIPWithText", "RidgeAlignment", "load_scorer"]


class Alignment(Protocol):
    """What scores pictures by their prompts.

    Attributes:
        name: What it is, for reports.
    """

    name: str

    def score(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """A value a picture, shape (N,), of pictures (N, 3, H, W) in [0, 1] and N texts."""


class CLIPWithText(CLIPFeatures):
    """A CLIP model's embeddings of pictures and of texts.

    Args:
        model: Folder or hub name.
        options: For `from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: see `hub.from_pretrained`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        from transformers import AutoTokenizer

        self.tokenizer = from_pretrained(AutoTokenizer, model)
        self.told: set[str] = set()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of N texts, not normalised, with shape (N, D).

        What is longer than the model's context (77 tokens, with the two that begin and end it) is
        cut off, as for published figures; a warning names each such prompt once.
        """
        most = self.network.config.text_config.max_position_embeddings
        for prompt in dict.fromkeys(prompts):
            if (
                prompt not in self.told
                and (count := len(self.tokenizer(prompt)["input_ids"])) > most
            ):
                self.told.add(prompt)
                warnings.warn(
                    f"CLIP reads {most} tokens, this prompt has {count} and is scored by its "
                    f"beginning: {prompt!r}",
                    stacklevel=2,
                )
        text = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(self.network.device)
        return self.network.text_projection(self.network.text_model(**text).pooler_output).float()

    @torch.inference_mode()
    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each picture and its prompt, shape (N,).

        Raises:
            ValueError: as many prompts as pictures are needed.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures, but {len(prompts)} prompts")
        return nn.functional.cosine_similarity(self(images), self.texts(prompts))


class CLIPAlignment(CLIPWithText):
    """CLIP score."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 max(cos, 0) of each picture and its prompt, shape (N,).

        Args:
            images: Pictures, with shape (N, 3, H, W), in [0, 1].
            prompts: N texts; of longer ones than the model's context, see `texts`.
        """
        return 100 * self.cosines(images, prompts).clamp(min=0)


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
