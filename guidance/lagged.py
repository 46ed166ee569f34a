"""Reading device values without stalling the queue, at a fixed and therefore deterministic lag."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
