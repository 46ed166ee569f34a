r"""Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, arXiv:1706.08500).

.. math:: d^2 = |\mu_1 - \mu_2|^2 + tr \Sigma_1 + tr \Sigma_2 - 2 tr (\Sigma_1 \Sigma_2)^{1/2}

It is called FID when the features are those of Inception. Figures compare with published ones only
with: the Inception weights of torch-fidelity (``--extractor inception``, converted from the
original), their own TensorFlow-1 bilinear resizing, pictures rounded to 8 bits (lossless files),
and 50,000 generated pictures (30,000 for COCO; the paper's table says which) against the same real
pictures. The distance is biased upwards for small N: compare equal N only.

    python -m pilotage.eval.metrics.frechet REAL FAKE --extractor inception
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor

from .features import FeatureStatistics, checked_features
from .options import DEFAULT, Batch, Device, Fake, Json, Name, Real, Resize, load_pair, report


def factor(source: FeatureStatistics | Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor L, with shape (D, r), of the covariance: Sigma = L L^T.

    Fewer features than dimensions are their own factor, so that a singular covariance is exact.
    """
    if isinstance(source, Tensor):
        features = checked_features(source, least=2)
        if len(features) <= features.shape[1]:
            mean = features.mean(0)
            return mean, (features - mean).T / (len(features) - 1) ** 0.5
        source = FeatureStatistics.of(features)
    values, vectors = torch.linalg.eigh(source.covariance)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > noise  # rounding makes zero eigenvalues tiny, and their roots are not tiny
    return source.mean, vectors[:, kept] * values[kept].sqrt()


def frechet_distance(real: FeatureStatistics | Tensor, fake: FeatureStatistics | Tensor) -> float:
    """Fréchet distance (squared, as everywhere in the literature), in float64.

    With covariances L1 L1^T and L2 L2^T, the eigenvalues of their product are the squared singular
    values of L1^T L2: no square root of a matrix, no imaginary part, and singular covariances keep
    their precision.

    Args:
        real: Features (N, D) or their statistics.
        fake: Features (M, D) or their statistics.

    Raises:
        ValueError: fewer than two pictures, NaN, or different dimensions.
    """
    (mean1, factor1), (mean2, factor2) = factor(real), factor(fake)
    if mean1.shape != mean2.shape:
        raise ValueError(f"features of different dimensions: {len(mean1)} and {len(mean2)}")
    cross = factor1.T @ factor2
    root = torch.linalg.svdvals(cross).sum() if cross.numel() else cross.new_zeros(())
    distance = (mean1 - mean2).square().sum() + factor1.square().sum() + factor2.square().sum()
    return max(float(distance - 2 * root), 0.0)


app = typer.Typer(add_completion=False)


@app.command()
def command(
    real: Real,
    fake: Fake,
    extractor: Name = DEFAULT,
    resamples: Annotated[int, typer.Option(min=0, help="For a bootstrap interval; slow.")] = 0,
    batch_size: Batch = 32,
    resize: Resize = None,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Fréchet distance between two sets of pictures (FID with --extractor inception)."""
    from .bootstrap import check_resampling, frechet_interval

    if resamples:
        check_resampling(resamples)
    one, two = load_pair(
        real, fake, extractor, resamples > 0, batch_size, resize, device, (2, 2), True
    )
    # Kept features spare small sets the eigenvectors of a D x D matrix.
    sources = [x.statistics if x.values is None else x.values for x in (one, two)]
    name = "fid" if extractor.partition(":")[0] == "inception" else "fd"
    values = {
        name: frechet_distance(*sources),
        "extractor": one.tags.extractor,
        "n_real": one.statistics.count,
        "n_fake": two.statistics.count,
    }
    if resamples:
        found = frechet_interval(sources[0], two.rows(), resamples=resamples)
        values["interval"] = list(found)
    report(values, json)


if __name__ == "__main__":
    from ..cli import run

    run(app)
