"""The guidance step in Triton: one launch for images, two for larger samples.

No float atomics and no autotuning: the same inputs give the same bits on every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .guide_sums import ROWS, coefficients, load, scalar, sums_of, totals
from .solver import INDEX

TABLE_ROWS = tl.constexpr(ROWS)
C_X, C_P, K_P = (tl.constexpr(INDEX[name]) for name in ("c_x", "c_p", "k_p"))
D_X, D_P = (tl.constexpr(INDEX[name]) for name in ("d_x", "d_p"))
INPUT_SCALE = tl.constexpr(INDEX["input_scale"])


@triton.jit
def sums_kernel(
    cond,
    uncond,
    x,
    state,
    table,
    a_x,
    a_p,
    guidance_scale,
    momentum,
    elements,
    cond_step,
    uncond_step,
    x_step,
    state_step,
    LAYOUT: tl.constexpr,
    RULE: tl.constexpr,
    IN_X0: tl.constexpr,
    OTHER: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    A_X_POINTER: tl.constexpr,
    A_P_POINTER: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sample and chunk: its sums into the table, of shape (B, ROWS, PARTS)."""
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    begin = chunk * CHUNK
    if WIDE:
        begin = chunk.to(tl.int64) * CHUNK
    if x is not None:
        x += sample * x_step
    if state is not None:
        state += sample * state_step
    sums = sums_of(
        cond + sample * cond_step,
        uncond + sample * uncond_step,
        x,
        state,
        scalar(a_x, A_X_POINTER),
        scalar(a_p, A_P_POINTER),
        scalar(guidance_scale, SCALE_POINTER) - 1,
        scalar(momentum, False),
        begin,
        tl.minimum(begin + CHUNK, elements),
        LAYOUT,
        RULE,
        IN_X0,
        OTHER,
        BLOCK,
    )
    row = table + sample * TABLE_ROWS * PARTS + chunk
    for i in tl.static_range(14):
        tl.store(row + i * PARTS, sums[i])


