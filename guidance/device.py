"""Small values between host and device without stalling the queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class LaggedReads:
    """A queue of small device tensors on their way to the host.

    A value pushed at step i is due from step ``i + 1 + lag`` on, never earlier and never later,
    however fast the device is. On CUDA it is copied to pinned memory without blocking; with a lag
    of at least 1 the copy has normally finished when it is read.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.queue: deque[tuple[int, Any, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: int, label: Any, value: Tensor) -> None:
        """Queue `value`, measured at `step`; `label` comes back with it."""
        value, event = value.detach(), None
        if value.is_cuda:
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            value, event = pinned, torch.cuda.Event()
            event.record()
        self.queue.append((step, label, value, event))

    def due(self, step: int) -> Iterator[tuple[Any, Any]]:
        """The (label, plain numbers) pairs that may be read at the beginning of `step`."""
        while self.queue and self.queue[0][0] + 1 + self.lag <= step:
            yield self._pop()

    def rest(self) -> Iterator[tuple[Any, Any]]:
        """Everything still queued, at the end of a run."""
        while self.queue:
            yield self._pop()

    def _pop(self) -> tuple[Any, Any]:
        _, label, value, event = self.queue.popleft()
        if event is not None:
            event.synchronize()
        return label, value.tolist()


def on_host(device: torch.device) -> bool:
    """Whether values on `device` are read at once, and not a step later."""
    return device.type == "cpu"


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
