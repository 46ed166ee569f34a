r"""Moments of a data set in one pass: mergeable, resumable, float64.

Two accumulators with counts :math:`a, b`, means :math:`\mu_a, \mu_b` and centred sums
:math:`S_a, S_b` merge into

.. math::
    S = S_a + S_b + \frac{ab}{a+b} (\mu_a - \mu_b)(\mu_a - \mu_b)^\top

so that blocks, checkpoints and processes all go through one operation.

References:
    Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979. The sketch is block incremental PCA: Ross, Lim, Lin & Yang, "Incremental
    Learning for Robust Visual Tracking", 2008.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .images import decode

FORMS = ("dense", "sketch", "stationary")


def fingerprint(images: Tensor) -> int:
    """Order-independent 128-bit hash of images (b, C, H, W): the sum of one hash per image."""
    rows = images.detach().cpu().contiguous().flatten(1)
    total = 0
    for row in rows:
        digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()
        total += int.from_bytes(digest, "little")
    return total % 2**128


@dataclass
class Accumulator:
    """Count, mean and centred second moments of images (C, H, W).

    Args:
        shape: (C, H, W).
        form: What is kept of the second moments. "dense": all of them, (n, n). "sketch": the
            `size` leading directions, (size, n), with the total variance exact; exact as long as
            the centred data have rank <= size, otherwise each merge drops at most `dropped` from
            any direction (the sum of the largest eigenvalue left out each time: a bound in operator
            norm on the error of `second`). "stationary": one Hermitian C x C matrix per frequency,
            (H, W // 2 + 1, C, C).
        size: Rows of the sketch.

    All tensors are float64 (complex128 for "stationary") on the CPU.
    """

    shape: tuple[int, int, int]
    form: str = "dense"
    size: int = 0
    count: int = 0
    hash: int = 0
    dropped: float = 0.0
    total: float = 0.0
    mean: Tensor = field(default=None, repr=False)
    second: Tensor = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}: expected one of {FORMS}")
        n = self.shape[0] * self.shape[1] * self.shape[2]
        if self.mean is None:
            self.mean = torch.zeros(n, dtype=torch.float64)
        if self.second is None:
            if self.form == "dense":
                self.second = torch.zeros(n, n, dtype=torch.float64)
            elif self.form == "sketch":
                self.second = torch.zeros(0, n, dtype=torch.float64)
            else:
                c, h, w = self.shape
                self.second = torch.zeros(h, w // 2 + 1, c, c, dtype=torch.complex128)

    def add(self, images: Tensor) -> None:
        """Take in a block of stored images (b, C, H, W).

        Raises:
            ValueError: images of another shape.
        """
        if tuple(images.shape[1:]) != tuple(self.shape):
            raise ValueError(f"expected images {self.shape}, got {tuple(images.shape[1:])}")
        x = decode(images.cpu(), torch.float64).flatten(1)
        block = Accumulator.__new__(Accumulator)
        block.__dict__.update(self.__dict__)
        block.count, block.hash, block.dropped = len(x), fingerprint(images), 0.0
        block.mean = x.mean(0)
        x = x - block.mean
        block.total = float(x.square().sum())
        if self.form == "dense":
            block.second = x.T @ x
        elif self.form == "sketch":
            block.second = x
        else:
            block.second = self._spectra(x)
        self.merge(block)

    def _spectra(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x.view(-1, *self.shape), norm="ortho")
        return torch.einsum("bchw,bdhw->hwcd", waves, waves.conj())

    def merge(self, other: Accumulator) -> None:
        """Take in what another accumulator has seen; the order of merges changes only rounding.

        Raises:
            ValueError: the two keep different things.
        """
        ours, theirs = (self.shape, self.form, self.size), (other.shape, other.form, other.size)
        if ours != theirs:
            raise ValueError(f"cannot merge accumulators of {theirs} into {ours}")
        count = self.count + other.count
        if count == 0:
            return
        step = other.mean - self.mean
        weight = self.count * other.count / count
        self.total += other.total + weight * float(step.square().sum())
        self.dropped += other.dropped
        if self.form == "dense":
            self.second = self.second.addr(step, step, alpha=weight).add_(other.second)
        elif self.form == "stationary":
            self.second = self.second + other.second + weight * self._spectra(step[None])
        else:
            rows = torch.cat([self.second, other.second, weight**0.5 * step[None]])
            self.second = self._compress(rows)
        self.mean = self.mean + step * (other.count / count)
        self.count, self.hash = count, (self.hash + other.hash) % 2**128

    def _compress(self, rows: Tensor) -> Tensor:
        """At most `size` rows with the same leading second moments, orthogonal to each other."""
        if len(rows) <= self.size:
            return rows
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        self.dropped += float(values[-self.size - 1].clamp(min=0))
        return vectors[:, -self.size :].T @ rows

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, under a temporary name first."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        facts = {k: getattr(self, k) for k in ("shape", "form", "size", "count", "total")}
        facts |= {"hash": f"{self.hash:032x}", "dropped": self.dropped}
        second = torch.view_as_real(self.second) if self.second.is_complex() else self.second
        tensors = {"mean": self.mean.contiguous(), "second": second.contiguous()}
        save_file(tensors, partial, {"accumulator": json.dumps(facts)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Accumulator:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is truncated or holds something else.
        """
        tensors, tags = read(path, "accumulator")
        facts = json.loads(tags["accumulator"])
        facts["shape"], facts["hash"] = tuple(facts["shape"]), int(facts["hash"], 16)
        second = tensors["second"]
        if facts["form"] == "stationary":
            second = torch.view_as_complex(second)
        return cls(**facts, mean=tensors["mean"], second=second)


def read(path: str | Path, tag: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and tags of a safetensors file that must carry `tag`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, not safetensors, or has no such tag.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tags = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    if tag not in tags:
        raise ValueError(f"{path} holds no {tag}: tags {sorted(tags)}")
    return tensors, tags
