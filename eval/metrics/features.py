"""Features of pictures, their mean and covariance, and the files that keep them.

A file is a ``.npz`` without pickled objects. Its tags say what made it: extractor, preprocessing,
number of pictures and a hash of their names and contents. Features of different extractors or
preprocessings are never compared.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...guidance.files import atomic
from ..pictures import batches, picture_files
from .extractors import Extractor, load_extractor

FORMAT = 1


def checked_features(features: Tensor, least: int = 1) -> Tensor:
    """Features as float64 (N, D).

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
    return features.double()


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


@dataclass(frozen=True, eq=False)
class Features:
    """Statistics of pictures' features, what made them, and the features where they are kept.

    Args:
        extractor: Name of the network.
        preprocessing: What is done to pictures before it.
        data: SHA-256 of the pictures' names and contents.
        statistics: Count, mean and scatter of the features.
        values: Features, with shape (N, D); None if they were not kept.
    """

    extractor: str
    preprocessing: str
    data: str
    statistics: FeatureStatistics
    values: Tensor | None = None

    def require(self, extractor: str, preprocessing: str) -> None:
        """Refuse features of another extractor or preprocessing.

        Raises:
            ValueError: names what differs first, and both values.
        """
        wanted = {"extractor": extractor, "preprocessing": preprocessing}
        for name, value in wanted.items():
            if (own := getattr(self, name)) != value:
                raise ValueError(
                    f"not comparable: {name} is {own!r} in one and {value!r} in the other"
                )

    def rows(self) -> Tensor:
        """The features.

        Raises:
            ValueError: they were not kept.
        """
        if self.values is None:
            raise ValueError(
                "this file keeps statistics only; this metric needs the features themselves: "
                "make it again with --features"
            )
        return self.values

    def save(self, path: str | Path) -> None:
        """Write a ``.npz``, whole or not at all."""
        tags = {"format": FORMAT, "n": self.statistics.count}
        tags |= {name: getattr(self, name) for name in ("extractor", "preprocessing", "data")}
        arrays: dict[str, Any] = {
            "tags": np.array(json.dumps(tags)),
            "mean": self.statistics.mean.cpu().numpy(),
            "scatter": self.statistics.scatter.cpu().numpy(),
        }
        if self.values is not None:
            arrays["features"] = self.values.cpu().numpy()
        with atomic(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(
        cls, path: str | Path, extractor: Extractor | None = None, resize: int | None = None
    ) -> Features:
        """Read what `save` wrote.

        Args:
            path: The file.
            extractor: What it must have been made with; None: anything.
            resize: Side to which pictures must have been brought before the extractor.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another kind, its parts disagree, or made with another extractor
                or preprocessing (names the field).
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            tags = json.loads(str(arrays.pop("tags")))
            parts = {name: torch.from_numpy(array) for name, array in arrays.items()}
            mean, scatter, kept = parts["mean"], parts["scatter"], parts.get("features")
            statistics = FeatureStatistics(int(tags["n"]), mean, scatter)
            made_by = tags["extractor"], tags["preprocessing"], tags["data"]
        except KeyError as error:
            raise ValueError(f"{path} is not a statistics file: it has no {error}") from error
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged or not a statistics file ({error}): make it again"
            ) from error
        if tags.get("format") != FORMAT:
            raise ValueError(f"{path} has format {tags.get('format')!r}, expected {FORMAT}")
        shapes = scatter.shape == (*mean.shape, *mean.shape) and mean.ndim == 1
        if not shapes or (kept is not None and kept.shape != (statistics.count, *mean.shape)):
            raise ValueError(f"{path}: the shapes of its parts disagree")
        if bad := [name for name, part in parts.items() if not part.isfinite().all()]:
            raise ValueError(f"{path}: NaN or infinity in its {' and '.join(bad)}")
        found = cls(*made_by, statistics, kept)
        if extractor is not None:
            try:
                found.require(extractor.name, _preprocessing(extractor, resize))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return found


def folder_features(
    folder: str | Path,
    extractor: Extractor,
    batch_size: int = 32,
    resize: int | None = None,
    keep: bool = True,
    progress: bool = True,
) -> Features:
    """Features of a folder's pictures.

    Args:
        folder: Where the pictures lie.
        extractor: See `extractors.Extractor`.
        batch_size: Pictures at once.
        resize: Bring pictures to this side first; needed for pictures of mixed sizes.
        keep: Keep the features beside their statistics.
        progress: Show a bar.

    Raises:
        FileNotFoundError, ValueError: see `pictures`; or features with NaN (names the file).
    """
    files, digest = picture_files(folder), hashlib.sha256()
    statistics: FeatureStatistics | None = None
    kept: list[Tensor] = []
    done = 0
    with tqdm(total=len(files), unit="picture", desc=str(folder), disable=not progress) as bar:
        for pictures in batches(files, batch_size, resize, digest.update):
            part = extractor(pictures).detach().float().cpu()
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
    assert statistics is not None  # `picture_files` gives at least one
    return Features(
        extractor.name,
        _preprocessing(extractor, resize),
        digest.hexdigest(),
        statistics,
        torch.cat(kept) if keep else None,
    )


def _preprocessing(extractor: Extractor, resize: int | None) -> str:
    # With `resize` the pictures were changed before the extractor; that is preprocessing too.
    first = "" if resize is None else f"bicubic to {resize}x{resize}, then "
    return first + extractor.preprocessing


def load_pair(
    real: Path,
    fake: Path,
    extractor: str,
    device: str = "cpu",
    batch_size: int = 32,
    resize: int | None = None,
    *,
    rows: tuple[bool, bool] = (True, True),
    least: tuple[int, int] = (1, 1),
) -> tuple[Features, Features]:
    """Features of two folders or ``.npz`` files; what can be refused early is.

    Args:
        real, fake: Folders or files.
        extractor: Its name, see `load_extractor`.
        device: Where it computes.
        batch_size, resize: See `folder_features`.
        rows: Whether of `real` and of `fake` the features themselves are needed.
        least: Pictures needed of `real` and of `fake`.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: too few pictures, features that were not kept, or as for `folder_features` and
            `Features.load`.
    """
    sources = (real, fake)
    counts: dict[Path, int] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
        if source.suffix != ".npz":
            counts[source] = len(picture_files(source))
    network = load_extractor(extractor, device=device)
    found = {s: Features.load(s, network, resize) for s in sources if s not in counts}
    counts |= {source: features.statistics.count for source, features in found.items()}
    for source, needed, itself in zip(sources, least, rows, strict=True):
        if (count := counts[source]) < needed:
            raise ValueError(f"at least {needed} pictures are needed, {source} has {count}")
        if itself and source in found:
            found[source].rows()
    for source in sources:
        if source not in found:
            found[source] = folder_features(source, network, batch_size, resize, any(rows))
    return found[real], found[fake]
