r"""The guidance step in Triton: every rule as one linear combination per sample.

In the rule's space (:math:`D = a_x x_t + a_p \, \mathrm{pred}`, or the prediction itself), with
:math:`c = D_c`, :math:`u = D_u` and :math:`m = c - u + \beta m_{prev}`, a rule returns

.. math:: D = c + k_c c + k_m m + k_u u

whose three coefficients follow from sums over the sample. The network's own prediction is then

.. math::
    \mathrm{pred} = (1 + k_c) p_c + k_m (p_c - p_u) + k_u p_u
    + \frac{k_m \beta}{a_p} m_{prev} + \frac{k_c a_x}{a_p} x_t

(:math:`k_u` is 0 for denoised images). So one read gives the sums, and one more read and one write
the result. The two predictions are subtracted before anything is squared or scaled; there are no
float atomics and no autotuning: the same inputs give the same bits on every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .guide_sums import ROWS, coefficients, gamma_of, load, number, sums_of, totals

TABLE_ROWS = tl.constexpr(ROWS)


@triton.jit
def guide_kernel(
    cond: tl.tensor,
    uncond: tl.tensor,
    x: tl.tensor,
    state: tl.tensor,
    table: tl.tensor,
    prediction: tl.tensor,
    new_state: tl.tensor,
    gamma: tl.tensor,
    finite: tl.tensor,
    a_x: tl.tensor,
    a_p: tl.tensor,
    w: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    momentum: tl.tensor,
    elements: tl.tensor,
    cond_step: tl.tensor,
    uncond_step: tl.tensor,
    x_step: tl.tensor,
    state_step: tl.tensor,
    POINTERS: tl.constexpr,
    RULE: tl.constexpr,
    IN_X0: tl.constexpr,
    GAMMA: tl.constexpr,
    WIDE: tl.constexpr,
    STAGE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per sample and chunk of it.

    Args:
        cond, uncond, x, state: Predictions, x_t and momentum buffer (None: not there). A sample
            has no gaps; samples are `cond_step`, ... elements apart.
        table: Sums of the PARTS parts of PART elements, with shape (B, ROWS, PARTS).
        prediction, new_state, gamma, finite: What is written (None: is not), dense.
        a_x, a_p, w: Numbers, or pointers to them where POINTERS says so.
        first, second, momentum: See `coefficients`.
        elements: Of a sample.
        STAGE: "sums" writes a chunk's sums into the table, "write" a chunk of the result from
            there; "whole" does both for a sample that is one chunk.
    """
    chunk = tl.program_id(0)
    if WIDE:
        chunk = chunk.to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, elements)
    cond += sample * cond_step
    uncond += sample * uncond_step
    if x is not None:
        x += sample * x_step
    if state is not None:
        state += sample * state_step
    if table is not None:
        table += sample * TABLE_ROWS * PARTS
    a_x, a_p = number(a_x, POINTERS[0]), number(a_p, POINTERS[1])
    scale = number(w, POINTERS[2]) - 1
    first, second, momentum = number(first, False), number(second, False), number(momentum, False)
    if STAGE == "write":
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
            momentum,
            begin,
            end,
            RULE,
            IN_X0,
            GAMMA,
            BLOCK,
        )
    if STAGE == "sums":
        for i in tl.static_range(TABLE_ROWS):
            tl.store(table + i * PARTS + chunk, sums[i])
    else:
        tl.store(finite + sample, sums[9] == 0, chunk == 0)
        if gamma is not None:
            tl.store(gamma + sample, gamma_of(sums), chunk == 0)
        if prediction is not None:
            k_c, k_m, k_u = coefficients(sums, scale, first, second, elements, RULE)
            of_cond, of_state, of_x = 1 + k_c, k_m * momentum, k_c * a_x
            if IN_X0:
                # A denoised image that says nothing of a prediction leaves the conditional one.
                known = a_p != 0
                inverse = tl.where(known, 1 / tl.where(known, a_p, 1.0), 0.0)
                of_cond, k_m = tl.where(known, of_cond, 1.0), tl.where(known, k_m, 0.0)
                of_state, of_x = of_state * inverse, of_x * inverse
            for start in range(begin, end, BLOCK):
                at = start + tl.arange(0, BLOCK)
                inside = at < end
                out = sample * elements + at
                p = load(cond, at, inside)
                q = load(uncond, at, inside)
                update = p - q
                guided = of_cond * p + k_m * update
                if RULE == "cfg-zero*":
                    guided += k_u * q
                if IN_X0:
                    guided += of_x * load(x, at, inside)
                    update *= a_p
                if state is not None:
                    last = load(state, at, inside)
                    guided += of_state * last
                    update += momentum * last
                if new_state is not None:
                    tl.store(new_state + out, update, inside)
                tl.store(prediction + out, guided.to(prediction.dtype.element_ty), inside)
