"""Loss, time and memory on each runtime: ``eval/results/runtimes.json``.

    python -m examples.studies.runtimes

The embedded model's token loss, as one step of personalization evaluates it, on PyTorch (float32,
and int8 weights) and on ONNX Runtime and OpenVINO (graphs in int8, activations too; and in
float32). Every setting has a process of its own, one thread, and is timed there in turn with
PyTorch in float32; its memory is measured in another process, in which PyTorch's UNet is dropped.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from examples.studies.memory import forget_peak_resident, peak_resident
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import write_figures
from pilotage.pipelines.personalization.calibration import calibrate
from pilotage.pipelines.personalization.inputs import TEMPLATES, extended, prompt_ids
from pilotage.pipelines.personalization.loss import DiffusionTokenLoss, TokenBatch
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.personalization.recipes import PRESETS
from pilotage.pipelines.quantization.quantize import quantize
from pilotage.pipelines.runtimes import export_onnx, on_runtime, quantize_onnx, recorded

OUTPUT = Path("eval/results/runtimes.json")
# Name -> runtime and graphs; "" is PyTorch.
SETTINGS = {
    "torch": ("", "fp32"),
    "int8": ("", "int8"),
    "onnxruntime": ("onnxruntime", "int8"),
    "openvino": ("openvino", "int8"),
    "onnxruntime_fp32": ("onnxruntime", "fp32"),
    "openvino_fp32": ("openvino", "fp32"),
}
PROMPTS = ("a red heart", "a yellow star", "a house with a garden", "a green frog")
WORD = "<x>"
ROWS, POINTS = 4, PRESETS["ours"].evaluations
# Of the tokens whose losses are compared, from a word, in units of its norm: how far the search
# looks around itself, and further.
DISTANCES = (PRESETS["ours"].mu, 0.03, 0.3)


def pictures(pipe: Any) -> list[Any]:
    """Some of the model's own, to calibrate on and to learn from."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(list(PROMPTS), guidance="cfg", num_inference_steps=20, generator=noise).images


def graphs(folder: Path) -> None:
    """Write the graphs in float32 and int8, calibrated on pictures, and the pictures."""
    pipe = quiet()
    images = pictures(pipe)
    save_file({"pictures": to_tensor(images).contiguous()}, folder / "pictures.safetensors")
    export_onnx(pipe, folder / "fp32")
    ours = on_runtime(quiet(), folder / "fp32")
    with recorded(ours) as inputs:
        calibrate(Personalizer(ours), images)
    quantize_onnx(folder / "fp32", folder / "int8", inputs)


def quiet() -> Any:
    """The embedded model, without progress bars or gradients."""
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).requires_grad_(False)
    return pipe


def pipeline(name: str, folder: Path) -> Any:
    """The embedded model as a setting has it."""
    pipe = quiet()
    runtime, precision = SETTINGS[name]
    if runtime:
        return on_runtime(pipe, folder / precision, runtime)
    if precision == "int8":
        quantize(pipe, backend="pilotage")
    return pipe


def inputs(
    networks: DiffusionTokenLoss, folder: Path, distance: float = 0.1
) -> tuple[Tensor, TokenBatch]:
    """What a step evaluates: POINTS tokens around a word, ROWS pictures and timesteps.

    They lie `distance` from the word, in units of its norm.
    """
    latents = networks.encode(load_file(folder / "pictures.safetensors")["pictures"])
    ids = prompt_ids(extended(networks.pipe.tokenizer, WORD, 1), TEMPLATES[:ROWS], WORD, 1)
    times = torch.tensor([150, 400, 650, 900])
    batch = networks.batch(latents, times, (ids,), 0)
    word = Personalizer(networks.pipe).initial_embeddings("star", 1)
    spread = torch.randn(POINTS, *word.shape, generator=torch.Generator().manual_seed(0))
    return word + distance * word.norm() / word.numel() ** 0.5 * spread, batch


@torch.no_grad()
def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Loss and time of a setting, in turn with PyTorch in float32."""
    exact, ours = (DiffusionTokenLoss(p) for p in (quiet(), pipeline(name, folder)))
    tokens, batch = inputs(exact, folder)
    expected, found = exact(tokens, batch), ours(tokens, batch)
    seconds: dict[DiffusionTokenLoss, list[float]] = {exact: [], ours: []}
    for turn in range(rounds):
        for loss in (exact, ours) if turn % 2 else (ours, exact):
            began = time.perf_counter()
            loss(tokens, batch)
            seconds[loss].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds[exact], seconds[ours], strict=True)]
    correlations = {}
    for distance in DISTANCES:
        tokens, batch = inputs(exact, folder, distance)
        losses = torch.stack([exact(tokens, batch), ours(tokens, batch)])
        correlations[str(distance)] = torch.corrcoef(losses.double())[0, 1].item()
    return {
        "loss_difference": ((found - expected).abs() / expected).max().item(),
        "correlation_by_distance": correlations,
        "seconds": statistics.median(seconds[ours]),
        "time_ratio_to_torch": statistics.median(ratios),
    }


@torch.no_grad()
def remember(name: str, folder: Path) -> dict[str, float]:
    """Peak resident memory of a step of a setting, above that before its networks were loaded."""
    if runtime := SETTINGS[name][0]:
        importlib.import_module(runtime)
    before = forget_peak_resident()
    loss = DiffusionTokenLoss(pipeline(name, folder))
    tokens, batch = inputs(loss, folder)
    loss(tokens, batch)
    gc.collect()
    forget_peak_resident()
    loss(tokens, batch)
    return {"peak_mb": (peak_resident() - before) / 1e6}


def child(name: str, what: str, folder: Path, rounds: int) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, "-W", "ignore", "-m", "examples.studies.runtimes"]
    command += ["--child", name, what, str(folder), "--rounds", str(rounds)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def rounded(figures: Any) -> Any:
    """Six digits of every number."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    return float(f"{figures:.6g}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser("examples.studies.runtimes", description=__doc__.split(":")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="the JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.child:
        name, what, folder = args.child
        measures: dict[str, Callable[[], Any]] = {
            "time": lambda: measure(name, Path(folder), args.rounds),
            "memory": lambda: remember(name, Path(folder)),
        }
        print(json.dumps(measures[what]()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graphs(folder)
        figures: dict[str, Any] = {}
        for name in tqdm(SETTINGS, unit="setting"):
            found = child(name, "time", folder, args.rounds)
            found |= child(name, "memory", folder, args.rounds)
            runtime, precision = SETTINGS[name]
            size = sum(f.stat().st_size for f in (folder / precision).rglob("model.onnx*"))
            figures[name] = found | ({"megabytes_of_graphs": size / 1e6} if runtime else {})
    write_figures(args.output, rounded(figures) | {"tokens": POINTS, "rows": ROWS, "threads": 1})
    print(args.output.read_text())


if __name__ == "__main__":
    main()
