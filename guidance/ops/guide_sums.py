"""The sums over a sample that a guided prediction follows from, and its coefficients, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 14
"""How many numbers `sums_of` returns."""

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def number(value, POINTER):
    """A number, or what a pointer points to, in float32."""
    return tl.load(value).to(tl.float32) if POINTER else tl.cast(value, tl.float32)


@triton.jit
def load(pointer, at, inside):
    """Elements of a sample by their number, in float32; zeros outside."""
    return tl.load(pointer + at, inside, other=0.0).to(tl.float32)


@triton.jit
def merged(count, mean, spread, other_count, other_mean, other_spread):
    """Mean and squared deviations of two parts together (Chan et al.)."""
    share = other_count / (count + other_count)
    gap = other_mean - mean
    return mean + gap * share, spread + other_spread + gap * gap * count * share


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
    RULE,
    IN_X0,
    GAMMA,
    BLOCK,
):
    """Sums over the elements from `begin` to `end` of one sample, to whose start pointers point.

    <m,m>, <m,c>, <c,c>, <c,u>, <u,u>, <u,u> - <c,c> in the rule's space; <a,a>, <a,z>, <z,z> of the
    predictions in the space of gamma; the number of elements that are not finite; means and squared
    deviations of c and of c + (w - 1) m. What neither rule nor gamma needs is left 0.
    """
    zeros = tl.zeros([BLOCK], tl.float32)
    mm, mc, cc, cu, uu, excess = zeros, zeros, zeros, zeros, zeros, zeros
    aa, az, zz, bad = zeros, zeros, zeros, zeros
    count = tl.cast(0.0, tl.float32)
    mean_c, mean_g, spread_c, spread_g = count, count, count, count
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        p = load(cond, at, inside)
        q = load(uncond, at, inside)
        bad += tl.where((tl.abs(p) <= LARGEST) & (tl.abs(q) <= LARGEST), 0.0, 1.0)
        c, u, m = p, q, p - q
        a, z = p, q
        if x is not None:
            shift = a_x * load(x, at, inside)
            if IN_X0:
                c, u, m = shift + a_p * p, shift + a_p * q, a_p * m
            if GAMMA == "x0":
                a, z = shift + a_p * p, shift + a_p * q
        if GAMMA is not None:
            aa += a * a
            az += a * z
            zz += z * z
        if RULE == "tcfg":
            excess -= m * (c + u)
        if state is not None:
            m += momentum * load(state, at, inside)
        if (RULE == "apg") | (RULE == "magnitude"):
            mm += m * m
        if RULE == "apg":
            mc += m * c
            cc += c * c
        if (RULE == "cfg-zero*") | (RULE == "tcfg"):
            cu += c * u
        if (RULE == "cfg-zero*") | (RULE == "magnitude"):
            uu += u * u
        if RULE == "rescale":
            size = tl.minimum(end - start, BLOCK).to(tl.float32)
            g = c + scale * m
            block_c, block_g = tl.sum(c) / size, tl.sum(g) / size
            off_c, off_g = tl.where(inside, c - block_c, 0.0), tl.where(inside, g - block_g, 0.0)
            square_c, square_g = tl.sum(off_c * off_c), tl.sum(off_g * off_g)
            mean_c, spread_c = merged(count, mean_c, spread_c, size, block_c, square_c)
            mean_g, spread_g = merged(count, mean_g, spread_g, size, block_g, square_g)
            count += size
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
def totals(table, elements, PART, PARTS, PADDED):
    """What `sums_of` returns for a whole sample, from the sums of its parts, in a fixed order.

    `table` has a row of PARTS numbers for each of them; all parts but the last have PART elements.
    """
    at = tl.arange(0, PADDED)
    sizes = tl.maximum(tl.minimum(elements - at.to(tl.int64) * PART, PART), 0).to(tl.float32)
    count = tl.cast(elements, tl.float32)
    means_c, means_g = row(table, 10, PARTS, PADDED), row(table, 11, PARTS, PADDED)
    mean_c, mean_g = tl.sum(means_c * sizes) / count, tl.sum(means_g * sizes) / count
    off_c, off_g = means_c - mean_c, means_g - mean_g
    return (
        tl.sum(row(table, 0, PARTS, PADDED)),
        tl.sum(row(table, 1, PARTS, PADDED)),
        tl.sum(row(table, 2, PARTS, PADDED)),
        tl.sum(row(table, 3, PARTS, PADDED)),
        tl.sum(row(table, 4, PARTS, PADDED)),
        tl.sum(row(table, 5, PARTS, PADDED)),
        tl.sum(row(table, 6, PARTS, PADDED)),
        tl.sum(row(table, 7, PARTS, PADDED)),
        tl.sum(row(table, 8, PARTS, PADDED)),
        tl.sum(row(table, 9, PARTS, PADDED)),
        mean_c,
        mean_g,
        tl.sum(row(table, 12, PARTS, PADDED) + off_c * off_c * sizes),
        tl.sum(row(table, 13, PARTS, PADDED) + off_g * off_g * sizes),
    )


@triton.jit
def row(table, index, PARTS, PADDED):
    """One row of a sample's table, with shape (PADDED,)."""
    at = tl.arange(0, PADDED)
    return tl.load(table + index * PARTS + at, at < PARTS, other=0.0)