@triton.jit
def guide_kernel(
    cond,
    uncond,
    x,
    state,
    previous,
    steps,
    solver,
    table,
    prediction,
    new_state,
    new_steps,
    scalars,
    denoised,
    x_next,
    next_input,
    a_x,
    a_p,
    guidance_scale,
    first,
    second,
    third,
    elements,
    batch,
    cond_step,
    uncond_step,
    x_step,
    state_step,
    previous_step,
    LAYOUT: tl.constexpr,
    RULE: tl.constexpr,
    IN_X0: tl.constexpr,
    OTHER: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    COPIES: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    A_X_POINTER: tl.constexpr,
    A_P_POINTER: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITES: tl.constexpr,
):
    """One program per sample and chunk. Without a table it sums over the whole sample itself.

    Inputs lie as LAYOUT says; outputs, and a table of PARTS sums over PART elements, are dense.
    What is None is neither read nor written.
    """
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    begin = chunk * CHUNK
    if WIDE:
        begin = chunk.to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, elements)
    cond += sample * cond_step
    uncond += sample * uncond_step
    if x is not None:
        x += sample * x_step
    if state is not None:
        state += sample * state_step
    if previous is not None:
        previous += sample * previous_step
    a_x, a_p = scalar(a_x, A_X_POINTER), scalar(a_p, A_P_POINTER)
    scale = scalar(guidance_scale, SCALE_POINTER) - 1
    first, second, third = scalar(first, False), scalar(second, False), scalar(third, False)
    zero = tl.cast(0.0, tl.float32)
    c, b, u = zero, scale, zero
    moving = True
    if RULE == "cfg-zero*":
        done = 0
        if steps is not None:
            done = tl.load(steps + sample).to(tl.int32)
        moving = done >= first
        if chunk == 0:
            tl.store(new_steps + sample, done + 1)
    if NEEDS_SUMS:
        if table is not None:
            table += sample * TABLE_ROWS * PARTS
            sums = totals(table, elements, PART, PARTS, PADDED)
        else:
            sums = sums_of(
                cond,
                uncond,
                x,
                state,
                a_x,
                a_p,
                scale,
                third,
                0,
                elements,
                LAYOUT,
                RULE,
                IN_X0,
                OTHER,
                BLOCK,
            )
        c, b, u = coefficients(sums, scale, first, second, elements, RULE)
        if scalars is not None:
            store_scalars(scalars + sample, batch, sums, c, b, u, moving, chunk == 0, OTHER)
    k_c, k_d, k_m, k_x = 1 + c, b, zero, zero
    if IN_X0:
        known = a_p != 0  # if not, a denoised image says nothing of a prediction
        inverse = tl.where(known, 1 / tl.where(known, a_p, 1.0), 0.0)
        k_c, k_d = tl.where(known, k_c, 1.0), tl.where(known, k_d, 0.0)
        k_m, k_x = b * third * inverse, c * inverse * a_x
    else:
        k_m = b * third
    if WRITES:
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            out = sample * elements + at
            p = load(cond, at, inside, LAYOUT[0], LAYOUT[1])
            q = load(uncond, at, inside, LAYOUT[0], LAYOUT[2])
            update = p - q
            guided = k_c * p + k_d * update
            if RULE == "cfg-zero*":
                guided = tl.where(moving, guided + u * q, 0.0)
            if x is not None:
                x_t = load(x, at, inside, LAYOUT[0], LAYOUT[3])
            if IN_X0:
                guided += k_x * x_t
                update *= a_p
            if state is not None:
                last = load(state, at, inside, LAYOUT[0], LAYOUT[4])
                guided += k_m * last
                update += third * last
            if new_state is not None:
                tl.store(new_state + out, update, inside)
            if prediction is not None:
                tl.store(prediction + out, guided.to(prediction.dtype.element_ty), inside)
            if solver is not None:
                moved = tl.load(solver + C_X) * x_t + tl.load(solver + C_P) * guided
                if previous is not None:
                    last_d = load(previous, at, inside, LAYOUT[0], LAYOUT[5])
                    moved += tl.load(solver + K_P) * last_d
                tl.store(x_next + out, moved.to(x_next.dtype.element_ty), inside)
                if denoised is not None:
                    image = tl.load(solver + D_X) * x_t + tl.load(solver + D_P) * guided
                    tl.store(denoised + out, image, inside)
                if COPIES > 0:
                    scaled = (tl.load(solver + INPUT_SCALE) * moved).to(next_input.dtype.element_ty)
                    tl.store(next_input + out, scaled, inside)
                    if COPIES > 1:
                        tl.store(
                            next_input + tl.cast(batch, tl.int64) * elements + out, scaled, inside
                        )


@triton.jit
def store_scalars(
    row,
    batch,
    sums,
    c,
    b,
    u,
    moving,
    wanted,
    OTHER: tl.constexpr,
):
    """gamma, cond_norm, update_norm, parallel_share and finite, `batch` numbers apart."""
    mm, mc, cc, cu, uu = sums[0], sums[1], sums[2], sums[3], sums[4]
    aa, az, zz = cc, cu, uu
    if OTHER:
        aa, az, zz = sums[6], sums[7], sums[8]
    length = tl.sqrt(aa) * tl.sqrt(zz)
    equal = tl.where(aa == zz, 1.0, 0.0)
    tl.store(row, tl.where(length > 0, az / tl.where(length > 0, length, 1.0), equal), wanted)
    tl.store(row + batch, tl.sqrt(cc), wanted)
    square = c * c * cc + b * b * mm + u * u * uu + 2 * c * (b * mc + u * cu)
    square = tl.where(moving, tl.maximum(square, 0.0), cc)
    tl.store(row + 2 * batch, tl.sqrt(square), wanted)
    lengths = tl.sqrt(mm) * tl.sqrt(cc)
    cosine = tl.minimum(tl.abs(mc) / tl.where(lengths > 0, lengths, 1.0), 1.0)
    tl.store(row + 3 * batch, cosine * cosine, wanted)
    tl.store(row + 4 * batch, tl.where(sums[9] > 0, 0.0, 1.0), wanted)
