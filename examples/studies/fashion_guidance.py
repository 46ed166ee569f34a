"""Guidance on class-conditional Fashion-MNIST, judged by distances to real pictures.

    apt-get install dataset-fashion-mnist
    python -m examples.studies.fashion_guidance

``eval/results/fashion_guidance.json`` and ``.png``. Every cell is one way of guiding, with the same
classes in turn and the same noise in every cell: DPM++ 2M in 8 steps, or fewer. Features are those
of the library's offline extractor, EfficientNet-Lite0, of pictures brought to 64 pixels, as their
256 leading principal components (of the real pictures). The real ones are the 10,000 that the
network was not trained on, so that what it knows by heart gains it nothing. Beside that, without
intervals: the Fréchet distance of a classifier's features and of the 784 pixels; and how often the
classifier (``examples/fashion_mnist/classifier.py``, trained first) answers with the class that was
asked for.

Differences are paired over pictures and their intervals corrected for all cells of a metric.
Resamples are drawn within classes, of which every cell has as many pictures of each. The threshold
of Adaptive Guidance (three quarters of the evaluations) and scales of matched strength (see
`pilotage compare --matched`) are found with other noise, and so is a fitted schedule. Chunks of
pictures lie in ``cache/fashion_guidance``: an interrupted run goes on where it stopped. Cells come
in the order of importance; ``--cells`` takes the first ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from examples.fashion_mnist.classifier import Classifier, trained
from examples.fashion_mnist.data import CLASSES, load_classes, load_images, model_folder
from examples.fashion_mnist.pipeline import to_blocks
from examples.fashion_mnist.train import to_unit
from pilotage.eval.comparison.cost import update_norms
from pilotage.eval.comparison.evaluation import Resampled, rounded
from pilotage.eval.comparison.matched import matched_scale
from pilotage.eval.comparison.paired import differences
from pilotage.eval.comparison.plan import sample_seed
from pilotage.eval.metrics.bootstrap import Resamples, moved_interval
from pilotage.eval.metrics.efficientnet import NETWORKS, EfficientNetLite
from pilotage.eval.metrics.frechet import frechet_distance, frechet_resamples
from pilotage.eval.metrics.precision_recall import neighbour_metrics
from pilotage.eval.metrics.resampled import neighbour_resamples
from pilotage.eval.options import DEFAULT_EXTRACTOR
from pilotage.eval.record import write_figures
from pilotage.eval.tuning.calibration import cost_curve
from pilotage.eval.tuning.policy_search import place
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import (
    AdaptiveGuidance,
    Interval,
    Schedule,
    load_guidance,
    resolve,
    save_guidance,
)
from pilotage.guidance.analytic import DatasetStatistics
from pilotage.guidance.files import atomic, write_json
from pilotage.guidance.saved import to_dict
from pilotage.pipelines import GaussianTeleport, guided
from pilotage.pipelines.fitting.identity import pipeline_identity
from pilotage.pipelines.fitting.on_policy import ScheduleFitter

STEPS = 8
PICTURES, BATCH = 5000, 250
TUNED_ON = 100  # pictures of other noise, for the threshold and the scales
AG_SHARE = 0.75  # of the evaluations of CFG, as in the paper
SIGMA_SKIP = 10.0  # what paid on the unconditional network (docs/results/analytic.md)
WINDOW = Interval(noise_low=0.28, noise_high=5.42)  # the paper's for SDXL
RESAMPLES = 200
SIDE, COMPONENTS = 64, 256  # of pictures for the extractor, of its features
NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
PAIRED = ("fd", "precision", "recall", "accuracy")
SEED, OTHER_SEED, FIT_SEED = 0, 1, 50_000
FITTED, FITTED_NFE = "fitted", 10  # as many evaluations as forecast has
FIT_ROUNDS, FIT_BATCH = 8, 50


@dataclass(frozen=True)
class Cell:
    """One way of guiding.

    Args:
        name: What it is called.
        guidance: As the pipeline takes it; `FITTED`: a schedule that `place` finds and fits.
        w: Guidance scale; of a `matched` cell that of the CFG it is to be as strong as.
        beside: Name of the CFG cell that it is compared with; None: it is what others are compared
            with.
        steps: Of the sampler.
        matched: Whether the scale is found so that it moves the picture as far as CFG does at `w`.
        sigma_skip: Noise level down to which the first steps are made in closed form; 0: none are.
    """

    name: str
    guidance: Any
    w: float
    beside: str | None = None
    steps: int = STEPS
    matched: bool = False
    sigma_skip: float = 0.0

    @property
    def slug(self) -> str:
        """The name, as a folder's."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower())


