"""Window sizes by noise level, as published, and how they carry over to any noise level.

A table lists sizes for the noise levels of its own sampler. For another noise level the size of the
level nearest in log sigma is taken: sizes are whole (odd) numbers, so there is nothing in between.

References:
    LS/ELS windows: Kamb & Ganguli, https://arxiv.org/abs/2412.20292 (20 steps). The page we build
    from gives no noise levels for them; we place step i at timestep 50 i - 1 of the 1000-step
    linear-beta schedule. Crops: Niedoba et al., https://arxiv.org/abs/2411.19339 (EDM's 18 steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Schedule = Callable[[float], int]
Table = tuple[tuple[float, int], ...]  # noise levels and sizes


# sqrt((1 - a) / a) of the DDPM schedule (1000 steps, beta from 1e-4 to 0.02) at 49, 99, ..., 999.
_SQUARES = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[49::50]
_STEPS = ((1 - _SQUARES) / _SQUARES).sqrt().tolist()
# EDM's noise levels, from 80 down to 0.002 (rho = 7).
_LOW, _HIGH = 0.002 ** (1 / 7), 80 ** (1 / 7)
_EDM = [(_HIGH + i / 17 * (_LOW - _HIGH)) ** 7 for i in range(18)]
_CIFAR = (3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7, 9, 9, 11, 13, 13, 15, 17, 25)
_FASHION = (3, 3, 5, 5, 7, 7, 7, 9, 11, 11, 11, 13, 15, 15, 21, 23, 25, 25, 25, 25)
_CROPS = (32, 32, 32, 32, 32, 32, 32, 23, 15, 11, 7, 5, 3, 3, 3, 3, 3, 3)

WINDOWS = {
    "cifar10": tuple(zip(_STEPS, _CIFAR, strict=True)),
    "fashion_mnist": tuple(zip(_STEPS, _FASHION, strict=True)),
}
CROPS = {"edm32": tuple(zip(_EDM, _CROPS, strict=True))}


def nearest(table: Table, sigma: float) -> int:
    """Size of the table's noise level that is nearest in log sigma; the ends extend."""
    if not math.isfinite(sigma):
        return max(table)[1]
    return min(table, key=lambda entry: abs(math.log(entry[0] / sigma)))[1]


def schedule(size: int | str, tables: dict[str, Table], *, odd: bool) -> Schedule:
    """A function of sigma from a fixed size or the name of a table.

    Raises:
        ValueError: an unknown name, or a size that is not a positive (odd) whole number.
    """
    if isinstance(size, str):
        if size not in tables:
            raise ValueError(f"unknown schedule {size!r}: expected one of {sorted(tables)}")
        return lambda sigma: nearest(tables[size], sigma)
    if not isinstance(size, int) or size < 1 or (odd and size % 2 == 0):
        kind = "an odd" if odd else "a"
        raise ValueError(f"size must be {kind} whole number >= 1, got {size!r}")
    return lambda sigma: size
