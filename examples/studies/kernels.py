"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU: ``kernels.json``.

    python -m examples.studies.kernels           # writes eval/results/kernels.json
    python -m examples.studies.kernels --check   # compares with that file, changes nothing

The library's own launch functions are called on CPU tensors with a Triton driver that only names a
GPU. Where they would launch a kernel, it is compiled instead, so what is compiled is what a GPU
would run: same constants, same alignment of pointers and sizes. Of each kernel the registers and
the local memory are read with Triton's own ``cuobjdump``, and the width of its loads from the PTX.
Triton's cache makes a second run short.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

OUTPUT = Path("eval/results/kernels.json")
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Of one sample: summed and written by one program, and in two launches.
SIZES = {"small": (4, 64, 64), "large": (16, 21, 60, 104)}
SCALE = 7.5
# What kernels call the tensors of the size of a prediction that they read in any case.
ALWAYS_READ = ("cond", "uncond", "state", "x_ptr", "pred_ptr", "previous_ptr")

Case = tuple[str, Callable[[], Any]]


class _Properties:
    """What the compiler asks of a device: limits that all three GPUs have at least."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Shared memory, registers and sizes."""
        return {
            "max_shared_mem": 163 * 1024,
            "max_num_regs": 65536,
            "multiprocessor_count": 108,
            "warpSize": 32,
        }