CELLS = (
    Cell("no guidance", "cfg", 1.0),
    Cell("cfg 3", "cfg", 3.0),
    Cell("apg 3", "apg", 3.0, "cfg 3"),
    Cell("cfg 7.5", "cfg", 7.5),
    Cell("apg 7.5", "apg", 7.5, "cfg 7.5"),
    Cell("cfg 15", "cfg", 15.0),
    Cell("apg 15", "apg", 15.0, "cfg 15"),
    Cell("interval 7.5", WINDOW, 7.5, "cfg 7.5"),
    Cell("apg as strong as cfg 3", "apg", 3.0, "cfg 3", matched=True),
    Cell("cfg 3, 5 steps", "cfg", 3.0, "cfg 3", steps=5),
    Cell("forecast 3", "forecast", 3.0, "cfg 3, 5 steps"),
    Cell("fitted 3", FITTED, 3.0, "cfg 3, 5 steps"),
    Cell("cfg 3, 6 steps", "cfg", 3.0, "cfg 3", steps=6),
    Cell("ag 3", "ag", 3.0, "cfg 3, 6 steps"),
    Cell("teleport, cfg 3", "cfg", 3.0, "cfg 3, 6 steps", sigma_skip=SIGMA_SKIP),
    Cell("rescale 7.5", "rescale", 7.5, "cfg 7.5"),
    Cell("cfg 1.5", "cfg", 1.5),
    Cell("apg as strong as cfg 7.5", "apg", 7.5, "cfg 7.5", matched=True),
)


class Components:
    """Leading principal components of an extractor's features.

    Args:
        real: Pictures, uint8 (N, 1, 28, 28), whose covariance says which lead.
        path: A safetensors file that keeps what was found.
    """

    def __init__(self, real: Tensor, path: Path) -> None:
        network = NETWORKS[DEFAULT_EXTRACTOR]._replace(side=SIDE)
        self.extractor = EfficientNetLite(f"{DEFAULT_EXTRACTOR}, {SIDE} pixels", network)
        if not path.is_file():
            features = self._features(real)
            values, vectors = torch.linalg.eigh(torch.cov(features.T))
            basis = vectors.flip(1)[:, :COMPONENTS]
            share = values.flip(0)[:COMPONENTS].sum() / values.sum()
            with atomic(path) as partial:
                tensors = {"basis": basis, "features": features @ basis, "share": share}
                save_file({name: one.contiguous() for name, one in tensors.items()}, partial)
        found = load_file(path)
        self.basis, self.real, self.share = found["basis"], found["features"], float(found["share"])

    def __call__(self, pictures: Tensor) -> Tensor:
        """Components (N, 256), float64, of pictures, uint8."""
        return self._features(pictures) @ self.basis

    def _features(self, pictures: Tensor) -> Tensor:
        return self.extractor(pictures.float().div(255).expand(-1, 3, -1, -1)).double()


def statistics_of(images: Tensor) -> DatasetStatistics:
    """Of pictures, uint8, as the network takes them."""
    return DatasetStatistics.from_images(to_blocks(to_unit(images)), value_range=None)


class ClassTrials(Trials):
    """Runs whose prompts are classes."""

    def call(self, samples: Sequence[int]) -> dict[str, Any]:
        """See `Runs.call`."""
        call = super().call(samples)
        call.pop("negative_prompt", None)
        return {"class_labels": call.pop("prompt"), **call}


