"""Pictures in files: read a batch at a time, and what of a folder was not read is told."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ..guidance.images import (
    SUFFIXES,
    flattened,
    holds_several,
    is_transparent,
    listing,
    read_head,
    read_image,
)

SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Reading:
    """How the pictures of a folder are read.

    Args:
        recursive: Those in subfolders too, at any depth.
        resize: ``SIDE``: the shorter side becomes SIDE pixels (bicubic), the middle square is cut
            out, as torchvision's Resize and CenterCrop do. ``clean:SIDE``: clean-fid's resizing
            (bicubic in floating point; the aspect ratio is not kept). None: pictures stay as they
            are, and must have one size.
        background: What transparent pictures are put on: a colour that PIL knows.

    Raises:
        ValueError: `resize` has another form, or the colour is not known or transparent.
    """

    recursive: bool = False
    resize: str | None = None
    background: str = "white"

    def __post_init__(self) -> None:
        if self.resize is not None and not re.fullmatch("(clean:)?[1-9][0-9]*", self.resize):
            raise ValueError(f"resize is a side in pixels or clean:SIDE, got {self.resize!r}")
        if len(ImageColor.getrgb(self.background)) > 3:
            raise ValueError(f"the background cannot be transparent itself, got {self.background}")

    @property
    def words(self) -> str:
        """What is done to the pixels; features of different ones are not compared."""
        parts = [] if self.background == "white" else [f"transparency on {self.background}"]
        if self.resize is not None:
            way, _, side = self.resize.rpartition(":")
            done = (
                f"clean-fid's bicubic to {side}x{side}"
                if way
                else f"shorter side to {side} (bicubic), middle {side}x{side}"
            )
            parts.append(done)
        return ", ".join(parts)

    def pixels(self, image: Image.Image) -> Tensor:
        """An image of 8 bits a channel as float32 (3, H, W) in [0, 1]."""
        image = flattened(image, background=self.background)
        if self.resize is None:
            return _pixels(image)
        way, _, side = self.resize.rpartition(":")
        return (_clean if way else _cropped)(image, int(side))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _cropped(image: Image.Image, side: int) -> Tensor:
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _pixels(image.crop((left, top, left + side, top + side)))


def _clean(image: Image.Image, side: int) -> Tensor:
    # Channels one by one, since PIL resamples floating point in images of one channel only.
    channels = [channel.convert("F") for channel in image.split()]
    resized = [np.array(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255) / 255


@dataclass(eq=False)
class Pictures:
    """Picture files, how they are read, and what was found on the way.

    Args:
        files: Picture files.
        reading: How they are read.
        folder: Where they lie; None: names are told without folders.
        left_out: Names of what else is there, by kind.
        transparent: Names of those put on a background, filled in by reading.
        first_only: Names of files with several pictures, of which the first is read; filled in by
            reading.
    """

    files: Sequence[Path]
    reading: Reading = field(default_factory=Reading)
    folder: Path | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    transparent: list[str] = field(default_factory=list)
    first_only: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: str | Path, reading: Reading | None = None) -> Pictures:
        """The pictures of a folder, sorted by path.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: it holds no pictures.
        """
        folder, reading = Path(folder), reading or Reading()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        found = listing(folder, reading.recursive)
        pictures = cls(found.files, reading, folder)
        for kind in ("hidden", "others", "folders"):
            pictures.left_out[kind] = [pictures.name(path) for path in getattr(found, kind)]
        if not found.files:
            rest = pictures._not_read()
            raise ValueError(
                f"{folder} holds no pictures ({', '.join(SUFFIXES)}){rest and '; it has '}{rest}"
            )
        return pictures

    def __len__(self) -> int:
        return len(self.files)

    def name(self, file: Path) -> str:
        """The path of a file below the folder, or its name alone."""
        return file.name if self.folder is None else file.relative_to(self.folder).as_posix()

    def check(self) -> Pictures:
        """Themselves, after a look at the beginning of every file; nothing is decoded.

        Raises:
            ValueError: what `batches` refuses, as far as the beginnings tell.
        """
        first = None
        for file in self.files:
            try:
                height, width, _ = read_head(file)
            except ValueError as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            if self.reading.resize is None:
                first = first or (height, width)
                self._check_size(file, (height, width), first)
        return self

    def batches(
        self, batch_size: int = 32, digest: Callable[[bytes], None] | None = None
    ) -> Iterator[Tensor]:
        """Pictures as float32 (B, 3, H, W) in [0, 1], in the order of `files`.

        They are upright as their EXIF orientation says; transparency lies on the background.

        Args:
            batch_size: Pictures at once, B.
            digest: Called with what names and contents of the files hash to, e.g. the `update` of a
                hash object.

        Raises:
            ValueError: a file is damaged, deeper than 8 bits a channel, or of another size than the
                first.
        """
        self.transparent, self.first_only = [], []
        first = None
        for start in range(0, len(self.files), batch_size):
            pictures = []
            for file in self.files[start : start + batch_size]:
                content = file.read_bytes()
                if digest is not None:
                    digest(self.name(file).encode() + b"\0" + hashlib.sha256(content).digest())
                pixels = self.reading.pixels(self._decoded(file, content))
                first = first or tuple(pixels.shape[1:])
                self._check_size(file, tuple(pixels.shape[1:]), first)
                pictures.append(pixels)
            yield torch.stack(pictures)

    def found(self) -> str:
        """How many pictures there are, and what else is in the folder, in a line."""
        rest = self._not_read()
        return f"{self.folder}: {len(self.files)} pictures{rest and '; not read: '}{rest}"

    def changes(self) -> list[str]:
        """What reading them left out or changed, in a line each."""
        lines = []
        if self.transparent:
            names = _some(self.transparent)
            lines.append(f"{self.folder}: transparent, on {self.reading.background}: {names}")
        if self.first_only:
            names = _some(self.first_only)
            lines.append(f"{self.folder}: several pictures, the first is read: {names}")
        return lines

    def summary(self) -> dict[str, Any]:
        """Counts and first names of what was read, left out and changed, ready for JSON."""
        lists = self.left_out | {"transparent": self.transparent, "first_only": self.first_only}
        return {"folder": str(self.folder), "read": len(self.files)} | {
            kind: {"count": len(names), "first": names[:SHOWN]} for kind, names in lists.items()
        }

    def _not_read(self) -> str:
        words = {"others": "other files", "hidden": "hidden", "folders": "subfolders (--recursive)"}
        return "; ".join(
            f"{words[kind]}: {_some(names)}" for kind, names in self.left_out.items() if names
        )

    def _check_size(self, file: Path, size: tuple[int, ...], first: tuple[int, ...]) -> None:
        if size != first:
            raise ValueError(
                f"{file} is {size[1]}x{size[0]}, but {self.name(self.files[0])} is "
                f"{first[1]}x{first[0]}: pictures of one size are needed; --resize SIDE brings "
                "them to one"
            )

    def _decoded(self, file: Path, content: bytes) -> Image.Image:
        try:
            image = read_image(io.BytesIO(content))
            several = holds_several(io.BytesIO(content))
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if several:
            self.first_only.append(self.name(file))
        if is_transparent(image):
            self.transparent.append(self.name(file))
        return image


def _some(names: Sequence[str]) -> str:
    """The number of names and the first of them."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})"


def load_pictures(folder: str | Path, reading: Reading | None = None) -> Tensor:
    """All pictures of a folder as float32 (N, 3, H, W) in [0, 1]; see `Pictures`."""
    return torch.cat(list(Pictures.of(folder, reading).batches()))
