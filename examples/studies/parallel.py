"""Branches shared out between two processes: ``eval/results/parallel.json``.

    python -m examples.studies.parallel

One picture on an SD3-shaped network with random weights, on two cores, gloo in between: two
processes with a thread each against one process with one thread, and against one with both cores.
And the tiny pipelines of the tests: whether both processes end with the same bits, and with those
of one process that evaluates the branches in turn; how long a process outlives one that is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from pilotage.eval.record import write_figures
from pilotage.guidance import CFG, AdaptiveGuidance
from pilotage.pipelines import guided
from pilotage.pipelines.seam.exchange import PATIENCE
from tests.pipelines.seam import test_parallel, together

OUTPUT = Path("eval/results/parallel.json")
STEPS = 8
SIZE = 32  # of the latents
TOKENS, WIDTH, POOLED = 77, 4096, 2048
# Adaptive Guidance stops after the first step: from then on, rows are shared out.
SETTINGS = {"cfg": "cfg", "apg": "apg", "ag": CFG() | AdaptiveGuidance(threshold=-1.0)}
TIMED = ("cfg", "apg")
IN_TURN = "in-turn.safetensors"
# Way of working -> processes, threads of each.
WAYS = {"one": (1, 1), "two": (2, 1), "two_threads": (1, 2)}


def pipeline(layers: int) -> Any:
    """SD3 without text encoders and autoencoder: as wide as SD3, of so many layers."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=SIZE,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=18,
        joint_attention_dim=WIDTH,
        caption_projection_dim=18 * 64,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIZE,
    ).eval()
    names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    names += ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = guided(
        StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            **dict.fromkeys(names),
        )
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, name: str, batch: int = 1, steps: int = STEPS, **extra: Any) -> Tensor:
    """Latents (batch, 16, SIZE, SIZE) of a call under one of the settings."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return pipe(
        prompt_embeds=noise(TOKENS, WIDTH),
        negative_prompt_embeds=noise(TOKENS, WIDTH),
        pooled_prompt_embeds=noise(POOLED),
        negative_pooled_prompt_embeds=noise(POOLED),
        latents=noise(16, SIZE, SIZE),
        height=8 * SIZE,
        width=8 * SIZE,
        num_inference_steps=steps,
        guidance_scale=5.0,
        guidance=SETTINGS[name],
        output_type="latent",
        **extra,
    ).images


def work(way: str, layers: int, folder: Path) -> None:
    """One process of a way: its times, bytes and latents go to files."""
    processes, threads = WAYS[way]
    torch.set_num_threads(threads)
    rank = int(os.environ["RANK"])
    sent: list[int] = []
    for name, place in (("all_gather", 1), ("broadcast", 0)):
        _count(name, place, sent)
    pipe, extra = pipeline(layers), {"parallel": "branches"} if processes > 1 else {}
    figures: dict[str, Any] = {"parameters": pipe.transformer.num_parameters()}
    latents = {}
    call(pipe, "cfg", steps=1, **extra)
    for name in TIMED:
        sent.clear()
        begin = time.perf_counter()
        latents[name] = call(pipe, name, **extra)
        figures[name] = time.perf_counter() - begin
        figures[f"{name} bytes"] = sum(sent) / STEPS
    if way != "two_threads":
        latents["ag"] = call(pipe, "ag", 2, 3, **extra)
    save_file({k: v.contiguous() for k, v in latents.items()}, folder / f"{way}-{rank}.safetensors")
    if way == "one" and not (folder / IN_TURN).exists():  # last: the network stays so
        test_parallel.in_turn(pipe.transformer)
        save_file({name: call(pipe, name).contiguous() for name in TIMED}, folder / IN_TURN)
    (folder / f"{way}-{rank}.json").write_text(json.dumps(figures))


def _count(name: str, place: int, sent: list[int]) -> None:
    """Note the bytes that this process puts into a collective of torch.distributed."""
    stock = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        sent.append(args[place].numel() * args[place].element_size())
        return stock(*args, **kwargs)

    setattr(dist, name, counted)


def launch(way: str, layers: int, folder: Path) -> dict[str, Any]:
    """Run the processes of a way to their end; the first one's figures."""
    count, threads = WAYS[way]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-W", "ignore", "-m", "examples.studies.parallel"]
    command += ["--way", way, "--layers", str(layers), "--folder", str(folder)]
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    if count == 1:  # no group
        ranks = [{"RANK": "0"}]
        shared.pop("WORLD_SIZE")
    running = [subprocess.Popen(command, env=os.environ | shared | rank) for rank in ranks]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"a process of {way!r} failed")
    return json.loads((folder / f"{way}-0.json").read_text())


