"""How well analytic denoisers explain a network: along its trajectory, and as denoisers.

Protocol of Lukoianov et al. (https://arxiv.org/abs/2509.09672): DDIM in 10 steps under the linear
beta schedule, each denoiser from the same noise on its own way, the last raw x0 compared with the
network's by R^2 = 1 - |D - D_net|^2 / (n var(D_net)). Pixels are in [-1, 1]; MSE is per pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm import tqdm

from pilotage.pipelines.seam.noise_levels import noise_level

Interval = Callable[[Tensor], tuple[float, float]]


def ddim(scheduler: Any, steps: int) -> DDIMScheduler:
    """A DDIM scheduler of the same noise schedule, without clipping, on its grid."""
    made = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    made.set_timesteps(steps)
    return made


@torch.no_grad()
def denoised(model: Any, scheduler: Any, x_t: Tensor, t: Tensor) -> Tensor:
    """The model's x0 at x_t."""
    return noise_level(scheduler, t).to_x0(model(x_t, t).sample, x_t)


@torch.no_grad()
def trajectory(model: Any, scheduler: Any, noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The samples x_t (the noise first) and the raw x0 of every step."""
    x, samples, images = noise, [], []
    for t in scheduler.timesteps:
        pred = model(x, t).sample
        samples.append(x)
        images.append(noise_level(scheduler, t).to_x0(pred, x))
        x = scheduler.step(pred, t, x).prev_sample
    return samples, images


def scores(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """R^2, MSE and cosine of images (B, C, H, W) with others, one each per image."""
    a, b = found.flatten(1).double(), truth.flatten(1).double()
    mse = (a - b).square().mean(1)
    return {
        "r2": 1 - mse / b.var(1, correction=0),
        "mse": mse,
        "cosine": torch.nn.functional.cosine_similarity(a, b),
    }


def summary(values: dict[str, Tensor], interval: Interval | None) -> dict[str, Any]:
    """Means and, with `interval`, their bootstrap intervals; the median of R^2 as well."""
    result: dict[str, Any] = {name: float(value.mean()) for name, value in values.items()}
    result["r2_median"] = float(values["r2"].median())
    if interval is not None:
        for name, value in values.items():
            result[f"{name}_interval"] = list(interval(value))
    return result


def explain(
    network: Any,
    models: dict[str, Any],
    scheduler: Any,
    noise: Tensor,
    on_path: int,
    interval: Interval,
) -> dict[str, dict[str, Any]]:
    """Every analytic model against the network, from the same noise.

    Args:
        network: The trained UNet.
        models: Name -> analytic model.
        scheduler: See `ddim`.
        noise: Where all begin, with shape (B, C, H, W).
        on_path: For how many samples the models are also evaluated at the network's own x_t.
        interval: Bootstrap interval of the mean of values (B,).

    Returns:
        Name -> figures of the last raw x0 (``r2``, ``mse``, ``cosine``, intervals), of each step of
        the model's own trajectory (``own_path``) and at the network's x_t (``network_path``).
    """
    samples, truth = trajectory(network, scheduler, noise)
    sigmas = [noise_level(scheduler, t).ratio for t in scheduler.timesteps]
    results = {}
    for name, model in tqdm(models.items(), desc="trajectories"):
        _, images = trajectory(model, scheduler, noise)
        own = [scores(a, b) for a, b in zip(images, truth, strict=True)]
        steps = zip(scheduler.timesteps, samples, truth, strict=True)
        there = [
            scores(denoised(model, scheduler, x[:on_path], t), x0[:on_path]) for t, x, x0 in steps
        ]
        results[name] = summary(own[-1], interval) | {
            "own_path": by_sigma(sigmas, own),
            "network_path": by_sigma(sigmas, there),
            "picture": images[-1][:8],
        }
    return results | {"network": {"picture": truth[-1][:8]}}


def by_sigma(sigmas: list[float], values: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """One entry per noise level."""
    return [
        {"sigma": sigma} | summary(value, None) for sigma, value in zip(sigmas, values, strict=True)
    ]


def held_out(
    models: dict[str, Any], scheduler: Any, images: Tensor, interval: Interval
) -> dict[str, list[dict[str, Any]]]:
    """Denoising error on images (B, C, H, W) that no model has seen, at every noise level."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for t in tqdm(scheduler.timesteps, desc="held-out images"):
        x_t = scheduler.add_noise(images, noise, t.expand(len(images)))
        for name, model in models.items():
            mse = scores(denoised(model, scheduler, x_t, t), images)["mse"]
            results[name].append(
                {
                    "sigma": noise_level(scheduler, t).ratio,
                    "mse": float(mse.mean()),
                    "mse_interval": list(interval(mse)),
                }
            )
    return results
