"""Does the Fréchet distance agree with torchmetrics' and torch-fidelity's, on the same features?

    python -m examples.studies.agreement

torchmetrics gets the features through a module that passes them on, in float64. Of torch-fidelity
only ``metric_fid`` is imported; its ``utils``, which needs torchvision, is not used by the two
functions compared (``pip install --no-deps torch-fidelity``). Both take the eigenvalues of the
product of two covariances, which lose half their digits when N <= D: agreement to 1e-6 is for more
pictures than dimensions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from pilotage.eval.metrics.extractors import fidelity_modules
from pilotage.eval.metrics.frechet import frechet_distance
from pilotage.eval.options import Json, report


@functools.cache
def torchmetrics(name: str) -> types.ModuleType:
    """A module of torchmetrics, which imports parts of torch-fidelity where that is installed."""
    installed = importlib.util.find_spec("torch_fidelity") is not None
    with fidelity_modules() if installed else nullcontext():
        return importlib.import_module(f"torchmetrics.{name}")


class _Pass(nn.Module):
    """Features to features, for torchmetrics."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.num_features = dimension

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid_of_torchmetrics(real: Tensor, fake: Tensor) -> float:
    """torchmetrics' distance of features (N, D) and (M, D), in float64."""
    metric = torchmetrics("image.fid").FrechetInceptionDistance(feature=_Pass(real.shape[1]))
    metric = metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def fid_of_torch_fidelity(real: Tensor, fake: Tensor) -> float:
    """torch-fidelity's distance of features (N, D) and (M, D), in float64.

    Raises:
        ModuleNotFoundError: torch-fidelity is not installed.
    """
    with fidelity_modules():
        # Its "utils" need torchvision, and nothing here needs them: every name of theirs is None.
        utils = types.ModuleType("torch_fidelity.utils")
        utils.__dict__["__getattr__"] = lambda name: None
        sys.modules[utils.__name__] = utils
        module = importlib.import_module("torch_fidelity.metric_fid")
    statistics = [module.fid_features_to_statistics(x.double()) for x in (real, fake)]
    return module.fid_statistics_to_metric(*statistics, verbose=False)[module.KEY_METRIC_FID]


def made_up(count: int, dimension: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of correlated features with decaying variances, float64 (N, D)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sets = []
    for shift in (0.0, 0.3):
        mix = draw(dimension, dimension) / dimension**0.5
        scales = torch.arange(1, dimension + 1, dtype=torch.float64) ** -0.5
        sets.append(draw(count, dimension) * scales @ mix + shift)
    return sets[0], sets[1]


def agreement(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Relative differences ``fid_vs_torchmetrics`` and ``fid_vs_torch_fidelity``.

    Args:
        real: Features, with shape (N, D), N > D.
        fake: Features, with shape (M, D), M > D.
    """
    own = frechet_distance(real, fake)
    others = {
        "fid_vs_torchmetrics": fid_of_torchmetrics(real, fake),
        "fid_vs_torch_fidelity": fid_of_torch_fidelity(real, fake),
    }
    return {
        name: math.nan if other == 0 else abs(own - other) / abs(other)
        for name, other in others.items()
    }


app = typer.Typer(add_completion=False)


@app.command()
def command(
    real: Annotated[Path | None, typer.Option(help="A .npz with features; else made up.")] = None,
    fake: Annotated[Path | None, typer.Option(help="A .npz with features; else made up.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Made-up feature vectors a set.")] = 4000,
    dimension: Annotated[int, typer.Option(min=1, help="Their length.")] = 512,
    json: Json = None,
) -> None:
    """Relative differences of the Fréchet distance to two other implementations."""
    if (real is None) != (fake is None):
        raise ValueError("name both --real and --fake, or neither")
    if real is None or fake is None:
        features = made_up(count, dimension)
    else:
        from pilotage.eval.metrics.features import Features

        files = Features.load(real), Features.load(fake)
        files[0].require(files[1].extractor, files[1].preprocessing)
        features = files[0].rows(), files[1].rows()
    report(agreement(*features), json)


if __name__ == "__main__":
    from pilotage.eval.terminal import finish

    finish(app)
