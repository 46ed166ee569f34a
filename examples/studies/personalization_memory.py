"""Peak memory above the weights of one step of token training, on networks of SD 1.5's shape.

    python -m examples.studies.personalization_memory

builds UNet and text encoder with random weights (memory does not depend on them) in bfloat16 and
runs, each in a process of its own: inference (one row), the forward-only step with K perturbations
in one call, exact backpropagation to the token, the same with gradient checkpointing; all again
with int8 weights. Batch 1, 64 x 64 latents. Writes ``eval/results/personalization_memory.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from examples.studies.memory import peak_memory
from pilotage.eval.record import write_figures

OUTPUT = Path("eval/results/personalization_memory.json")
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# The order in which they run: what the comparison needs first.
METHODS = (
    "inference",
    "forward_1",
    "backprop",
    "backprop_checkpoint",
    "int8_inference",
    "int8_forward_1",
    "int8_backprop_checkpoint",
    "int8_backprop",
    "forward_2",
    "forward_4",
    "forward_8",
    "int8_forward_8",
)
REPEATS = 10  # timed steps on a GPU


def random_networks(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    """UNet (860 M parameters) and text encoder (123 M) of SD 1.5's shape, on the CPU."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
    for network in (unet, text):
        network.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.uniform_(-0.02, 0.02)
    for buffer in text.buffers():
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return unet, text


def token_loss(unet: nn.Module, text: nn.Module, device: str, side: int) -> tuple[Any, Any]:
    """The personalizer's loss on these networks, and a batch of one latent."""
    from diffusers import DDPMScheduler

    from pilotage.pipelines.personalization.loss import DiffusionTokenLoss, TokenBatch

    words = text.config.vocab_size
    parts = SimpleNamespace(
        unet=unet.to(device),
        text_encoder=text.to(device),
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4, block_out_channels=(1,) * 4)),
        tokenizer=range(words),
        scheduler=DDPMScheduler(),
    )
    ids = torch.full((1, text.config.max_position_embeddings), 1)
    ids[0, 3] = words  # the learned token
    noisy = torch.randn(1, 4, side, side, device=device)
    timesteps = torch.tensor([700], device=device)
    batch = TokenBatch(noisy, timesteps, torch.randn_like(noisy), (ids.to(device),))
    return DiffusionTokenLoss(parts), batch


def measure(method: str, unet: nn.Module, text: nn.Module, device: str, side: int) -> dict:
    """Peak bytes above the weights of one step of a method, and its time."""
    from pilotage.pipelines.quantization.quantize import quantize

    kind = method.removeprefix("int8_")
    if method != kind:
        for network in (unet, text):
            quantize(network, backend="pilotage", gradients=True)
    loss, batch = token_loss(unet, text, device, side)
    count = int(kind.split("_")[1]) if kind.startswith("forward") else 1
    vectors = 0.02 * torch.randn(count, 1, text.config.hidden_size, device=device)
    if kind.endswith("checkpoint"):
        unet.enable_gradient_checkpointing()
        text.gradient_checkpointing_enable()
        unet.train(), text.train()  # without dropout: only checkpointing asks for it

    def inference() -> None:
        hidden, _ = loss.conditions(vectors, batch.ids)
        loss.pipe.unet(batch.noisy.to(unet.dtype), batch.timesteps, hidden)

    def step() -> None:
        if kind == "inference":
            inference()
        elif kind.startswith("forward"):
            loss(vectors, batch)
        else:
            leaf = vectors.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(leaf, batch).sum(), leaf)
            if not grad.abs().sum() > 0:
                raise RuntimeError(f"{method}: no gradient reached the token")

    with torch.set_grad_enabled(kind.startswith("backprop")):
        if device == "cuda":
            step()
        peak = peak_memory(step, device)
        seconds = peak.seconds
        if device == "cuda":
            start = time.perf_counter()
            for _ in range(REPEATS):
                step()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / REPEATS
    weights = [*unet.parameters(), *unet.buffers(), *text.parameters(), *text.buffers()]
    return {
        "peak_mb_over_weights": round(peak.allocated / 2**20, 3),
        "resident_mb_over_weights": peak.resident and round(peak.resident / 2**20, 3),
        "weights_mb": round(sum(w.nbytes for w in weights) / 2**20, 3),
        "seconds": round(seconds, 3),
        "steps_per_second": round(1 / seconds, 4),
    }


def _child(queue: Any, threads: int, method: str, *arguments: Any) -> None:
    try:
        torch.set_num_threads(threads)
        queue.put(measure(method, *arguments))
    except BaseException as error:
        queue.put(f"{type(error).__name__}: {error}")
        raise


def in_a_process(threads: int, method: str, *arguments: Any) -> dict:
    """`measure` in a fork of this process, which shares the weights and nothing else.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(queue, threads, method, *arguments))
    process.start()
    while not queue._reader.poll(0.5):
        if not process.is_alive() and not queue._reader.poll(0):
            raise RuntimeError(f"{method}: the process ended with code {process.exitcode}")
    result = queue.get()
    process.join()
    if isinstance(result, str):
        raise RuntimeError(f"{method}: {result}")
    return result


def figures(results: dict[str, dict], side: int, device: str) -> dict[str, Any]:
    """What goes into the file: all results, and peaks as multiples of inference's."""
    ratios = {
        name: round(row["peak_mb_over_weights"] / results[base]["peak_mb_over_weights"], 3)
        for name, row in results.items()
        if (base := "int8_inference" if name.startswith("int8") else "inference") in results
    }
    return {
        "networks": "SD 1.5's UNet and text encoder, random weights, bfloat16",
        "latents": [1, 4, side, side],
        "device": device,
        "peak_mb_over_weights": "MiB held by PyTorch's allocator; resident: of the process",
        "methods": results,
        "memory_ratio_to_inference": ratios,
    }


def earlier(path: Path, side: int, device: str) -> dict[str, dict]:
    """Methods of a file of figures, in the order in which they were measured.

    Raises:
        ValueError: the file is of other latents or another device.
    """
    record = json.loads(path.read_text())
    mine = figures({}, side, device)
    for name in ("networks", "latents", "device"):
        if record[name] != mine[name]:
            raise ValueError(f"{path} is of {name} {record[name]}, not {mine[name]}: keep nothing")
    return record["methods"]


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON to write.")] = OUTPUT,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    side: Annotated[int, typer.Option(min=8, help="Side of the latents; 64 is 512 pixels.")] = 64,
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a measurement.")] = 2,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep what is in the file, measure the rest.")
    ] = False,
) -> None:
    """Measure every method and write the figures after each."""
    wanted = tuple(methods.split(",")) if methods else METHODS
    if unknown := [name for name in wanted if name not in METHODS]:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is cpu or cuda, got {device!r}")
    results = earlier(output, side, device) if keep else {}
    wanted = tuple(name for name in wanted if name not in results)
    # A fork must not inherit OpenMP's threads or a CUDA context: one thread, no CUDA until the end.
    torch.set_num_threads(1)
    networks = random_networks()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(wanted))
        for name in wanted:
            progress.update(task, description=name)
            results[name] = in_a_process(threads, name, *networks, device, side)
            progress.console.print(f"{name}: {results[name]}", highlight=False)
            progress.advance(task)
            if device == "cpu":
                write_figures(output, figures(results, side, device))
    write_figures(output, figures(results, side, device))


if __name__ == "__main__":
    typer.run(main)
