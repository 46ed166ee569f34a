"""Image files: the ones of a folder in a fixed order, decoded, as tensors. PIL does the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageOps
from torch import Tensor

ORIENTATION = 0x0112  # of EXIF; from 5 on it swaps the axes
GREY = ("1", "L", "LA", "La")  # modes without colour
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def image_files(
    folder: str | Path, suffixes: Sequence[str] = SUFFIXES, nested: bool = False
) -> list[Path]:
    """The image files of a folder, sorted by path; empty if there are none or no such folder.

    Hidden files are left out: among them are those that an interrupted writer leaves behind.

    Args:
        folder: Where they lie.
        suffixes: Ends of their names, in lower case; names are compared without regard to case.
        nested: Take those in subfolders too, at any depth.
    """
    folder = Path(folder)
    found = folder.rglob("*") if nested else folder.glob("*")
    known = (f for f in found if f.suffix.lower() in suffixes and not f.name.startswith("."))
    return sorted(file for file in known if file.is_file())


def read_image(source: str | Path | BinaryIO | Image.Image, upright: bool = True) -> Image.Image:
    """An image of any mode, decoded.

    Args:
        source: A file, an open file, or an image.
        upright: Turn it as its EXIF orientation says.

    Raises:
        ValueError: it is damaged, no image, or too large for PIL. The message gives the reason
            only: callers add the name of the file.
    """
    try:
        if isinstance(source, Image.Image):
            image = source
            image.load()
        else:
            with Image.open(source) as image:
                image.load()
        return ImageOps.exif_transpose(image) if upright else image
    except (
        *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),  # PIL's, by format
        *(TypeError, AttributeError),  # no file at all
    ) as error:
        raise ValueError(str(error)) from error


def read_head(file: str | Path) -> tuple[int, int, bool]:
    """Height and width of an image file, upright, and whether it has colour; nothing is decoded.

    Raises:
        ValueError: it is no image; see `read_image`.
    """
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            width, height = image.size
            return (*((width, height) if turned else (height, width)), image.mode not in GREY)
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def on_white(image: Image.Image, colour: bool = True, size: int | None = None) -> Image.Image:
    """An image of 8 bits a channel as mode RGB (L without colour), transparency on white.

    Args:
        image: Of any mode that `check_depth` passes.
        colour: RGB rather than L.
        size: Side in pixels of the centred square that it is cut and resized to (bicubic); None
            keeps it as it is.

    Raises:
        ValueError: see `check_depth`.
    """
    check_depth(image)
    mode = "RGB" if colour else "L"
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    return image if size is None else ImageOps.fit(image, (size, size))


def check_depth(image: Image.Image) -> None:
    """Refuse images deeper than 8 bits a channel: PIL would clip their values, not scale them.

    Raises:
        ValueError: the image's mode is one of 16 or 32 bits a channel.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode!r}: convert it to 8 bits a channel first")


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image of 8 bits a channel (mode L, RGB, RGBA, ...): uint8 (C, H, W)."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
