"""A trained network beside every denoiser computed from its data.

    python -m pilotage.eval.analytic                       # everything, on Fashion-MNIST
    python -m pilotage.eval.analytic --part teleport       # one part; the others keep their figures

Parts: ``agreement`` (R^2, MSE, cosine with the network; held-out denoising), ``reading`` (Jacobian,
sensitivity fields), ``speed`` (against a plain transcription), ``teleport`` (Fréchet distance by
network evaluations). Pictures are written beside the figures.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..guidance.analytic import DatasetStatistics
from ..pipelines import AnalyticDenoiserModel
from . import analytic_agreement as agreement
from . import analytic_speed as speed
from . import analytic_teleport as teleport
from .analytic_jacobian import reading
from .analytic_pictures import log_plot, save, sheet, spread
from .embedded import embedded_folder, load_embedded
from .fashion_mnist import load_images, load_unet
from .record import write_figures

PARTS = ("agreement", "reading", "speed", "teleport")
TAU = {"tau": "fashion_mnist"}
WINDOW = {"k": "fashion_mnist"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "optimal": ("optimal", {}),
    "wiener": ("wiener", {}),
    "ls": ("ls", WINDOW),
    "els": ("els", WINDOW),
    "local_exact": ("local", TAU),
    "local_minibatch": ("local", TAU | {"normalization": "minibatch"}),
}
SIGMAS = (0.1, 0.5, 2.0)
ELS_SAMPLES = 8


def seeded(count: int, shape: tuple[int, ...], first: int = 0) -> Tensor:
    """Noise, one generator per sample."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(first + i))
            for i in range(count)
        ]
    )


def measure_agreement(
    data: Tensor, statistics: DatasetStatistics, samples: int, els_images: int, output: Path
) -> dict[str, Any]:
    """Part ``agreement``; ELS searches all translates, so it has fewer images and samples."""
    from .bootstrap import interval

    pipe = load_unet()
    scheduler = agreement.ddim(pipe.scheduler, 10)
    models = {}
    for name, (method, options) in METHODS.items():
        pool = data[:els_images] if name == "els" else data
        known = statistics if len(pool) == len(data) else None
        models[name] = AnalyticDenoiserModel.from_images(
            pool, method=method, scheduler=pipe.scheduler, statistics=known, **options
        )
    few = min(ELS_SAMPLES, samples)
    els, others = {"els": models.pop("els")}, models
    noise = seeded(samples, tuple(data.shape[1:]))
    found = agreement.explain(pipe.unet, others, scheduler, noise, few, interval)
    found |= {
        "els": agreement.explain(pipe.unet, els, scheduler, noise[:few], few, interval)["els"]
    }
    order = ("network", *METHODS)
    sheet(torch.cat([found[name].pop("picture") for name in order]), output / "samples.png", 8)
    found.pop("network")
    for name in found:
        found[name]["images"] = els_images if name == "els" else len(data)
        found[name]["samples"] = few if name == "els" else samples
    test = load_images("test")[0][:samples].float() / 127.5 - 1
    held = agreement.held_out({"network": pipe.unet} | others, scheduler, test, interval)
    held |= agreement.held_out(els, scheduler, test[:few], interval)
    return {"fashion_mnist": found, "held_out": held}


def measure_reading(statistics: DatasetStatistics, output: Path) -> dict[str, Any]:
    """Part ``reading``: at one noisy test image, for several noise levels."""
    pipe = load_unet()
    squares = pipe.scheduler.alphas_cumprod.double()
    ratios = ((1 - squares) / squares).sqrt()
    clean = load_images("test")[0][:1].float() / 127.5 - 1
    results, fields, vectors = [], [], []
    for sigma in SIGMAS:
        t = int((ratios.log() - torch.tensor(sigma).log()).abs().argmin())
        level, alpha = float(ratios[t]), float(squares[t]) ** 0.5

        def denoise(y: Tensor, t: int = t, level: float = level, alpha: float = alpha) -> Tensor:
            return y - level * pipe.unet(alpha * y, t).sample

        y = clean + level * seeded(1, tuple(clean.shape[1:]))
        found = reading(denoise, statistics, y, level)
        pictures = found.pop("pictures")
        fields.append(pictures["fields"])
        vectors.append(pictures["eigenvectors"])
        results.append(found)
    sheet(spread(torch.cat(fields)), output / "sensitivity.png", 2)
    sheet(spread(torch.cat(vectors)), output / "eigenvectors.png", 8)
    return {"reading": results}


