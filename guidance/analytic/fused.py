r"""Fused masked posterior on CUDA: distances and online softmax in one Triton kernel.

For every query and block of outputs the kernel walks over the candidates once. Differences are
squared in registers from the stored uint8, multiplied with the mask by tensor cores (each square as
the sum of two float16 factors, float32 sums), divided by :math:`2\sigma^2` and folded into running
maximum, sum and weighted sum (float32). Nothing of size [B, N, n] or [n, N] is ever written.
The reference is `posterior.posterior` with `posterior.Rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST = 181.0  # of a query's differences as they are squared: float16 holds 181^2

if triton is not None:

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        y, x, mask, out, stretch, n, count, scale,
        OUTPUTS: tl.constexpr, CANDIDATES: tl.constexpr, INNER: tl.constexpr,
    ):  # fmt: skip
        query = tl.program_id(0)
        m = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        stretched = tl.load(stretch + query)
        unit = (scale / stretched) * (scale / stretched)
        peak = tl.full((OUTPUTS,), float("-inf"), tl.float32)
        mass = tl.zeros((OUTPUTS,), tl.float32)
        total = tl.zeros((OUTPUTS,), tl.float32)
        for first in range(0, count, CANDIDATES):
            i = first + tl.arange(0, CANDIDATES)
            distances = tl.zeros((OUTPUTS, CANDIDATES), tl.float32)
            for start in range(0, n, INNER):
                j = start + tl.arange(0, INNER)
                inside = (j[:, None] < n) & (i[None, :] < count)
                # Images are stored (N, n): candidates along rows.
                raw = tl.load(x + i[None, :].to(tl.int64) * n + j[:, None], mask=inside, other=0)
                noisy = tl.load(y + query * n + j, mask=j < n, other=0.0)
                square = (noisy[:, None] - (raw.to(tl.float32) / 127.5 - 1.0)) * stretched
                square = square * square
                high = square.to(tl.float16)
                low = (square - high.to(tl.float32)).to(tl.float16)
                used = tl.load(
                    mask + m[:, None] * n + j[None, :],
                    mask=(m[:, None] < n) & (j[None, :] < n),
                    other=0,
                )
                used = used.to(tl.float16)
                distances += tl.dot(used, high)
                distances += tl.dot(used, low)
            logits = tl.where(i[None, :] < count, -distances * unit, float("-inf"))
            risen = tl.maximum(peak, tl.max(logits, 1))
            weights = tl.exp(logits - risen[:, None])
            rescale = tl.exp(peak - risen)
            value = tl.load(
                x + i[None, :].to(tl.int64) * n + m[:, None],
                mask=(m[:, None] < n) & (i[None, :] < count),
                other=0,
            )
            value = value.to(tl.float32) / 127.5 - 1.0
            mass = mass * rescale + tl.sum(weights, 1)
            total = total * rescale + tl.sum(weights * value, 1)
            peak = risen
        tl.store(out + query * n + m, total / mass, mask=m < n)


def available(y: Tensor, images: Tensor, mask: Tensor) -> bool:
    """Whether the kernel can take these: uint8 images and a binary mask, all on CUDA."""
    cuda = y.is_cuda and images.is_cuda and mask.is_cuda
    kinds = images.dtype == torch.uint8 and mask.dtype == torch.bool and y.dtype == torch.float32
    return triton is not None and cuda and kinds


def masked_posterior(y: Tensor, sigma: float, images: Tensor, mask: Tensor) -> Tensor:
    """Posterior mean with one mask per coordinate, exactly normalized; see `available`.

    Args:
        y: Noisy images, float32 (B, C, H, W).
        sigma: Noise level, > 0.
        images: uint8 (N, C, H, W), meaning [-1, 1].
        mask: M, bool (n, n).

    Returns:
        Float32 (B, C, H, W).
    """
    n, out = y[0].numel(), torch.empty_like(y, memory_format=torch.contiguous_format)
    stretch = LARGEST / (y.flatten(1).abs().amax(1) + 1)  # pixels reach from -1 to 1
    grid = (len(y), triton.cdiv(n, 64))
    _kernel[grid](
        y.contiguous(), images.contiguous(), mask.contiguous().view(torch.uint8), out,
        stretch, n, len(images), (1 / (2 * sigma**2)) ** 0.5,
        OUTPUTS=64, CANDIDATES=64, INNER=32,
    )  # fmt: skip
    return out
