"""The inner products of a guidance step in Triton, and the coefficients that follow from them."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 16
"""Rows of the table of sums: the 14 that `sums_of` returns, in its order, and two of padding."""

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def scalar(value, POINTER: tl.constexpr):
    """A number or what a pointer points to, in float32 (compilers pass numbers as float64)."""
    return tl.load(value).to(tl.float32) if POINTER else tl.cast(value, tl.float32)


@triton.jit
def load(pointer, at, inside, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    """Elements of a sample by their number, in float32; zeros outside. SIZES = () means dense."""
    offset = at
    if len(SIZES) > 0:
        offset = at * 0
        rest = at
        for i in tl.static_range(len(SIZES)):
            offset += rest % SIZES[len(SIZES) - 1 - i] * STRIDES[len(SIZES) - 1 - i]
            rest = rest // SIZES[len(SIZES) - 1 - i]
    return tl.load(pointer + offset, inside, other=0.0).to(tl.float32)


@triton.jit
def merged(count, mean, spread, other_count, other_mean, other_spread):
    """Count, mean and squared deviations of two parts together (Chan et al.)."""
    total = count + other_count
    gap = other_mean - mean
    share = other_count / total
    return total, mean + gap * share, spread + other_spread + gap * gap * count * share


@triton.jit
def sums_of(
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
    LAYOUT: tl.constexpr,
    RULE: tl.constexpr,
    IN_X0: tl.constexpr,
    OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the elements from `begin` to `end` of one sample, to whose start pointers point.

    <m,m>, <m,c>, <c,c>, <c,u>, <u,u>, <u,u> - <c,c> in the rule's space; <a,a>, <a,z>, <z,z> of the
    predictions in the other space; the number of elements that are not finite; means and squared
    deviations of c and of c + (w - 1) m. What the rule does not need is left 0.
    """
    zeros = tl.zeros([BLOCK], tl.float32)
    mm, mc, cc, cu, uu, excess = zeros, zeros, zeros, zeros, zeros, zeros
    aa, az, zz, bad = zeros, zeros, zeros, zeros
    count = tl.cast(0.0, tl.float32)
    mean_c, mean_g, spread_c, spread_g = count, count, count, count
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        p = load(cond, at, inside, LAYOUT[0], LAYOUT[1])
        q = load(uncond, at, inside, LAYOUT[0], LAYOUT[2])
        bad += tl.where((tl.abs(p) <= LARGEST) & (tl.abs(q) <= LARGEST), 0.0, 1.0)
        c, u, m = p, q, p - q
        if IN_X0 or OTHER:
            shift = a_x * load(x, at, inside, LAYOUT[0], LAYOUT[3])
            a, z = shift + a_p * p, shift + a_p * q
            if IN_X0:
                c, u, m = a, z, a_p * m
                a, z = p, q
            if OTHER:
                aa += a * a
                az += a * z
                zz += z * z
        if RULE == "tcfg":
            excess -= m * (c + u)
        if state is not None:
            m += momentum * load(state, at, inside, LAYOUT[0], LAYOUT[4])
        mm += m * m
        mc += m * c
        cc += c * c
        cu += c * u
        uu += u * u
        if RULE == "rescale":
            size = tl.minimum(end - start, BLOCK).to(tl.float32)
            g = c + scale * m
            block_c, block_g = tl.sum(c) / size, tl.sum(g) / size
            off_c, off_g = tl.where(inside, c - block_c, 0.0), tl.where(inside, g - block_g, 0.0)
            _, mean_g, spread_g = merged(
                count, mean_g, spread_g, size, block_g, tl.sum(off_g * off_g)
            )
            count, mean_c, spread_c = merged(
                count, mean_c, spread_c, size, block_c, tl.sum(off_c * off_c)
            )
    return (
        tl.sum(mm),
        tl.sum(mc),
        tl.sum(cc),
        tl.sum(cu),
        tl.sum(uu),
        tl.sum(excess),
        tl.sum(aa),
        tl.sum(az),
        tl.sum(zz),
        tl.sum(bad),
        mean_c,
        mean_g,
        spread_c,
        spread_g,
    )


