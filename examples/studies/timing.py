"""Timing: of short operations (quantiles, launches, copy bandwidth), and of guided calls.

What is compared is timed in turn, in the same rounds, so that other load falls on all alike.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from pilotage.eval.comparison.sampling import Setting

Operation = Callable[[], Any]

# glibc's mallopt(3): parameter and value.
KEEP = ((-1, 2**30), (-3, 2**25))  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its largest value)


class Quantiles(NamedTuple):
    """Milliseconds."""

    median: float
    low: float
    high: float


def quantiles_of(times: list[float]) -> Quantiles:
    """Median, 20 % and 80 % quantiles of measured times."""
    values = torch.tensor(times, dtype=torch.float64)
    return Quantiles(*torch.quantile(values, torch.tensor([0.5, 0.2, 0.8]).double()).tolist())


def time_operation(operation: Operation, device: torch.device, budget: float = 0.1) -> Quantiles:
    """Time of one call: Triton's do_bench on CUDA (cold L2 cache), the wall clock elsewhere.

    Args:
        operation: What to time.
        device: Where it runs.
        budget: Seconds to spend; at least 3 calls are timed.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return Quantiles(*do_bench(operation, rep=int(budget * 1000), quantiles=[0.5, 0.2, 0.8]))
    operation()
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        operation()
        times.append(1000 * (time.perf_counter() - start))
    return quantiles_of(times)


def time_in_turn(
    operations: dict[str, Operation], device: torch.device, budget: float = 0.1
) -> dict[str, Quantiles]:
    """Times of several operations; off CUDA in turn, so that other load falls on all alike.

    Args:
        operations: What to time, by name.
        device: Where they run.
        budget: Seconds to spend on each, about; each is timed 3 times at least.
    """
    if device.type == "cuda":
        return {name: time_operation(call, device, budget) for name, call in operations.items()}
    times: dict[str, list[float]] = {name: [] for name in operations}
    for operation in operations.values():
        operation()
    end = time.perf_counter() + budget * len(operations)
    while len(times[next(iter(times))]) < 3 or time.perf_counter() < end:
        for name, operation in operations.items():
            start = time.perf_counter()
            operation()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: quantiles_of(values) for name, values in times.items()}


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; whether the C library took the wish (glibc).

    Else each temporary of some 100 kB may or may not be given back to the system and fetched again
    page by page, depending on what the heap looks like: times then differ several fold between
    runs, and an operation with more temporaries looks the worse.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in KEEP)


def time_replay(operation: Operation) -> Quantiles:
    """Time of one call replayed from a CUDA graph: without the cost of launching from Python."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return Quantiles(*do_bench_cudagraph(operation, quantiles=[0.5, 0.2, 0.8]))


def count_launches(operation: Operation) -> int:
    """Kernels and device copies of one call on CUDA, counted by the profiler."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    operation()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        operation()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def copy_bandwidth(total_bytes: int, device: torch.device, budget: float = 0.1) -> float:
    """Bytes per second read and written by a plain copy that moves `total_bytes` in all."""
    source = torch.empty(max(1, math.ceil(total_bytes / 2)), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = time_operation(lambda: target.copy_(source), device, budget)
    return 2 * source.numel() / (took.median / 1000)


def seconds_in_turn(
    pipe, columns: Sequence[Setting], prompts: Sequence[str], rounds: int
) -> dict[Setting, list[float]]:
    """Seconds of one batch of `prompts` under every setting, a value a round.

    A first round, in which libraries prepare for the batch sizes that occur, is not counted.
    """
    found = clocks_in_turn(pipe, columns, prompts, rounds)
    return {setting: [wall for wall, _ in values] for setting, values in found.items()}


def evaluations_of(pipe, setting: Setting, prompts: Sequence[str]) -> float:
    """Network evaluations a sample in the batch that `clocks_in_turn` times."""
    run_once(pipe, setting, prompts)
    return statistics.fmean(pipe.guidance_trace.nfe)


def run_once(pipe, setting: Setting, prompts: Sequence[str]) -> None:
    """One batch, a seed a prompt."""
    pipe(
        list(prompts),
        guidance=setting.guidance,
        guidance_scale=setting.scale,
        num_inference_steps=setting.steps,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    )


def clocks_in_turn(
    pipe, columns: Sequence[Setting], prompts: Sequence[str], rounds: int
) -> dict[Setting, list[tuple[float, float]]]:
    """The same as (seconds, seconds of the processor spent by this process on all threads)."""
    found: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in columns}
    for turn in tqdm(range(rounds + 1), desc="timing", unit="round"):
        for setting in columns:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            run_once(pipe, setting, prompts)
            if turn > 0:
                took = time.perf_counter() - begin, time.process_time() - begin_cpu
                found[setting].append(took)
    return found


def network_in_turn(pipe, rows: int, rounds: int) -> list[tuple[float, float]]:
    """(seconds, seconds of the processor) of the denoiser on `rows` rows over those on twice many.

    What the network itself gains from half the rows: no guidance can gain more.
    """
    network = pipe.unet
    x_t = torch.randn(2 * rows, network.config.in_channels, *[network.config.sample_size] * 2)
    states = torch.randn(
        2 * rows, pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size
    )
    found = []
    for turn in range(rounds + 1):
        clocks = []
        for count in (rows, 2 * rows):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for _ in range(5):
                with torch.no_grad():
                    network(x_t[:count], 500, encoder_hidden_states=states[:count])
            clocks.append((time.perf_counter() - begin, time.process_time() - begin_cpu))
        if turn > 0:
            found.append(tuple(half / whole for half, whole in zip(*clocks, strict=True)))
    return found
