"""Real pictures that the pictures of a comparison are measured against."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...pipelines.processes import processes
from ..metrics.chroma import chroma_shares
from ..metrics.extractors import Extractor, load_extractor
from ..metrics.feature_files import Features
from ..metrics.per_picture import PER_PICTURE
from ..pictures import Pictures, Reading
from ..terminal import note

Reference = Tensor | Pictures | Features
BATCH = 32


def open_reference(
    path: Path, extractor: str, device: str, reading: Reading, made_by: str | None = None
) -> tuple[Pictures | Features, Extractor]:
    """The pictures of a folder or a file of their features, and the network for features.

    What is in the folder is told on the standard error.

    Args:
        path: A folder or a ``.npz``.
        extractor: Name of what makes features, and must have made those of the file.
        device: Where it computes.
        reading: How pictures are read, and must have been for the file.
        made_by: See `Features.load`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: fewer than two pictures, or as `Pictures.check` and `Features.load`.
    """
    if not path.exists():
        raise FileNotFoundError(f"no folder or file {path}")
    if path.suffix == ".npz":
        network = load_extractor(extractor, device=device)
        return Features.load(path, network, reading, made_by), network
    pictures = Pictures.of(path, reading)
    if processes().is_main_process:
        note(pictures.found())
    check_reference(pictures.check())
    return pictures, load_extractor(extractor, device=device)


def check_reference(reference: Reference) -> None:
    """Refuse too few pictures.

    Raises:
        ValueError: fewer than two, or a tensor of another shape.
    """
    if isinstance(reference, Tensor) and (reference.ndim != 4 or len(reference) < 2):
        raise ValueError(
            "reference must be two pictures or more, (N, 3, H, W), got shape "
            f"{tuple(reference.shape)}"
        )
    if isinstance(reference, Pictures) and len(reference) < 2:
        raise ValueError(f"a reference needs two pictures or more, {reference.folder} has one")


def measure_reference(
    reference: Reference, extractor: Extractor, progress: bool = False
) -> tuple[Tensor | Features, dict[str, Any], Tensor | None]:
    """Features, and what is measured of each picture, a batch at a time; `progress` shows a bar.

    Returns:
        Features, with shape (N, D), on the CPU, or a file's mean and covariance where it keeps
        nothing else; ``n``, and of pictures the means of `PER_PICTURE`; and of pictures the shares
        of their pixels by chroma, with shape (280,).
    """
    if isinstance(reference, Features):
        kept = reference if reference.values is None else reference.values
        return kept, {"n": reference.count}, None
    batches: Iterable[Tensor]
    batches = reference.split(BATCH) if isinstance(reference, Tensor) else reference.batches(BATCH)
    found: dict[str, list[Tensor]] = {}
    total = math.ceil(len(reference) / BATCH)
    for batch in tqdm(batches, "reference", total, unit="batch", disable=not progress):
        found.setdefault("features", []).append(extractor(batch).cpu())
        for name, metric in PER_PICTURE.items():
            found.setdefault(name, []).append(metric(batch))
        found.setdefault("chroma_shares", []).append(chroma_shares(batch))
    values = {name: torch.cat(parts) for name, parts in found.items()}
    features, shares = values.pop("features"), values.pop("chroma_shares").mean(0)
    means: dict[str, Any] = {name: float(value.mean()) for name, value in values.items()}
    return features, means | {"n": len(features)}, shares
