"""Picture files to tensors: sorted, a batch at a time, with errors that name the file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .images import to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture_files(folder: str | Path) -> list[Path]:
    """Pictures directly in a folder (PNG, JPEG, WebP), sorted by name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return files


def _decoded(path: Path, content: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or not a picture ({error})") from error
    if image.mode[0] in "IF":  # PIL would clip them to 8 bits, not scale them
        raise ValueError(f"{path}: mode {image.mode!r}: convert it to 8 bits a channel first")
    return image.convert("RGB")


def batches(
    files: Sequence[Path], batch_size: int = 32, resize: int | None = None, digest=None
) -> Iterator[Tensor]:
    """Pictures as float32 (B, 3, H, W) in [0, 1], in the order of `files`.

    Transparency is dropped, as by PIL's ``convert("RGB")``.

    Args:
        files: Pictures, all of one size unless `resize` is given.
        batch_size: Pictures at once, B.
        resize: Side in pixels to which every picture is brought first (bicubic, not keeping the
            aspect ratio).
        digest: A hash object updated with names and contents.

    Raises:
        ValueError: a file is damaged, deeper than 8 bits a channel, or of another size than the
            first.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if resize is not None and resize < 1:
        raise ValueError(f"resize must be >= 1 pixel, got {resize}")
    size = None
    for start in range(0, len(files), batch_size):
        pictures = []
        for path in files[start : start + batch_size]:
            content = path.read_bytes()
            if digest is not None:
                digest.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
            picture = _decoded(path, content)
            if resize is not None:
                picture = picture.resize((resize, resize), Image.Resampling.BICUBIC)
            size = size or picture.size
            if picture.size != size:
                raise ValueError(
                    f"{path} is {picture.width}x{picture.height}, but {files[0].name} is "
                    f"{size[0]}x{size[1]}: pictures of one size are needed, or resize them"
                )
            pictures.append(picture)
        yield to_tensor(pictures)


def load_pictures(folder: str | Path, resize: int | None = None) -> Tensor:
    """All pictures of a folder as float32 (N, 3, H, W) in [0, 1]; see `batches`."""
    return torch.cat(list(batches(picture_files(folder), resize=resize)))


def prompt_of(path: Path) -> str:
    """The prompt that ``pilotage generate`` keeps in a PNG.

    Raises:
        ValueError: there is none.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.info["pilotage"])["prompt"]
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not carry its prompt: name a file of prompts") from error