class Sampler:
    """The pipeline, and what each cell needs of it.

    Args:
        pipe: A guided `ClassPipeline`.
        statistics: Of the training pictures, as the network takes them.
        components: What is to be known of the pictures.
    """

    def __init__(
        self, pipe: Any, statistics: DatasetStatistics, components: Callable[[Tensor], Tensor]
    ) -> None:
        self.pipe, self.components = pipe, components
        pipe.set_progress_bar_config(disable=True)
        self.stock = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="linspace"
        )
        self.statistics = statistics

    def run(self, cell: Cell, indices: Sequence[int], seed: int = SEED) -> Tensor:
        """Pictures (N, 1, 28, 28) in [0, 1]: class and noise of each are those of its index."""
        self.pipe.scheduler = self.stock
        if cell.sigma_skip:
            self.pipe.scheduler = GaussianTeleport(
                self.stock, self.statistics, cell.sigma_skip, jump="input"
            )
        return self.pipe(
            [i % len(CLASSES) for i in indices],
            guidance=cell.guidance,
            guidance_scale=cell.w,
            num_inference_steps=cell.steps,
            generator=[torch.Generator().manual_seed(sample_seed(seed, i)) for i in indices],
            output_type="pt",
            detailed_trace=cell.w > 1,
        ).images

    def made(self, cell: Cell, indices: Sequence[int]) -> dict[str, Tensor]:
        """Pictures as bytes, and components, network evaluations and strength of each."""
        pictures = (self.run(cell, indices) * 255).round().byte()
        return {
            "pictures": pictures,
            "components": self.components(pictures),
            "nfe": torch.tensor(self.pipe.guidance_trace.nfe),
            "update": torch.tensor(self.strengths(cell), dtype=torch.float64),
        }

    def strengths(self, cell: Cell) -> list[float]:
        """Of the last run, as `update_norms`; nan where not known."""
        trace = self.pipe.guidance_trace
        if cell.w <= 1:
            return [0.0] * trace.batch
        found = update_norms(trace, self.pipe.resolve_guidance(cell.guidance), self.stock)
        return found or [float("nan")] * trace.batch

    def tuned(self, cell: Cell, known: dict[str, float], folder: Path) -> Cell:
        """A cell with what is found on a few pictures, unless `known` or the folder has it.

        That is a threshold, a scale, or a schedule.
        """
        if cell.guidance == FITTED:
            path = folder / "fitted.json"
            if not path.is_file():
                save_guidance(path, self._schedule(cell))
            return replace(cell, guidance=load_guidance(path))
        if not (cell.matched or cell.guidance == "ag"):
            return cell
        if cell.name not in known:
            value = self._scale(cell) if cell.matched else self._threshold(cell)
            known[cell.name] = float(f"{value:.6g}")
        if cell.matched:
            return replace(cell, w=known[cell.name])
        return replace(cell, guidance=AdaptiveGuidance(known[cell.name]))

    def _threshold(self, cell: Cell) -> float:
        """With which Adaptive Guidance costs `AG_SHARE` of CFG."""
        self.run(replace(cell, guidance="cfg"), range(TUNED_ON), OTHER_SEED)
        gamma = torch.stack([step.gamma for step in self.pipe.guidance_trace.steps])
        wanted = AG_SHARE * 2 * cell.steps
        return min(cost_curve(gamma), key=lambda point: abs(point[1] - wanted))[0]

    def _schedule(self, cell: Cell) -> Schedule:
        """Where to evaluate, with weights fitted to the full run (`pilotage search --nfe`)."""
        self.pipe.scheduler = self.stock
        classes = [i % len(CLASSES) for i in range(TUNED_ON)]
        trials = ClassTrials(
            self.pipe, classes, cell.w, cell.steps, None, FIT_SEED, FIT_BATCH, False
        )
        fitter = ScheduleFitter(trials, output_type="pil")
        return place(trials, FITTED_NFE, fitter, rounds=FIT_ROUNDS).best.schedule

    def _scale(self, cell: Cell) -> float:
        """With which a cell guides as strongly as CFG does at its own."""

        def strength(one: Cell) -> float:
            self.run(one, range(TUNED_ON), OTHER_SEED)
            return sum(self.strengths(one)) / TUNED_ON

        target = strength(replace(cell, guidance="cfg"))
        found = matched_scale(lambda w: strength(replace(cell, w=w)), target, cell.w)
        if found is None:
            raise ValueError(f"{cell.name}: there is no such scale")
        return found


