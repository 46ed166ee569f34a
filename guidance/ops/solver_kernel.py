"""The solver step in Triton: x_next and D in one launch, each input read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import INDEX

BLOCK = 1024
D_S, D_X, D_P, D_Q = (tl.constexpr(INDEX[name]) for name in ("d_s", "d_x", "d_p", "d_q"))
C_X, C_P, K_D, K_P = (tl.constexpr(INDEX[name]) for name in ("c_x", "c_p", "k_d", "k_p"))


@triton.jit
def solver_kernel(
    x_ptr: tl.tensor,
    pred_ptr: tl.tensor,
    previous_ptr: tl.tensor,
    row_ptr: tl.tensor,
    next_ptr: tl.tensor,
    denoised_ptr: tl.tensor,
    elements: tl.tensor,
    HAS_PREVIOUS: tl.constexpr,
    WANT_DENOISED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per BLOCK elements of contiguous tensors; float32 inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(x_ptr + at, inside).to(tl.float32)
    pred = tl.load(pred_ptr + at, inside).to(tl.float32)
    denoised = tl.load(row_ptr + D_X) * x + tl.load(row_ptr + D_P) * pred
    denoised += tl.load(row_ptr + D_Q) * pred
    denoised *= tl.load(row_ptr + D_S)
    x_next = tl.load(row_ptr + C_X) * x + tl.load(row_ptr + C_P) * pred
    x_next += tl.load(row_ptr + K_D) * denoised
    if HAS_PREVIOUS:
        previous = tl.load(previous_ptr + at, inside).to(tl.float32)
        x_next += tl.load(row_ptr + K_P) * previous
    tl.store(next_ptr + at, x_next.to(next_ptr.dtype.element_ty), inside)
    if WANT_DENOISED:
        tl.store(denoised_ptr + at, denoised.to(denoised_ptr.dtype.element_ty), inside)


def launch(
    x_t: Tensor,
    prediction: Tensor,
    previous: Tensor | None,
    row: Tensor,
    want_denoised: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """See `network_step`; tensors of other than one dense layout are made contiguous first."""
    inputs = [x_t, prediction] if previous is None else [x_t, prediction, previous]
    if any(t.stride() != x_t.stride() for t in inputs) or not _dense(x_t):
        inputs = [t.contiguous() for t in inputs]
    x_next = torch.empty_like(inputs[0], dtype=dtype)
    denoised = torch.empty_like(inputs[0], dtype=torch.float32) if want_denoised else None
    grid = (triton.cdiv(x_t.numel(), BLOCK),)
    solver_kernel[grid](
        inputs[0],
        inputs[1],
        inputs[-1],
        row,
        x_next,
        denoised if want_denoised else x_next,
        x_t.numel(),
        HAS_PREVIOUS=previous is not None,
        WANT_DENOISED=want_denoised,
        BLOCK=BLOCK,
    )
    return x_next, denoised


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their storage range, in whatever order of dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)
