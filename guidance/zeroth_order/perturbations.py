"""Directions drawn from (seed, step, index): no process has to send one to another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, step, index).

    The key is hashed, so that neighbouring keys give unrelated streams.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def perturbations(size: int, seed: int, step: int, count: int) -> Tensor:
    """The directions u of one step: Gaussian, with zero mean and unit covariance.

    Args:
        size: d, elements of a direction.
        seed: Seed of the run.
        step: Step of the run.
        count: n, directions of the step, at least 1.

    Returns:
        Directions with shape (n, d), float32, on the CPU: the same on every device.
    """
    return torch.stack(
        [torch.randn(size, generator=generator(seed, step, i)) for i in range(count)]
    )
