r"""Masked posterior on CPUs in float32: sums of squares that masks share are made once.

Neighbouring outputs are compared on almost the same coordinates. With masks as nodes of a tree,

.. math::
    \sum_j M_{mj} s_j = \sum_j M_{pj} s_j + \sum_{j \in M_m \setminus M_p} s_j
    - \sum_{j \in M_p \setminus M_m} s_j,

so that an output costs the coordinates in which it differs from its parent p, from nothing or from
all coordinates: the smallest spanning tree under that distance (Prim). On Fashion-MNIST these are 2
to 15 % of a product with the masks. Below a noise level of `SUBTRACT`, where squares are large
beside what tells candidates apart, nothing is subtracted: a parent's mask is part of the child's.

An output's candidates whose weights hold less than `subset.TOLERANCE` of its mass together are left
out. ``kernel.c`` is compiled by the system's C compiler when it is first needed. The reference is
`posterior.posterior` with `posterior.Rows`, which is also what runs where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..integer.build import Unavailable, compile_library, processor_flags
from ..subset import TOLERANCE

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
LEVELS = {  # of x86-64, and what Linux calls their instructions
    "-march=x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "-march=x86-64-v3": {"avx2", "fma", "f16c", "bmi1", "bmi2"},
}
SIDE = 32  # of the packed candidates, as in kernel.c
LARGEST = 4096  # coordinates: a plan compares all masks with all
QUERIES = 16  # handled in one walk over the candidates
SUBTRACT = 0.25  # noise level


@dataclass(frozen=True)
class Plan:
    """How distances follow from each other: int32 tensors as in kernel.c.

    Args:
        order: The outputs, parents first, (n,).
        parents: An output, -1 (nothing) or -2 (all coordinates), (n,).
        starts: Where the coordinates begin that each adds and takes away, (2 n + 1,).
        coordinates: These.
    """

    order: Tensor
    parents: Tensor
    starts: Tensor
    coordinates: Tensor


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is missing."""
    found = processor_flags()
    level = next((flag for flag, needed in LEVELS.items() if needed <= found), None)
    if platform.machine() != "x86_64" or level is None:
        return None, "not Linux on a processor with AVX2"
    try:
        library = ctypes.CDLL(str(compile_library(SOURCE, (*FLAGS, level))))
    except (Unavailable, OSError) as error:
        return None, str(error)
    pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    library.posterior.argtypes = [pointer, number, number, pointer, real, number, number]
    library.posterior.argtypes += [pointer] * 4 + [real, pointer, number, number]
    return library, ""


def missing() -> str:
    """Why this cannot run on this machine; empty if it can."""
    return load()[1]


def available(y: Tensor, images: Tensor, mask: Tensor) -> bool:
    """Whether these can be taken: uint8 images, a binary mask and a float32 query, on the CPU."""
    kinds = (y.dtype, images.dtype, mask.dtype) == (torch.float32, torch.uint8, torch.bool)
    here = y.device.type == images.device.type == mask.device.type == "cpu"
    return kinds and here and len(mask) <= LARGEST and not missing()


