"""What selecting the images that matter saves: by noise level, over a run, against N; large sizes.

Ours and the transcription are measured in turn in one process, in float32. No AMX: the local
denoiser runs without its kernel of byte products. The data set of the transcriptions lies in
memory, decoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from examples.studies.analytic import baseline
from examples.studies.analytic.agreement import ddim
from examples.studies.analytic.jacobian import wiener_matrix
from examples.studies.memory import forget_peak_resident, peak_resident
from pilotage.guidance.analytic import (
    DENOISERS,
    DatasetStatistics,
    Denoiser,
    LocalDenoiser,
    OptimalDenoiser,
)
from pilotage.guidance.analytic.subset import TOLERANCE
from pilotage.pipelines.seam.noise_levels import noise_level

SIGMAS = (0.1, 0.3, 0.6, 1.0, 2.0, 8.0)
CALL = 2  # images a call
TAU = 0.005
Denoise = Callable[[Tensor, float], Tensor]


def noisy(clean: Tensor, sigma: float) -> Tensor:
    """Clean images in [-1, 1] with noise, a generator each."""
    draws = [torch.Generator().manual_seed(i) for i in range(len(clean))]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws])
    return clean + sigma * noise


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Shortest wall seconds of each call and the processor seconds of that one, taken in turn."""
    best = {name: (float("inf"), 0.0) for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            found = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = min(best[name], found)
    return {name: {"seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in best.items()}


def in_calls(denoise: Denoise, y: Tensor, sigma: float) -> Tensor:
    """All of y, `CALL` images at a time."""
    return torch.cat([denoise(part, sigma) for part in y.split(CALL)])


def optimal(images: Tensor, clean: Tensor) -> dict[str, dict[str, Any]]:
    """The optimal denoiser by noise level, each image's share of the calls on all of `clean`.

    Against the formula on all images at once ("transcription"), on 256 at a time, which stay in the
    processor's cache ("in_batches"), and with distances as matrix products ("product").
    """
    ours, exact = OptimalDenoiser(images), OptimalDenoiser(images)
    batches = baseline.resident(images)
    whole = torch.cat(batches)
    matrix = whole.flatten(1)
    ours(clean[:1], 0.1)  # the index is made once for all calls
    rows = {}
    for sigma in SIGMAS:
        y = noisy(clean, sigma)
        calls = {
            "ours": lambda y=y, s=sigma: in_calls(ours, y, s),
            "transcription": lambda y=y, s=sigma: baseline.optimal_denoiser([whole], y, s),
            "in_batches": lambda y=y, s=sigma: baseline.optimal_denoiser(batches, y, s),
            "product": lambda y=y, s=sigma: in_calls(
                lambda part, level: baseline.optimal_product(matrix, part, level), y, s
            ),
        }
        spent = in_turn(calls, 3)
        found, info = ours(y, sigma, return_info=True)
        rows[f"{sigma:g}"] = figures(spent, len(y)) | {
            "compared": info.used.flatten(1)[:, 0].float().mean().item(),
            "whole_set": float((info.used.flatten(1)[:, 0] == len(images)).float().mean()),
            "largest_difference": float((found - exact(y.double(), sigma)).abs().max()),
        }
    return rows


def local(
    images: Tensor, clean: Tensor, statistics: DatasetStatistics
) -> dict[str, dict[str, Any]]:
    """The local denoiser by noise level, `CALL` images."""
    ours = LocalDenoiser(images, tau=TAU, statistics=statistics, accelerator="float32")
    few, batches = images[:2048], baseline.resident(images)
    check = LocalDenoiser(few, tau=TAU, statistics=statistics, accelerator="float32")
    rows = {}
    for sigma in SIGMAS:
        y, wiener = noisy(clean[:CALL], sigma), wiener_matrix(statistics, sigma).float()
        ours(y, sigma)  # masks are made once for all calls
        calls = {
            "ours": lambda y=y, s=sigma: ours(y, s),
            "transcription": lambda y=y, s=sigma, w=wiener: baseline.local_denoiser(
                batches, w, y, s, tau=TAU
            ),
        }
        spent = in_turn(calls, 2)
        exact = check(y.double(), sigma)
        rows[f"{sigma:g}"] = figures(spent, len(y)) | {
            "largest_difference": float((check(y, sigma) - exact).abs().max())
        }
    return rows


def figures(spent: dict[str, dict[str, float]], count: int) -> dict[str, Any]:
    """Seconds an image of every call, and of each how many times those of ours."""
    rows: dict[str, Any] = {
        name: {key: value / count for key, value in times.items()} for name, times in spent.items()
    }
    for name in spent.keys() - {"ours"}:
        rows[f"ratio_{name}"] = spent[name]["seconds"] / spent["ours"]["seconds"]
        rows[f"ratio_{name}_cpu"] = spent[name]["cpu_seconds"] / spent["ours"]["cpu_seconds"]
    return rows


def sample(denoise: Denoise, noise: Tensor, steps: int = 10) -> Tensor:
    """A DDIM run under the linear beta schedule."""
    scheduler = ddim(DDPMScheduler(), steps)
    x = noise
    for t in scheduler.timesteps:
        level = noise_level(scheduler, t)
        alpha, sigma = float(level.alpha), float(level.sigma)
        x0 = denoise(x / alpha, sigma / alpha)
        x = scheduler.step((x - alpha * x0) / sigma, t, x).prev_sample
    return x


def run(images: Tensor, statistics: DatasetStatistics) -> dict[str, Any]:
    """DDIM in 10 steps, `CALL` images, with masks and indices made before."""
    batches = baseline.resident(images)
    whole = torch.cat(batches)
    noise = noisy(torch.zeros(CALL, *images.shape[1:]), 1.0)
    best = OptimalDenoiser(images)
    masked = LocalDenoiser(images, tau=TAU, statistics=statistics, accelerator="float32")
    wieners: dict[float, Tensor] = {}

    def transcribed(y: Tensor, sigma: float) -> Tensor:
        return baseline.local_denoiser(batches, wieners[sigma], y, sigma, tau=TAU)

    def prepare(y: Tensor, sigma: float) -> Tensor:
        wieners[sigma] = wiener_matrix(statistics, sigma).float()
        return masked(y, sigma)

    best(noise, 0.1)
    sample(prepare, noise)
    rows = {}
    for name, ours, plain in (
        ("optimal", best, lambda y, s: baseline.optimal_denoiser([whole], y, s)),
        ("local", masked, transcribed),
    ):
        calls = {
            "ours": lambda ours=ours: sample(ours, noise),
            "transcription": lambda plain=plain: sample(plain, noise),
        }
        rows[name] = figures(in_turn(calls, 1 if name == "local" else 3), CALL)
    return rows | {"steps": 10}


def against_number(images: Tensor, clean: Tensor) -> list[dict[str, Any]]:
    """The optimal denoiser on up to 10^5 images in a file that is mapped into memory.

    Args:
        images: 60,000, uint8; their mirror images follow.
        clean: Images in [-1, 1] that are not among them.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, torch.cat([images, images.flip(-1)])[:100_000].numpy())
        for count in (1_000, 3_000, 10_000, 30_000, 100_000):
            mapped = torch.from_numpy(np.load(path, mmap_mode="c"))[:count]
            before = forget_peak_resident()
            denoiser = OptimalDenoiser(mapped)
            start = time.perf_counter()
            denoiser(clean[:1], 0.1)
            row: dict[str, Any] = {"images": count, "first_call": time.perf_counter() - start}
            for sigma in (0.1, 0.3, 1.0, 8.0):
                y = noisy(clean, sigma)
                calls = {"ours": lambda y=y, s=sigma, d=denoiser: in_calls(d, y, s)}
                row[f"{sigma:g}"] = in_turn(calls, 3)["ours"]["seconds"] / len(y)
            row["peak_memory_mb"] = (peak_resident() - before) / 1e6
            rows.append(row)
    return rows


def largest_picture(images: Tensor, clean: Tensor, count: int = 200) -> dict[str, Any]:
    """Seconds a call for one colour picture: 256 x 256, and the local denoiser to its limit.

    Args:
        images: Grey pictures, uint8, enlarged and given three channels.
        clean: One picture in [-1, 1], likewise.
        count: How many.
    """

    def enlarged(pictures: Tensor, side: int) -> Tensor:
        wide = torch.nn.functional.interpolate(pictures.float(), (side, side), mode="bilinear")
        return wide.expand(-1, 3, -1, -1)

    rows = {}
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("optimal", 256, {}),
        ("wiener", 256, {}),
        ("ls", 256, {"k": 5}),
        ("pspc", 256, {"size": 15}),
        ("local", 64, {"tau": 0.02}),
        ("local", 104, {"tau": 0.02}),
    ]
    for method, side, options in cases:
        data = enlarged(images[:count], side).round().to(torch.uint8)
        y = noisy(enlarged(clean[:1], side), 0.5)
        start = time.perf_counter()
        denoiser: Denoiser = DENOISERS[method](data, **options)
        denoiser(y, 0.5)
        first = time.perf_counter() - start
        again = in_turn({"again": lambda d=denoiser, y=y: d(y, 0.5)}, 2)["again"]["seconds"]
        rows[f"{method}_{side}"] = {
            "side": side, "channels": 3, "images": count, "sigma": 0.5, **options,
            "first_call_seconds": first, "seconds": again,
        }  # fmt: skip
    return rows


def measure(name: str, images: Tensor, clean: Tensor, statistics: DatasetStatistics) -> Any:
    """A piece of the part ``golden_subset``, as it is kept."""
    if name in ("optimal", "local"):
        rows = optimal(images, clean) if name == "optimal" else local(images, clean, statistics)
        ratios = {sigma: row["ratio_transcription"] for sigma, row in rows.items()}
        settings = {
            "images": len(images), "images_a_call": CALL, "threads": torch.get_num_threads(),
            "tolerance": TOLERANCE,
        }  # fmt: skip
        return {"golden_subset": {name: ratios, "details": {name: rows}, **settings}}
    if name == "run":
        return {"golden_subset": {"run": run(images, statistics)}}
    if name == "number":
        return {"golden_subset": {"by_number_of_images": against_number(images, clean)}}
    return {"largest_picture": largest_picture(images, clean)}
