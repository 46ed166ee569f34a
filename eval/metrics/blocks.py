r"""Dot products and distances of all pairs of features: float32 blocks, where it matters float64.

Of N and M features a block holds `BLOCK` pairs: 16 MB in float32. Beside the features and a float32
copy of them nothing larger than a few blocks is ever kept, on whatever device the features lie.

Features are first moved by the mean of both sets and scaled by a power of two, in float64. What
float32 then rounds is small beside the differences that are asked for, and its size is known:

.. math:: |fl(d_{ij}^2) - d_{ij}^2| \le
    \left(\frac{D}{1 - D u} + 32\right) u\, (|a_i|^2 + |b_j|^2), \qquad u = 2^{-24}

for any order of summation (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.1; 32
covers the roundings besides the dot product's). A comparison that this leaves open is made again
in float64 with exact differences, so that nearest neighbours and counts are those of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import finite_features

BLOCK = 2**22  # pairs at once
UNIT = 2.0**-24  # relative rounding error of float32
TINY = 1e-37  # a product of scaled features may be lost below it


def on_device(features: Tensor, device: str | torch.device) -> Tensor:
    """Features on a device that has float64; Apple's has none, there they stay where they are."""
    return features if torch.device(device).type == "mps" else features.to(device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever the program allows elsewhere (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, eq=False)
class Rows:
    """Features of one set, ready for products with those of sets prepared together.

    Args:
        given: The features, with shape (N, D).
        small: (given - centre) * scale in float32, with shape (N, D).
        squares: Squared lengths of (given - centre) * scale in float64, with shape (N,).
        shares: Dot products of (given - centre) and centre in float64, with shape (N,).
        centre_square: Squared length of the centre.
        scale: A power of two.
    """

    given: Tensor
    small: Tensor
    squares: Tensor
    shares: Tensor
    centre_square: float
    scale: float

    def __len__(self) -> int:
        """N."""
        return len(self.given)

    @property
    def dimension(self) -> int:
        """D."""
        return self.given.shape[1]

    @property
    def slack(self) -> Tensor:
        """Its part of the error of a squared distance, in float64, with shape (N,)."""
        share = (self.dimension / (1 - self.dimension * UNIT) + 32) * UNIT
        return self.squares * share + self.dimension * TINY


def prepared(*sets: Tensor, least: int = 1) -> list[Rows]:
    """Sets of features, ready for products with each other, on the device of the first.

    Raises:
        ValueError: as `finite_features`, or sets of different dimensions.
    """
    found = [finite_features(features, least) for features in sets]
    for other in found[1:]:
        if other.shape[1] != found[0].shape[1]:
            raise ValueError(
                f"features of different dimensions: {found[0].shape[1]} and {other.shape[1]}"
            )
    found = [features.to(found[0].device) for features in found]
    step = max(BLOCK // found[0].shape[1], 1)
    parts = [part for features in found for part in features.split(step)]
    centre = torch.stack([part.double().sum(0) for part in parts]).sum(0) / sum(map(len, found))
    largest = max(float((part.double() - centre).abs().max()) for part in parts)
    scale = 2.0 ** -torch.tensor(largest or 1.0, dtype=torch.float64).log2().ceil().item()
    return [_rows(features, centre, scale, step) for features in found]


def _rows(features: Tensor, centre: Tensor, scale: float, step: int) -> Rows:
    small = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    squares, shares = torch.empty(2, len(features), dtype=torch.float64, device=features.device)
    for start in range(0, len(features), step):
        part = slice(start, start + step)
        moved = features[part].double() - centre
        shares[part] = moved @ centre
        moved *= scale
        squares[part] = moved.square().sum(1)
        small[part] = moved
    return Rows(features, small, squares, shares, float(centre.square().sum()), scale)


def slices(count: int, columns: int) -> Iterator[slice]:
    """Rows of a block with so many columns, in order, until `count` rows are through."""
    step = max(BLOCK // max(columns, 1), 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def dots(a: Rows, rows: slice, b: Rows, columns: slice = slice(None)) -> Tensor:
    """Dot products of the features given, float64, with shape (rows, columns).

    What is rounded to float32 is the product of the differences from the centre.
    """
    with full_precision(a.small.device):
        block = (a.small[rows] @ b.small[columns].T).double()
    block /= a.scale**2
    block += a.shares[rows, None]
    block += b.shares[columns]
    block += a.centre_square
    return block


def pair_sum(a: Rows, b: Rows, kernel: Callable[[Tensor], Tensor]) -> float:
    """Sum over all pairs of kernel(dot product), in float64."""
    return sum(float(kernel(dots(a, rows, b)).sum()) for rows in slices(len(a), len(b)))


def own_sum(a: Rows, kernel: Callable[[Tensor], Tensor]) -> float:
    """Sum over all ordered pairs of different rows of kernel(dot product), in float64."""
    total = 0.0
    for rows in slices(len(a), len(a)):
        values = kernel(dots(a, rows, a, slice(rows.start, None)))  # the rest is symmetric
        square = values[:, : rows.stop - rows.start]
        total += float(2 * values.sum() - square.sum() - square.diagonal().sum())
    return total


@dataclass(frozen=True, eq=False)
class Block:
    """Squared distances of some rows of one set to all of another, in float32, scaled.

    Args:
        a, b: The sets.
        rows: Which rows of `a`.
        squares: The squared distances, with shape (rows, len(b)).
    """

    a: Rows
    b: Rows
    rows: slice
    squares: Tensor

    def within(self, radius: Tensor) -> Tensor:
        """Whether distances are at most a radius, as float64 has it, with shape of `squares`.

        Args:
            radius: Of each row, with shape (rows, 1), or of each column, with shape (len(b),);
                float64.
        """
        own, other = self.a.slack[self.rows, None], self.b.slack
        if radius.ndim == 1:
            own, other = other, own
        limit = (radius * self.a.scale).square()
        other = other.float() * 1.0001
        inside = self.squares - other <= (limit * (1 + 8 * UNIT) + own).float()
        sure = self.squares + other <= (limit * (1 - 8 * UNIT) - own).float()
        i, j = (inside & ~sure).nonzero().T
        radii = radius.expand(self.squares.shape)
        inside[i, j] = distances(self.a, i + self.rows.start, self.b, j) <= radii[i, j]
        return inside


def blocks(a: Rows, b: Rows) -> Iterator[Block]:
    """Distances of all pairs, some rows of `a` at a time."""
    lengths = b.squares.float()
    for rows in slices(len(a), len(b)):
        with full_precision(a.small.device):
            squares = a.small[rows] @ b.small.T
        squares.mul_(-2).add_(lengths).add_(a.squares[rows, None].float())
        yield Block(a, b, rows, squares)


def distances(a: Rows, i: Tensor, b: Rows, j: Tensor) -> Tensor:
    """Distances of single pairs (i, j) in float64, from exact differences, with shape (P,)."""
    found = [torch.empty(0, dtype=torch.float64, device=i.device)]
    step = max(BLOCK // (4 * a.dimension), 1)
    for rows, columns in zip(i.split(step), j.split(step), strict=True):
        one, other = a.given[rows].double(), b.given[columns].double()
        # The same arithmetic, in the same order, as torch.cdist between whole sets.
        pairs = torch.cdist(
            one[:, None], other[:, None], compute_mode="donot_use_mm_for_euclid_dist"
        )
        found.append(pairs[:, 0, 0])
    return torch.cat(found)


def nearest(a: Rows, b: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest rows of another set, and which they are.

    Of equal distances the earlier row comes first.

    Args:
        a: N rows.
        b: At least k rows; `a` itself: a row is no neighbour of itself.
        k: How many.

    Returns:
        Distances in float64, in rising order, and positions in `b`, with shape (N, k).

    Raises:
        ValueError: too few rows.
    """
    same = a is b
    if not 1 <= k <= len(b) - same:
        raise ValueError(
            f"k = {k} neighbours need at least {max(k, 1) + same} pictures, got {len(b)}"
        )
    found = []
    for block in blocks(a, b):
        if same:
            block.squares.diagonal(block.rows.start).fill_(torch.inf)
        slack = b.slack.float() * 1.0001
        own = a.slack[block.rows, None].float() * 1.0001
        # No row whose distance is surely above k others can be among the k nearest.
        limit = (block.squares + slack).topk(k, 1, largest=False).values[:, -1:]
        i, j = (block.squares - slack <= limit + 2.01 * own).nonzero().T
        length = distances(a, i + block.rows.start, b, j)
        order = length.argsort(stable=True)
        order = order[i[order].argsort(stable=True)]
        first = torch.searchsorted(i, torch.arange(len(block.squares), device=i.device))
        chosen = order[first[:, None] + torch.arange(k, device=i.device)]
        found.append((length[chosen], j[chosen]))
    return torch.cat([d for d, _ in found]), torch.cat([j for _, j in found])
