"""Images in: one way to read a tensor, a folder, a data set or an iterator.

Images of one source have one shape (C, H, W) and one kind of number: uint8, kept as uint8 and
meaning [-1, 1] (x / 127.5 - 1), or floats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import GREY, SUFFIXES, flattened, listing, read_head, read_image, to_tensor

IMAGE_KEYS = ("image", "img", "pixel_values")
Block = tuple[Tensor, Tensor | None]
Accept = Callable[[tuple[int, ...]], None]
Side = Callable[[int, int], int]
MEMORY = 2**31  # bytes of a folder's pictures that are kept as they are, or cropped to by default


def decode(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored images as numbers of `dtype`: uint8 becomes [-1, 1], floats stay as they are."""
    if images.dtype == torch.uint8:
        return images.to(dtype).div_(127.5).sub_(1)
    return images.to(dtype)


def _folder_items(
    folder: Path, files: list[Path], size: int | None
) -> Iterator[tuple[Tensor, int | None]]:
    """Images and, if all lie in subfolders, classes: the first folder's place in the alphabet."""
    tops = [file.relative_to(folder).parts[:-1][:1] for file in files]
    names = sorted(set(tops)) if all(tops) else []
    colour = any(head[2] for head in _heads(files))
    for file, top in zip(files, tops, strict=True):
        try:
            image = to_tensor(flattened(read_image(file), colour, size))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        yield image, names.index(top) if names else None