def pack(images: Tensor) -> Tensor:
    """Candidates of a block side by side, uint8 (blocks, n, SIDE), padded with zeros.

    Args:
        images: uint8 (N, C, H, W).
    """
    flat = images.flatten(1)
    count, n = flat.shape
    packed = flat.new_zeros(-(-count // SIDE), n, SIDE)
    whole = count // SIDE
    for start in range(0, whole, 64):  # a part at a time, so that little is held twice
        part = flat[start * SIDE : min(start + 64, whole) * SIDE]
        packed[start : start + 64][: len(part) // SIDE] = part.view(-1, SIDE, n).transpose(1, 2)
    if count > whole * SIDE:
        packed[-1, :, : count - whole * SIDE] = flat[whole * SIDE :].T
    return packed


def plan(mask: Tensor, subtract: bool) -> Plan:
    """The tree of masks (n, n), bool.

    Args:
        mask: Row m is what output m is compared on.
        subtract: Whether a parent may have what the child has not.
    """
    n, rows = len(mask), mask.float()
    sizes, both = rows.sum(1), rows @ rows.T
    start = torch.minimum(sizes, n - sizes) if subtract else sizes
    cost, parents = start.clone(), torch.full((n,), -1)
    if subtract:
        parents[n - sizes < sizes] = -2
        order, left = [], torch.zeros(n)  # infinity for those that are done
        for _ in range(n):
            node = int((cost + left).argmin())
            order.append(node)
            left[node] = math.inf
            change = sizes + sizes[node] - 2 * both[node]
            nearer = (change < cost) & (left == 0)
            cost[nearer], parents[nearer] = change[nearer], node
    else:
        order = sizes.argsort(stable=True).tolist()
        change = sizes[:, None] - sizes[None]  # of an output (row) from a parent whose mask it has
        inside = (both == sizes[None]) & (change > 0)
        least, which = change.where(inside, math.inf).min(1)
        nearer = least < cost
        parents[nearer] = which[nearer]
        # Equal masks: each from the one before it.
        for one, other in zip(order[1:], order, strict=False):
            if sizes[one] == sizes[other] == both[one, other]:
                parents[one] = other
    lists, starts = [], [0]
    base = {-1: mask.new_zeros(n), -2: mask.new_ones(n)}
    for node in order:
        parent = int(parents[node])
        known = base[parent] if parent < 0 else mask[parent]
        for part in (mask[node] & ~known, known & ~mask[node]):
            lists.append(part.nonzero()[:, 0])
            starts.append(starts[-1] + len(lists[-1]))
    numbers = (torch.tensor(order), parents[order], torch.tensor(starts), torch.cat(lists))
    return Plan(*(part.to(torch.int32) for part in numbers))


def masked_posterior(
    y: Tensor, sigma: float, packed: Tensor, plan: Plan, candidates: tuple[int, int]
) -> Tensor:
    """Posterior mean with one mask per coordinate, exactly normalized.

    Args:
        y: Noisy images, float32 (B, C, H, W).
        sigma: Noise level, > 0 and finite.
        packed: What `pack` made of the images.
        plan: What `plan` made of the masks.
        candidates: First image that counts, and the one after the last.

    Returns:
        Float32 (B, C, H, W).

    Raises:
        Unavailable: this cannot run on this machine.
        ValueError: images of another size, or no candidates.
        MemoryError: no memory for the intermediates of a block.
    """
    n, (first, last) = packed.shape[1], candidates
    if y[0].numel() != n or len(plan.order) != n:
        raise ValueError(f"query of {y[0].numel()}, plan of {len(plan.order)}, packed {n}")
    if not 0 <= first < last <= len(packed) * SIDE:
        raise ValueError(f"candidates {candidates} of {len(packed) * SIDE}")
    library, why = load()
    if library is None:
        raise Unavailable(why)
    noisy = ((y.flatten(1) + 1) * 127.5).contiguous()
    alpha = 1 / (2 * (127.5 * sigma) ** 2 * math.log(2))
    limit = math.log2((last - first) / TOLERANCE)
    workers, parts = torch.get_num_threads(), []
    with ThreadPoolExecutor(workers) as pool:
        for part in noisy.split(QUERIES):
            states = torch.empty(workers, len(part), n, 3)
            call = functools.partial(
                library.posterior,
                packed.data_ptr(), first, last, part.data_ptr(), alpha, n, len(part),
                plan.order.data_ptr(), plan.parents.data_ptr(), plan.starts.data_ptr(),
                plan.coordinates.data_ptr(), limit,
            )  # fmt: skip
            failed = pool.map(
                lambda worker, call=call, states=states: call(
                    states[worker].data_ptr(), worker, workers
                ),
                range(workers),
            )
            if any(failed):
                raise MemoryError("no memory for a block of candidates")
            best, mass, total = states.unbind(-1)
            share = torch.exp2(best.amin(0) - best)
            parts.append((share * total).sum(0) / (share * mass).sum(0))
    return (torch.cat(parts) / 127.5 - 1).view_as(y)
