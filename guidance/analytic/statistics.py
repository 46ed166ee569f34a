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
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .accumulate import Accumulator
from .images import stream

LARGEST_DENSE = 4096  # coordinates: a covariance of 128 MB, about a minute of eigh on one core
LARGEST_SKETCH = 65536  # coordinates: above, even the leading directions are too many numbers
DIRECTIONS = 4096  # of a covariance that is kept whole: again a minute of eigh
BASIS = 2**30  # bytes of these directions; their making takes about three times as many
RANK = 256  # directions that are kept of a covariance which is too large to be kept whole
Level = tuple[float, float]  # alpha and sigma of x_t = alpha x_0 + sigma z


@dataclass(frozen=True, eq=False)
class DatasetStatistics:
    """Mean and covariance of images with n = C H W coordinates.

    Args:
        shape: (C, H, W).
        count: N, the number of images counted.
        mean: mu, float64 (C, H, W).
        kind: "full", "low_rank" (directions, all that the images span or the leading ones, and an
            isotropic residual) or "stationary" (the covariance commutes with cyclic shifts: one
            C x C matrix per frequency).
        eigenvalues: Variances of the population (over N, not N - 1), float64, descending: (r,);
            stationary: (H, W // 2 + 1, C).
        basis: Orthonormal directions, float64 (n, r); stationary: complex128 (H, W // 2 + 1, C, C).
        residual: Variance of every direction outside the basis.
        identity: What the numbers come from: "pixels" ("[-1, 1]" or "as given"), "data" (a hash of
            the images, whatever their order).
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
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        rank: int | None = None,
    ) -> DatasetStatistics:
        """Statistics of a folder, tensor, data set or iterator, in one pass.

        The covariance is kept whole where it can be: up to 4096 coordinates in any case, beyond
        in the up to N - 1 directions that N images span, as long as these are at most `DIRECTIONS`
        and take at most `BASIS` bytes (N <= 4096 at 64 x 64 pixels in colour, 682 at 256 x 256).
        Of more images the `RANK` leading directions are kept, or above 65536 coordinates the
        stationary part, with a warning.

        Args:
            source: See `images.stream`; value_range likewise.
            value_range: Of float pixels.
            rank: Keep so many leading directions only, and the mean variance of the others in each
                of them; a warning says how much variance that is.

        Raises:
            ValueError: fewer than two images, images that are all the same, a rank that is not
                between 1 and n - 1 or takes more than `BASIS` bytes, or what `images.stream`
                refuses.
        """
        blocks = (images for images, _ in stream(source, value_range=value_range))
        first = next(blocks)
        n = first[0].numel()
        if rank is not None and not (1 <= rank < n and 8 * n * rank <= BASIS):
            most = min(n - 1, BASIS // (8 * n))
            raise ValueError(f"rank must lie between 1 and {most} for n = {n}, got {rank}")
        # Twice the directions in use: what a block drops hardly touches the leading half.
        most, beyond, keep = min(DIRECTIONS, BASIS // (8 * n)), "cut", 2 * (rank or RANK)
        if n <= LARGEST_DENSE:
            most, beyond, keep = n, "dense", 0
        elif n > LARGEST_SKETCH and rank is None:
            beyond, keep = "stationary", 0
        total = Accumulator(tuple(first.shape[1:]), max(most, keep), beyond, keep)
        for images in itertools.chain([first], blocks):
            total.add(images)
        count = total.count
        if count < 2:
            raise ValueError(f"statistics need at least two images, got {count}")
        if total.total <= 1e-12 * n * count:
            raise ValueError(f"all {count} images are the same: there is nothing to estimate")
        if total.form in ("rows", "cut"):
            values, vectors = descending(total.second @ total.second.T / count)
            values = values[values > 1e-12 * values[0]]
            basis = total.second.T @ vectors[:, : len(values)] / (count * values).sqrt()
        else:
            values, basis = descending(total.second / count)
        kind, rest = "full" if total.form == "dense" and count > n else "low_rank", 0.0
        if total.form == "stationary":
            kind = "stationary"
            _warn(
                f"{count} images of {n} coordinates are too many for all directions: the "
                "covariance is taken to be stationary (one matrix per frequency)"
            )
        elif rank is not None or kind == "low_rank":
            kind, whole = "low_rank", min(len(values), count - 1, n)
            wanted = rank or (RANK if total.form == "cut" else whole)
            values, basis = values[: min(wanted, whole)], basis[:, : min(wanted, whole)]
            outside = max(total.total / count - float(values.sum()), 0.0)
            if wanted < whole:
                rest = outside / (n - wanted)
                _warn(
                    f"{count} images of {n} coordinates: the covariance keeps {wanted} "
                    f"directions and spreads the other {outside * count / total.total:.1%} of "
                    "the variance evenly"
                )
        return cls(
            shape=total.shape,
            count=count,
            mean=total.mean.view(total.shape),
            kind=kind,
            eigenvalues=values,
            basis=basis if kind == "stationary" else basis.contiguous(),
            residual=rest,
            identity={
                "pixels": "as given" if value_range is None else "[-1, 1]",
                "data": f"{total.hash:032x}",
            },
        )

    def apply(self, residual: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(covariance) times a residual: U f(L) U^T r + f(c) (r - U U^T r).

        Args:
            residual: r, with shape (B, C, H, W), real.
            function: f, from eigenvalues (1, K), float64, to factors (1, K).

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

    def matrix_rows(self, function: Callable[[Tensor], Tensor], rows: slice) -> Tensor:
        """Rows of the matrix f(covariance), float64 (rows, n), on the CPU; see `apply`."""
        if self.kind != "stationary":
            rest = function(torch.full((1, 1), self.residual, dtype=torch.float64))
            rest = torch.zeros_like(rest) if self.kind == "full" else rest
            values = function(self.eigenvalues.cpu().reshape(1, -1)) - rest
            basis = self.basis.cpu()
            found = (basis[rows] * values) @ basis.T
            found.diagonal(rows.start).add_(rest.squeeze())
            return found
        unit = torch.zeros(rows.stop - rows.start, self.dimension, dtype=torch.float64)
        unit.diagonal(rows.start).fill_(1)
        return self.apply(unit.view(-1, *self.shape), function).flatten(1)

    def matrix_diagonal(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The diagonal (n,) of the matrix f(covariance), float64, on the CPU; see `apply`."""
        if self.kind != "stationary":
            rest = function(torch.full((1, 1), self.residual, dtype=torch.float64)).squeeze()
            rest = torch.zeros_like(rest) if self.kind == "full" else rest
            values = function(self.eigenvalues.cpu().reshape(1, -1))[0] - rest
            return self.basis.cpu().square() @ values + rest
        channels, height, width = self.shape  # the same at every place
        unit = torch.zeros(channels, *self.shape, dtype=torch.float64)
        unit[:, :, 0, 0] = torch.eye(channels)
        found = self.apply(unit, function)[:, :, 0, 0].diagonal()
        return found.repeat_interleave(height * width)

    def wiener(self, y: Tensor, sigma: float) -> Tensor:
        """Best linear denoiser of y = x0 + sigma z, with shape (B, C, H, W)."""
        # Written so that no noise and no variance are not 0 / 0, and infinite noise gives the mean.
        mean, square = self._mean(y), max(sigma * sigma, 1e-300)
        return mean + self.apply(y - mean, lambda v: v / (v + square))

    def teleport(self, x: Tensor, source: Level, target: Level) -> Tensor:
        """Samples moved along the exact probability flow of the Gaussian, see above.

        Args:
            x: Samples at the level they come from, with shape (B, C, H, W).
            source: (alpha, sigma) of that level.
            target: (alpha, sigma) of the level they are moved to.

        Returns:
            Shape and dtype of x.
        """
        (alpha, sigma), (alpha_to, sigma_to), mean = source, target, self._mean(x)
        moved = self.apply(
            x - alpha * mean,
            lambda v: ((sigma_to**2 + alpha_to**2 * v) / (sigma**2 + alpha**2 * v)).sqrt(),
        )
        return (alpha_to * mean + moved).to(x.dtype)

    def explained(self, sigma: float) -> float:
        r"""Share of the true score's energy that the Gaussian score explains, at least.

        :math:`\frac1n \sum_k \sigma^2 / (\lambda_k + \sigma^2)`, whatever the distribution behind
        the covariance: the energy of the Gaussian score over the most that any score can have
        (:math:`n / \sigma^2`), since their inner product is the former (Stein's identity).
        The bound is ours; it tends to 1 as sigma grows. Where no more images than coordinates were
        seen, the trailing half of the eigenvalues is mostly the noise of the estimate, and the
        variance of directions that no image spans is unknown, not 0: the former is spread over
        them all.
        """
        square = float(sigma) ** 2
        values, residual = self.eigenvalues, self.residual
        if self.kind == "low_rank" and residual == 0:
            values = values[: max(1, min(RANK, len(values) // 2))]
            outside = float(self.eigenvalues.sum() - values.sum())
            residual = outside / max(1, self.dimension - len(values))
        shares = square / (values + square)
        if self.kind == "stationary":
            # Most columns of the half spectrum stand for two of the full one.
            columns = torch.arange(shares.shape[1])
            twice = (columns > 0) & (2 * columns < self.shape[2])
            return float((shares.sum(-1) * (1 + twice.double())).sum() / self.dimension)
        rest = (self.dimension - shares.numel()) * square / (residual + square)
        return (float(shares.sum()) + rest) / self.dimension

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


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of positive Hermitian matrices, the largest first."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)