@triton.jit
def part(table, row: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """A row of one sample's table of partial sums, with shape (PADDED,)."""
    at = tl.arange(0, PADDED)
    return tl.load(table + row * PARTS + at, at < PARTS, other=0.0)


@triton.jit
def totals(table, elements, CHUNK: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """What `sums_of` returns for the whole sample, from the sums of its parts, in a fixed order."""
    at = tl.arange(0, PADDED)
    sizes = tl.maximum(tl.minimum(elements - at.to(tl.int64) * CHUNK, CHUNK), 0).to(tl.float32)
    count = tl.cast(elements, tl.float32)
    means_c, means_g = part(table, 10, PARTS, PADDED), part(table, 11, PARTS, PADDED)
    mean_c, mean_g = tl.sum(means_c * sizes) / count, tl.sum(means_g * sizes) / count
    off_c, off_g = means_c - mean_c, means_g - mean_g
    return (
        tl.sum(part(table, 0, PARTS, PADDED)),
        tl.sum(part(table, 1, PARTS, PADDED)),
        tl.sum(part(table, 2, PARTS, PADDED)),
        tl.sum(part(table, 3, PARTS, PADDED)),
        tl.sum(part(table, 4, PARTS, PADDED)),
        tl.sum(part(table, 5, PARTS, PADDED)),
        tl.sum(part(table, 6, PARTS, PADDED)),
        tl.sum(part(table, 7, PARTS, PADDED)),
        tl.sum(part(table, 8, PARTS, PADDED)),
        tl.sum(part(table, 9, PARTS, PADDED)),
        mean_c,
        mean_g,
        tl.sum(part(table, 12, PARTS, PADDED) + off_c * off_c * sizes),
        tl.sum(part(table, 13, PARTS, PADDED) + off_g * off_g * sizes),
    )


@triton.jit
def coefficients(sums, scale, first, second, elements, RULE: tl.constexpr):
    """(c, b, u) of `formulas`, whose functions these are."""
    mm, mc, cc, cu, uu = sums[0], sums[1], sums[2], sums[3], sums[4]
    none = tl.cast(0.0, tl.float32)
    c, b, u = none, scale, none
    if RULE == "apg":
        share = mc / tl.where(cc > 0, cc, 1.0)
        inside = (second <= 0) | (mm <= second * second)
        b = scale * tl.where(inside, 1.0, second / tl.sqrt(tl.where(inside, 1.0, mm)))
        c = share * b * (first - 1)
    if RULE == "rescale":
        count = tl.cast(elements, tl.float32)
        spread = tl.sqrt(sums[13])
        norm = tl.sqrt(sums[13] + count * sums[11] * sums[11])
        varies = spread > 16 * 1.1920928955078125e-07 * norm
        ratio = tl.sqrt(sums[12]) / tl.where(varies, spread, 1.0)
        c = tl.where(varies, first * (ratio - 1), 0.0)
        b = scale * (1 + c)
    if RULE == "cfg-zero*":
        optimized = second > 0
        c = tl.where(optimized, scale, 0.0)
        b = scale - c
        u = tl.where(optimized, -scale * cu / tl.where(uu > 0, uu, 1.0), 0.0)
    if RULE == "tcfg":
        # hypot without leaving the range of float32
        long = tl.maximum(tl.abs(sums[5]), 2 * tl.abs(cu))
        short = tl.minimum(tl.abs(sums[5]), 2 * tl.abs(cu)) / tl.where(long > 0, long, 1.0)
        root = long * tl.sqrt(1 + short * short)
        safe = tl.where(root > 0, root, 1.0)
        ratio = sums[5] / safe
        near = ratio * (sums[5] / tl.where(cu > 0, root + 2 * cu, 1.0))
        gap = tl.where(cu > 0, near, 1 - 2 * cu / safe)
        c = scale * (gap - ratio) / 2
        b = scale * (1 + ratio) / 2
    if RULE == "magnitude":
        # Nothing is damped without an update or with alpha = 0.
        damped = (mm > 0) & (first > 0)
        length = first * tl.sqrt(mm)
        power = tl.where(uu > 0, length / tl.sqrt(tl.where(uu > 0, uu, 1.0)), float("inf"))
        b = scale * tl.where(damped, tl.exp(-power), 1.0)
    return c, b, u
