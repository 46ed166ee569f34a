"""What the local denoiser costs: against a plain transcription, against N and n, and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.studies.analytic.baseline import decoding, local_denoiser
from examples.studies.analytic.jacobian import wiener_matrix
from examples.studies.memory import forget_peak_resident, peak_resident
from pilotage.guidance.analytic import (
    DatasetStatistics,
    LocalDenoiser,
    OptimalDenoiser,
    floats,
    integer,
)


def seconds(call: Callable[[], Any], repeats: int = 1) -> tuple[float, float]:
    """Shortest wall time of a call, and CPU time of that one (busy machines blur the former)."""
    best = (float("inf"), 0.0)
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return best


def speedup(
    images: Tensor,
    statistics: DatasetStatistics,
    noisy: dict[float, Tensor],
    tau: float,
    **options: Any,
) -> dict[str, Any]:
    """Our local denoiser and the transcription in one run, per image and step.

    Args:
        images: The data set, uint8.
        noisy: Noise level -> noisy images (B, C, H, W).
        options: Further arguments of `LocalDenoiser`. The transcription normalizes within
            mini-batches: with that normalization ours is compared to it (`largest_difference`);
            as it runs here, to itself in float32 (`difference_to_float32`).
    """
    ours = LocalDenoiser(images, tau=tau, statistics=statistics, **options)
    check = LocalDenoiser(images[:1024], tau=tau, statistics=statistics, minibatch=256)
    few = [
        LocalDenoiser(images[:4096], tau=tau, statistics=statistics, **options | more)
        for more in ({}, {"accelerator": "none"})
    ]
    rows, memory = [], 0.0
    for sigma, y in noisy.items():
        before = forget_peak_resident()  # the data are part of it
        ours.precision(sigma)  # the making of masks is not part of the comparison
        mine = seconds(lambda y=y, sigma=sigma: ours(y, sigma), 2)
        memory = max(memory, (peak_resident() - before) / 1e6)
        wiener = wiener_matrix(statistics, sigma).float()
        plain = seconds(
            lambda y=y, wiener=wiener, sigma=sigma: local_denoiser(
                decoding(images), wiener, y, sigma, tau=tau
            )
        )
        reference = local_denoiser(decoding(images[:1024]), wiener, y, sigma, tau=tau)
        difference = (check(y, sigma) - reference).abs().max()
        rows.append(
            {
                "sigma": sigma,
                "seconds": mine[0] / len(y),
                "cpu_seconds": mine[1] / len(y),
                "transcription_seconds": plain[0] / len(y),
                "transcription_cpu_seconds": plain[1] / len(y),
                "largest_difference": float(difference),
                "difference_to_float32": float((few[0](y, sigma) - few[1](y, sigma)).abs().max()),
            }
        )
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    return {
        "speedup": total["transcription_seconds"] / total["seconds"],
        "speedup_cpu": total["transcription_cpu_seconds"] / total["cpu_seconds"],
        "by_sigma": rows,
        "peak_memory_over_data_mb": memory,
        "images": len(images),
        "images_a_call": len(next(iter(noisy.values()))),
        "products": products(options.get("accelerator", "auto")),
        "threads": torch.get_num_threads(),
    }


def products(accelerator: str) -> str:
    """What the local denoiser's distances are made of on this CPU."""
    if accelerator == "auto" and not integer.missing():
        return "bytes in AMX tiles"
    shared = accelerator != "none" and not floats.missing()
    return "float32 sums that masks share" if shared else "float32"


def cost(images: Tensor, sigma: float, tau: float) -> list[dict[str, float]]:
    """CPU seconds per image of the local and the optimal denoiser against N and n."""
    rows = []
    count, side = len(images), images.shape[-1]
    sizes = [(count // 16, side), (count // 4, side), (count, side)]
    sizes += [(count // 4, side // 2), (count // 4, side // 4)]
    for n_images, size in sizes:
        data = images[:n_images, :, :size, :size].contiguous()
        y = data[:4].float() / 127.5 - 1
        y = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        row = {"images": n_images, "coordinates": data[0].numel()}
        for name, denoiser in (
            ("local", LocalDenoiser(data, tau=tau)),
            ("optimal", OptimalDenoiser(data)),
        ):
            denoiser(y[:1], sigma)
            row[f"{name}_seconds"] = seconds(lambda d=denoiser, y=y: d(y, sigma), 2)[1] / len(y)
        rows.append(row)
    return rows
