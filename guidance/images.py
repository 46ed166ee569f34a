"""Image files: the ones of a folder in a fixed order, decoded, as tensors. PIL does the work."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ORIENTATION = 0x0112  # of EXIF; from 5 on it swaps the axes
GREY = ("1", "L", "LA", "La")  # modes without colour
# fmt: off
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".heic", ".heif",
)
# fmt: on
HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands, bytes 8 to 12
AVIF = (b"avif", b"avis")


class Listing(NamedTuple):
    """What lies in a folder, each sorted by path.

    Args:
        files: Image files, by their names.
        hidden: Files and folders whose names begin with a dot: among them are those that an
            interrupted writer or another system leaves behind.
        others: Files that are no images or of a kind that is not read.
        folders: Subfolders that were not looked into.
    """

    files: list[Path]
    hidden: list[Path]
    others: list[Path]
    folders: list[Path]


def listing(folder: str | Path, nested: bool = False) -> Listing:
    """The image files of a folder, and what else it holds; empty if there is no such folder.

    Names are compared with `SUFFIXES` without regard to case.

    Args:
        folder: Where they lie.
        nested: Take those in subfolders too, at any depth; links are followed unless they lead to a
            folder above.
    """
    found = Listing([], [], [], [])
    for path, inside in _entries(Path(folder), nested):
        if path.name.startswith("."):
            found.hidden.append(path)
        elif path.is_dir():
            if not inside:
                found.folders.append(path)
        else:
            # A broken link with an image's name is an image that cannot be read.
            known = path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())
            (found.files if known else found.others).append(path)
    for paths in found:
        paths.sort()
    return found


def _entries(folder: Path, nested: bool) -> Iterator[tuple[Path, bool]]:
    """What is in a folder, and whether it was looked into."""
    for path in folder.iterdir() if folder.is_dir() else ():
        inside = nested and path.is_dir() and not path.name.startswith(".")
        if inside and path.is_symlink():
            inside = not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))
        yield path, inside
        if inside:
            yield from _entries(path, nested)


@functools.cache
def _register_plug_ins() -> None:
    """HEIC is read by a package of its own, if it is there."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


@contextlib.contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """An open image, of 8 bits a channel; errors of the many kinds of PIL are ValueErrors."""
    _register_plug_ins()
    try:
        with Image.open(source) as image:
            check_depth(image)
            yield image
    except UnidentifiedImageError as error:
        reason = _missing_plug_in(source) or "damaged, or no picture of a kind that is read"
        raise ValueError(reason) from error
    except (
        *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),  # PIL's, by format
        *(TypeError, AttributeError),  # no file at all
    ) as error:
        raise ValueError(str(error)) from error


def _missing_plug_in(source: str | Path | BinaryIO) -> str:
    """What to install, if a file is of a kind that cannot be read without it; else empty."""
    try:
        with open(source, "rb") if isinstance(source, (str, Path)) else source as file:
            file.seek(0)
            start = file.read(12)
    except (OSError, ValueError, AttributeError):
        return ""
    known = Image.registered_extensions()
    if start[4:8] == b"ftyp" and start[8:] in HEIF and ".heic" not in known:
        return "HEIC pictures need the package pillow-heif: pip install pillow-heif"
    if start[4:8] == b"ftyp" and start[8:] in AVIF and ".avif" not in known:
        return "AVIF pictures need Pillow 11.3 or later"
    return ""


def read_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """An image of any mode, decoded, upright as its EXIF orientation says; the first of several.

    Args:
        source: A file, an open file, or an image.

    Raises:
        ValueError: it is damaged, no image, too large for PIL, or deeper than 8 bits a channel. The
            message gives the reason only: callers add the name of the file.
    """
    if isinstance(source, Image.Image):
        source.load()
        return ImageOps.exif_transpose(source)
    with _opened(source) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def read_head(file: str | Path) -> tuple[int, int, bool]:
    """Height and width of an image file, upright, and whether it has colour; nothing is decoded.

    Raises:
        ValueError: it is no image; see `read_image`.
    """
    with _opened(file) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        width, height = image.size
        return (*((width, height) if turned else (height, width)), image.mode not in GREY)


def holds_several(source: str | Path | BinaryIO) -> bool:
    """Whether a file holds more pictures than the first: an animation, or pages.

    The second one of a phone's JPEG (MPO), a preview or a map of brightness, does not count.

    Raises:
        ValueError: it is no image; see `read_image`.
    """
    with _opened(source) as image:
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel of an image shows what lies behind it."""
    if not image.has_transparency_data:
        return False
    opaque = image.convert("RGBA").getchannel("A").histogram()[255]
    return opaque < image.width * image.height


def flattened(
    image: Image.Image, colour: bool = True, size: int | None = None, background: str = "white"
) -> Image.Image:
    """An image of 8 bits a channel as mode RGB (L without colour), transparency on a background.

    Args:
        image: Of any mode that `check_depth` passes.
        colour: RGB rather than L.
        size: Side in pixels of the centred square that it is cut and resized to (bicubic); None
            keeps it as it is.
        background: A colour, by a name or number that PIL knows.

    Raises:
        ValueError: see `check_depth`.
    """
    check_depth(image)
    mode = "RGB" if colour else "L"
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert(mode)
    return image if size is None else ImageOps.fit(image, (size, size))


def check_depth(image: Image.Image) -> None:
    """Refuse images deeper than 8 bits a channel: PIL would cut their values, not scale them.

    Raises:
        ValueError: the image, or the file it comes from, has 16 or 32 bits a channel.
    """
    # PIL's modes of colour have 8 bits; what an unread file has is in the decoder's raw mode.
    raw = " ".join(str(part) for tile in getattr(image, "tile", ()) for part in tile[3:])
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode!r}: convert it to 8 bits a channel first")
    if ";16" in raw.replace("BGR;16", ""):  # BGR;16, of BMP, has 16 bits for all three
        raise ValueError("16 bits a channel: convert it to 8 bits a channel first")


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image of 8 bits a channel (mode L, RGB, RGBA, ...): uint8 (C, H, W)."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
