r"""The posterior mean under a data set, on three axes.

.. math::
    D_m(y) = \sum_i \mathrm{softmax}_i\Big(-\frac{1}{2\sigma^2}
    \sum_j P_{mj} (y_j - x_{ij})^2\Big) \, x_i[m]

Every analytic denoiser is a choice of *precision* (which coordinates a group of outputs is compared
on, and how much each counts), of *response* (which outputs the group writes) and of *source* (which
candidates: the images, their mirror images; `translates.py` has all places). `posterior` is the
loop over candidates. Candidates lie in the last, contiguous dimension everywhere: (C, H, W, c).

References:
    Lukoianov, Yuan, Solomon & Sitzmann, "Locality in Image Diffusion Models Emerges from Data
    Statistics", https://arxiv.org/abs/2509.09672; Kamb & Ganguli, "An analytic theory of creativity
    in convolutional diffusion models", https://arxiv.org/abs/2412.20292
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .images import decode
from .softmax import Info, Softmax

WORK = 3 * 2**21  # bytes of intermediates at once on a CPU: small blocks stay in the cache
WORK_CUDA = 2**30
SPARSE = (
    0.15  # density of a mask below which a sparse product is faster than a dense one (measured)
)
ROWS = 1024  # rows of a mask that are multiplied at once
HALF = 2.0**15  # what the largest square becomes in float16


@dataclass(frozen=True)
class Source:
    """Candidates at the same place: stored images (N, C, H, W), with their mirror images or not.

    Args:
        images: uint8 (meaning [-1, 1]) or floats; never decoded as a whole.
        first: Number of the first image, for attribution.
        flips: Whether left-right mirror images are candidates too.
    """

    images: Tensor
    first: int = 0
    flips: bool = False

    def blocks(self, size: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks (C, H, W, c), c <= size, and the numbers (c,) of their images.

        In the dtype and on the device of `like`.
        """
        size = max(1, size // 2) if self.flips else size
        for start in range(0, len(self.images), size):
            stored = self.images[start : start + size].to(like.device)
            x = decode(stored.permute(1, 2, 3, 0).contiguous(), like.dtype)
            index = torch.arange(start, start + x.shape[-1], device=like.device) + self.first
            if self.flips:
                x, index = torch.cat([x, x.flip(2)], -1), index.repeat(2)
            yield x, index

    def reach(self, d: int) -> float:
        """At least the norm of any d coordinates of a candidate."""
        norm, largest = self._sizes
        return min(norm, d**0.5 * largest)

    @functools.cached_property
    def _sizes(self) -> tuple[float, float]:
        """Largest norm of an image and largest size of a coordinate."""
        norm = largest = 0.0
        for part in self.images.split(64):
            flat = decode(part).flatten(1)
            norm = max(norm, float(flat.norm(dim=1).max()))
            largest = max(largest, float(flat.abs().max()))
        return norm, largest


@dataclass(frozen=True)
class Whole:
    """All coordinates count the same, for one group per noisy image, which writes all of it."""


def by_product(y: Tensor, source: Source, sigma: float) -> bool:
    """Whether `whole_distances` of y (q, n) may be a matrix product.

    It may where the rounding of x^2 - 2 <y, x> stays below 1e-3 in the result, which is a logarithm
    of a probability, for every candidate of the source: the two forms differ by y^2, so that all
    blocks of candidates must take the same one.
    """
    reach = source.reach(y.shape[1])
    largest = reach * max(reach, float(y.norm(dim=1).max()))
    return torch.finfo(y.dtype).eps * largest < 1e-3 * sigma**2


def whole_distances(y: Tensor, x: Tensor, sigma: float, product: bool) -> Tensor:
    """Squared distances over 2 sigma^2 of y (q, n) to x (n, c), up to a constant per query.

    As a matrix product, x^2 - 2 <y, x>, or from differences; see `by_product`.

    Returns:
        Shape (q, c).
    """
    if product:
        return torch.addmm(x.square().sum(0)[None] / 2, y, x, alpha=-1).div_(sigma**2)
    return torch.stack([(row[:, None] - x).square_().sum(0) for row in y]).div_(2 * sigma**2)


@dataclass(frozen=True, eq=False)
class Rows:
    """A row of weights for every coordinate; its group writes that coordinate.

    Args:
        weights: (n, n), at least 0, bool or float; row m says what coordinate m is compared on.
        compute: Precision of the factors of the matrix product: None for float16 with a mask on
            CUDA and that of the query elsewhere. Below float32 the squares are the sum of two such
            numbers (twice the digits), and the product is float32.
    """

    weights: Tensor
    compute: torch.dtype | None = None
    _cast: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def distances(self, y: Tensor, x: Tensor, sigma: float) -> Iterator[tuple[slice, Tensor]]:
        """Groups g of one noisy image and their squared distances over 2 sigma^2.

        Differences first, so that nothing cancels.

        Args:
            y: A noisy image, with shape (C, H, W).
            x: Candidates, with shape (C, H, W, c).
            sigma: Noise level, > 0.

        Yields:
            A slice of the groups, and their distances, (g, c).
        """
        scale = (1 / (2 * sigma**2)) ** 0.5
        squares = (y.flatten()[:, None] - x.flatten(0, 2)).mul_(scale).square_()
        if self._density < SPARSE and not x.is_cuda and self.compute is None:
            yield slice(0, len(squares)), self._csr(x.dtype) @ squares
            return
        exact = self.weights.dtype == torch.bool  # in float16
        kind = self.compute or (torch.float16 if x.is_cuda and exact else x.dtype)
        for start in range(0, len(squares), ROWS):
            rows = slice(start, min(start + ROWS, len(squares)))
            yield rows, product(self._dense(rows, kind), squares).to(x.dtype)

    @functools.cached_property
    def _density(self) -> float:
        return int(self.weights.count_nonzero()) / self.weights.numel()

    def _csr(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._cast:
            with warnings.catch_warnings():  # "beta state": the product is held by our tests
                warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
                self._cast[dtype] = self.weights.to(dtype).to_sparse_csr()
        return self._cast[dtype]

    def _dense(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if len(self.weights) > 4 * ROWS:  # too large to be kept once more as floats
            return self.weights[rows].to(dtype)
        if dtype not in self._cast:
            self._cast[dtype] = self.weights.to(dtype)
        return self._cast[dtype][rows]


def product(weights: Tensor, squares: Tensor) -> Tensor:
    """Matrix product in float32 at least; weights of less meet squares in two parts of the same."""
    kind = weights.dtype
    if kind.itemsize >= 4:
        return weights @ squares.to(kind)
    unit = squares.amax().clamp(min=1e-30) / HALF  # so that float16 holds all of them
    squares = squares / unit
    high = squares.to(kind)
    low = (squares - high).to(kind)
    return (_wide(weights, high) + _wide(weights, low)) * unit


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """Product of factors of less than float32, summed and returned in float32."""
    if a.is_cuda and torch.__version__ >= "2.8":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@dataclass(frozen=True)
class Box:
    """A k x k window around every pixel, over all channels, cut at the border.

    Its group writes the pixel. Window sums are two products with 0/1 band matrices: sums of
    positive numbers only, where differences of an integral image would cancel at low noise.
    """

    k: int

    def distances(self, y: Tensor, x: Tensor, sigma: float) -> Iterator[tuple[slice, Tensor]]:
        """See `Rows.distances`; the groups are pixels."""
        squares = (y[..., None] - x).square_().sum(0).div_(2 * sigma**2)
        h, w, _ = squares.shape
        found = torch.matmul(band(w, self.k, x), squares)
        yield slice(0, h * w), (band(h, self.k, x) @ found.view(h, -1)).view(h * w, -1)


Precision = Whole | Rows | Box


def band(length: int, k: int, like: Tensor) -> Tensor:
    """Band matrix (length, length): ones within (k - 1) / 2 of the diagonal."""
    places = torch.arange(length, device=like.device)
    return ((places[:, None] - places).abs() <= k // 2).to(like.dtype)


def posterior(
    y: Tensor,
    sigma: float,
    source: Source,
    precision: Precision,
    *,
    minibatch: int | None = None,
    chunk: int | None = None,
    info: bool = False,
) -> tuple[Tensor, Info | None]:
    """Posterior mean of noisy images.

    Args:
        y: Noisy images x0 + sigma z, with shape (B, C, H, W), float32 or float64.
        sigma: Noise level, > 0; infinity gives the mean of the candidates.
        source: The candidates.
        precision: What groups of outputs are compared on, and with it what they write.
        minibatch: None normalizes over all candidates; a number normalizes within consecutive
            blocks of so many and averages the blocks.
        chunk: Candidates in a block when normalizing over all; None for what `WORK` allows. It
            changes nothing but rounding, speed and memory.
        info: Whether to return `Info` as well.

    Returns:
        The mean, with shape and dtype of y, and Info or None.
    """
    shape = y.shape[1:]
    state = functools.partial(Softmax, minibatch=minibatch is not None, info=info)
    blocks = source.blocks(minibatch or chunk or block_size(y), y)
    one: tuple[int, ...]  # shape of one number per group
    if isinstance(precision, Whole):
        flat, one = y.flatten(1), (len(y), 1, 1, 1)
        states = [state(y.new_zeros(flat.shape))]
        as_product = by_product(flat, source, sigma)
        for x, index in blocks:
            candidates = x.flatten(0, 2)
            found = whole_distances(flat, candidates, sigma, as_product)
            states[0].update(slice(0, len(y)), found, candidates.T, index)
        mean = states[0].mean().view_as(y)
    else:
        channels = shape[0] if isinstance(precision, Box) else 1  # that a group writes
        one = (len(y), shape[0] // channels, *shape[1:])
        states = [state(y.new_zeros(shape.numel() // channels, channels)) for _ in y]
        for x, index in blocks:
            values = x.reshape(channels, -1, x.shape[-1])
            for query, own in zip(y, states, strict=True):
                for rows, found in precision.distances(query, x, sigma):
                    own.update(rows, found, values[:, rows], index)
        mean = torch.stack([own.mean().T.reshape(shape) for own in states])
    if not info:
        return mean, None
    # One number per group becomes one per coordinate.
    n_eff, top = map(torch.cat, zip(*(own.info() for own in states), strict=True))
    return mean, Info(n_eff.view(one).expand_as(y), top.view(one).expand_as(y))


def block_size(y: Tensor) -> int:
    """Candidates in a block, for about eight intermediates of the size of the candidates."""
    work = WORK_CUDA if y.is_cuda else WORK
    return max(128, work // (8 * y.element_size() * y[0].numel()))
