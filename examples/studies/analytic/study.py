"""A trained network beside every denoiser computed from its data.

    python -m examples.studies.analytic                      # everything, on Fashion-MNIST
    python -m examples.studies.analytic --part agreement.ls  # a piece; others keep their figures

Parts: ``agreement`` (R^2, MSE, cosine with the network; held-out denoising), ``reading`` (Jacobian,
sensitivity fields), ``speed`` (against a plain transcription), ``golden_subset`` (images selected
by a bound, large pictures; some minutes), ``teleport`` (Fréchet distance by network evaluations).
Figures are written piece by piece, so a run that was cut off is continued by naming the pieces it
lacks. Pictures are written beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from examples.fashion_mnist.data import load_images, load_unet
from examples.studies.analytic import agreement, golden, speed, teleport
from examples.studies.analytic.jacobian import reading
from examples.studies.analytic.pictures import log_plot, save, sheet, spread
from pilotage.eval.embedded import load_embedded
from pilotage.eval.record import figures_context, write_figures
from pilotage.guidance.analytic import DatasetStatistics
from pilotage.pipelines import AnalyticDenoiserModel

PARTS = ("agreement", "reading", "speed", "golden_subset", "teleport")
TAU = {"tau": "fashion_mnist"}
WINDOW = {"k": "fashion_mnist"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "optimal": ("optimal", {}),
    "wiener": ("wiener", {}),
    "ls": ("ls", WINDOW),
    "els": ("els", WINDOW),
    "local_exact": ("local", TAU),
    "local_columns": ("local", TAU | {"mask": "columns"}),
    "local_minibatch": ("local", TAU | {"minibatch": 256}),
}
UNITS = (
    *(f"agreement.{name}" for name in ("network", *METHODS)),
    "reading",
    "speed",
    *(f"golden_subset.{name}" for name in ("optimal", "local", "run", "number", "largest")),
    "teleport.fashion_mnist",
    "teleport.emoji",
)
SIGMAS = (0.1, 0.5, 2.0)
R2 = {"local_exact": "r2_rows", "local_columns": "r2_columns"}  # figures that are also on top
CALLS = (1, 8)  # images a call of the speed comparison, beside 2
ON_PATH = 8  # samples that are also evaluated at the network's own x_t


def seeded(count: int, shape: tuple[int, ...], first: int = 0) -> Tensor:
    """Noise, one generator per sample."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(first + i))
            for i in range(count)
        ]
    )


