"""Features of pictures, their mean and covariance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..pictures import Pictures, Reading
from ..terminal import note
from .extractors import Extractor, load_extractor
from .feature_files import Features, preprocessing


def checked_features(features: Tensor, least: int = 1) -> Tensor:
    """Features as float64 (N, D).

    Raises:
        ValueError: as `finite_features`.
    """
    return finite_features(features, least).double()


def finite_features(features: Tensor, least: int = 1) -> Tensor:
    """Features (N, D) as they are.

    Raises:
        ValueError: another shape, NaN or infinity, or fewer than `least` rows.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"expected features (N, D), got shape {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"at least {least} pictures are needed, got {len(features)}")
    if not (finite := features.isfinite().all(1)).all():
        rows = (~finite).nonzero().flatten()[:5].tolist()
        raise ValueError(f"features contain NaN or infinity, in rows {rows}")
    return features


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean and scatter of features, in float64; parts merge to the whole.

    Args:
        count: Number of rows.
        mean: Their mean, with shape (D,).
        scatter: Sum of outer products of deviations from the mean, with shape (D, D).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (N, D)."""
        features = checked_features(features)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both together (Chan, Golub, LeVeque 1979)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"dimensions differ: {len(self.mean)} and {len(other.mean)}")
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter = scatter + torch.outer(step, step) * (self.count * other.count / count)
        return FeatureStatistics(count, self.mean + step * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divisor N - 1), with shape (D, D).

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return self.scatter / (self.count - 1)


def folder_features(
    pictures: Pictures,
    extractor: Extractor,
    batch_size: int = 32,
    keep: bool = True,
    progress: bool = True,
) -> Features:
    """Features of pictures.

    Args:
        pictures: Two or more.
        extractor: See `extractors.Extractor`.
        batch_size: Pictures at once.
        keep: Keep the features beside their statistics.
        progress: Show a bar.

    Raises:
        ValueError: as for `Pictures.batches`; features with NaN (names the file); one picture.
    """
    digest, files = hashlib.sha256(), pictures.files
    statistics: FeatureStatistics | None = None
    kept: list[Tensor] = []
    done = 0
    title = str(pictures.folder)
    with tqdm(total=len(files), unit="picture", desc=title, disable=not progress) as bar:
        for batch in pictures.batches(batch_size, digest.update):
            part = extractor(batch).detach().float().cpu()
            if len(bad := (~part.isfinite().all(1)).nonzero()):
                raise ValueError(
                    f"the features of {files[done + int(bad[0])]} contain NaN or infinity"
                )
            if keep:
                kept.append(part)
            new = FeatureStatistics.of(part)
            statistics = new if statistics is None else statistics.merged(new)
            done += len(part)
            bar.update(len(part))
    if statistics is None:
        raise ValueError("no pictures")
    return Features(
        extractor.name,
        preprocessing(extractor, pictures.reading),
        statistics.mean,
        statistics.covariance,
        statistics.count,
        digest.hexdigest(),
        torch.cat(kept) if keep else None,
        pictures,
    )


def load_pair(
    real: Path,
    fake: Path,
    extractor: str,
    device: str = "cpu",
    batch_size: int = 32,
    reading: Reading | None = None,
    *,
    rows: tuple[bool, bool] = (True, True),
    least: tuple[int, int] = (2, 2),
    made_by: str | None = None,
) -> tuple[Features, Features]:
    """Features of two folders or ``.npz`` files; what can be refused early is.

    What of the folders is read is told on the standard error, as is the progress.

    Args:
        real, fake: Folders or files.
        extractor: Its name, see `load_extractor`.
        device: Where it computes.
        batch_size: Pictures at once.
        reading: How pictures are read.
        rows: Whether of `real` and of `fake` the features themselves are needed.
        least: Pictures needed of `real` and of `fake`, at least 2.
        made_by: See `Features.load`.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: too few pictures, features that were not kept, or as for `folder_features` and
            `Features.load`.
    """
    sources = (real, fake)
    folders: dict[Path, Pictures] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
        if source.suffix != ".npz" and source not in folders:
            folders[source] = Pictures.of(source, reading)
            note(folders[source].found())
            folders[source].check()
    network = load_extractor(extractor, device=device)
    found = {s: Features.load(s, network, reading, made_by) for s in sources if s not in folders}
    for source, needed, itself in zip(sources, least, rows, strict=True):
        count = len(folders[source]) if source in folders else found[source].count
        if count is not None and count < needed:
            raise ValueError(f"at least {needed} pictures are needed, {source} has {count}")
        if itself and source in found:
            found[source].rows()
    for source, pictures in folders.items():
        found[source] = folder_features(pictures, network, batch_size, any(rows))
    return found[real], found[fake]
