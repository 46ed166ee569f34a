r"""The local analytic denoiser: each coordinate is compared where the data are correlated with it.

With the Wiener matrix W at noise level sigma and R = W with each row divided by its diagonal entry,

.. math::
    M = 1\{|R| \ge \tau \max |R|\}, \qquad
    D_m(y) = \sum_i \mathrm{softmax}_i\Big(-\frac{\sum_j M_{mj} (y_j - x_{ij})^2}{2\sigma^2}\Big)
    x_i[m]

That is the paper's formula. Its code uses the mask the other way round: output m is compared where
column m of R is large, :math:`M_{mj} = 1\{|W_{jm} / W_{jj}| \ge \tau \max |R|\}`, with a
covariance over N - 1 instead of N. Both are here, by name: ``mask="rows"``, ``mask="columns"``.

References:
    Lukoianov, Yuan, Solomon & Sitzmann, "Locality in Image Diffusion Models Emerges from Data
    Statistics", NeurIPS 2025, https://arxiv.org/abs/2509.09672
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import floats, fused, integer
from .denoisers import Denoiser
from .posterior import Result, Rows, Source, posterior

# Published thresholds by data set.
TAU = {
    "cifar10": 0.05,
    "celeba_hq": 0.02,
    "afhq": 0.02,
    "mnist": 0.005,
    "fashion_mnist": 0.005,
}
# Bytes of the n x n weights at one noise level. With copies made on the way, four times as many are
# needed; beyond, a picture takes hours on a CPU.
LARGEST = 2**30
KEPT = 2**27  # bytes of masks kept from one call to the next, as bool and as float32
STEP = 512  # rows of the Wiener matrix made at once


def row_blocks(n: int) -> list[slice]:
    """Slices that cover n rows."""
    return [slice(start, min(start + STEP, n)) for start in range(0, n, STEP)]


class LocalDenoiser(Denoiser):
    """The local analytic denoiser.

    Args:
        images: See `Denoiser`; further arguments likewise.
        tau: Threshold of the mask, >= 0, or the name of a data set in `TAU`. 0 compares whole
            images; an infinite noise level gives the mean of the candidates.
        mask: "rows", the paper's formula, or "columns", what its code computes; see above.
        minibatch: None normalizes over all candidates; a number within blocks of so many, whose
            results are averaged, as the published code does with 256 or 512 (it depends on the
            order of images).
        accelerator: "auto" takes a kernel made for uint8 images and float32 queries, exactly
            normalized, where one runs: on CUDA a Triton kernel (`fused`), on CPUs with AMX, given
            a C compiler, products of the stored bytes (`integer`), which keeps a second copy of
            the images and moves the query by up to 1e-4 sigma, on other CPUs, given one, sums
            that masks share (`floats`), likewise with a second copy. "float32": the latter even
            with AMX or CUDA. "none": `posterior` everywhere.

    Raises:
        ValueError: see `Denoiser`; an unknown or a wrong option, "float32" where it cannot run.
    """

    uses_statistics = True
    SIDE = 64
    weight_bytes = 1  # of what `weights` gives

    def __init__(
        self,
        images: Any,
        labels: Tensor | None = None,
        *,
        tau: float | str = 0.02,
        mask: str = "rows",
        minibatch: int | None = None,
        accelerator: str = "auto",
        **rest: Any,
    ) -> None:
        super().__init__(images, labels, **rest)
        if isinstance(tau, str) and tau not in TAU:
            raise ValueError(f"no published tau for {tau!r}: known are {sorted(TAU)}")
        self.tau = TAU[tau] if isinstance(tau, str) else float(tau)
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must lie in [0, 1], got {self.tau}")
        if mask not in ("rows", "columns"):
            raise ValueError(f"mask is 'rows' or 'columns', got {mask!r}")
        self.mask = mask
        if minibatch is not None and minibatch < 1:
            raise ValueError(f"minibatch must be >= 1, got {minibatch}")
        self.minibatch = minibatch
        if accelerator not in ("auto", "float32", "none"):
            raise ValueError(f"accelerator is 'auto', 'float32' or 'none', got {accelerator!r}")
        if accelerator == "float32" and floats.missing():
            raise ValueError(f"accelerator='float32' cannot run here: {floats.missing()}")
        self.accelerator = accelerator
        self._kept: dict[float, Rows] = {}
        self._packed: dict[str, Tensor] = {}
        self._plans: dict[float, floats.Plan] = {}

    @classmethod
    def accept(cls, shape: tuple[int, ...]) -> None:
        """Refuse images (C, H, W) whose weights would take more than `LARGEST` bytes."""
        n, most = math.prod(shape), math.isqrt(LARGEST // cls.weight_bytes)
        if n > most:
            side = math.isqrt(most // shape[0])
            raise ValueError(
                f"{shape[1]} x {shape[2]} pixels of {shape[0]} channels are n = {n} coordinates, "
                f"and their n x n weights take {n**2 * cls.weight_bytes / 2**30:,.2f} GiB (at most "
                f"{LARGEST / 2**30:g}): make the pictures smaller ({side} x {side} pixels) or take "
                "another method (wiener, pspc, optimal)"
            )

    def weights(self, sigma: float) -> Tensor:
        """M, bool (n, n); the maximum is over the whole of |R|."""
        blocks = row_blocks(self.statistics.dimension)
        if len(blocks) <= 8:  # few enough to hold all of R instead of making it twice
            r = torch.cat([self.sensitivity(sigma, rows) for rows in blocks])
            return r >= self.tau * r.max()
        least = self.tau * max(float(self.sensitivity(sigma, rows).max()) for rows in blocks)
        return torch.cat([self.sensitivity(sigma, rows) >= least for rows in blocks])

    def sensitivity(self, sigma: float, rows: slice) -> Tensor:
        """What the outputs `rows` are compared on: the Wiener matrix over its diagonal.

        The diagonal of an output's own row, or with mask="columns" of the coordinate compared;
        entries below 1e-6 count as 1. Float64, shape (rows, n); zeros at sigma = infinity.
        """
        # The Wiener matrix is symmetric: column m of it is row m.
        count, columns = self.statistics.count, self.mask == "columns"
        stretch = count / (count - 1) if columns else 1.0

        def factor(v: Tensor) -> Tensor:
            return stretch * v / (stretch * v + sigma**2)

        w = self.statistics.matrix_rows(factor, rows)
        diagonal = self.statistics.matrix_diagonal(factor) if columns else w.diagonal(rows.start)
        diagonal = diagonal.where(diagonal.abs() >= 1e-6, 1)
        return w.div_(diagonal if columns else diagonal[:, None]).abs_()

    def precision(self, sigma: float) -> Rows:
        """The weights at a noise level, kept for the last few levels."""
        if sigma not in self._kept:
            most = max(2, KEPT // (5 * self.statistics.dimension**2))
            while len(self._kept) >= most:
                self._kept.pop(next(iter(self._kept)))
            self._kept[sigma] = Rows(self.weights(sigma).to(self.images.device))
        return self._kept[sigma]

    def _denoise(self, y: Tensor, sigma: float, source: Source, info: bool) -> Result:
        rows = self.precision(sigma)
        if self.minibatch is None and not info and sigma < math.inf:
            mean = self._accelerated(y, sigma, source, rows.weights)
            if mean is not None:
                return mean, None
        return posterior(y, sigma, source, rows, minibatch=self.minibatch, info=info)

    def _accelerated(self, y: Tensor, sigma: float, source: Source, mask: Tensor) -> Tensor | None:
        """The mean from a kernel made for this case; None where there is none."""
        if self.accelerator == "none":
            return None
        if self.accelerator == "auto" and fused.available(y, source.images, mask):
            return fused.masked_posterior(y, sigma, source.images, mask)
        candidates = (source.first, source.first + len(source.images))
        if self.accelerator == "auto" and integer.available(y, source.images, mask):
            if "integer" not in self._packed:
                self._packed["integer"] = integer.pack(self.images)
            return integer.masked_posterior(y, sigma, self._packed["integer"], mask, candidates)
        if not (floats.available(y, source.images, mask) and bool(y.isfinite().all())):
            return None
        if "floats" not in self._packed:
            self._packed["floats"] = floats.pack(self.images)
        if sigma not in self._plans:
            self._plans = {s: kept for s, kept in self._plans.items() if s in self._kept}
            self._plans[sigma] = floats.plan(mask, subtract=sigma >= floats.SUBTRACT)
        return floats.masked_posterior(
            y, sigma, self._packed["floats"], self._plans[sigma], candidates
        )


class SoftLocalDenoiser(LocalDenoiser):
    """A soft version (ours): weights :math:`|R| / \\max_j |R_{mj}|` instead of a mask.

    Args:
        images: See `LocalDenoiser`; further arguments likewise.
        tau: Weights below it count as 0.
    """

    weight_bytes = 4

    def __init__(
        self, images: Any, labels: Tensor | None = None, *, tau: float = 0.0, **rest: Any
    ) -> None:
        super().__init__(images, labels, tau=tau, **rest)

    def weights(self, sigma: float) -> Tensor:
        """What each coordinate is compared on, float32 (n, n)."""
        parts = []
        for rows in row_blocks(self.statistics.dimension):
            size = self.sensitivity(sigma, rows)
            size = size / size.amax(1, keepdim=True).clamp(min=1e-300)
            parts.append(size.where(size >= self.tau, 0).float())
        return torch.cat(parts)
