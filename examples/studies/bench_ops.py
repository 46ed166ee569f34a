"""Benchmark of the guidance operations: ``python -m examples.studies.bench_ops``.

It first runs the tests of what it measures and stops if one fails. Then it times one APG step at
the latent sizes of common models, by ours (reference, compiled, fused), diffusers' and ComfyUI's
formula, and on CUDA a network of SDXL's size beside it. Writes ``ops.csv`` (all timings) and
``ops.json`` (the figures) into eval/results.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from examples.studies.apg_providers import ETA, MOMENTUM, RADIUS, SCALE, minimum_bytes, providers
from examples.studies.timing import (
    Quantiles,
    copy_bandwidth,
    count_launches,
    keep_freed_memory,
    time_in_turn,
    time_replay,
)
from pilotage.eval.record import machine, versions, write_figures
from pilotage.guidance.files import atomic

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/guidance/ops",)
CUDA_TESTS = ("tests/cuda",)
SIZES = {
    "sd": (4, 64, 64),
    "sdxl": (4, 128, 128),
    "flux": (4096, 64),
    "wan": (16, 21, 60, 104),
    "hunyuan": (16, 33, 90, 160),
}
VIDEO = "hunyuan"
QUICK = {"tiny": (4, 8, 8), "sdxl": SIZES["sdxl"]}
CONFIG = f"w={SCALE} eta={ETA} r={RADIUS} momentum={MOMENTUM} batch=1"
COLUMNS = (  # Liger-Kernel's, with our versions in place of its own
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "gpu_name",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "timestamp",
    "pilotage_version",
    "torch_version",
    "diffusers_version",
)


class RedTestsError(RuntimeError):
    """A test of what is measured fails."""


def require_green(tests: Sequence[str]) -> None:
    """Run tests, with pytest, in a process of their own.

    Raises:
        FileNotFoundError: the tests are not there (a wheel does not contain them).
        RedTestsError: they fail, or none was found.
    """
    missing = [test for test in tests if not (ROOT / test).exists()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found in {ROOT}: benchmark in a checkout, by its tests"
        )
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT)
    if done.returncode:
        raise RedTestsError(f"the tests in {', '.join(tests)} fail: nothing was measured")


class Table:
    """The rows of the CSV, and the medians by (size, dtype, provider, metric).

    Args:
        device: Where the operations run.
        kept: Whether this process keeps freed memory, see `timing.keep_freed_memory`.
    """

    def __init__(self, device: torch.device, kept: bool = False) -> None:
        here, installed = machine(), versions()
        self.threads = ""
        if device.type == "cpu":
            self.threads = f" threads={torch.get_num_threads()}"
            self.threads += " memory=kept" if kept else ""
        self.constant = {
            "kernel_name": "apg_step",
            "kernel_operation_mode": "forward",
            "gpu_name": here["accelerator"] if device.type == "cuda" else here["processor"],
            "x_name": "elements",
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{f"{name}_version": installed.get(name) for name in ("pilotage", "torch")},
            "diffusers_version": installed.get("diffusers"),
        }
        self.rows: list[dict[str, Any]] = []
        self.medians: dict[tuple[str, str, str, str], float] = {}

    def add(
        self, size: str, elements: int, dtype: str, provider: str, metric: str, unit: str, values
    ) -> None:
        """One row; `values` are `Quantiles`, or one number for all three."""
        values = values if isinstance(values, Quantiles) else Quantiles(values, values, values)
        self.medians[size, dtype, provider, metric] = values.median
        self.rows.append(
            self.constant
            | {
                "kernel_provider": provider,
                "metric_name": metric,
                "metric_unit": unit,
                "x_label": size,
                "x_value": elements,
                "y_value_50": values.median,
                "y_value_20": values.low,
                "y_value_80": values.high,
                "extra_benchmark_config_str": f"{CONFIG} dtype={dtype}{self.threads}",
            }
        )

    def write(self, path: Path) -> None:
        """Write the CSV, whole or not at all."""
        with atomic(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def ratio(self, size: str, dtype: str, slow: str, fast: str) -> float:
        """How many times longer `slow` takes."""
        slow, fast = (self.medians[size, dtype, name, "speed"] for name in (slow, fast))
        return slow / fast


def measure(
    table: Table,
    device: torch.device,
    sizes: dict[str, tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    compiled: bool,
    budget: float,
    tick: Any,
) -> None:
    """Time every provider at every size and dtype into `table`."""
    for size, shape in sizes.items():
        elements = math.prod(shape)
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            needed = minimum_bytes(elements, dtype.itemsize)
            bandwidth = copy_bandwidth(needed, device, budget)
            operations = providers(shape, dtype, device, compiled)
            tick(f"{size} {name}")
            for provider, took in time_in_turn(operations, device, budget).items():
                operation, row = operations[provider], (size, elements, name, provider)
                table.add(*row, "speed", "ms", took)
                share = needed / (took.median / 1000) / bandwidth
                table.add(*row, "copy_bandwidth_share", "1", share)
                if device.type == "cuda":
                    table.add(*row, "graph_replay", "ms", time_replay(operation))
                    table.add(*row, "launches", "1", count_launches(operation))


def run(
    device: torch.device,
    quick: bool,
    folder: Path,
    sizes: dict[str, tuple[int, ...]],
    kept: bool = False,
) -> dict[str, Any]:
    """Test, measure and write; the figures that were measured."""
    on_cuda = device.type == "cuda"
    require_green([*TESTS, *(CUDA_TESTS if on_cuda else ())])
    table, budget = Table(device, kept), 0.05 if quick else 0.5
    dtypes = (torch.float16, torch.bfloat16) if on_cuda else (torch.float32,)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        measure(
            table, device, sizes, dtypes, compiled=not quick, budget=budget,
            tick=lambda text: progress.update(task, description=text),
        )  # fmt: skip
        figures: dict[str, Any] = {}
        if on_cuda:
            from examples.studies.bench_network import network_figures

            progress.update(task, description="network")
            figures["gpu"] = gpu_figures(table) | network_figures(device)
        processor = table
        if on_cuda:
            processor, only = Table(torch.device("cpu"), kept), {"sdxl": SIZES["sdxl"]}
            measure(
                processor, torch.device("cpu"), only, (torch.float32,), False, budget,
                lambda text: progress.update(task, description=f"processor {text}"),
            )  # fmt: skip
    if "sdxl" in sizes:
        speedup = processor.ratio("sdxl", "float32", "diffusers", "reference")
        figures["cpu"] = {"speedup_vs_diffusers_sdxl": speedup}
    table.rows += processor.rows if on_cuda else []
    table.write(folder / "ops.csv")
    write_figures(folder / "ops.json", figures)
    return figures


def gpu_figures(table: Table) -> dict[str, Any]:
    """What the table says of CUDA, at the sizes that were measured."""
    figures: dict[str, Any] = {"name": table.constant["gpu_name"]}
    if ("sdxl", "float16", "fused", "speed") in table.medians:
        figures["launches_sdxl"] = int(table.medians["sdxl", "float16", "fused", "launches"])
        speedup = table.ratio("sdxl", "float16", "diffusers", "fused")
        figures["speedup_vs_diffusers_sdxl"] = speedup
    share = table.medians.get((VIDEO, "float16", "fused", "copy_bandwidth_share"))
    if share is not None:
        figures["copy_bandwidth_share_video"] = share
    return figures


def main(arguments: Sequence[str] | None = None, own_process: bool = False) -> int:
    """The command; 1 where a test fails. In its own process it may set how memory is freed."""
    parser = argparse.ArgumentParser(
        "examples.studies.bench_ops", description=__doc__.split(":")[0]
    )
    parser.add_argument("--device", help="cpu or cuda; the default is cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="two sizes, no torch.compile")
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    try:
        kept = own_process and keep_freed_memory()
        figures = run(device, options.quick, options.out, QUICK if options.quick else SIZES, kept)
    except (FileNotFoundError, RedTestsError) as error:
        print(error, file=sys.stderr)
        return 1
    for section, values in figures.items():
        for name, value in values.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{section}.{name}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main(own_process=True))