def make(sampler: Sampler, cells: Sequence[Cell], folder: Path, pictures: int, batch: int) -> None:
    """Make what is missing of some cells' chunks.

    Raises:
        ValueError: the folder holds pictures of other settings.
    """
    network = pipeline_identity(sampler.pipe)["model"]
    plans = {
        cell.slug: {
            "network": network,
            "guidance": to_dict(sampler.pipe.resolve_guidance(cell.guidance)),
            "settings": [cell.w, cell.steps, cell.sigma_skip, batch],
        }
        for cell in cells
    }
    for slug, plan in plans.items():
        path = folder / slug / "plan.json"
        plan = json.loads(json.dumps(plan))
        if path.is_file() and json.loads(path.read_text()) != plan:
            raise ValueError(f"{path.parent} holds pictures of other settings: remove it")
        write_json(path, plan)
    work = [(cell, i) for cell in cells for i in range(0, pictures, batch)]
    todo = [(cell, i) for cell, i in work if not chunk(folder, cell, i).is_file()]
    with tqdm(
        total=len(work) * batch, unit="picture", initial=(len(work) - len(todo)) * batch
    ) as bar:
        for cell, first in todo:
            bar.set_description(cell.name)
            found = sampler.made(cell, range(first, first + batch))
            with atomic(chunk(folder, cell, first)) as partial:
                save_file(found, partial)
            bar.update(batch)


def chunk(folder: Path, cell: Cell, first: int) -> Path:
    """The file of a cell's pictures from an index on."""
    return folder / cell.slug / f"{first:06d}.safetensors"