def _heads(files: list[Path]) -> Iterator[tuple[int, int, bool]]:
    for file in files:
        try:
            yield read_head(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


def _files(folder: str | Path) -> list[Path]:
    files = listing(folder, nested=True).files
    if not files:
        raise ValueError(f"no pictures in {folder} (looked for {', '.join(SUFFIXES)})")
    return files


def size_for(folder: str | Path, accept: Accept, side: Side) -> tuple[int | None, str]:
    """The `size` to read a folder's pictures with, and why, in words.

    Args:
        folder: Where they lie.
        accept: See `stream`.
        side: The largest side by default, from channels and the number of pictures.

    Returns:
        None if the pictures have one shape, are accepted and take at most `MEMORY` bytes; else a
        side that does. No picture is enlarged.

    Raises:
        ValueError: no pictures, or one that is damaged.
    """
    heads = list(_heads(_files(folder)))
    channels = 3 if any(head[2] for head in heads) else 1
    shapes = sorted({head[:2] for head in heads})
    if len(shapes) == 1:
        shape = (channels, *shapes[0])
        try:
            accept(shape)
            if len(heads) * math.prod(shape) <= MEMORY:
                return None, ""
        except ValueError:
            pass  # too large as they are
    size = min(side(channels, len(heads)), *(min(shape) for shape in shapes))
    least, most = (f"{width} x {height}" for height, width in (shapes[0], shapes[-1]))
    given = least if least == most else f"{least} to {most}"
    return size, (
        f"{folder}: {len(heads)} pictures of {given} pixels, cropped to squares of {size} x {size}"
    )


def _items(source: Iterable[Any], size: int | None) -> Iterator[tuple[Tensor, Any]]:
    """Image and label (None) of every item of a data set."""
    for item in source:
        label = None
        if isinstance(item, dict):
            key = next((key for key in IMAGE_KEYS if key in item), None)
            if key is None:
                raise ValueError(f"no image among {sorted(item)}: expected one of {IMAGE_KEYS}")
            item, label = item[key], item.get("label")
        elif isinstance(item, (tuple, list)):
            item, label = item[0], item[1] if len(item) > 1 else None
        if isinstance(item, Image.Image):
            item = read_image(item)
            image = to_tensor(flattened(item, item.mode not in GREY, size))
        elif size is not None:
            raise ValueError(f"size={size} is for files and PIL images: resize tensors before")
        else:
            image = torch.as_tensor(item)
        yield image[None] if image.ndim == 2 else image, label


def stream(
    source: Any,
    *,
    chunk: int = 256,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
    accept: Accept | None = None,
    size: int | None = None,
) -> Iterator[Block]:
    """Blocks of images and labels from any source, in its order.

    Args:
        source: A folder (path), a NumPy file (path, ``.npy``) of images (N, C, H, W), which is
            mapped into memory rather than read, a tensor (N, C, H, W), a pair (images, labels), a
            torch or Hugging Face data set, or any iterable of images (tensors (C, H, W) or (H, W),
            PIL), each alone, with a label in a tuple, or as "image" and "label" in a dict.
        chunk: Largest number of images in a block.
        value_range: Range that float pixels are given in; they are mapped to [-1, 1]. None leaves
            floats as they are (latents). uint8 always means [-1, 1].
        accept: Called with the shape of the first image before others are read, to refuse it.
        size: Side in pixels of the squares that files and PIL images are cropped to; None keeps
            them as they are.

    Files and PIL images become grey or RGB, transparency on white; the files of a folder RGB if
    one of them has colour.

    Yields:
        Images (b, C, H, W), uint8, float32 or float64, and int64 labels (b,) or None.

    Raises:
        ValueError: mixed shapes or kinds of number, values that are not finite or outside the
            range, labels for some images only, broken files, no images, a size for tensors.
    """
    files: list[Path] = []
    source = _mapped(source)
    if isinstance(source, (str, Path)):
        files = _files(source)
        items: Iterator[tuple[Tensor, Any]] = _folder_items(Path(source), files, size)
    elif isinstance(source, Tensor) or _is_pair(source):
        images, labels = load_images(source, value_range=value_range, accept=accept, size=size)
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            yield images[rows], None if labels is None else labels[rows]
        return
    else:
        entries = source
        if not isinstance(source, Iterator) and hasattr(source, "__getitem__"):
            # Data sets of the old protocol have __getitem__ and a length, no __iter__.
            entries = (source[index] for index in range(len(source)))
        items = _items(entries, size)
    items, count = _alike(items, files, accept), 0
    while block := list(itertools.islice(items, chunk)):
        yield (
            checked(torch.stack([image for image, _ in block]), value_range, count),
            None if block[0][1] is None else torch.as_tensor([int(label) for _, label in block]),
        )
        count += len(block)
    if not count:
        raise ValueError("no images")


def _alike(
    items: Iterator[tuple[Tensor, Any]], files: list[Path], accept: Accept | None
) -> Iterator[tuple[Tensor, Any]]:
    """The items, all of one shape and kind; `files` says what they are called, if anything."""
    names, first = ("shape", "dtype", "with a label"), None
    for number, (image, label) in enumerate(items):
        found = (tuple(image.shape), image.dtype, label is not None)
        if first is None:
            first = found
            if accept is not None:
                accept(found[0])
        if found != first:
            what = next(i for i in range(3) if found[i] != first[i])
            place = files[number] if files else f"image {number}"
            advice = ": pass size to crop files and PIL images" if what == 0 else ""
            raise ValueError(
                f"mixed images: {names[what]} is {found[what]} at {place}, {first[what]} before"
                + advice
            )
        yield image, label


def load_images(
    source: Any,
    *,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
    accept: Accept | None = None,
    size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All images (N, C, H, W) and labels (N,) or None of a source; see `stream`."""
    source = _mapped(source)
    if isinstance(source, Tensor) or _is_pair(source):
        if size is not None:
            raise ValueError(f"size={size} is for files and PIL images: resize tensors before")
        images, labels = (source, None) if isinstance(source, Tensor) else source
        if accept is not None:
            accept(tuple(images.shape[1:]))
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images")
        return checked(images, value_range), None if labels is None else labels.long()
    blocks = list(stream(source, value_range=value_range, accept=accept, size=size))
    found = [label for _, label in blocks if label is not None]  # of all blocks or of none
    return torch.cat([images for images, _ in blocks]), torch.cat(found) if found else None


def checked(images: Tensor, value_range: tuple[float, float] | None, first: int = 0) -> Tensor:
    """A block (b, C, H, W) in the form it is stored in; see `stream` for what is refused."""
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected images (N, C, H, W), got shape {tuple(images.shape)}")
    if value_range is not None and images.shape[1] not in (1, 3):
        hint = ": an alpha channel?" if images.shape[1] in (2, 4) else ""
        raise ValueError(f"expected 1 or 3 channels, got {images.shape[1]}{hint}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"expected uint8 or floating point images, got {images.dtype}")
    if images.dtype.itemsize < 4:
        images = images.float()
    bad = ~images.flatten(1).isfinite().all(1)
    if bad.any():
        raise ValueError(f"image {first + int(bad.nonzero()[0])} contains NaN or infinity")
    if value_range is None:
        return images
    low, high = value_range
    found = images.aminmax()
    slack = 1e-3 * (high - low)  # resampling and rounding overshoot a little
    if found.min < low - slack or found.max > high + slack:
        raise ValueError(
            f"pixels from {found.min:.4g} to {found.max:.4g} in a source declared as "
            f"[{low:g}, {high:g}]; pass value_range, None for latents"
        )
    return images if (low, high) == (-1, 1) else (images - low) * (2 / (high - low)) - 1


def _mapped(source: Any) -> Any:
    """The array of a NumPy file, mapped into memory; any other source as it is."""
    if not (isinstance(source, (str, Path)) and Path(source).suffix == ".npy"):
        return source
    try:
        # Copy on write: torch takes writable arrays only, and the file stays as it is.
        return torch.from_numpy(np.load(source, mmap_mode="c", allow_pickle=False))
    except (EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is no array of images: {error}") from None


def _is_pair(source: Any) -> bool:
    return (
        isinstance(source, (tuple, list))
        and len(source) == 2
        and all(isinstance(part, Tensor) for part in source)
        and source[0].ndim == 4
        and source[1].ndim == 1
    )