def measure_agreement(
    name: str,
    data: Tensor,
    statistics: DatasetStatistics,
    samples: int,
    els_images: int,
    output: Path,
) -> dict[str, Any]:
    """Part ``agreement``: one denoiser, or the network's own held-out error ("network").

    ELS searches all translates of an image, so it has fewer of them.
    """
    from pilotage.eval.metrics.bootstrap import interval

    pipe = load_unet()
    scheduler = agreement.ddim(pipe.scheduler, 10)
    test = load_images("test")[0][:samples].float() / 127.5 - 1
    if name == "network":
        return {"held_out": agreement.held_out({name: pipe.unet}, scheduler, test, interval)}
    method, options = METHODS[name]
    pool = data[:els_images] if name == "els" else data
    model = AnalyticDenoiserModel.from_images(
        pool,
        method=method,
        scheduler=pipe.scheduler,
        statistics=statistics if len(pool) == len(data) else None,
        **options,
    )
    noise = seeded(samples, tuple(data.shape[1:]))
    on_path = min(ON_PATH, samples)
    found = agreement.explain(pipe.unet, {name: model}, scheduler, noise, on_path, interval)
    pictures = torch.cat([found["network"]["picture"], found[name].pop("picture")])
    sheet(pictures, output / f"samples_{name}.png", 8)
    record = found[name] | {"images": len(pool), "samples": samples}
    held = agreement.held_out({name: model}, scheduler, test, interval)
    top = {R2[name]: record["r2"]} if name in R2 else {}
    return {"fashion_mnist": {name: record}, "held_out": held} | top


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
    clean = load_images("test")[0][: max(CALLS)].float() / 127.5 - 1

    def noisy(count: int) -> dict[float, Tensor]:
        shape = tuple(clean.shape[1:])
        return {s: clean[:count] + s * seeded(count, shape) for s in (0.1, 0.6, 2.0, 8.0)}

    found = speed.speedup(data, statistics, noisy(2), 0.005)
    others = [speed.speedup(data, statistics, noisy(count), 0.005) for count in CALLS]
    floats = speed.speedup(data, statistics, noisy(2), 0.005, accelerator="none")
    found["by_images_a_call"] = [
        {name: other[name] for name in ("images_a_call", "speedup")} for other in others
    ]
    found["float32"] = {name: floats[name] for name in ("speedup", "by_sigma")}
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
    name: str,
    data: Tensor,
    statistics: DatasetStatistics,
    count: int,
    archive: Path,
    output: Path,
) -> dict[str, Any]:
    """Part ``teleport``: on "fashion_mnist", or on the embedded text-to-image model ("emoji")."""
    from pilotage.eval.metrics.efficientnet import EfficientNetLite

    extractor = EfficientNetLite("efficientnet-lite0")
    if name == "fashion_mnist":
        pipe = load_unet()
        stock, sampler = agreement.ddim(pipe.scheduler, 20), teleport.unconditional(pipe.unet)
        real, groups = data[: 2 * count].expand(-1, 3, -1, -1), [*range(count)]
    else:
        pictures, prompts = teleport.drawings(archive)
        pipe = load_embedded()
        pipe.set_progress_bar_config(disable=True)
        statistics = teleport.latent_statistics(pipe.vae, pictures)
        stock, sampler = pipe.scheduler, teleport.text_to_image(pipe, prompts, "apg", 4.0)
        real, groups = pictures[: 2 * count], [i % len(prompts) for i in range(count)]
    rows = teleport.settings(stock, statistics, (20, 15), ("auto", 10.0, 5.0, 3.0, 2.0))
    features = extractor(real.float().div(255)).double()
    results = teleport.measure(sampler, rows, extractor, features, groups)
    images = torch.cat([row["pictures"] for row in results]) * 2 - 1
    sheet(images, output / f"teleport_{name}.png", 8)
    return {"teleport": {name: teleport.verdict(results) | {"pictures": count}}}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the entries of `new`, dictionaries within them merged likewise."""
    both = {k: merged(old[k], v) if k in old and isinstance(v, dict) else v for k, v in new.items()}
    return old | both


def selected(wanted: list[str]) -> list[str]:
    """The names of `UNITS` that are wanted by name or by part, in their order.

    Raises:
        ValueError: a name that is neither.
    """
    for name in wanted:
        if not any(unit == name or unit.split(".")[0] == name for unit in UNITS):
            raise ValueError(f"unknown part {name!r}: expected some of {PARTS} or {UNITS}")
    return [unit for unit in UNITS if unit in wanted or unit.split(".")[0] in wanted]


def command(
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(PARTS)}, or a piece such as agreement.ls; default: all."),
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
    wanted = selected(part or list(PARTS))
    data = load_images("train")[0][:images]
    load_unet()  # both cheap mistakes first
    statistics = DatasetStatistics.from_images(data)
    folder = output.parent / "analytic"
    for unit in wanted:
        kind, _, name = unit.partition(".")
        if kind == "agreement":
            found = measure_agreement(name, data, statistics, samples, els_images, folder)
        elif kind == "reading":
            found = measure_reading(statistics, folder)
        elif kind == "speed":
            found = measure_speed(data, statistics, folder)
        elif kind == "golden_subset":
            clean = load_images("test")[0][:8].float() / 127.5 - 1
            found = golden.measure(name, data, clean, statistics)
            if name == "number":
                rows = found["golden_subset"]["by_number_of_images"]
                lines = {
                    f"sigma {s}": [(row["images"], row[s]) for row in rows]
                    for s in ("8", "0.3", "0.1")
                }
                plot = log_plot(lines, "images", "seconds per image")
                save(plot, folder / "cost_number.png")
        else:
            found = measure_teleport(name, data, statistics, pictures, archive, folder)
        # Read only now: another process may have added its part meanwhile.
        figures = json.loads(output.read_text()) if output.is_file() else {}
        contexts = figures.pop("contexts", {}) | {unit: figures_context()}
        write_figures(output, merged(figures, found) | {"images": images, "contexts": contexts})
