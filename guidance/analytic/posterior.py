r"""The posterior mean under a data set.

.. math::
    D_m(y) = \sum_i \mathrm{softmax}_i\Big(-\frac{1}{2\sigma^2}
    \sum_j P_{mj} (y_j - x_{ij})^2\Big) \, x_i[m]

Every analytic denoiser is a choice of weights P (which coordinates an output is compared on, and
how much each counts) and of candidates: the images in `posterior`, pieces of them in `compare`.
Candidates lie in the last, contiguous dimension everywhere: (C, H, W, c).

References:
    Lukoianov, Yuan, Solomon & Sitzmann, "Locality in Image Diffusion Models Emerges from Data
    Statistics", https://arxiv.org/abs/2509.09672; Kamb & Ganguli, "An analytic theory of creativity
    in convolutional diffusion models", https://arxiv.org/abs/2412.20292
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .images import decode
from .softmax import Info, Softmax

WORK = 3 * 2**21  # bytes of intermediates at once on a CPU: small blocks stay in the cache
WORK_CUDA = 2**30
# Density of a mask below which a sparse product is faster than a dense one (measured).
SPARSE = 0.15
ROWS = 1024  # rows of a mask that are multiplied at once
Result = tuple[Tensor, Info | None]


@dataclass(frozen=True, eq=False)
class Source:
    """Stored images (N, C, H, W) as candidates.

    Args:
        images: uint8 (meaning [-1, 1]) or floats; never decoded as a whole.
        first: Number of the first image, for attribution.
    """

    images: Tensor
    first: int = 0

    def blocks(self, like: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks (C, H, W, c), c <= size, and the numbers (c,) of their images.

        In the dtype and on the device of `like`, noisy images (B, C, H, W); without a size as
        large as `WORK` allows.
        """
        size = block_size(like) if size is None else max(1, size)
        for start in range(0, len(self.images), size):
            stored = self.images[start : start + size].to(like.device)
            x = decode(stored.permute(1, 2, 3, 0).contiguous(), like.dtype)
            yield x, torch.arange(start, start + len(stored), device=like.device) + self.first

    @property
    def units(self) -> tuple[float, float]:
        """Factor and summand that take decoded numbers to those of `rows`."""
        return (127.5, -0.5) if self.images.dtype == torch.uint8 else (1.0, 0.0)

    def rows(self, like: Tensor, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks (c, n), an image a row, and their numbers; of all images or of those chosen.

        Bytes are less 128, which takes one pass over them where decoding takes three.
        """
        count = len(self.images) if chosen is None else len(chosen)
        size = block_size(like)
        for start in range(0, count, size):
            stop = min(start + size, count)
            if chosen is None:
                stored, index = self.images[start:stop], torch.arange(start, stop)
            else:
                index = chosen[start:stop]
                stored = self.images.index_select(0, index)
            stored = stored.to(like.device)
            if stored.dtype == torch.uint8:
                stored = (stored ^ 128).view(torch.int8)
            yield stored.flatten(1).to(like.dtype), index.to(like.device) + self.first

    @functools.cached_property
    def half(self) -> Tensor:
        """Half of the squared sizes of all `rows`, float64 (N,)."""
        like = torch.empty(1, *self.images.shape[1:], device=self.images.device).double()
        return torch.cat([x.square().sum(1) for x, _ in self.rows(like)]) / 2

    @functools.cached_property
    def largest(self) -> float:
        """Largest size of a coordinate."""
        return float(decode(torch.stack(self.images.aminmax())).abs().max())


def compare(
    queries: Tensor,
    blocks: Iterable[tuple[Tensor, Tensor, Tensor]],
    sigma: float,
    *,
    largest: float,
    responses: int,
    logits: int,
    info: bool,
    half: Tensor | None = None,
) -> Softmax:
    """Means for queries whose coordinates all count the same.

    Distances are a matrix product, x^2 - 2 <y, x>, where its rounding stays below 1e-3 in the
    result, which is a logarithm of a probability, and else come from differences. The two differ
    by y^2, so that all blocks of candidates must take the same one.

    Args:
        queries: y, with shape (q, d).
        blocks: Candidates x (d, c), their values (c, responses), the numbers (c,) of their images.
        sigma: Noise level, > 0.
        largest: Largest size of a candidate's coordinate.
        responses: Numbers in a value.
        logits: How many may be held at once.
        info: Whether the result knows its candidates.
        half: Half of the squared sizes of all candidates, if known, (N,).
    """
    done = 0
    state = Softmax(queries.new_zeros(len(queries), responses), info=info)
    reach = queries.shape[1] ** 0.5 * largest
    squares = reach * max(reach, float(queries.norm(dim=1).max()))
    as_product = torch.finfo(queries.dtype).eps * squares < 1e-3 * sigma**2
    for x, values, index in blocks:
        step = max(1, logits // x.shape[1])
        if not as_product:
            known = None
        elif half is None:
            known = x.square().sum(0) / 2
        else:
            known = half[done : done + x.shape[1]].to(x)
        done += x.shape[1]
        for start in range(0, len(queries), step):
            rows = slice(start, min(start + step, len(queries)))
            y = queries[rows]
            if known is not None:
                found = torch.addmm(known, y, x, alpha=-1).div_(sigma**2)
            else:
                found = torch.stack([(one[:, None] - x).square_().sum(0) for one in y])
                found.div_(2 * sigma**2)
            state.update(rows, found, values, index)
    return state


@dataclass(frozen=True, eq=False)
class Rows:
    """A row of weights for every coordinate.

    Args:
        weights: (n, n), at least 0, bool or float; row m says what coordinate m is compared on.
    """

    weights: Tensor
    _casts: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def distances(self, y: Tensor, x: Tensor, sigma: float) -> Iterator[tuple[slice, Tensor]]:
        """Groups g of outputs of one noisy image and their squared distances over 2 sigma^2.

        Differences first, so that nothing cancels.

        Args:
            y: A noisy image, with shape (C, H, W).
            x: Candidates, with shape (C, H, W, c).
            sigma: Noise level, > 0.

        Yields:
            A slice of the groups (here coordinates), and their distances, (g, c).
        """
        scale = (1 / (2 * sigma**2)) ** 0.5
        squares = (y.flatten()[:, None] - x.flatten(0, 2)).mul_(scale).square_()
        if self._sparse:
            yield slice(0, len(squares)), self._cast(x.dtype) @ squares
            return
        large = len(squares) > 4 * ROWS  # too large to be kept once more as floats
        for start in range(0, len(squares), ROWS):
            rows = slice(start, min(start + ROWS, len(squares)))
            weights = self.weights[rows].to(x.dtype) if large else self._cast(x.dtype)[rows]
            yield rows, weights @ squares

    @functools.cached_property
    def _sparse(self) -> bool:
        density = int(self.weights.count_nonzero()) / self.weights.numel()
        return density < SPARSE and not self.weights.is_cuda

    def _cast(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._casts:
            cast = self.weights.to(dtype)
            if self._sparse:
                with warnings.catch_warnings():  # "beta state": the product is held by our tests
                    warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
                    cast = cast.to_sparse_csr()
            self._casts[dtype] = cast
        return self._casts[dtype]


@dataclass(frozen=True)
class Box:
    """A k x k window around every pixel, over all channels, cut at the border."""

    k: int

    def distances(self, y: Tensor, x: Tensor, sigma: float) -> Iterator[tuple[slice, Tensor]]:
        """See `Rows.distances`; the groups are pixels."""
        down, right = (band(length, self.k, x) for length in y.shape[1:])
        yield slice(0, len(down) * len(right)), window_distances(y, x, sigma, down, right)


def band(length: int, k: int, like: Tensor) -> Tensor:
    """Band matrix (length, length): ones within (k - 1) / 2 of the diagonal."""
    places = torch.arange(length, device=like.device)
    return ((places[:, None] - places).abs() <= k // 2).to(like.dtype)


def window_distances(y: Tensor, x: Tensor, sigma: float, down: Tensor, right: Tensor) -> Tensor:
    """Squared distances over 2 sigma^2 of all windows, with shape (windows, c).

    Products with 0/1 matrices, which say what places each window covers along an axis: sums of
    positive numbers only, where differences of an integral image would cancel at low noise.

    Args:
        y: A noisy image, with shape (C, H, W).
        x: Candidates, with shape (C, H, W, c).
        sigma: Noise level, > 0.
        down: (windows along the first axis, H).
        right: (windows along the second axis, W).
    """
    squares = (y[..., None] - x).square_().sum(0).div_(2 * sigma**2)
    found = torch.matmul(right, squares)
    return (down @ found.flatten(1)).view(len(down) * len(right), -1)


def posterior(
    y: Tensor,
    sigma: float,
    source: Source,
    weights: Rows | Box,
    *,
    minibatch: int | None = None,
    info: bool = False,
) -> Result:
    """Posterior mean of noisy images.

    Args:
        y: Noisy images x0 + sigma z, with shape (B, C, H, W), float32 or float64.
        sigma: Noise level, > 0; infinity gives the mean of the candidates.
        source: The candidates.
        weights: What coordinates (`Rows`) or pixels (`Box`) are compared on.
        minibatch: None normalizes over all candidates; a number normalizes within consecutive
            blocks of so many and averages the blocks.
        info: Whether to return `Info` as well.

    Returns:
        The mean, with shape and dtype of y, and Info or None.
    """
    shape, channels = y.shape[1:], y.shape[1] if isinstance(weights, Box) else 1
    zeros = y.new_zeros(shape.numel() // channels, channels)
    states = [Softmax(zeros.clone(), minibatch=minibatch is not None, info=info) for _ in y]
    for x, index in source.blocks(y, minibatch):
        values = x.reshape(channels, -1, x.shape[-1])
        for query, state in zip(y, states, strict=True):
            for rows, found in weights.distances(query, x, sigma):
                state.update(rows, found, values[:, rows], index)
    mean = torch.stack([state.mean().T.reshape(shape) for state in states])
    if not info:
        return mean, None
    # One number per group becomes one per coordinate.
    one = (len(y), shape[0] // channels, *shape[1:])
    n_eff, top = map(torch.stack, zip(*(state.info() for state in states), strict=True))
    return mean, Info(n_eff.view(one).expand_as(y), top.view(one).expand_as(y))


def block_size(y: Tensor) -> int:
    """Candidates in a block, for about eight intermediates of the size of the candidates."""
    work = WORK_CUDA if y.is_cuda else WORK
    return max(128, work // (8 * y.element_size() * y[0].numel()))
