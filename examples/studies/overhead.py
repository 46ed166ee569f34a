"""What guidance costs the host beside the stock loop: ``eval/results/overhead.json``.

    python -m examples.studies.overhead

The network computes nothing: it returns stored predictions, another pair at every step, so that the
seam learns, measures and leaves rows out as ever, and all that is timed is the loop. Every setting
is timed in turn with the stock pipeline, on one thread, from one call of the network to another.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from tqdm import tqdm

from examples.studies.timing import keep_freed_memory
from pilotage.eval.record import write_figures
from pilotage.guidance import CFG, AdaptiveGuidance, Guidance
from pilotage.pipelines import guided

OUTPUT = Path("eval/results/overhead.json")
STEPS = 30
SCALE = 7.5
# Side of the latents, and the pipeline.
SIZES: dict[str, tuple[int, str]] = {
    "small": (8, "StableDiffusionPipeline"),
    "sdxl": (128, "StableDiffusionXLPipeline"),
}
# What is asked for, and the first step that is timed: Adaptive Guidance's after its stop.
SETTINGS: dict[str, tuple[str | Guidance, int]] = {
    "cfg": ("cfg", 1),
    "apg": ("apg", 1),
    "ag": (CFG() | AdaptiveGuidance(threshold=-1.0), 2),
}
WIDTH, POOLED, TIMES = 768, 16, 8


class Prepared(nn.Module, ConfigMixin):
    """Returns stored predictions, with shape (rows, 4, size, size), and notes when it is called.

    Args:
        size: Of the latents.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        size: int,
        sample_size: int,
        in_channels: int = 4,
        cross_attention_dim: int = WIDTH,
        time_cond_proj_dim: int | None = None,
        addition_time_embed_dim: int = TIMES,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (STEPS, 2, in_channels, size, size)
        self.register_buffer("predictions", torch.randn(shape, generator=generator))
        self.add_embedding = nn.Module()
        self.add_embedding.linear_1 = nn.Linear(6 * TIMES + POOLED, 1)
        self.calls: list[float] = []
        self.rows: list[int] = []

    @property
    def dtype(self) -> torch.dtype:
        """Of the predictions."""
        return self.predictions.dtype

    @property
    def device(self) -> torch.device:
        """Of the predictions."""
        return self.predictions.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """Both predictions of the step, or, of one row, the conditional one."""
        self.calls.append(time.perf_counter())
        self.rows.append(len(sample))
        both = self.predictions[len(self.calls) - 1]
        return (torch.cat([both[2 - len(sample) :]]),)


def pipeline(size: int, name: str) -> tuple[Any, dict[str, Any]]:
    """A guided pipeline without text encoders and autoencoder, and the arguments of its call."""
    cls = getattr(diffusers, name)
    parts: dict[str, Any] = {"scheduler": diffusers.EulerDiscreteScheduler(steps_offset=1)}
    parts["unet"] = Prepared(size, sample_size=max(size, 64))
    names = ["vae", "text_encoder", "tokenizer", "feature_extractor"]
    text = torch.zeros(1, 77, WIDTH)
    call: dict[str, Any] = {"prompt_embeds": text + 1, "negative_prompt_embeds": text}
    if "XL" in name:
        names += ["text_encoder_2", "tokenizer_2"]
        pooled = torch.zeros(1, POOLED)
        call |= {"pooled_prompt_embeds": pooled + 1, "negative_pooled_prompt_embeds": pooled}
        parts["add_watermarker"] = False
    else:
        names.append("safety_checker")
        parts["requires_safety_checker"] = False
    pipe = guided(cls(**parts, **dict.fromkeys(names)))
    pipe.set_progress_bar_config(disable=True)
    call |= {"height": 8 * size, "width": 8 * size, "num_inference_steps": STEPS}
    call |= {"guidance_scale": SCALE, "output_type": "latent"}
    return pipe, call | {"latents": torch.randn(1, 4, size, size)}


def seconds(pipe: Any, call: dict[str, Any], guidance: Any, first: int) -> tuple[float, float]:
    """Seconds of a step, from the network's call `first` on; and of the whole call."""
    network = pipe.unet
    network.calls, network.rows = [], []
    begin = time.perf_counter()
    pipe(**call, guidance=guidance)
    end = time.perf_counter()
    return (network.calls[-1] - network.calls[first]) / (STEPS - 1 - first), end - begin


def measure(size: int, name: str, rounds: int) -> dict[str, Any]:
    """Medians over rounds: seconds of the stock loop, and how many times those a setting takes."""
    pipe, call = pipeline(size, name)
    for guidance, first in SETTINGS.values():
        seconds(pipe, call, guidance, first)
    steps: dict[str, list[float]] = {name: [] for name in ("stock", *SETTINGS)}
    calls: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for turn in tqdm(range(rounds), desc=name, unit="round"):
        for key, (guidance, first) in SETTINGS.items():
            order = [None, guidance] if turn % 2 else [guidance, None]
            took = {g: seconds(pipe, call, g, first) for g in order}
            steps["stock"].append(took[None][0])
            steps[key].append(took[guidance][0] / took[None][0])
            calls[key].append(took[guidance][1] / took[None][1])
    figures = {
        key: round(statistics.median(values), 3) for key, values in steps.items() if key != "stock"
    }
    figures["stock_ms"] = round(1000 * statistics.median(steps["stock"]), 4)
    figures["whole_call"] = {key: round(statistics.median(v), 3) for key, v in calls.items()}
    return figures


def main(arguments: Sequence[str] | None = None, own_process: bool = False) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser("examples.studies.overhead", description=__doc__.split(":")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = own_process and keep_freed_memory()
    figures = {key: measure(*of, args.rounds) for key, of in SIZES.items()}
    figures |= {"rounds": args.rounds, "steps": STEPS, "memory_kept": kept}
    write_figures(args.output, figures)
    print(args.output.read_text())


if __name__ == "__main__":
    main(own_process=True)
