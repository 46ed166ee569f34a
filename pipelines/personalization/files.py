"""Files of learned tokens, in the forms that diffusers, ComfyUI and A1111 read.

- ``sd`` (Stable Diffusion 1 and 2): one key, ``{"<token>": (k, d)}``;
- ``sdxl``: ``{"clip_l": (k, 768), "clip_g": (k, 1280)}``; diffusers takes it in two calls of
  ``load_textual_inversion``, one for each text encoder (`add_token` makes both).

ComfyUI and A1111 call a token by the name of its file, diffusers by its key. The name also stands
in the file's metadata, where no reader but `add_token` looks. k vectors are k tokens in diffusers:
``<token>``, ``<token>_1``, ...; its pipelines expand ``<token>`` in a prompt to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...guidance.files import atomic

SDXL_KEYS = ("clip_l", "clip_g")
TAKEN = (*SDXL_KEYS, "string_to_param", "string_to_token")


def check_name(token: str) -> None:
    """Raise ValueError unless readers take the name for a token's."""
    if not token or token.split() != [token] or token in TAKEN:
        raise ValueError(
            f"a token is one word without spaces and none of {', '.join(TAKEN)}, got {token!r}"
        )


def token_names(token: str, vectors: int) -> list[str]:
    """Names of the vectors, as diffusers gives them: <x>, <x>_1, <x>_2, ..."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def check_spelling(tokenizer: Any, token: str, vectors: int) -> None:
    """Raise ValueError unless prompts with the token bring in all its vectors.

    diffusers finds the further vectors by the name that the tokenizer makes of the token, and
    CLIP's tokenizers make everything lower case.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    spelt = token.lower() if normalizer is None else normalizer.normalize_str(token)
    if vectors > 1 and spelt != token:
        raise ValueError(
            f"{type(tokenizer).__name__} reads {token!r} as {spelt!r}, so diffusers would find "
            f"only the first of its {vectors} vectors: call it {spelt!r}"
        )


def save_token(path: str | Path, vectors: Sequence[Tensor], token: str) -> None:
    """Writes a token, whole or not at all.

    Args:
        path: File to write, usually ``learned_embeds.safetensors``.
        vectors: (k, d) for each text encoder: one tensor for Stable Diffusion 1 and 2, two
            (CLIP-L, OpenCLIP-G) for XL.
        token: Its name in prompts.

    Raises:
        ValueError: a name that readers would take for something else.
    """
    check_name(token)
    keys = (token,) if len(vectors) == 1 else SDXL_KEYS
    tensors = {key: rows.cpu().contiguous() for key, rows in zip(keys, vectors, strict=True)}
    with atomic(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={"token": token})


def text_encoders(pipe: Any) -> list[tuple[str, Any, Any]]:
    """Suffix of its name ("" or "_2"), text encoder and tokenizer, of a pipeline's one or two."""
    return [
        (suffix, encoder, getattr(pipe, f"tokenizer{suffix}", None))
        for suffix in ("", "_2")
        if (encoder := getattr(pipe, f"text_encoder{suffix}", None)) is not None
    ]


def add_token(pipe: Any, path: str | Path, token: str | None = None) -> list[str]:
    """Teaches a pipeline the token of a file, through diffusers' ``load_textual_inversion``.

    Args:
        pipe: A pipeline with one or two CLIP text encoders, quantized or not.
        path: A file of `save_token`, or of another trainer in the same form.
        token: Its name in prompts; default: the one in the file.

    Returns:
        The names of its vectors: ``["<x>", "<x>_1", ...]``.

    Raises:
        ValueError: a damaged file, or one for another pipeline; no name, or one that a tokenizer
            knows already or spells otherwise. Nothing is changed then.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            name = token or (file.metadata() or {}).get("token")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    parts = text_encoders(pipe)
    keys = SDXL_KEYS if len(parts) == 2 else tuple(tensors)
    widths = [encoder.get_input_embeddings().weight.shape[1] for _, encoder, _ in parts]
    given = {key: tensor.shape[-1] for key, tensor in tensors.items()}
    if set(given) != set(keys) or [given[key] for key in keys] != widths:
        raise ValueError(
            f"add_token: vectors of width {given} do not fit {type(pipe).__name__}, "
            f"whose text encoders have {widths}"
        )
    if not (name := name or (keys[0] if len(keys) == 1 else None)):
        raise ValueError(f"add_token: {path} has no name for the token: pass token=")
    names = token_names(name, len(tensors[keys[0]].view(-1, widths[0])))
    for _, _, tokenizer in parts:
        check_spelling(tokenizer, name, len(names))
    for key, (_, encoder, tokenizer) in zip(keys, parts, strict=True):
        with torch.no_grad():
            pipe.load_textual_inversion(
                {name: tensors[key]}, token=name, text_encoder=encoder, tokenizer=tokenizer
            )
    return names
