r"""A weighted sum over stored predictions, for linear estimates of a branch that is left out.

.. math:: y = \sum_i \beta_i h_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from .solver import Impl, fused_by_default


def linear_history(
    history: Tensor,
    weights: Tensor,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Weighted sum over the first dimension, in one pass and with sums in float32.

    Args:
        history: h, with shape (K, B, \\*), any floating dtype; every slot is read, also those whose
            weight is 0.
        weights: beta, with shape (K,), or (K, B) for weights of each sample.
        dtype: Of the result; None: that of `history`.
        impl: "reference" (eager), "fused" (one Triton launch) or None: fused on CUDA where Triton
            is installed and no gradient is needed.

    Returns:
        The sum, with shape (B, \\*).

    Raises:
        ValueError: shapes disagree, or `impl` is unknown.
    """
    if history.ndim < 2 or weights.shape not in (history.shape[:1], history.shape[:2]):
        raise ValueError(
            f"linear_history: history has shape (K, B, *) and weights (K,) or (K, B), got "
            f"{tuple(history.shape)} and {tuple(weights.shape)}"
        )
    if weights.device != history.device:
        raise ValueError(
            f"linear_history: weights are on {weights.device}, history on {history.device}"
        )
    if impl not in (None, "reference", "fused"):
        raise ValueError(f"linear_history: impl is 'reference' or 'fused', got {impl!r}")
    if torch.compiler.is_compiling():
        from .registration import linear_history_op

        return linear_history_op(history, weights, dtype, impl)
    return run(history, weights, dtype or history.dtype, impl)


def run(history: Tensor, weights: Tensor, dtype: torch.dtype, impl: Impl | None) -> Tensor:
    """Compute the sum directly, without PyTorch's dispatcher."""
    if impl == "fused" or (impl is None and fused_by_default(history, weights)):
        from .linear_history_kernel import launch

        with torch.cuda.device_of(history):  # Triton launches on the current device
            return launch(history, weights, dtype)
    work = torch.promote_types(history.dtype, torch.float32)
    weights = weights.to(work).view(*weights.shape, *(1,) * (history.ndim - weights.ndim))
    total = history[0] * weights[0]
    for slot, weight in zip(history[1:], weights[1:], strict=True):
        total.addcmul_(slot.to(work), weight)
    return total.to(dtype)