def load(folder: Path, cell: Cell, pictures: int, batch: int) -> dict[str, Tensor]:
    """What `make` made of a cell."""
    parts = [load_file(chunk(folder, cell, i)) for i in range(0, pictures, batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def resamples_within_classes(pictures: int, count: int, seed: int = 0) -> Resamples:
    """As many pictures of each class as there are; the class of picture i is i % 10."""
    generator = torch.Generator().manual_seed(seed)
    classes = len(CLASSES)
    shape = (count, pictures // classes, classes)
    drawn = torch.randint(pictures // classes, shape, generator=generator)
    drawn = (drawn * classes + torch.arange(classes)).flatten(1)
    times = torch.zeros(count, pictures, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    return Resamples(times, torch.arange(pictures))


@dataclass(frozen=True)
class Judges:
    """What pictures are compared with.

    Args:
        components: Of the real pictures, with shape (N, 256).
        classifier: For the share of pictures of the class asked for.
        seen: The classifier's features of the real pictures, with shape (N, 128).
        pixels: Of the real pictures, with shape (N, 784).
        resamples: Of the generated pictures.
    """

    components: Tensor
    classifier: Classifier
    seen: Tensor
    pixels: Tensor
    resamples: Resamples

    @classmethod
    def of(
        cls, components: Components, classifier: Classifier, real: Tensor, pictures: int
    ) -> Judges:
        """With real pictures, uint8."""
        seen, _ = classifier.look(real)
        drawn = resamples_within_classes(pictures, RESAMPLES)
        return cls(components.real, classifier, seen, flat(real), drawn)


def measure(
    pictures: Tensor, components: Tensor, judges: Judges
) -> tuple[dict[str, Any], dict[str, Resampled]]:
    """Figures of generated pictures, uint8, the classes in turn, and their resamples."""
    real, drawn, ks = judges.components, judges.resamples, (NEIGHBOUR, DENSITY_NEIGHBOUR)
    seen, answers = judges.classifier.look(pictures)
    right = (answers == torch.arange(len(pictures)) % len(CLASSES)).double()
    shares, wide = neighbour_metrics(real, components, *ks)
    assert shares is not None and wide is not None
    values = {
        "fd": frechet_distance(real, components),
        **shares._asdict(),
        **wide._asdict(),
        "accuracy": float(right.mean()),
    }
    draws = {
        "fd": frechet_resamples(real, components, drawn),
        "accuracy": drawn.means(right),
        **neighbour_resamples(real, components, drawn, *ks),
    }
    row: dict[str, Any] = {}
    for name, value in values.items():
        low, high = moved_interval(draws[name], value)
        row[name] = rounded(value)
        row[f"{name}_interval"] = [rounded(low), rounded(high)]
    row["fd_half_width"] = rounded((row["fd_interval"][1] - row["fd_interval"][0]) / 2)
    row["fd_classifier"] = rounded(frechet_distance(judges.seen, seen))
    row["fd_pixels"] = rounded(frechet_distance(judges.pixels, flat(pictures)))
    return row, {name: Resampled(value, draws[name]) for name, value in values.items()}


def flat(pictures: Tensor) -> Tensor:
    """Pixels (N, 784) in [0, 1], float64, of pictures, uint8."""
    return pictures.flatten(1).double() / 255


def compared(
    beside: dict[str, str | None], found: dict[str, dict[str, Resampled]], pictures: int
) -> dict[str, dict[str, Any]]:
    """By cell, the paired differences to the CFG cell beside it, all of a metric one family."""
    names = list(found)
    beside = {one: other for one, other in beside.items() if other in found}
    pairs = [(names.index(one), names.index(other)) for one, other in beside.items()]
    result: dict[str, dict[str, Any]] = {one: {"cell": other} for one, other in beside.items()}
    for metric in PAIRED:
        values = [found[name][metric].value for name in names]
        draws = [found[name][metric].draws for name in names]
        rows = differences(values, draws, pairs, pictures)
        for name, one in zip(beside, rows, strict=True):
            ends = one.interval and [rounded(end) for end in one.interval]
            result[name][metric] = {"difference": rounded(one.value), "interval": ends}
    return result


def report(
    cells: Sequence[Cell], folder: Path, judges: Judges, pictures: int, batch: int
) -> list[dict[str, Any]]:
    """The figures of every cell."""
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Resampled]] = {}
    for cell in tqdm(cells, "metrics", unit="cell"):
        held = load(folder, cell, pictures, batch)
        row, found[cell.name] = measure(held["pictures"], held["components"], judges)
        rows[cell.name] = {
            "name": cell.name,
            "method": "cfg" if cell.w == 1 else cell.slug.split("-")[0],
            "guidance": str(resolve(cell.guidance)),
            "w": cell.w,
            "steps": cell.steps,
            "nfe": rounded(held["nfe"].double().mean()),
            "n": len(held["pictures"]),
            "strength": rounded(held["update"].mean()),
            **row,
        }
    beside = {cell.name: cell.beside for cell in cells}
    full = {name: beside.get(other) for name, other in beside.items() if other}
    paired, to_full = compared(beside, found, pictures), compared(full, found, pictures)
    return [
        row | {"paired_to_cfg": paired.get(name), "paired_to_full_run": to_full.get(name)}
        for name, row in rows.items()
    ]


def table_line(row: dict[str, Any]) -> str:
    """A cell's figures as a line of a table: copied, or rounded where the interval is wider."""
    paired = row["paired_to_cfg"]
    difference = "–"
    if paired:
        fd = paired["fd"]
        low, high = fd["interval"]
        difference = f"{fd['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
    columns = [
        row["name"],
        f"{row['w']:.4g}",
        f"{row['nfe']:.4g}",
        f"{row['fd']:.2f} ± {row['fd_half_width']:.2f}",
        difference.replace("-", "−"),
        *(f"{row[name]:.3f}" for name in ("precision", "recall", "accuracy")),
        f"{row['fd_classifier']:.2f}",
        f"{row['fd_pixels']:.2f}",
    ]
    return f"| {' | '.join(columns)} |"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """FD, precision and recall over w: lines of CFG and APG, single points of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 3), ("fd", "precision", "recall"), strict=True):
        drawn: set[str] = set()
        for method, colour in (("cfg", "#2471a3"), ("apg", "#c0392b")):
            plain = [
                row for row in rows if re.fullmatch(rf"no guidance|{method} [\d.]+", row["name"])
            ]
            plain.sort(key=lambda row: row["w"])
            drawn |= {row["name"] for row in plain}
            points = [row["w"] for row in plain], [row[metric] for row in plain]
            ends = [[abs(end - row[metric]) for end in row[f"{metric}_interval"]] for row in plain]
            axes.errorbar(*points, yerr=list(zip(*ends, strict=True)), color=colour, label=method)
        others = [row for row in rows if row["name"] not in drawn]
        for marker, row in zip(itertools.cycle("osv^<>DPX*hp"), others, strict=False):
            axes.plot(row["w"], row[metric], marker, color="#566573", label=row["name"], ms=5)
        axes.set(xscale="log", xlabel="w", title=metric)
        axes.set_xticks(ticks := [1, 1.5, 3, 7.5, 15], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=90)


def sheet(cells: Sequence[Cell], folder: Path, path: Path) -> None:
    """A row of every cell: the first picture of every class, from the same noise."""
    count = len(CLASSES)
    rows = [load_file(chunk(folder, cell, 0))["pictures"][:count, 0] for cell in cells]
    pictures = [Image.fromarray(picture.numpy()) for row in rows for picture in row]
    with atomic(path) as partial:
        make_image_grid(pictures, len(cells), count).save(partial)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the classifier, tune, generate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many, first ones first")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of every cell")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--work", type=Path, default=Path("cache/fashion_guidance"))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("eval/results/fashion_guidance.json")
    )
    args = parser.parse_args(argv)
    pictures, batch = args.pictures, args.batch_size
    if batch < 1 or pictures < 1 or pictures % batch or batch % len(CLASSES):
        raise SystemExit(
            f"--pictures must be a multiple of --batch-size, and that of {len(CLASSES)} classes: "
            f"got {pictures} and {batch}"
        )
    if not 1 <= args.cells <= len(CELLS):
        raise SystemExit(f"--cells must be between 1 and {len(CELLS)}, got {args.cells}")
    begin = time.perf_counter()
    training = json.loads((model_folder("classes") / "training.json").read_text())
    pipe = guided(load_classes())
    (images, labels), (real_images, real_labels) = (load_images(s) for s in ("train", "test"))
    classifier = trained(args.work / "classifier.safetensors", images, labels)
    components = Components(real_images, args.work / "components.safetensors")
    sampler = Sampler(pipe, statistics_of(images), components)
    tuning, network = args.work / "tuned.json", pipeline_identity(pipe)["model"]
    kept = json.loads(tuning.read_text()) if tuning.is_file() else {}
    known = kept["values"] if kept.get("network") == network else {}
    cells = []
    for cell in CELLS[: args.cells]:
        cells.append(sampler.tuned(cell, known, args.work))
        write_json(tuning, {"network": network, "values": known})
    make(sampler, cells, args.work, pictures, batch)
    judges = Judges.of(components, classifier, real_images, pictures)
    rows = report(cells, args.work, judges, pictures, batch)
    # Training pictures as if a cell had drawn them: of every class the first ones, in turn.
    by_class = [(labels == i).nonzero()[: pictures // len(CLASSES), 0] for i in range(len(CLASSES))]
    known_by_heart = images[torch.stack(by_class, 1).flatten()]
    floor, _ = measure(known_by_heart, components(known_by_heart), judges)
    right = classifier.look(real_images)[1] == real_labels
    figures = {
        "network": {k: training[k] for k in ("minutes", "parameters", "step", "held_out_loss")},
        "extractor": components.extractor.name,
        "components": {"count": COMPONENTS, "share": rounded(components.share)},  # of the variance
        "classifier": {"accuracy": rounded(right.double().mean())},
        "reference": len(real_images),
        "training_pictures": floor,
        "tuned": known,
        "cells": rows,
        "minutes": round((time.perf_counter() - begin) / 60, 1),  # of this call
    }
    write_figures(args.output, figures)
    print("\n".join(table_line(row) for row in rows))
    plot(rows, args.output.with_suffix(".png"))
    sheet(cells, args.work, args.output.with_name(f"{args.output.stem}_pictures.png"))


if __name__ == "__main__":
    main()
