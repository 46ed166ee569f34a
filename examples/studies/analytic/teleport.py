"""Teleported samplers against stock ones: Fréchet distance by network evaluations, same seeds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.emoji import data as emoji
from examples.emoji.train import load_pixels
from pilotage.eval.comparison.evaluation import DISTANCE_RESAMPLES
from pilotage.eval.comparison.paired import differences
from pilotage.eval.metrics.bootstrap import Resamples
from pilotage.eval.metrics.frechet import frechet_distance, frechet_resamples
from pilotage.guidance.analytic import DatasetStatistics
from pilotage.pipelines import GaussianTeleport
from pilotage.pipelines.analytic import encode_images

Sampler = Callable[[Any, int, int, int], Tensor]  # scheduler, steps, first seed, count -> pictures


def unconditional(unet: Any) -> Sampler:
    """Pictures (count, 3, H, W) in [0, 1] of an unconditional UNet."""

    def run(scheduler: Any, steps: int, first: int, count: int) -> Tensor:
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(first + i))
            for i in range(count)
        ]
        scheduler.set_timesteps(steps)
        x = torch.stack(noise) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            pred = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(pred, t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)

    return torch.no_grad()(run)


def text_to_image(pipe: Any, prompts: Sequence[str], guidance: str, scale: float) -> Sampler:
    """Pictures of a guided pipeline, a prompt each."""

    def run(scheduler: Any, steps: int, first: int, count: int) -> Tensor:
        pipe.scheduler = scheduler
        return pipe(
            [prompts[(first + i) % len(prompts)] for i in range(count)],
            guidance=guidance,
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(first + i) for i in range(count)],
            output_type="pt",
        ).images.float()

    return run


def drawings(archive: Path) -> tuple[Tensor, list[str]]:
    """Training pictures (N, 3, 64, 64), uint8, of the embedded model, and its held-out prompts.

    Raises:
        FileNotFoundError: the archive is not there.
    """
    found = emoji.load(archive, everyday=True)
    pictures = load_pixels(archive, [d for d in found if d.split == "train"])
    return pictures, [d.text for d in found if d.split == "pair"]


def latent_statistics(vae: Any, pictures: Tensor) -> DatasetStatistics:
    """Statistics of the scaled latents of pictures."""
    latents, _ = encode_images(vae, pictures)
    return DatasetStatistics.from_images(latents, value_range=None)


def settings(
    scheduler: Any, statistics: DatasetStatistics, steps: Sequence[int], sigmas: Sequence[Any]
) -> list[tuple[str, Any, int]]:
    """(name, scheduler, steps): the stock scheduler, and teleported ones."""
    rows = [(f"stock, {count} steps", scheduler, count) for count in steps]
    for sigma in sigmas:
        fast = GaussianTeleport(scheduler, statistics, sigma_skip=sigma, jump="input")
        rows.append((f"teleport to sigma {fast.sigma_skip:.3g}, {steps[0]} steps", fast, steps[0]))
    return rows


def measure(
    sampler: Sampler,
    rows: list[tuple[str, Any, int]],
    extractor: Any,
    real: Tensor,
    groups: Sequence[Hashable],
    batch: int = 64,
) -> list[dict[str, Any]]:
    """Fréchet distance of every setting, and its differences to the stock ones before it.

    All settings have the same seeds, so differences are paired: whole groups are resampled, the
    same ones for every setting.

    Args:
        real: Features of real pictures, (N, D).
        groups: Of each picture that is generated, so that pictures are independent from group to
            group only: its prompt, or itself.
    """
    results: list[dict[str, Any]] = []
    drawn, draws = Resamples.of(groups, DISTANCE_RESAMPLES), []
    for name, scheduler, steps in tqdm(rows, desc="teleport"):
        features = []
        for first in range(0, len(groups), batch):
            pictures = sampler(scheduler, steps, first, min(batch, len(groups) - first))
            features.append(extractor(pictures))
        fake = torch.cat(features).double()
        draws.append(frechet_resamples(real, fake, drawn))
        results.append(
            {
                "name": name,
                "nfe": len(scheduler.timesteps),
                "sigma_skip": getattr(scheduler, "sigma_skip", None),
                "fd": frechet_distance(real, fake),
                "pictures": pictures[:8],
            }
        )
    stock = [i for i, row in enumerate(results) if row["sigma_skip"] is None]
    pairs = [(i, j) for i in range(len(results)) for j in stock if j < i]
    found = differences([row["fd"] for row in results], draws, pairs, len(set(groups)))
    for (i, j), one in zip(pairs, found, strict=True):
        difference = {"fd": one.value, "interval": one.interval, "needed": one.needed}
        results[i].setdefault("minus", {})[results[j]["name"]] = difference
    return results


def verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The most evaluations saved at a distance that is not clearly above the first, stock setting.

    Clearly: the interval of the paired difference, which holds for all pairs, is above zero.
    """
    stock = results[0]
    fast = [row for row in results if row["sigma_skip"] is not None]
    good = [row for row in fast if row["minus"][stock["name"]]["interval"][0] <= 0]
    best = min(good or fast, key=lambda row: row["nfe"] if good else row["fd"])
    return {
        "nfe_saved": 1 - best["nfe"] / stock["nfe"],
        "clearly_worse": not good,
        "fd_with": best["fd"],
        "fd_without": stock["fd"],
        "minus": best["minus"],
        "nfe_with": best["nfe"],
        "nfe_without": stock["nfe"],
        "settings": [{k: v for k, v in row.items() if k != "pictures"} for row in results],
    }