def measure_speed(data: Tensor, statistics: DatasetStatistics, output: Path) -> dict[str, Any]:
    """Part ``speed``, at noise levels of the 10-step trajectory."""
    clean = load_images("test")[0][:2].float() / 127.5 - 1
    noisy = {s: clean + s * seeded(2, tuple(clean.shape[1:])) for s in (0.1, 0.6, 2.0, 8.0)}
    found = speed.speedup(data, statistics, noisy, 0.005)
    rows = speed.cost(data, 0.6, 0.005)
    full = max(row["coordinates"] for row in rows)
    for axis, part in (
        ("images", [row for row in rows if row["coordinates"] == full]),
        ("coordinates", [row for row in rows if row["images"] == len(data) // 4]),
    ):
        lines = {
            name: [(row[axis], row[f"{name}_seconds"]) for row in part]
            for name in ("local", "optimal")
        }
        save(log_plot(lines, axis, "CPU seconds per image"), output / f"cost_{axis}.png")
    return {
        "speedup_vs_transcription": found.pop("speedup"),
        "peak_memory_over_data_mb": found.pop("peak_memory_over_data_mb"),
        "speed": found,
        "cost": rows,
    }


def measure_teleport(
    data: Tensor, statistics: DatasetStatistics, count: int, archive: Path, output: Path
) -> dict[str, Any]:
    """Part ``teleport``, on Fashion-MNIST and on the embedded text-to-image model."""
    from .extractors import EfficientNetLite0

    extractor = EfficientNetLite0()
    sigmas = ("auto", 10.0, 5.0, 3.0, 2.0)
    pipe = load_unet()
    stock = agreement.ddim(pipe.scheduler, 20)
    rows = teleport.settings(stock, statistics, (20, 15), sigmas)
    real = extractor(data[: 2 * count].float().div(255).expand(-1, 3, -1, -1)).double()
    first = teleport.measure(teleport.unconditional(pipe.unet), rows, extractor, real, count)
    everyday = (embedded_folder().parent / "everyday.txt").read_text().split("\n")
    pictures, prompts = teleport.drawings(archive, {c.strip() for c in everyday})
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    latents = teleport.latent_statistics(pipe.vae, pictures)
    rows = teleport.settings(pipe.scheduler, latents, (20, 15), sigmas)
    real = extractor(pictures[: 2 * count].float().div(255)).double()
    sampler = teleport.text_to_image(pipe, prompts, "apg", 4.0)
    second = teleport.measure(sampler, rows, extractor, real, count)
    for name, results in (("fashion_mnist", first), ("emoji", second)):
        images = torch.cat([row["pictures"] for row in results]) * 2 - 1
        sheet(images, output / f"teleport_{name}.png", 8)
    return {
        "teleport": {
            "fashion_mnist": teleport.verdict(first) | {"pictures": count},
            "emoji": teleport.verdict(second) | {"pictures": count},
        }
    }


def command(
    part: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; default: all.")
    ] = None,
    images: Annotated[int, typer.Option(min=1024, help="Training images used.")] = 60000,
    samples: Annotated[int, typer.Option(min=8, help="Trajectories per denoiser.")] = 64,
    els_images: Annotated[int, typer.Option(min=2, help="Images that ELS searches.")] = 500,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures per Fréchet distance.")] = 512,
    archive: Annotated[Path, typer.Option(help="Emoji pictures.")] = Path("cache/emoji.zip"),
    output: Annotated[Path, typer.Option("-o", help="JSON of figures.")] = Path(
        "eval/results/analytic.json"
    ),
) -> None:
    """Compare a trained network with every analytic denoiser of its data."""
    wanted = part or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise ValueError(f"unknown part {sorted(unknown)}: expected some of {PARTS}")
    data = load_images("train")[0][:images]
    load_unet()  # both cheap mistakes first
    statistics = DatasetStatistics.from_images(data)
    folder = output.parent / "analytic"
    work = {
        "agreement": partial(measure_agreement, data, statistics, samples, els_images, folder),
        "reading": partial(measure_reading, statistics, folder),
        "speed": partial(measure_speed, data, statistics, folder),
        "teleport": partial(measure_teleport, data, statistics, pictures, archive, folder),
    }
    figures = json.loads(output.read_text()) if output.is_file() else {}
    figures.pop("context", None)
    for name in wanted:
        figures |= work[name]()
        write_figures(output, figures | {"images": images})


if __name__ == "__main__":
    typer.run(command)
