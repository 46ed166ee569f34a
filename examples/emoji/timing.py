"""Seconds of guidance settings, one after the other in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from pilotage.eval.sampling import Setting


def seconds_in_turn(
    pipe, columns: Sequence[Setting], prompts: Sequence[str], rounds: int
) -> dict[Setting, list[float]]:
    """Seconds of one batch of `prompts` under every setting, a value a round.

    A first round, in which libraries prepare for the batch sizes that occur, is not counted.
    """
    found: dict[Setting, list[float]] = {setting: [] for setting in columns}
    for turn in tqdm(range(rounds + 1), desc="timing", unit="round"):
        for setting in columns:
            generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
            begin = time.perf_counter()
            pipe(
                list(prompts),
                guidance=setting.guidance,
                guidance_scale=setting.scale,
                num_inference_steps=setting.steps,
                generator=generator,
            )
            if turn > 0:
                found[setting].append(time.perf_counter() - begin)
    return found
