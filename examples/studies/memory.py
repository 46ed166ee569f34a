"""Peak memory of a call above what is held before it (weights, data)."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes above the start, and the time of the call.

    Args:
        allocated: Peak of the bytes that PyTorch's allocator held, exact and repeatable.
        resident: Peak of the process's resident memory, which has what oneDNN allocates itself and
            what the C library keeps; None where the system does not tell (it is on Linux), and on
            an accelerator.
        seconds: Wall time of the call; on a CPU it includes the recording of allocations.
    """

    allocated: int
    resident: int | None
    seconds: float


def peak_memory(fn: Callable[[], Any], device: str | torch.device = "cpu") -> PeakMemory:
    """Calls `fn` once and returns its peak memory; the result of `fn` is dropped.

    On a CPU every allocation is recorded: call it on one step, not on a whole training run. Memory
    that was allocated before and is freed inside `fn` counts negative.

    Raises:
        ValueError: a device that is neither "cpu" nor "cuda".
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, start = torch.cuda.memory_allocated(device), time.perf_counter()
        fn()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        return PeakMemory(torch.cuda.max_memory_allocated(device) - before, None, seconds)
    if device.type != "cpu":
        raise ValueError(f"peak_memory: device is cpu or cuda, got {device}")
    try:
        resident = forget_peak_resident()
    except OSError:
        resident = None
    start = time.perf_counter()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fn()
    seconds = time.perf_counter() - start
    if resident is not None:
        resident = peak_resident() - resident
    return PeakMemory(_peak_of(profile), resident, seconds)


def _peak_of(profile: torch.profiler.profile) -> int:
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def peak_resident() -> int:
    """Peak of the process's resident memory in bytes (Linux)."""
    return _status("VmHWM")


def forget_peak_resident() -> int:
    """Gives free memory back and lets the peak start anew; bytes that are resident now (Linux).

    Raises:
        OSError: the system has no such files.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    CLEAR.write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")
