r"""Masked posterior on CPUs with integer matrix products: exact sums, no intermediates.

For a binary mask M and stored bytes u the distances of the local denoiser are, up to a constant
per coordinate, sums of products of bytes once the noisy image is written in digits to the base 256:

.. math::
    \sum_j M_{mj} (2 Y_j u_{ij} - u_{ij}^2), \qquad Y = 127.5 (y + 1)

Processors with AMX tiles multiply bytes sixteen times as fast as float32, and the 32-bit sums are
exact. The only thing that is rounded is the noisy image: the result is that of a query which
differs from the one asked for by at most `ROUNDING` sigma in any coordinate. The online softmax
follows in registers; nothing of size (n, N) is ever written.

``kernel.c`` is compiled by the system's C compiler when it is first needed (as Triton does it on
CUDA) and kept in ``$XDG_CACHE_HOME/pilotage``. The reference is `posterior.posterior` with
`posterior.Rows`, which is also what runs where there is no compiler or no such processor.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .build import Unavailable, load, missing

ROUNDING = 1e-4  # of sigma: how far a coordinate of the noisy image may be moved
SIDE, CHUNK = 16, 64  # of the packed candidates, as in kernel.c
LARGEST = 2**31 // 255**2  # coordinates whose squares a 32-bit sum holds
QUERIES = 16  # handled in one walk over the candidates


def available(y: Tensor, images: Tensor, mask: Tensor) -> bool:
    """Whether these can be taken: uint8 images, a binary mask and a float32 query, on the CPU."""
    kinds = (y.dtype, images.dtype, mask.dtype) == (torch.float32, torch.uint8, torch.bool)
    here = y.device.type == images.device.type == mask.device.type == "cpu"
    return kinds and here and len(mask) <= LARGEST and not missing()


def pack(images: Tensor) -> Tensor:
    """Candidates in the order that integer products want, uint8 (tiles, chunks, 16, 16, 4).

    Four neighbouring coordinates of 16 images lie together; padded with zeros.

    Args:
        images: uint8 (N, C, H, W).
    """
    flat = images.flatten(1)
    count, n = flat.shape
    tiles, chunks = -(-count // SIDE), -(-n // CHUNK)
    packed = flat.new_zeros(tiles, chunks, SIDE, SIDE, 4)
    for start in range(0, tiles, 256):  # a block at a time, so that little is held twice
        block = flat[start * SIDE : (start + 256) * SIDE]
        wide = flat.new_zeros(-(-len(block) // SIDE) * SIDE, chunks * CHUNK)
        wide[: len(block), :n] = block
        ordered = wide.view(-1, SIDE, chunks, SIDE, 4).permute(0, 2, 3, 1, 4)
        packed[start : start + 256] = ordered
    return packed


def digits_of(y: Tensor, sigma: float) -> tuple[Tensor, Tensor] | None:
    """Noisy images in digits to the base 256.

    Args:
        y: Noisy images, (B, n).
        sigma: Noise level; see `ROUNDING`.

    Returns:
        int8 digits (B, planes, n), the lowest first, and float64 units (B,):
        :math:`127.5 (y + 1) \\approx unit \\sum_k 256^k digit_k`. None where three digits are too
        few: values that are huge beside sigma, or not finite.
    """
    bytes_ = 127.5 * (y.double() + 1)
    largest = bytes_.abs().amax(1).clamp(min=1)
    for planes in (2, 3):
        unit = largest / (127 * 256 ** (planes - 1))
        if bool((unit / 2 <= ROUNDING * sigma * 127.5).all()):
            break
    else:
        return None
    whole, digits = (bytes_ / unit[:, None]).round().long(), []
    for _ in range(planes):
        digits.append(((whole + 128) & 255) - 128)
        whole = (whole - digits[-1]) >> 8
    return torch.stack(digits, 1).to(torch.int8), unit


def masked_posterior(
    y: Tensor,
    sigma: float,
    packed: Tensor,
    mask: Tensor,
    candidates: tuple[int, int],
) -> Tensor | None:
    """Posterior mean with one mask per coordinate, exactly normalized.

    Args:
        y: Noisy images, float32 (B, C, H, W).
        sigma: Noise level, > 0 and finite.
        packed: What `pack` made of the images.
        mask: M, bool (n, n).
        candidates: First image that counts, and the one after the last.

    Returns:
        Float32 (B, C, H, W); None where `digits_of` gives None.

    Raises:
        Unavailable: no integer products on this machine.
        ValueError: images of another size, or no candidates.
        MemoryError: no memory for the intermediates of a block.
    """
    n, chunks = len(mask), packed.shape[1]
    first, last = candidates
    if y[0].numel() != n or chunks != -(-n // CHUNK):
        raise ValueError(f"query of {y[0].numel()}, mask of {n}, packed {tuple(packed.shape)}")
    if not 0 <= first < last <= len(packed) * SIDE:
        raise ValueError(f"candidates {candidates} of {len(packed) * SIDE}")
    library, why = load()
    if library is None:
        raise Unavailable(why)
    coded = digits_of(y.flatten(1), sigma)
    if coded is None:
        return None
    digits, unit = coded
    planes, stride = digits.shape[1], chunks * CHUNK
    wide = mask.new_zeros(-(-n // SIDE) * SIDE, stride, dtype=torch.uint8)
    wide[:n, :n] = mask
    left = digits.new_zeros(len(y), planes, stride)
    left[..., :n] = digits
    alpha = 1 / (2 * (127.5 * sigma) ** 2 * math.log(2))
    places = 256.0 ** torch.arange(planes, dtype=torch.float64)
    factors = torch.cat([2 * alpha * unit[:, None] * places, torch.full((len(y), 1), -alpha)], 1)
    out = torch.empty(len(y), n)
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(y), QUERIES):
            part = slice(start, start + QUERIES)
            inputs = [wide, left[part].contiguous(), factors[part].contiguous(), out[part]]
            call = functools.partial(
                library.posterior,
                packed.data_ptr(), first, last, *(tensor.data_ptr() for tensor in inputs),
                n, stride, len(out[part]), planes,
            )  # fmt: skip
            failed = pool.map(lambda worker, call=call: call(worker, workers), range(workers))
            if any(failed):
                raise MemoryError("no memory for a block of candidates")
    return (out / 127.5 - 1).view_as(y)