@triton.jit
def gamma_of(sums):
    """The cosine of the two predictions, as `prediction.cosine` defines it."""
    aa, az, zz = sums[6], sums[7], sums[8]
    product = tl.sqrt(aa) * tl.sqrt(zz)
    safe = tl.where(product > 0, product, 1.0)
    return tl.where(product > 0, az / safe, tl.where(aa == zz, 1.0, 0.0))


@triton.jit
def coefficients(sums, scale, first, second, elements, RULE):
    """(k_c, k_m, k_u): the rule's result is ``c + k_c * c + k_m * m + k_u * u``.

    `scale` is w - 1; `first` and `second` are the numbers of `guide_launch.KERNELS`.
    """
    mm, mc, cc, cu, uu, excess = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]
    zero = tl.cast(0.0, tl.float32)
    k_c, k_m, k_u = zero, scale, zero
    if RULE == "apg":
        eta, radius = first, second
        inside = (radius <= 0) | (mm <= radius * radius)
        k_m = scale * tl.where(inside, 1.0, radius / tl.sqrt(tl.where(inside, 1.0, mm)))
        k_c = mc / tl.where(cc > 0, cc, 1.0) * k_m * (eta - 1)
    if RULE == "rescale":
        spread_c, spread = tl.sqrt(sums[12]), tl.sqrt(sums[13])
        norm = tl.sqrt(sums[13] + tl.cast(elements, tl.float32) * sums[11] * sums[11])
        # A prediction that is constant to rounding has no spread to rescale and is left alone.
        varies = spread > 16 * 1.1920928955078125e-07 * norm
        k_c = tl.where(varies, first * (spread_c / tl.where(varies, spread, 1.0) - 1), 0.0)
        k_m = scale * (1 + k_c)
    if RULE == "cfg-zero*":
        optimized = first > 0
        k_c = tl.where(optimized, scale, 0.0)
        k_m = scale - k_c
        k_u = -k_c * cu / tl.where(uu > 0, uu, 1.0)
    if RULE == "tcfg":
        # root is the hypotenuse of the two, without leaving the range of float32.
        long = tl.maximum(tl.abs(excess), 2 * tl.abs(cu))
        short = tl.minimum(tl.abs(excess), 2 * tl.abs(cu)) / tl.where(long > 0, long, 1.0)
        root = long * tl.sqrt(1 + short * short)
        safe = tl.where(root > 0, root, 1.0)
        ratio = excess / safe
        # 1 - 2 cu / root, without its cancellation where the predictions nearly agree.
        near = ratio * (excess / tl.where(cu > 0, root + 2 * cu, 1.0))
        gap = tl.where(cu > 0, near, 1 - 2 * cu / safe)
        k_c = scale * (gap - ratio) / 2
        k_m = scale * (1 + ratio) / 2
    if RULE == "magnitude":
        # Nothing is damped without an update or with alpha = 0, be u zero or not.
        length = first * tl.sqrt(mm)
        ratio = tl.where(uu > 0, length / tl.sqrt(tl.where(uu > 0, uu, 1.0)), float("inf"))
        k_m = scale * tl.where(length > 0, tl.exp(-ratio), 1.0)
    return k_c, k_m, k_u
