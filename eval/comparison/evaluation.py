"""Metrics of a comparison's settings: of every picture, to the baseline, to real pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..metrics.alignment import Alignment
from ..metrics.extractors import Extractor
from ..metrics.frechet import frechet_distance, frechet_interval
from ..metrics.images import PER_PICTURE
from ..metrics.kid import kernel_distance
from ..metrics.per_picture import mean_and_interval, measure
from ..metrics.precision_recall import density_coverage, precision_recall
from .plan import Samples, Setting

DISTANCE_RESAMPLES = 100


@dataclass(frozen=True)
class Cell:
    """One setting of a comparison.

    Args:
        setting: What was asked of the pipeline.
        guidance: The settings its name stands for, written out.
        kind: ``grid``: asked for; ``baseline``: added for the others; ``equal nfe``: CFG with as
            many steps as cost what another method costs.
        matches: For ``equal nfe``, the labels of the settings whose cost it has.
        samples: Its pictures.
        baseline: Index of the baseline's cell; None for a baseline.
    """

    setting: Setting
    guidance: str
    kind: str
    matches: tuple[str, ...]
    samples: Samples
    baseline: int | None


class Evaluation:
    """Evaluates the cells of a comparison, a few pictures at a time.

    Args:
        cells: What to evaluate.
        output: Folder of the comparison.
        reference: Real pictures, with shape (N, 3, H, W), in [0, 1], or None.
        extractor: Pictures to features; needed with `reference` only.
        alignment: What scores pictures by their prompts, or None.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        output: Path,
        reference: Tensor | None,
        extractor: Extractor | None,
        alignment: Alignment | None,
    ) -> None:
        self.cells, self.output, self.reference = cells, output, reference
        self.extractor, self.alignment = extractor, alignment
        self.gallery: Tensor | None = None
        if reference is not None and extractor is not None:
            self.gallery = extractor(reference).cpu()

    def rows(self, progress: bool) -> list[dict[str, Any]]:
        """One dictionary a cell."""
        from tqdm import tqdm

        bar = tqdm(self.cells, unit="setting", desc="metrics", disable=not progress)
        return [self._row(cell) for cell in bar]

    def real(self) -> dict[str, Any] | None:
        """The statistics of single pictures, of the reference."""
        if (reference := self.reference) is None:
            return None
        means = {name: rounded(metric(reference).mean()) for name, metric in PER_PICTURE.items()}
        return means | {"n": len(reference)}

    def _row(self, cell: Cell) -> dict[str, Any]:
        samples, setting = cell.samples, cell.setting
        row: dict[str, Any] = {
            "label": setting.label,
            "method": setting.method,
            "guidance": cell.guidance,
            "kind": cell.kind,
            "matches": list(cell.matches),
            "w": setting.scale,
            "steps": setting.steps,
            "n": len(samples.paths),
            "nfe": rounded(samples.mean_nfe),
            "nfe_range": [min(samples.nfe), max(samples.nfe)],
            "seconds": rounded(samples.seconds),
            "effective_guidance": self._effective(cell),
            "folder": os.path.relpath(samples.paths[0].parent, self.output),
        }
        base = None if cell.baseline is None else self.cells[cell.baseline].samples
        values = measure(
            samples.paths,
            None if base is None else base.paths,
            samples.prompts,
            self.alignment,
            None if self.gallery is None else self.extractor,
        )
        features = values.pop("features", None)
        groups = independent(samples.prompts)
        for name, value in values.items():
            mean, ends = mean_and_interval(value, groups)
            row[name] = rounded(mean)
            row[f"{name}_interval"] = None if ends is None else [rounded(end) for end in ends]
        if "psnr" in values:
            row["n_equal"] = int(values["psnr"].isinf().sum())
        if self.gallery is not None and features is not None:
            row |= distribution_metrics(self.gallery, features, groups)
        return row

    def _effective(self, cell: Cell) -> float | None:
        """Effective guidance (see `comparison`); None where it could not be measured."""
        setting = cell.setting
        if cell.baseline is None or cell.kind == "equal nfe":
            return rounded(setting.scale)
        update, plain = cell.samples.update, self.cells[cell.baseline].samples.update
        if update is None or plain is None or sum(plain) == 0:
            return None
        return rounded(1 + (setting.scale - 1) * sum(update) / sum(plain))


def independent(prompts: Sequence[str]) -> list[Hashable]:
    """The group of each picture, so that pictures are independent from group to group.

    That is its prompt: the seeds of a prompt say little about other prompts. Pictures of one prompt
    only speak for this prompt, and are groups of their own.
    """
    return list(prompts) if len(set(prompts)) > 1 else list(range(len(prompts)))


def distribution_metrics(
    real: Tensor, fake: Tensor, groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Fréchet distance with its interval, KID, precision, recall, density and coverage.

    The first two need two pictures, the others more than their k (3, 3, 5, 5); what has too few is
    left out.

    Args:
        real: Features of the reference, with shape (N, D).
        fake: Features of the generated pictures, with shape (M, D).
        groups: See `frechet_interval`.
    """
    values: dict[str, Any] = {}
    least = min(len(real), len(fake))
    if least > 1:
        values["fd"] = rounded(frechet_distance(real, fake))
        ends = frechet_interval(real, fake, resamples=DISTANCE_RESAMPLES, groups=groups)
        values["fd_interval"] = [rounded(end) for end in ends]
        values["kid"] = rounded(kernel_distance(real, fake).value)
    for metric, k in ((precision_recall, 3), (density_coverage, 5)):
        if least > k:
            found = metric(real, fake, k)
            values |= {name: rounded(value) for name, value in found._asdict().items()}
    return values


def rounded(value: float | Tensor | None) -> float | None:
    """Six significant digits; None for none, NaN and infinity."""
    number = math.nan if value is None else float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
