r"""Masked posterior on CPUs with integer matrix products: exact sums, no intermediates.

For a binary mask M and stored bytes u the distances of the local denoiser are, up to a constant
per coordinate, sums of products of bytes once the noisy image is written in digits to the base 256:

.. math::
    \sum_j M_{mj} (2 Y_j u_{ij} - u_{ij}^2), \qquad Y = 127.5 (y + 1)

Processors with AMX tiles multiply bytes sixteen times as fast as float32, and the 32-bit sums are
exact. The only thing that is rounded is the noisy image: the result is that of a query which
differs from the one asked for by at most `ROUNDING` sigma in any coordinate. The online softmax
follows in registers; nothing of size (n, N) is ever written.

``integer.c`` is compiled by the system's C compiler when it is first needed (as Triton does it on
CUDA) and kept in ``$XDG_CACHE_HOME/pilotage``. The reference is `posterior.posterior` with
`posterior.Rows`, which is also what runs where there is no compiler or no such processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("integer.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-march=x86-64-v4", "-mamx-tile", "-mamx-int8")
NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "amx_tile", "amx_int8"}
ROUNDING = 1e-4  # of sigma: how far a coordinate of the noisy image may be moved
SIDE, CHUNK = 16, 64  # of the packed candidates, as in integer.c
LARGEST = 2**31 // 255**2  # coordinates whose squares a 32-bit sum holds
QUERIES = 16  # handled in one walk over the candidates


class Unavailable(RuntimeError):
    """No integer products here; the message says what is missing."""


def processor_flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def cache_folder() -> Path:
    """Where compiled code is kept.

    Raises:
        Unavailable: the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilotage"
    except RuntimeError as error:
        raise Unavailable(f"nowhere to keep compiled code, set XDG_CACHE_HOME: {error}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compile_library() -> Path:
    """Compile ``integer.c`` unless that is done already; the file.

    It is named after what it is made of and after what it holds: a damaged one is not loaded.

    Raises:
        Unavailable: no C compiler, one that does not know the instructions, or nowhere to write.
    """
    text = SOURCE.read_bytes()
    folder, name = cache_folder(), f"integer-{_digest(text + ' '.join(FLAGS).encode())}"
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang) on the path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            made = Path(build) / "integer.so"
            command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            path = folder / f"{name}-{_digest(made.read_bytes())}.so"
            os.replace(made, path)
    except OSError as error:
        raise Unavailable(f"cannot compile into {folder}: {error}") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} cannot compile {SOURCE.name}: {error.stderr}") from None
    return path


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is missing."""
    lacking = NEEDED - processor_flags()
    if platform.machine() != "x86_64" or lacking:
        return None, f"not Linux on a processor with AMX (without {', '.join(sorted(lacking))})"
    try:
        library = ctypes.CDLL(str(compile_library()))
    except (Unavailable, OSError) as error:
        return None, str(error)
    if not library.permit_tiles():
        return None, "the system does not let processes use AMX tiles"
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.posterior.argtypes = [pointer, number, number, pointer, pointer, pointer, pointer]
    library.posterior.argtypes += [number] * 3 + [ctypes.c_int] + [number] * 2
    return library, ""


def missing() -> str:
    """Why there are no integer products on this machine; empty if there are."""
    return _load()[1]


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
    library, why = _load()
    if library is None:
        raise Unavailable(why)
    n, chunks = len(mask), packed.shape[1]
    first, last = candidates
    if y[0].numel() != n or chunks != -(-n // CHUNK):
        raise ValueError(f"query of {y[0].numel()}, mask of {n}, packed {tuple(packed.shape)}")
    if not 0 <= first < last <= len(packed) * SIDE:
        raise ValueError(f"candidates {candidates} of {len(packed) * SIDE}")
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
