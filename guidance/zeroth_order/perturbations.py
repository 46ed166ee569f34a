"""Directions drawn from (seed, step, index): no process has to send one to another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

Distribution = Literal["gaussian", "rademacher"]

DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, step, index).

    The key is hashed, so that neighbouring keys give unrelated streams.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def perturbations(
    size: int,
    seed: int,
    step: int,
    indices: Iterable[int],
    distribution: Distribution = "gaussian",
) -> Tensor:
    """The directions u of one step, each with zero mean and unit covariance.

    Args:
        size: d, elements of a direction.
        seed: Seed of the run.
        step: Step of the run.
        indices: Which directions of the step, k of them.
        distribution: "gaussian" or "rademacher" (signs).

    Returns:
        Directions with shape (k, d), float32, on the CPU: the same on every device.

    Raises:
        ValueError: the distribution is unknown.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {distribution!r}: known are {DISTRIBUTIONS}")
    rows = []
    for index in indices:
        source = generator(seed, step, index)
        if distribution == "gaussian":
            rows.append(torch.randn(size, generator=source))
        else:
            rows.append(torch.randint(2, (size,), generator=source) * 2.0 - 1.0)
    return torch.stack(rows) if rows else torch.empty(0, size)
