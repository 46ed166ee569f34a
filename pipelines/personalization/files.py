"""Files of learned tokens, in the forms that diffusers, ComfyUI and A1111 read.

- ``sd`` (Stable Diffusion 1 and 2): one key, ``{"<token>": (k, d)}``;
- ``sdxl``: ``{"clip_l": (k, 768), "clip_g": (k, 1280)}``; diffusers takes it in two calls of
  ``load_textual_inversion``, one for each text encoder (`add_token` makes both).

ComfyUI and A1111 call a token by the name of its file, diffusers by its key. The name also stands
in the file's metadata, where no reader but `add_token` looks. k vectors are k tokens in diffusers:
``<token>``, ``<token>_1``, ...; its pipelines expand ``<token>`` in a prompt to all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from accelerate.hooks import CpuOffload
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


def loading_lines(path: str | Path, token: str, encoders: int) -> list[str]:
    """Lines of Python that load a token file into a stock diffusers pipeline ``pipe``."""
    if encoders == 1:
        return [f"pipe.load_textual_inversion({str(path)!r}, token={token!r})"]
    return [
        f'pipe.load_textual_inversion(safetensors.torch.load_file({str(path)!r})["{key}"], '
        f"token={token!r}, text_encoder=pipe.text_encoder{suffix}, "
        f"tokenizer=pipe.tokenizer{suffix})"
        for key, suffix in zip(SDXL_KEYS, ("", "_2"), strict=True)
    ]


def load_token(path: str | Path) -> tuple[str | None, tuple[Tensor, ...]]:
    """What a token file holds.

    Args:
        path: A file of `save_token`, or of another trainer in the same form.

    Returns:
        The token's name, None if the file has none; its vectors (k, d) for each text encoder,
        as they are stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, one of another form, or vectors that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no token file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            name = (file.metadata() or {}).get("token")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if set(tensors) == set(SDXL_KEYS):
        parts = tuple(tensors[key] for key in SDXL_KEYS)
    elif len(tensors) == 1 and not set(tensors) & set(TAKEN):
        name, parts = name or next(iter(tensors)), tuple(tensors.values())
    else:
        raise ValueError(
            f"{path} is no token file: it holds {', '.join(sorted(tensors)) or 'none'}"
        )
    parts = tuple(part[None] if part.ndim == 1 else part for part in parts)
    if any(part.ndim != 2 or not part.isfinite().all() for part in parts):
        raise ValueError(f"the vectors in {path} are not finite rows of numbers")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"{path} has {' and '.join(str(len(p)) for p in parts)} vectors of a token"
        )
    return name, parts


def add_token(pipe: Any, path: str | Path, token: str | None = None) -> list[str]:
    """Teaches a pipeline the token of a file, through diffusers' ``load_textual_inversion``.

    Args:
        pipe: A pipeline with one or two CLIP text encoders, quantized or not, its models offloaded
            (``enable_model_cpu_offload``) or not.
        path: A file of `save_token`, or of another trainer in the same form.
        token: Its name in prompts; default: the one in the file.

    Returns:
        The names of its vectors: ``["<x>", "<x>_1", ...]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one for another pipeline; no name, or one that a tokenizer
            knows already or spells otherwise; offloading in groups or sequentially. Nothing is
            changed then.
    """
    own, vectors = load_token(path)
    parts = text_encoders(pipe)
    widths = [encoder.get_input_embeddings().weight.shape[1] for _, encoder, _ in parts]
    if (given := [part.shape[1] for part in vectors]) != widths:
        raise ValueError(
            f"add_token: vectors of width {given} do not fit {type(pipe).__name__}, "
            f"whose text encoders have {widths}"
        )
    if not (name := token or own):
        raise ValueError(f"add_token: {path} has no name for the token: pass token=")
    names = token_names(name, len(vectors[0]))
    for _, _, tokenizer in parts:
        check_spelling(tokenizer, name, len(names))
        if taken := [n for n in names if n in tokenizer.get_vocab()]:
            raise ValueError(f"{taken[0]!r} is already in the tokenizer's vocabulary: pass token=")
    with _not_offloaded(pipe), torch.no_grad():
        for rows, (_, encoder, tokenizer) in zip(vectors, parts, strict=True):
            pipe.load_textual_inversion(
                {name: rows}, token=name, text_encoder=encoder, tokenizer=tokenizer
            )
    return names


def remove_token(pipe: Any, token: str) -> list[str]:
    """Undoes `add_token`: every vector of a token leaves tokenizers and text encoders.

    diffusers' ``unload_textual_inversion`` removes single vectors: of a token of several, the
    others stay, and loading it again fails.

    Args:
        pipe: The pipeline.
        token: The token's name.

    Returns:
        The names of the vectors that were removed.

    Raises:
        ValueError: the pipeline has no such token, or is offloaded in groups or sequentially.
    """
    parts = text_encoders(pipe)
    known = [set(t.get_added_vocab()) - set(t.all_special_tokens) for _, _, t in parts]
    added = set.intersection(*known) if known else set()
    if token not in added:
        raise ValueError(
            f"{type(pipe).__name__} has no token {token!r} to remove; there are: "
            f"{', '.join(sorted(added)) or 'none'}"
        )
    count = 1
    while f"{token}_{count}" in added:
        count += 1
    names = token_names(token, count)
    with _not_offloaded(pipe):
        for _, encoder, tokenizer in parts:
            pipe.unload_textual_inversion(names, tokenizer=tokenizer, text_encoder=encoder)
    return names


@contextlib.contextmanager
def _not_offloaded(pipe: Any) -> Iterator[None]:
    """Within this context the pipeline's models are not offloaded; afterwards they are as before.

    diffusers does so too, but in the end would offload to where the text encoder lies, the CPU.
    """
    networks = [x for x in pipe.components.values() if isinstance(x, torch.nn.Module)]
    hooked = any(hasattr(module, "_diffusers_hook") for x in networks for module in x.modules())
    encoders = [encoder for _, encoder, _ in text_encoders(pipe)]
    if hooked or any(p.is_meta for encoder in encoders for p in encoder.parameters()):
        raise ValueError(
            f"{type(pipe).__name__} is offloaded in groups or sequentially: load or remove tokens "
            "before enable_group_offload() or enable_sequential_cpu_offload()"
        )
    if not any(isinstance(getattr(x, "_hf_hook", None), CpuOffload) for x in networks):
        yield
        return
    device = pipe._execution_device
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        pipe.enable_model_cpu_offload(device=device)
