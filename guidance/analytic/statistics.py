r"""Mean and covariance of a data set, and everything Gaussian that follows from them.

With covariance :math:`\Sigma = U \Lambda U^\top`, the Wiener filter for
:math:`y = x_0 + \sigma z` and the exact solution of the probability-flow ODE for
:math:`x_t = \alpha_t x_0 + \sigma_t z`, from level s to level t, are

.. math::
    D(y) &= \mu + \Sigma (\Sigma + \sigma^2)^{-1} (y - \mu) \\
    x_t &= \alpha_t \mu + (\alpha_t^2 \Sigma + \sigma_t^2)^{1/2}
           (\alpha_s^2 \Sigma + \sigma_s^2)^{-1/2} (x_s - \alpha_s \mu).

The latter holds whatever the convention (variance preserving, exploding, flow), also where
:math:`\alpha_s = 0`. Both are spectral functions of :math:`\Sigma`: one operation, `apply`.

References:
    Wang & Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion
    Models and its Applications", TMLR 2024, https://arxiv.org/abs/2412.09726
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic
from .accumulate import Accumulator
from .images import stream

KINDS = ("full", "low_rank", "stationary")
LARGEST_DENSE = 4096  # coordinates: a covariance of 128 MB, about a minute of eigh on one core
LARGEST_FULL = 16384  # coordinates of a covariance that is asked for: 2 GiB
LARGEST_SKETCH = 65536  # coordinates: above, even the leading directions are too many numbers
RANK = 256  # directions of a low-rank covariance when nothing else is asked for
Sigma = float | Tensor


@dataclass(frozen=True, eq=False)
class DatasetStatistics:
    """Mean and covariance of images with n = C H W coordinates.

    Args:
        shape: (C, H, W).
        count: N, the number of images counted.
        mean: mu, float64 (C, H, W).
        kind: "full", "low_rank" (leading directions and an isotropic residual) or "stationary"
            (the covariance commutes with cyclic shifts: one C x C matrix per frequency).
        eigenvalues: Variances (population), float64, descending: (r,); stationary:
            (H, W // 2 + 1, C).
        basis: Orthonormal directions, float64 (n, r); stationary: complex128 (H, W // 2 + 1, C, C).
        residual: Variance of every direction outside the basis.
        identity: What the numbers come from: "pixels" ("[-1, 1]" or "as given"), "data" (a hash of
            the images, whatever their order); "mirrored" if mirror images were added.
    """

    shape: tuple[int, ...]
    count: int
    mean: Tensor
    kind: str
    eigenvalues: Tensor
    basis: Tensor
    residual: float = 0.0
    identity: dict[str, str] = field(default_factory=dict)
    _casts: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, repr=False
    )

    @property
    def dimension(self) -> int:
        """n = C H W."""
        return self.mean.numel()

    @classmethod
    def from_images(
        cls,
        source: Any,
        *,
        kind: str = "auto",
        rank: int | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        chunk: int = 256,
    ) -> DatasetStatistics:
        """Statistics of a folder, tensor, data set or iterator, in one pass.

        Args:
            source: See `images.stream`; value_range and chunk likewise.
            kind: "full", "low_rank", "stationary", or "auto": up to 4096 coordinates full if there
                are more images than coordinates, else low-rank; up to 65536 low-rank; stationary
                beyond.
            rank: Directions of a low-rank covariance; None for min(256, n / 2, N / 2).

        Raises:
            ValueError: what the images or the kind make impossible, see `from_accumulator`.
        """
        blocks = (images for images, _ in stream(source, chunk=chunk, value_range=value_range))
        first = next(blocks)
        total = accumulator(tuple(first.shape[1:]), kind, rank)
        for images in itertools.chain([first], blocks):
            total.add(images)
        pixels = "as given" if value_range is None else "[-1, 1]"
        return cls.from_accumulator(total, kind=kind, rank=rank, pixels=pixels)

    @classmethod
    def from_accumulator(
        cls,
        total: Accumulator,
        *,
        kind: str = "auto",
        rank: int | None = None,
        pixels: str = "[-1, 1]",
    ) -> DatasetStatistics:
        """Statistics of what an accumulator (of one or, merged, of several processes) counted.

        Raises:
            ValueError: fewer than two images, images that are all the same, a full covariance from
                no more images than coordinates, an unknown kind.
        """
        n, count = total.mean.numel(), total.count
        kind = resolve_kind(kind, n, count, total.form)
        if count < 2:
            raise ValueError(f"statistics need at least two images, got {count}")
        if total.total <= 1e-12 * n * count:
            raise ValueError(f"all {count} images are the same: there is nothing to estimate")
        rest = 0.0
        if kind == "stationary":
            values, basis = descending(total.second / count)
        elif total.form == "sketch":
            values, keep = descending(total.second @ total.second.T / count)
            values = values[values > 1e-14 * values[0]]
            basis = total.second.T @ keep[:, : len(values)] / (count * values).sqrt()
        else:
            values, basis = descending(total.second / count)
        if kind == "low_rank":
            # Half of what N images span: the eigenvalues beyond are mostly the noise of the
            # estimate, and their mean is what the isotropic residual stands for.
            rank = max(1, min(RANK, n // 2, count // 2)) if rank is None else rank
            rank = min(rank, len(values), n - 1)
            values, basis = values[:rank], basis[:, :rank]
            rest = max(total.total / count - float(values.sum()), 0.0) / (n - rank)
        return cls(
            shape=total.shape,
            count=count,
            mean=total.mean.view(total.shape),
            kind=kind,
            eigenvalues=values,
            basis=basis if kind == "stationary" else basis.contiguous(),
            residual=rest,
            identity={"pixels": pixels, "data": f"{total.hash:032x}"},
        )

    def apply(self, residual: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(covariance) times a residual: U f(L) U^T r + f(c) (r - U U^T r).

        Args:
            residual: r, with shape (B, C, H, W), real.
            function: f, from eigenvalues (1, K), float64, to factors (1, K) or (B, K).

        Returns:
            Shape (B, C, H, W), in float32 (float64 if r is).
        """
        r = residual if residual.dtype.itemsize >= 4 else residual.float()
        if r.shape[1:] != torch.Size(self.shape):
            raise ValueError(f"statistics of images {self.shape}, got {tuple(r.shape[1:])}")
        values = function(self._cast("eigenvalues", torch.float64, r.device).reshape(1, -1))
        values = values.to(r.device, r.dtype)
        if self.kind == "stationary":
            basis = self._cast("basis", r.dtype.to_complex(), r.device)
            waves = torch.fft.rfft2(r, norm="ortho")
            waves = torch.einsum("hwck,bchw->bhwk", basis.conj(), waves)
            waves = waves * values.view(-1, *self.eigenvalues.shape)
            waves = torch.einsum("hwck,bhwk->bchw", basis, waves)
            return torch.fft.irfft2(waves, s=self.shape[1:], norm="ortho")
        basis, flat = self._cast("basis", r.dtype, r.device), r.flatten(1)
        if self.kind == "full":
            return ((flat @ basis * values) @ basis.T).view_as(r)
        rest = torch.full((1, 1), self.residual, dtype=torch.float64, device=r.device)
        rest = function(rest).to(r.dtype)
        return ((flat @ basis * (values - rest)) @ basis.T + rest * flat).view_as(r)

    def wiener(self, y: Tensor, sigma: Sigma) -> Tensor:
        """Best linear denoiser: y (B, C, H, W) = x0 + sigma z; sigma a number or (B,)."""
        square = _column(sigma, y) ** 2
        # Written so that sigma = 0 with a variance of 0 keeps y, and sigma = inf gives the mean.
        mean = self._mean(y)
        return mean + self.apply(y - mean, lambda v: v / (v + square.clamp(min=1e-300)))

    def teleport(
        self,
        x: Tensor,
        sigma_from: Sigma,
        sigma_to: Sigma,
        alpha_from: float = 1.0,
        alpha_to: float = 1.0,
    ) -> Tensor:
        """Samples moved along the exact probability flow of the Gaussian, see above.

        Args:
            x: Samples at the level they come from, with shape (B, C, H, W).
            sigma_from, sigma_to: Noise coefficients of the two levels, numbers or shape (B,).
            alpha_from, alpha_to: Signal coefficients.

        Returns:
            Shape (B, C, H, W), in float32 (float64 if x is).
        """
        mean, (a, b) = self._mean(x), (_column(sigma, x) ** 2 for sigma in (sigma_from, sigma_to))
        moved = self.apply(
            x - alpha_from * mean,
            lambda v: ((b + alpha_to * alpha_to * v) / (a + alpha_from * alpha_from * v)).sqrt(),
        )
        return alpha_to * mean + moved

    def mirrored(self) -> DatasetStatistics:
        r"""Statistics of the images and their left-right mirror images together.

        With J the mirror: mean :math:`(\mu + J \mu) / 2` and covariance
        :math:`(\Sigma + J \Sigma J) / 2 + d d^\top`, :math:`d = (\mu - J \mu) / 2`.
        """
        mean, values, residual = self.mean.double(), self.eigenvalues.double(), self.residual
        basis = self.basis.to(torch.complex128 if self.basis.is_complex() else torch.float64)
        step = (mean - mean.flip(-1)) / 2
        if self.kind == "stationary":
            # The mirror of a real image: frequencies (h, w) become conjugates of those at (-h, w).
            second = (basis * values[..., None, :]) @ basis.mH
            second = (second + second.flip(0).roll(1, 0).conj()) / 2
            wave = torch.fft.rfft2(step, norm="ortho").permute(1, 2, 0)[..., None]
            values, basis = descending(second + wave @ wave.mH)
        else:
            # Beside the residual, the sum of b b^T over the columns of one matrix.
            beside = basis * ((values - residual).clamp(min=0) / 2).sqrt()
            mirror = beside.view(*self.shape, -1).flip(2).flatten(0, 2)
            columns = torch.cat([beside, mirror, step.view(-1, 1)], 1)
            if self.kind == "full":
                values, basis = descending(columns @ columns.T)
                basis = basis.contiguous()
            else:
                basis, values, _ = torch.linalg.svd(columns, full_matrices=False)
                keep = values > 1e-7 * values[0]
                values, basis = values[keep] ** 2 + residual, basis[:, keep].contiguous()
        return replace(
            self,
            count=2 * self.count,
            mean=mean - step,
            eigenvalues=values,
            basis=basis,
            identity=self.identity | {"mirrored": "yes"},
            _casts={},
        )

    def explained(self, sigma: float) -> float:
        r"""Share of the true score's energy that the Gaussian score explains, at least.

        :math:`\frac1n \sum_k \sigma^2 / (\lambda_k + \sigma^2)`, whatever the distribution behind
        the covariance: the energy of the Gaussian score over the most that any score can have
        (:math:`n / \sigma^2`), since their inner product is the former (Stein's identity).
        The bound is ours; it tends to 1 as sigma grows.
        """
        square = float(sigma) ** 2
        shares = square / (self.eigenvalues + square)
        if self.kind == "stationary":
            return float((shares.sum(-1) * self._multiplicity()).sum() / self.dimension)
        rest = (self.dimension - shares.numel()) * square / (self.residual + square)
        return (float(shares.sum()) + rest) / self.dimension

    def save(self, path: str | Path) -> None:
        """Write everything as safetensors with its identity, whole or not at all."""
        from safetensors.torch import save_file

        tensors, facts = self.parts()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with atomic(path) as partial:
            save_file(tensors, partial, {"statistics": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, identity: dict[str, str] | None = None) -> DatasetStatistics:
        """Read what `save` wrote.

        Args:
            identity: Entries that the file's identity must have ("pixels", "data").

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, holds something else, or has another identity.
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
        if "statistics" not in tags:
            raise ValueError(f"{path} holds no statistics: tags {sorted(tags)}")
        facts = json.loads(tags["statistics"])
        for key, wanted in (identity or {}).items():
            if facts["identity"].get(key) != wanted:
                raise ValueError(
                    f"{path}: {key} is {facts['identity'].get(key)!r}, expected {wanted!r}"
                )
        return cls.from_parts(tensors, facts)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What files hold: real tensors, and what JSON can hold."""
        basis = torch.view_as_real(self.basis) if self.basis.is_complex() else self.basis
        tensors = {"mean": self.mean, "eigenvalues": self.eigenvalues, "basis": basis}
        return tensors, {k: getattr(self, k) for k in ("count", "kind", "residual", "identity")}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> DatasetStatistics:
        """The inverse of `parts`."""
        mean, basis = tensors["mean"], tensors["basis"]
        return cls(
            shape=tuple(mean.shape),
            count=facts["count"],
            mean=mean,
            kind=facts["kind"],
            eigenvalues=tensors["eigenvalues"],
            basis=torch.view_as_complex(basis) if facts["kind"] == "stationary" else basis,
            residual=facts["residual"],
            identity=facts["identity"],
        )

    def _mean(self, like: Tensor) -> Tensor:
        dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
        return self._cast("mean", dtype, like.device)

    def _cast(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, dtype, device)
        if key not in self._casts:
            self._casts[key] = getattr(self, name).to(device, dtype)
        return self._casts[key]

    def _multiplicity(self) -> Tensor:
        """How many of the W columns of the full spectrum each column of the half one stands for."""
        width = self.shape[2]
        columns = torch.arange(width // 2 + 1)
        return torch.where((columns == 0) | (2 * columns == width), 1.0, 2.0).double()


def accumulator(shape: tuple[int, ...], kind: str, rank: int | None) -> Accumulator:
    """The accumulator that `DatasetStatistics.from_accumulator` needs for a kind.

    Raises:
        ValueError: a full covariance of more than `LARGEST_FULL` coordinates.
    """
    n = shape[0] * shape[1] * shape[2]
    if kind == "full" and n > LARGEST_FULL:
        raise ValueError(
            f"a full covariance of images {shape}, {n} coordinates, takes {8 * n**2 / 2**30:.0f} "
            f'GiB (at most {LARGEST_FULL} coordinates): use kind="auto" or smaller images'
        )
    if kind == "stationary" or (kind == "auto" and n > LARGEST_SKETCH):
        return Accumulator(shape, "stationary")
    if kind != "full" and n > LARGEST_DENSE:
        # Twice the directions asked for: what a merge drops hardly touches the leading half.
        return Accumulator(shape, "sketch", 2 * (rank or RANK))
    return Accumulator(shape, "dense")


def resolve_kind(kind: str, n: int, count: int, form: str) -> str:
    """The kind of covariance that "auto" means, or the one asked for if it can be had.

    Raises:
        ValueError: an unknown kind, or one that the images or the accumulator cannot give.
    """
    if kind not in (*KINDS, "auto"):
        raise ValueError(f"unknown kind {kind!r}: expected 'auto' or one of {KINDS}")
    if kind == "auto":
        if form == "stationary":
            return form
        return "full" if form == "dense" and count > n else "low_rank"
    if (kind == "stationary") != (form == "stationary") or (kind == "full" and form == "sketch"):
        raise ValueError(f"an accumulator of form {form!r} cannot give {kind!r} statistics")
    if kind == "full" and count <= n:
        raise ValueError(
            f"a full covariance of {n} coordinates needs more than {n} images, got {count}: "
            'use kind="low_rank" (or "auto")'
        )
    return kind


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of positive Hermitian matrices, the largest first."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def _column(sigma: Sigma, like: Tensor) -> Tensor:
    """Noise levels as float64 (1, 1) or (B, 1) on the device of `like`."""
    return torch.as_tensor(sigma, dtype=torch.float64, device=like.device).reshape(-1, 1)
