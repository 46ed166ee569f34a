"""Files of features, or of their mean and covariance.

A file is a ``.npz`` without pickled objects, with ``mu`` and ``sigma`` as pytorch-fid and clean-fid
write and read them. Its tags say what made it: extractor, preprocessing, number of pictures and a
hash of their names and contents. Features of different extractors or preprocessings are never
compared. Files of other tools have no tags: whoever uses them says what made them.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...guidance.files import atomic
from ..pictures import Pictures, Reading
from .extractors import Extractor

FORMAT = 2
TOOLS = {"pytorch-fid": "inception", "clean-fid": "inception"}  # and their networks
INCEPTION = 2048  # features of its last layer
ROUNDING = 1e-6  # of float32, in which other tools may have computed, relative to the largest value


def preprocessing(extractor: Extractor, reading: Reading | None) -> str:
    """All that is done to pictures before the network, in words."""
    first = "" if reading is None else reading.words
    return f"{first}, then {extractor.preprocessing}" if first else extractor.preprocessing


@dataclass(frozen=True, eq=False)
class Features:
    """Mean and covariance of pictures' features, what made them, and the features if kept.

    Args:
        extractor: Name of the network.
        preprocessing: What is done to pictures before it.
        mean: With shape (D,), float64.
        covariance: Unbiased (divisor N - 1), with shape (D, D), float64.
        count: N; None: not known, in files of other tools.
        data: SHA-256 of the pictures' names and contents; empty in files of other tools.
        values: Features, with shape (N, D); None if they were not kept.
        pictures: What was read, None from a file.
    """

    extractor: str
    preprocessing: str
    mean: Tensor
    covariance: Tensor
    count: int | None = None
    data: str = ""
    values: Tensor | None = None
    pictures: Pictures | None = None

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
        """Write a ``.npz``, whole or not at all.

        Its ``mu`` and ``sigma`` are what pytorch-fid and clean-fid read.
        """
        tags = {"format": FORMAT, "n": self.count}
        tags |= {name: getattr(self, name) for name in ("extractor", "preprocessing", "data")}
        arrays: dict[str, Any] = {
            "tags": np.array(json.dumps(tags)),
            "mu": self.mean.cpu().numpy(),
            "sigma": self.covariance.cpu().numpy(),
        }
        if self.values is not None:
            arrays["features"] = self.values.cpu().numpy()
        with atomic(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(
        cls,
        path: str | Path,
        extractor: Extractor | None = None,
        reading: Reading | None = None,
        made_by: str | None = None,
    ) -> Features:
        """Read what `save` wrote, or ``mu`` and ``sigma`` of another tool.

        Args:
            path: The file.
            extractor: What it must have been made with; None: anything.
            reading: How pictures must have been read before the extractor.
            made_by: What made a file that does not say it: one of `TOOLS`, or an extractor's name.
                The preprocessing of such a file is not compared.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another kind, its parts disagree, no mean and covariance, or
                made with another extractor or preprocessing (names the field).
        """
        path = Path(path)
        arrays = _arrays(path)
        try:
            tagged = "tags" in arrays
            found = cls._tagged(arrays) if tagged else cls._of_another_tool(arrays, made_by)
            if extractor is not None:
                before = preprocessing(extractor, reading) if tagged else found.preprocessing
                found.require(extractor.name, before)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return found

    @classmethod
    def _tagged(cls, arrays: dict[str, NDArray[Any]]) -> Features:
        tags = json.loads(str(arrays["tags"]))
        if missing := {"n", "extractor", "preprocessing", "data"} - set(tags):
            raise ValueError(f"damaged: its tags have no {' and no '.join(sorted(missing))}")
        if tags.get("format") != FORMAT:
            raise ValueError(
                f"it has format {tags.get('format')!r}, expected {FORMAT}: make it again"
            )
        kept = arrays.get("features")
        mean, covariance = _moments(arrays)
        if kept is not None:
            if kept.shape != (tags["n"], len(mean)):
                raise ValueError("the shapes of its parts disagree")
            if not np.isfinite(kept).all():
                raise ValueError("NaN or infinity in its features")
        return cls(
            *(tags["extractor"], tags["preprocessing"], mean, covariance, tags["n"], tags["data"]),
            None if kept is None else torch.from_numpy(kept),
        )

    @classmethod
    def _of_another_tool(cls, arrays: dict[str, NDArray[Any]], made_by: str | None) -> Features:
        mean, covariance = _moments(arrays)
        if made_by is None:
            raise ValueError(
                "its mu and sigma do not say what made them: say it with --made-by "
                f"({', '.join(TOOLS)}, or the name of an extractor)"
            )
        if made_by in TOOLS and len(mean) != INCEPTION:
            raise ValueError(
                f"mu has {len(mean)} entries, those of {made_by} with Inception's last layer have "
                f"{INCEPTION}"
            )
        return cls(TOOLS.get(made_by, made_by), f"that of {made_by}", mean, covariance)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.npz``."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged or not a statistics file ({error}): make it again"
        ) from error


def _moments(arrays: dict[str, NDArray[Any]]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of a file, in float64.

    Raises:
        ValueError: they are not there, or are none: names the part and what is wrong with it.
    """
    if missing := [name for name in ("mu", "sigma") if name not in arrays]:
        raise ValueError(f"not a statistics file: it has no {' and no '.join(missing)}")
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or not mean.size or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"expected mu (D,) and sigma (D, D), got shapes {mean.shape} and {covariance.shape}"
        )
    for name, part in (("mu", mean), ("sigma", covariance)):
        if part.dtype.kind != "f":
            kind = "complex" if part.dtype.kind == "c" else f"of type {part.dtype}"
            raise ValueError(f"{name} is {kind}, expected real floating point numbers")
        if not np.isfinite(part).all():
            raise ValueError(f"NaN or infinity in {name}")
    covariance = covariance.astype(np.float64)
    gap, largest = np.abs(covariance - covariance.T).max(), np.abs(covariance).max()
    if gap > ROUNDING * largest:
        raise ValueError(f"sigma is not symmetric: it differs by {gap:.3g} from its transpose")
    values = np.linalg.eigvalsh(covariance)
    if values[0] < -ROUNDING * np.abs(values).max():
        raise ValueError(f"sigma is no covariance: it has the negative eigenvalue {values[0]:.3g}")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance)
