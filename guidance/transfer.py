"""Small tensors from the host to the device without stalling the queue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on `device`.

    To CUDA it goes through pinned memory: a copy from ordinary memory waits for all work queued.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def row_index(rows: Sequence[int], device: torch.device | str) -> Tensor:
    """Rows as an index tensor on `device`, shape (len(rows),), int64."""
    return to_device(torch.tensor(rows, dtype=torch.int64), device)
