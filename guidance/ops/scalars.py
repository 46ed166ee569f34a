"""Functions of a step's sums: floats of a single sample on the host, else tensors of shape (B,).

Floats follow tensors: NaN stays NaN, 1 / sqrt(0) is infinite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor


def where(condition: bool | Tensor, value: Number, other: Number) -> Number:
    """`value` where the condition holds; both are computed, as in `torch.where`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value, other)
    return value if condition else other


def at_least(x: Number, bound: float) -> Number:
    """max(x, bound)."""
    return x.clamp(min=bound) if isinstance(x, Tensor) else max(x, bound)


def at_most(x: Number, bound: float) -> Number:
    """min(x, bound)."""
    return x.clamp(max=bound) if isinstance(x, Tensor) else min(x, bound)


def sqrt(x: Number) -> Number:
    """Square root."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def rsqrt(x: Number) -> Number:
    """1 / sqrt(x)."""
    if isinstance(x, Tensor):
        return x.rsqrt()
    return math.inf if x == 0 else 1 / math.sqrt(x)


def exp(x: Number) -> Number:
    """Exponential."""
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def hypot(x: Number, y: Number) -> Number:
    """sqrt(x^2 + y^2) without leaving the range of the numbers."""
    return torch.hypot(x, y) if isinstance(x, Tensor) else math.hypot(x, y)
