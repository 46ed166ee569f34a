"""Fashion-MNIST as Debian packages it, and the small networks of this repository trained on it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("cache/fashion-mnist"))
MODELS = {
    "plain": Path("examples/fashion_mnist/model"),
    "classes": Path("examples/fashion_mnist/classes"),
}
FILES = {"train": "train", "test": "t10k"}
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def read_idx(path: str | Path) -> Tensor:
    """A gzipped idx file of unsigned bytes, as uint8 of the shape it declares.

    Raises:
        ValueError: truncated, or not such a file.
    """
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is damaged ({error}): install it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of bytes (it starts with {data[:4]!r})")
    rank, head = data[3], 4 + 4 * data[3]
    shape = struct.unpack(f">{rank}I", data[4:head]) if len(data) >= head else ()
    values = torch.frombuffer(bytearray(data[head:]), dtype=torch.uint8)
    if not shape or values.numel() != torch.Size(shape).numel():
        raise ValueError(f"{path} is truncated: {values.numel()} values for shape {shape}")
    return values.view(shape)


def load_images(split: str = "train", folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 1, 28, 28), and labels, int64 (N,), of "train" (60,000) or "test" (10,000).

    Args:
        folder: Where the four idx files lie; None looks where Debian's package puts them, then in
            ``cache/fashion-mnist``.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: an unknown split or a damaged file.
    """
    if split not in FILES:
        raise ValueError(f"unknown split {split!r}: expected one of {sorted(FILES)}")
    places = PLACES if folder is None else (Path(folder),)
    stem = FILES[split]
    for place in places:
        images, labels = (
            place / f"{stem}-images-idx3-ubyte.gz",
            place / f"{stem}-labels-idx1-ubyte.gz",
        )
        if images.is_file() and labels.is_file():
            return read_idx(images).unsqueeze(1), read_idx(labels).long()
    raise FileNotFoundError(
        f"no Fashion-MNIST in {', '.join(map(str, places))}: install the Debian package "
        "(apt-get install dataset-fashion-mnist), or put its four .gz files there"
    )


def load_unet(dtype: torch.dtype = torch.float32) -> Any:
    """The attention-free ``DDPMPipeline`` trained on Fashion-MNIST (28 x 28, linear beta).

    Raises:
        FileNotFoundError: neither in the working directory nor in the checkout installed from.
    """
    from diffusers import DDPMPipeline

    return DDPMPipeline.from_pretrained(model_folder("plain"), torch_dtype=dtype)


def load_classes(dtype: torch.dtype = torch.float32) -> Any:
    """The class-conditional `ClassPipeline` trained on Fashion-MNIST (28 x 28, linear beta).

    Raises:
        FileNotFoundError: neither in the working directory nor in the checkout installed from.
    """
    from examples.fashion_mnist.pipeline import ClassPipeline

    return ClassPipeline.from_pretrained(model_folder("classes"), torch_dtype=dtype)


def model_folder(network: str) -> Path:
    """Where a trained network lies, in the working directory or the checkout installed from.

    Raises:
        FileNotFoundError: neither has it.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / MODELS[network] / "model_index.json").is_file():
            return root / MODELS[network]
    raise FileNotFoundError(
        f"the Fashion-MNIST network ({MODELS[network]}) is not here: run inside a checkout of "
        f"Pilotage, or train it (python -m examples.fashion_mnist.train train {network})"
    )