class NamedGPU:
    """A Triton driver that knows the name of a GPU and has none.

    Args:
        name: One of `CAPABILITIES`.
    """

    utils = _Properties()

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> Any:
        """What to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITIES[self.name], 32)

    def get_current_device(self) -> int:
        """A number for each target, as Triton keeps compiled kernels by it."""
        return CAPABILITIES[self.name]

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def cases(kind: str) -> Iterator[Case]:
    """(name, call) of everything that launches a kernel, for predictions of one of `DTYPES`.

    With "fp16" also what does not depend on that type.
    """
    from pilotage.guidance import APG
    from pilotage.guidance.ops.guide_launch import KERNELS

    dtype = DTYPES[kind]
    for rule, size in itertools.product((rule() for rule in KERNELS), SIZES):
        yield f"{rule.name}, {size}, {kind}", lambda r=rule, s=size: guide(r, SIZES[s], dtype)
    for size in SIZES:
        # The later steps of a run, and APG on predictions as they are.
        for label, rule in (
            ("apg with momentum", APG(0.0, 0.1, -0.5)),
            ("apg with momentum, native", APG(0.0, 0.1, -0.5, space="native")),
        ):
            yield (
                f"{label}, {size}, {kind}",
                lambda r=rule, s=size: guide(r, SIZES[s], dtype, later=True),
            )
        if kind == "fp16":
            yield (
                f"apg, numbers on the device, {size}, {kind}",
                lambda s=size: guide(APG(), SIZES[s], dtype, on_device=True),
            )
            yield (
                f"apg, no cosine, {size}, {kind}",
                lambda s=size: guide(APG(), SIZES[s], dtype, gamma_space=None),
            )
    for previous, denoised in ((False, False), (False, True), (True, True)):
        extras = ", previous image" * previous + ", denoised image" * denoised
        name = f"solver step{extras}, {kind}"
        yield name, lambda p=previous, d=denoised: solve(dtype, p, d)
    if kind == "fp16":
        yield "local denoiser", local


def guide(
    rule: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    later: bool = False,
    on_device: bool = False,
    gamma_space: Any = "x0",
) -> None:
    """One guidance step as a run takes it.

    Args:
        later: Whether it is a later step, which is given the state that the first one returned.
        on_device: Whether scale and noise level are 0-d tensors.
    """
    from pilotage.guidance import NoiseLevel, Predictions, Step
    from pilotage.guidance.ops import guide_step

    cond, uncond, x_t = (torch.empty(2, *shape, dtype=dtype) for _ in range(3))
    scale, alpha, sigma = SCALE, 0.6, 0.8
    if on_device:
        scale, alpha, sigma = (torch.tensor(value) for value in (scale, alpha, sigma))
    step = Step(10, 20, NoiseLevel(alpha, sigma, "epsilon"), None, x_t)
    predictions = Predictions({"cond": cond, "uncond": uncond}, step)
    state = None
    for _ in range(2 if later else 1):
        state = guide_step(
            rule, predictions, step, scale, state, gamma_space=gamma_space, impl="fused"
        ).state


def solve(dtype: torch.dtype, previous: bool, denoised: bool) -> None:
    """One step of a sampler that is written for speed."""
    from pilotage.guidance.ops import SolverStep, network_step
    from pilotage.guidance.ops.columns import COLUMNS

    x_t, prediction, last = (torch.empty(2, *SIZES["small"], dtype=dtype) for _ in range(3))
    step = SolverStep(torch.ones(len(COLUMNS)), has_previous=previous)
    network_step(
        x_t,
        prediction,
        last.float() if previous else None,
        step,
        want_denoised=denoised,
        dtype=dtype,
        impl="fused",
    )


def local() -> None:
    """One call of the local analytic denoiser."""
    from pilotage.guidance.analytic.fused import masked_posterior

    images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    n = images[0].numel()
    masked_posterior(torch.zeros(2, 1, 28, 28), 0.5, images, torch.ones(n, n, dtype=torch.bool))


def compiled(job: tuple[str, str]) -> list[dict[str, Any]]:
    """Every different kernel of the `cases` of (target, kind): registers, local memory, loads."""
    target, kind = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(NamedGPU(target))
    found: dict[str, dict[str, Any]] = {}
    name = ""

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            made = kernel.warmup(*args, grid=grid, **options)
            if made.hash not in found:
                bound = inspect.signature(kernel.fn).bind_partial(
                    *args, **{k: v for k, v in options.items() if k in kernel.arg_names}
                )
                facts = {"name": name, "kernel": kernel.fn.__name__, "target": target}
                found[made.hash] = facts | usage(made.asm["cubin"]) | loads(made, bound.arguments)

        return launch

    JITFunction.__getitem__ = launcher
    with torch.no_grad():
        for name, call in cases(kind):  # noqa: B007 (read in `launch`)
            call()
    return list(found.values())


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and its bytes of stack and local memory (where spills go)."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    values = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": values["REG"], "spilled_bytes": values["STACK"] + values["LOCAL"]}


def loads(made: Any, arguments: dict[str, Any]) -> dict[str, bool | None]:
    """Whether each prediction-sized input is read 128 bits at a time.

    None where no such width is expected: of kernels that read tiles for tensor cores.
    """
    inputs = [arguments[name] for name in ALWAYS_READ if arguments.get(name) is not None]
    if arguments.get("IN_X0"):
        inputs.append(arguments["x"])
    if not inputs:
        return {"vector_loads": None}
    needed = len({tensor.data_ptr() for tensor in inputs})
    wide = len(re.findall(r"ld\.global(?:\.\w+(?:::\w+)*)*\.v4\.[bfu]32", made.asm["ptx"]))
    return {"vector_loads": wide >= needed}


def measure() -> dict[str, Any]:
    """Compile everything, in as many processes as there are cores; the figures."""
    os.environ.pop("TRITON_INTERPRET", None)
    context = multiprocessing.get_context("spawn")
    jobs = list(itertools.product(CAPABILITIES, DTYPES))
    with context.Pool(os.cpu_count()) as pool:
        rows = [row for part in pool.imap(compiled, jobs, chunksize=1) for row in part]
    import triton

    figures: dict[str, Any] = {"triton": triton.__version__, "targets": {}}
    for target in CAPABILITIES:
        mine = [row for row in rows if row["target"] == target]
        checked = [row["vector_loads"] for row in mine if row["vector_loads"] is not None]
        figures["targets"][target] = {
            "variants": len(mine),
            "max_registers": max(row["registers"] for row in mine),
            "spills": sum(row["spilled_bytes"] > 0 for row in mine),
            "vector_loads": bool(checked) and all(checked),
            "dense_variants": len(checked),
        }
        figures["targets"][target]["kernels"] = {
            kernel: {
                "variants": sum(row["kernel"] == kernel for row in mine),
                "max_registers": max(row["registers"] for row in mine if row["kernel"] == kernel),
            }
            for kernel in dict.fromkeys(row["kernel"] for row in mine)
        }
    figures["cases"] = list(dict.fromkeys(row["name"] for row in rows))
    return figures


def complaints(found: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What is wrong with compiled kernels, or worse than or other than in the file."""
    wrong = []
    for target, now in found["targets"].items():
        if now["spills"]:
            wrong.append(f"{target}: {now['spills']} kernels spill registers")
        if not now["vector_loads"]:
            wrong.append(f"{target}: a dense input is read in less than 128 bits")
        then = stored["targets"].get(target, {})
        if now["variants"] != then.get("variants"):
            wrong.append(f"{target}: {now['variants']} variants, {then.get('variants')} stored")
        same_compiler = found["triton"] == stored["triton"]
        if same_compiler and now["max_registers"] > then.get("max_registers", 0):
            wrong.append(
                f"{target}: {now['max_registers']} registers, {then.get('max_registers')} stored"
            )
    return wrong


def main() -> int:
    """Compile, then write or compare; 1 where something is wrong."""
    from pilotage.eval.record import write_figures

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the file, keep it")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    figures = measure()
    stored = json.loads(args.output.read_text()) if args.check else figures
    for target, row in figures["targets"].items():
        shown = {name: value for name, value in row.items() if name != "kernels"}
        print(target, ", ".join(f"{name} {value}" for name, value in shown.items()))
    wrong = complaints(figures, stored)
    for line in wrong:
        print(line)
    if not args.check:
        write_figures(args.output, figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
