"""Files of learned tokens, in the forms that diffusers, ComfyUI and A1111 read.

- ``sd`` (Stable Diffusion 1 and 2): one key, ``{"<token>": (k, d)}``;
- ``sdxl``: ``{"clip_l": (k, 768), "clip_g": (k, 1280)}``; diffusers takes it in two calls of
  ``load_textual_inversion``, one for each text encoder (`add_token` makes both).

ComfyUI and A1111 call a token by the name of its file, diffusers by its key. The name also stands
in the file's metadata, where no reader but `load_token` looks. k vectors are k tokens in diffusers:
``<token>``, ``<token>_1``, ...; its pipelines expand ``<token>`` in a prompt to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ...guidance.files import atomic

SDXL_KEYS = ("clip_l", "clip_g")
TAKEN = (*SDXL_KEYS, "string_to_param", "string_to_token")


@dataclass(frozen=True)
class Token:
    """A learned token: its name, or None, and its vectors (k, d) for each text encoder."""

    name: str | None
    vectors: tuple[Tensor, ...]


def check_name(token: str) -> None:
    """Raise unless readers take the name for a token's.

    Raises:
        ValueError: what is wrong with it.
    """
    if not token or token.split() != [token] or token in TAKEN:
        raise ValueError(
            f"a token is one word without spaces and none of {', '.join(TAKEN)}, got {token!r}"
        )


def token_names(token: str, vectors: int) -> list[str]:
    """Names of the vectors, as diffusers gives them: <x>, <x>_1, <x>_2, ..."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def check_spelling(tokenizer: Any, token: str, vectors: int) -> None:
    """Raise unless prompts with the token bring in all its vectors.

    diffusers finds the further vectors by the name that the tokenizer makes of the token, and
    CLIP's tokenizers make everything lower case.

    Raises:
        ValueError: the tokenizer spells a token of several vectors in another way.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    spelt = token.lower() if normalizer is None else normalizer.normalize_str(token)
    if vectors > 1 and spelt != token:
        raise ValueError(
            f"{type(tokenizer).__name__} reads {token!r} as {spelt!r}, so diffusers would find "
            f"only the first of its {vectors} vectors: call it {spelt!r}"
        )


def _checked(vectors: Sequence[Tensor], origin: str) -> tuple[Tensor, ...]:
    """Vectors as (k, d), the same k for every encoder.

    Raises:
        ValueError: other shapes, no vector, integers, or NaN or infinite entries.
    """
    rows = tuple(v.detach()[None] if v.ndim == 1 else v.detach() for v in vectors)
    shapes = [tuple(v.shape) for v in vectors]
    if any(v.ndim != 2 or not v.numel() for v in rows) or len({len(v) for v in rows}) != 1:
        raise ValueError(
            f"{origin}: expected vectors (k, d), k alike for every text encoder, got {shapes}"
        )
    if not all(v.is_floating_point() and v.isfinite().all() for v in rows):
        raise ValueError(f"{origin}: the vectors must be finite floating-point numbers")
    return rows


def save_token(path: str | Path, vectors: Tensor | Sequence[Tensor], token: str) -> Path:
    """Writes a token, whole or not at all; returns the path.

    Args:
        path: File to write, usually ``learned_embeds.safetensors``.
        vectors: (k, d) or (d,): one tensor for Stable Diffusion 1 and 2, two (CLIP-L, OpenCLIP-G)
            for XL.
        token: Its name in prompts.

    Raises:
        ValueError: a wrong number or shape of tensors, a name that readers would take for
            something else.
    """
    check_name(token)
    rows = _checked([vectors] if isinstance(vectors, Tensor) else vectors, "save_token")
    if len(rows) > len(SDXL_KEYS):
        raise ValueError(f"save_token: expected one tensor, or two for SDXL, got {len(rows)}")
    keys = (token,) if len(rows) == 1 else SDXL_KEYS
    tensors = {key: row.cpu().contiguous().clone() for key, row in zip(keys, rows, strict=True)}
    with atomic(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={"token": token})
    return Path(path)


def load_token(path: str | Path) -> Token:
    """Reads a file of `save_token`, or of another trainer in the same form.

    Raises:
        ValueError: a damaged file, or keys of another form.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            name = (file.metadata() or {}).get("token")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if set(tensors) == set(SDXL_KEYS):
        return Token(name, _checked([tensors[key] for key in SDXL_KEYS], str(path)))
    if len(tensors) != 1:
        raise ValueError(
            f"{path}: expected one key or {' and '.join(SDXL_KEYS)}, got {', '.join(tensors)}"
        )
    ((key, rows),) = tensors.items()
    return Token(key, _checked([rows], str(path)))


def text_encoders(pipe: Any) -> list[tuple[str, Any, Any]]:
    """Suffix of its name ("" or "_2"), text encoder and tokenizer, of a pipeline's one or two."""
    return [
        (suffix, encoder, getattr(pipe, f"tokenizer{suffix}", None))
        for suffix in ("", "_2")
        if (encoder := getattr(pipe, f"text_encoder{suffix}", None)) is not None
    ]


def add_token(
    pipe: Any, source: str | Path | Tensor | Sequence[Tensor], token: str | None = None
) -> list[str]:
    """Teaches a pipeline a token, through diffusers' ``load_textual_inversion``.

    Args:
        pipe: A pipeline with one or two CLIP text encoders, quantized or not.
        source: A file, or vectors (k, d) for each text encoder.
        token: Its name in prompts; default: the one in the file.

    Returns:
        The names of its vectors: ``["<x>", "<x>_1", ...]``.

    Raises:
        ValueError: no name, a name that is in a vocabulary or spelt otherwise by a tokenizer,
            vectors of another width or number than the pipeline's encoders. Nothing is changed
            then.
    """
    if not isinstance(pipe, TextualInversionLoaderMixin):
        raise ValueError(f"add_token: {type(pipe).__name__} takes no textual inversions")
    if isinstance(source, (str, Path)):
        known = load_token(source)
    else:
        known = Token(None, _checked([source] if isinstance(source, Tensor) else source, "vectors"))
    name = token or known.name
    if not name:
        raise ValueError("add_token: the source has no name for the token: pass token=")
    parts = text_encoders(pipe)
    widths = [encoder.get_input_embeddings().weight.shape[1] for _, encoder, _ in parts]
    given = [v.shape[1] for v in known.vectors]
    if given != widths:
        raise ValueError(
            f"add_token: vectors of width {given} do not fit {type(pipe).__name__}, "
            f"whose text encoders have {widths}"
        )
    names = token_names(name, len(known.vectors[0]))
    for _, _, tokenizer in parts:
        check_spelling(tokenizer, name, len(names))
        if taken := [n for n in names if n in tokenizer.get_vocab()]:
            raise ValueError(f"add_token: already in the vocabulary: {', '.join(taken)}")
    for (_, encoder, tokenizer), vectors in zip(parts, known.vectors, strict=True):
        with torch.no_grad():
            pipe.load_textual_inversion(
                {name: vectors}, token=name, text_encoder=encoder, tokenizer=tokenizer
            )
    return names