def times(layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The ways in turn, several times: medians of ratios within a round."""
    found = [
        {way: launch(way, layers, folder) for way in WAYS}
        for _ in tqdm(range(rounds), "rounds", unit="round")
    ]

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(f["two"][name] / f[other][name] for f in found), 3)

    files = [f"{name}.safetensors" for name in ("one-0", "two-0", "two-1")]
    one, two, second, in_turn = (load_file(folder / name) for name in (*files, IN_TURN))
    largest = {n: float((one[n] - two[n]).norm() / one[n].norm()) for n in two}
    return {
        "network": "SD3Transformer2DModel",
        "parameters": found[0]["one"]["parameters"],
        "latents": [1, 16, SIZE, SIZE],
        "steps": STEPS,
        "rounds": rounds,
        "seconds": {
            way: {n: round(statistics.median(f[way][n] for f in found), 3) for n in TIMED}
            for way in WAYS
        },
        "time_ratio": {name: ratio(name, "one") for name in TIMED},
        "time_ratio_two_threads": {name: ratio(name, "two_threads") for name in TIMED},
        "bytes_per_step": {name: round(found[0]["two"][f"{name} bytes"]) for name in TIMED},
        "large_ranks_bit_equal": all(torch.equal(two[n], second[n]) for n in two),
        "large_equal_in_turn": {n: torch.equal(two[n], in_turn[n]) for n in TIMED},
        "large_relative_difference_to_one_call": largest,
    }


def tiny(folder: Path) -> dict[str, Any]:
    """The pipelines of the tests, in two processes and in one; all with one thread."""
    torch.set_num_threads(1)
    for process in together.start(2, "everything", folder):
        if process.communicate() and process.returncode:
            raise RuntimeError("the tiny pipelines failed: run tests/pipelines/seam")
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in (0, 1))
    equal, nearly = {}, {}
    for name, given in tqdm({**together.CALLS, **together.NEARLY}.items(), "one process"):
        exact = name in together.CALLS
        alone, _ = test_parallel.expected(given) if exact else together.made(name, given)
        difference = float((first[name] - alone).norm() / alone.norm())
        if exact and not name.startswith("ltx2"):
            equal[name] = torch.equal(first[name], alone)
        else:
            nearly[name] = difference
    families = sorted({given[0] for given in together.CALLS.values()})
    policies = sorted({n.split()[-1] for n in together.CALLS} - {"cfg", "apg", "noise"})
    return {
        "ranks_bit_equal": all(torch.equal(first[name], second[name]) for name in first),
        "equal_to_one_process": all(equal.values()),
        "equal_in_turn": equal,
        "relative_difference_where_rows_are_grouped_otherwise": nearly,
        "families": len(families),
        "families_tested": families,
        "policies": len(policies),
        "policies_tested": policies,
    }


def killed(folder: Path) -> float:
    """Seconds from the end of a process that is killed to that of the other, with an error."""
    first, second = together.start(2, "lost", folder, "killed")
    second.wait()
    begin = time.perf_counter()
    printed = first.communicate()[1]
    seconds = time.perf_counter() - begin
    if "ProcessesError: process 0 of 2 has lost another one" not in printed:
        raise RuntimeError(f"the other process did not say why it ended: {printed}")
    return round(seconds, 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser("examples.studies.parallel", description=__doc__.split(":")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="the JSON file")
    parser.add_argument("--way", choices=WAYS, help="be one process of it (the study starts it)")
    parser.add_argument("--folder", type=Path, help="where that writes")
    args = parser.parse_args(arguments)
    if args.way:
        work(args.way, args.layers, args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = times(args.layers, args.rounds, folder)
        figures |= tiny(folder) | {"killed_rank_seconds": killed(folder)}
    figures["patience_seconds"] = PATIENCE.total_seconds()
    write_figures(args.output, figures)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
