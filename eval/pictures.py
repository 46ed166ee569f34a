"""Pictures in files: read a batch at a time, written with the settings that made them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..guidance.files import atomic
from ..guidance.images import check_depth, image_files, read_image
from .metrics.images import to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TAG = "pilotage"  # the name of the text in a PNG that holds its settings


def picture_files(folder: str | Path) -> list[Path]:
    """Pictures directly in a folder (PNG, JPEG, WebP), sorted by name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no pictures.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if not (files := image_files(folder, SUFFIXES)):
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return files


def _decoded(path: Path, content: bytes) -> Image.Image:
    try:
        image = read_image(io.BytesIO(content), upright=False)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a picture ({error})") from error
    try:
        check_depth(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return image.convert("RGB")


def batches(
    files: Sequence[Path],
    batch_size: int = 32,
    resize: int | None = None,
    digest: Callable[[bytes], None] | None = None,
) -> Iterator[Tensor]:
    """Pictures as float32 (B, 3, H, W) in [0, 1], in the order of `files`.

    Transparency is dropped, as by PIL's ``convert("RGB")``.

    Args:
        files: Pictures, all of one size unless `resize` is given.
        batch_size: Pictures at once, B.
        resize: Side in pixels to which every picture is brought first (bicubic, not keeping the
            aspect ratio).
        digest: Called with what names and contents of the files hash to, e.g. the `update` of a
            hash object.

    Raises:
        ValueError: a file is damaged, deeper than 8 bits a channel, or of another size than the
            first.
    """
    size = None
    for start in range(0, len(files), batch_size):
        pictures = []
        for path in files[start : start + batch_size]:
            content = path.read_bytes()
            if digest is not None:
                digest(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
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


def save_picture(path: Path, image: Image.Image, made: dict[str, Any]) -> None:
    """Write a PNG, whole or not at all, with how it was made (ready for JSON) in its metadata."""
    info = PngInfo()
    info.add_text(TAG, json.dumps(made))
    with atomic(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def prompt_of(path: Path) -> str:
    """The prompt that `save_picture` kept in a PNG.

    Raises:
        ValueError: there is none.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.info[TAG])["prompt"]
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not carry its prompt: name a file of prompts") from error
