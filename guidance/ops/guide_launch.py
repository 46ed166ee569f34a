"""The launches of the fused guidance step: what is allocated, how it is divided into programs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .guide_kernel import guide_kernel, sums_kernel
from .guide_sums import ROWS
from .inputs import GuideStep, Request
from .layout import Layout, common_layout, dense_strides

ONE_PROGRAM = 65536
"""Elements of a sample up to which one program sums and writes all of it."""

PARTS = 256
"""Largest number of partial sums of a sample."""

MOST_DIMENSIONS = 4
"""Dimensions of a sample, after merging, that are read in place; above, inputs are copied."""


def launch(r: Request) -> GuideStep:
    """See `guide_step`."""
    momentum = r.momentum
    inputs = {
        "cond": r.pred_cond,
        "uncond": r.pred_uncond,
        "x": r.x_t,
        "state": r.state if momentum != 0 else None,
        "previous": r.previous,
    }
    layout = _layout(inputs)
    if len(layout.sizes) > MOST_DIMENSIONS:
        inputs = {name: None if t is None else t.contiguous() for name, t in inputs.items()}
        layout = _layout(inputs)
    batch, elements = len(r.pred_cond), r.pred_cond[0].numel()
    device = r.pred_cond.device

    def empty(wanted: bool, dtype: torch.dtype, copies: int = 1) -> Tensor | None:
        if not wanted:
            return None
        shape = r.pred_cond.shape[1:]
        strides = (elements, *dense_strides(shape, layout.order))
        size = (batch * copies, *shape)
        return torch.empty_strided(size, strides, dtype=dtype, device=device)

    prediction = empty(r.want_prediction, r.pred_cond.dtype)
    state = empty(momentum != 0, torch.float32)
    denoised = empty(r.want_denoised, torch.float32)
    x_next = empty(r.solver is not None, r.pred_cond.dtype if r.x_t is None else r.x_t.dtype)
    next_input = empty(r.copies > 0, r.pred_cond.dtype, max(r.copies, 1))
    scalars = torch.empty(5, batch, dtype=torch.float32, device=device) if r.measures else None
    steps = r.state if r.kind == "cfg-zero*" else None
    new_steps = None
    if r.kind == "cfg-zero*":
        new_steps = torch.empty(batch, 1, dtype=torch.int32, device=device)
    block, warps = (4096, 16) if elements > 4096 else (triton.next_power_of_2(elements), 4)
    block = max(block, 128)
    one_program = elements <= ONE_PROGRAM
    if one_program and (r.needs_sums or elements <= block):
        parts, chunk = 1, block * triton.cdiv(elements, block)
    else:
        parts, chunk = _parts(elements, block)
    common = {
        "LAYOUT": _constants(layout, inputs),
        "RULE": r.kind,
        "IN_X0": r.in_x0,
        "OTHER": r.gamma_space is not None and (r.gamma_space == "x0") != r.in_x0,
        "SCALE_POINTER": isinstance(r.guidance_scale, Tensor),
        "A_X_POINTER": isinstance(r.a_x, Tensor),
        "A_P_POINTER": isinstance(r.a_p, Tensor),
        "WIDE": layout.wide,
        "BLOCK": block,
        "num_warps": warps,
    }
    table = None
    if parts > 1 and r.needs_sums:
        table = torch.empty(batch, ROWS, parts, dtype=torch.float32, device=device)
        sums_kernel[(parts, batch)](
            *(inputs[name] for name in ("cond", "uncond", "x", "state")),
            table,
            r.a_x,
            r.a_p,
            r.guidance_scale,
            momentum,
            elements,
            *(_batch_stride(inputs[name]) for name in ("cond", "uncond", "x", "state")),
            PARTS=parts,
            CHUNK=chunk,
            **common,
        )
    part, writes = chunk, r.writes or momentum != 0
    if table is not None:
        # Small programs write; one is enough where only scalars are wanted.
        chunk = 2 * block
    grid = (triton.cdiv(elements, chunk) if writes else 1, batch)
    guide_kernel[grid](
        *inputs.values(),
        steps,
        None if r.solver is None else r.solver.row,
        table,
        prediction,
        state,
        new_steps,
        scalars,
        denoised,
        x_next,
        next_input,
        r.a_x,
        r.a_p,
        r.guidance_scale,
        *r.settings,
        elements,
        batch,
        *(_batch_stride(tensor) for tensor in inputs.values()),
        NEEDS_SUMS=r.needs_sums,
        COPIES=r.copies,
        PARTS=parts,
        PADDED=triton.next_power_of_2(parts),
        PART=part,
        CHUNK=chunk,
        WRITES=writes,
        **common,
    )
    return _result(r, scalars, prediction, state, new_steps, denoised, x_next, next_input)


def _result(r: Request, scalars, prediction, state, steps, denoised, x_next, next_input):
    measured = (None,) * 5
    if scalars is not None:
        wanted = (r.gamma_space is not None, *(r.want_norms,) * 3, r.want_finite)
        measured = tuple(row if w else None for row, w in zip(scalars, wanted, strict=True))
    state = state if steps is None else steps
    return GuideStep(prediction, state, *measured, denoised, x_next, next_input)


def _layout(inputs: dict[str, Tensor | None]) -> Layout:
    given = [tensor for tensor in inputs.values() if tensor is not None]
    return common_layout(tuple(given[0].shape[1:]), *(tensor.stride()[1:] for tensor in given))


def _constants(layout: Layout, inputs: dict[str, Tensor | None]) -> tuple[tuple[int, ...], ...]:
    """Sizes, then strides of every input; nothing but () for dense ones, to compile only once."""
    if layout.dense:
        return ((),) * (1 + len(inputs))
    strides = iter(layout.strides)
    return layout.sizes, *(() if t is None else next(strides) for t in inputs.values())


def _batch_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _parts(elements: int, block: int) -> tuple[int, int]:
    """Number of programs per sample and elements of each, a multiple of the block."""
    blocks = triton.cdiv(elements, block)
    chunk = block * triton.cdiv(blocks, PARTS)
    return triton.cdiv(elements, chunk), chunk
