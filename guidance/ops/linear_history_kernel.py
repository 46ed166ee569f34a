"""The weighted sum over stored predictions in Triton: each is read once, the sum written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import common_layout, dense_strides

BLOCK = 1024


@triton.jit
def linear_history_kernel(
    history,
    weights,
    total,
    slots,
    elements,
    slot_step,
    sample_step,
    weight_slot_step,
    weight_sample_step,
    BLOCK: tl.constexpr,
):
    """One program per sample and BLOCK elements; float32 inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    inside = at < elements
    history += sample * sample_step
    weights += sample * weight_sample_step
    result = tl.zeros([BLOCK], tl.float32)
    for slot in range(slots):
        lying = history + tl.cast(slot, tl.int64) * slot_step + at
        weight = tl.load(weights + slot * weight_slot_step).to(tl.float32)
        result += weight * tl.load(lying, inside, other=0.0).to(tl.float32)
    tl.store(total + sample * elements + at, result.to(total.dtype.element_ty), inside)


def launch(history: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """See `linear_history`; samples with gaps between their elements are made contiguous first."""
    shape = tuple(history.shape[2:])
    layout = common_layout(shape, history.stride()[2:])
    if not layout.dense:
        history = history.contiguous()
        layout = common_layout(shape, history.stride()[2:])
    slots, batch = history.shape[:2]
    elements = history[0, 0].numel()
    strides = (elements, *dense_strides(shape, layout.order))
    total = torch.empty_strided(history.shape[1:], strides, dtype=dtype, device=history.device)
    linear_history_kernel[(triton.cdiv(elements, BLOCK), batch)](
        history,
        weights,
        total,
        slots,
        elements,
        history.stride(0),
        history.stride(1),
        weights.stride(0),
        weights.stride(1) if weights.ndim > 1 else 0,
        BLOCK=BLOCK,
    )
    return total
