"""Seconds of guidance settings, one after the other in the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from pilotage.eval.comparison.plan import Setting


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
