"""Costs of a step, exact resume and agreement of processes."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from examples.studies.memory import peak_memory
from pilotage.pipelines.personalization.inputs import TokenData
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.personalization.recipes import PRESETS

WORD = "<x>"
ROUNDS = 15
COMMAND = [
    *("--token", WORD, "--initializer", "bus", "--template", "twemoji style {}"),
    *("--evaluate-every", "2", "--checkpoint-every", "2"),
    *("--points-per-call", "1"),
]


def costs(
    full: Personalizer, int8: Personalizer, subject: Any, batch: int
) -> dict[str, dict[str, float]]:
    """One step of each method: peak allocation above the weights in MB, processor seconds.

    Seconds are medians over rounds in which every method has its turn.

    Plain inference is the denoiser and the text encoder on the two rows of guidance, on the int8
    network. `ours_two_rows` is ours with at most two rows a call.
    """
    source = subject.data(full.pipe, subject.train)
    token = full.initial_embeddings(subject.word, 1)

    def batches(rows: int) -> Any:
        plan = PRESETS["zoodip"]
        data = TokenData(full.networks, source, plan, seed=0)
        ids = tuple(i[:1].repeat(rows, 1) for i in source[1])
        times = torch.full((rows,), 700)
        return full.networks.batch(data.latents[:1].repeat(rows, 1, 1, 1), times, ids, 0)

    @torch.no_grad()
    def forward(personalizer: Personalizer, count: int, rows: int = 1) -> None:
        personalizer.networks(token.repeat(count, 1, 1), inputs[rows])

    def backward(personalizer: Personalizer) -> None:
        leaf = token.clone().requires_grad_()
        personalizer.networks(leaf[None], inputs[batch]).sum().backward()

    def checkpointed() -> None:
        int8.pipe.unet.enable_gradient_checkpointing()
        backward(int8)
        int8.pipe.unet.disable_gradient_checkpointing()

    def two_rows() -> None:
        int8.networks.max_rows = 2
        forward(int8, PRESETS["ours"].evaluations)
        int8.networks.max_rows = 0

    inputs = {1: batches(1), 2: batches(2), batch: batches(batch)}
    calls = {
        "inference": lambda: forward(int8, 1, 2),
        "zoodip": lambda: forward(int8, PRESETS["zoodip"].evaluations),
        "ours": lambda: forward(int8, PRESETS["ours"].evaluations),
        "ours_two_rows": two_rows,
        "backprop": lambda: backward(full),
        "backprop_int8_checkpoint": checkpointed,
    }
    result = {}
    for name, call in calls.items():
        call()  # what is made once (threads, workspaces) is not the method's
        result[name] = {"mb": round(peak_memory(call).allocated / 1e6, 3)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    for name, values in seconds.items():
        result[name]["seconds"] = round(statistics.median(values), 5)
    return result


def learn(folder: Path, pictures: Path, processes: int = 1, steps: int = 4) -> torch.Tensor:
    """All numbers of the checkpoint of a short run of ``pilotage personalize``.

    In so many processes. (So few steps may have learned nothing, which is status 1.)
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [sys.executable, "-m", "pilotage.eval", "personalize", str(pictures)]
    command = [*script, *COMMAND, "--steps", str(steps), "--output", str(folder)]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
        running.append(subprocess.Popen(command, env=environment))
    for process in running:
        if process.wait() not in (0, 1):
            raise RuntimeError(f"{' '.join(command)} failed")
    state = load_file(folder / "checkpoint.safetensors")
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def agreement(subject: Any) -> dict[str, Any]:
    """Whether an interrupted run and runs in 2 and 4 processes end alike, bit for bit."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pictures = root / "pictures"
        pictures.mkdir()
        for i, image in enumerate(subject.pictures[subject.train]):
            image.save(pictures / f"{i}.png")
        one = learn(root / "1", pictures)
        learn(root / "parts", pictures, steps=2)
        parts = learn(root / "parts", pictures)
        several = {count: learn(root / str(count), pictures, count) for count in (2, 4)}
    return {
        "resume_exact": torch.equal(one, parts),
        "processes_agree": all(torch.equal(one, other) for other in several.values()),
        "processes": [1, *several],
    }
