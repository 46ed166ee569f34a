"""A guidance-distilled copy of the embedded network, for the study of `evaluations`.

Its one branch predicts what classifier-free guidance at w = 7.5 makes of two, as the first stage of
https://arxiv.org/abs/2210.03142 (Meng et al.) and models like Flux dev do. It begins as a copy of
the network and learns, by the mean square of its output's error, from the states of guided runs of
15 to 60 steps (the paper: from noised pictures, and for a range of scales). Captions are those of
the training split. Weights and the clock lie in a folder: an interrupted training goes on there.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.emoji.training import Training
from pilotage.guidance.files import write_json
from pilotage.pipelines.fitting.identity import pipeline_identity

SCALE = 7.5
MINUTES, RATE, BATCH = 20.0, 2e-4, 32
CAPTIONS, AT_ONCE, STEPS = 320, 16, (15, 60)
SEED, HELD_OUT_SEED = 42_000, 43_000

Tensors = tuple[Tensor, ...]


class Branch(nn.Module):
    """The network on what one branch sees."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Its output."""
        return self.unet(x_t, t, encoder_hidden_states=text).sample


def guided_states(pipe: Any, captions: Sequence[str], seed: int) -> Tensors:
    """Along guided runs of the captions, with numbers of steps drawn at random.

    Returns:
        Noisy latents (N, C, H, W), timesteps (N,), index of the caption (N,), network output that
        guidance makes (N, C, H, W); and the text embedding of each caption, (captions, L, D).
    """
    parts: list[Tensors] = []
    texts: dict[int, Tensor] = {}
    rng = random.Random(seed)
    first = 0

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x_t, t = args[0].chunk(2)[1], args[1]
        uncond, cond = output[0].chunk(2)
        text = kwargs["encoder_hidden_states"].chunk(2)[1]
        rows = torch.arange(first, first + len(x_t))
        texts.update(zip(rows.tolist(), text.clone(), strict=True))
        target = uncond + SCALE * (cond - uncond)
        parts.append((x_t.clone(), t.expand(len(x_t)).clone(), rows, target))

    handle = pipe.unet.register_forward_hook(keep, with_kwargs=True)
    try:
        for first in range(0, len(captions), AT_ONCE):
            pipe(
                list(captions[first : first + AT_ONCE]),
                guidance_scale=SCALE,
                num_inference_steps=rng.randint(*STEPS),
                generator=torch.Generator().manual_seed(seed + first),
                output_type="latent",
            )
    finally:
        handle.remove()
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return *whole, torch.stack([texts[i] for i in range(len(captions))])


def unexplained(network: nn.Module, other: nn.Module, states: Tensors) -> float:
    """Mean square of a network's error, as a share of another's."""
    x_t, t, rows, target, text = states
    sums = [0.0, 0.0]
    with torch.inference_mode():
        for part in torch.arange(len(x_t)).split(128):
            inputs = x_t[part], t[part], text[rows[part]]
            for i, one in enumerate((network, other)):
                sums[i] += (one(*inputs) - target[part]).square().double().sum().item()
    return sums[0] / sums[1]


def distil(
    pipe: Any,
    captions: Sequence[str],
    held_out: Sequence[str],
    folder: Path,
    minutes: float = MINUTES,
) -> dict[str, Any]:
    """Put a distilled copy into the place of a pipeline's network.

    Args:
        pipe: A guided text-to-image pipeline, which is changed.
        captions: To learn on.
        held_out: To measure on.
        folder: Of weights and clock. What is finished there is not trained any more.
        minutes: Of training.

    Returns:
        Minutes and steps of training; `unexplained`: mean square of the error on held-out runs,
        as a share of that of the network itself on one branch.

    Raises:
        ValueError: the folder holds the training of another network.
    """
    pipe.set_progress_bar_config(disable=True)
    chosen = list(captions)[:: max(len(captions) // CAPTIONS, 1)][:CAPTIONS]
    own = {"network": pipeline_identity(pipe)["model"], "captions": len(chosen)}
    path = folder / "of.json"
    if path.is_file() and _read(path) != own:
        raise ValueError(f"{folder} holds the training of another network: remove it")
    write_json(path, own)
    teacher = Branch(pipe.unet)
    args = argparse.Namespace(work=folder, minutes=minutes, precision="no")
    training = Training("student", Branch(copy.deepcopy(pipe.unet)), args, RATE)
    if training.progress < 1:
        states = guided_states(pipe, chosen, SEED)
        held = guided_states(pipe, list(held_out), HELD_OUT_SEED)

        def step_loss() -> Tensor:
            drawn = torch.randint(len(states[0]), (BATCH,), generator=training.generator())
            x_t, t, rows, target = (tensor[drawn] for tensor in states[:4])
            return (training.model(x_t, t, states[4][rows]) - target).square().mean()

        def report(run: Training) -> dict[str, Any]:
            return {"unexplained": unexplained(averaged(run), teacher, held)}

        training.run(step_loss, report, every=5)
    pipe.unet = averaged(training).unet
    state = _read(folder / "student" / "state.json")
    return {
        "minutes": round(state["elapsed"] / 60, 1),
        "steps": state["step"],
        "unexplained": round(state["unexplained"], 4),
    }


def averaged(training: Training) -> Branch:
    """The network with averaged weights."""
    network = copy.deepcopy(training.bare)
    network.load_state_dict(training.ema)
    return network.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
