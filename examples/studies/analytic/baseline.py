r"""The denoisers as one would write them down: the baselines of the speed comparisons.

From the formulas of Lukoianov et al. (https://arxiv.org/abs/2509.09672): `local_denoiser` has the
mask by rows as in their text (their code takes columns), dense, and, as in their code, the softmax
is normalized within each mini-batch and batches are averaged; `decoding` reads the data set through
a DataLoader at every call as theirs does, `resident` has it in memory as float32. They are ours; no
published code is in them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    """Stored pictures (N, C, H, W), uint8, decoded one at a time the way data sets do.

    From array to PIL image to floats in [-1, 1], at every access.
    """

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"expected uint8 (N, 1 or 3, H, W), got {images.dtype} {images.shape}")
        self.arrays = images.permute(0, 2, 3, 1).squeeze(-1).numpy()

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.fromarray(self.arrays[index])
        raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = raw.view(picture.height, picture.width, -1).permute(2, 0, 1)
        return image.float() / 127.5 - 1


def decoding(images: Tensor, minibatch: int = 256) -> Iterable[Tensor]:
    """Batches (b, C, H, W) of stored pictures, decoded anew every time they are walked over."""
    return DataLoader(Pictures(images), batch_size=minibatch)


def resident(images: Tensor, minibatch: int = 256) -> list[Tensor]:
    """Batches (b, C, H, W) of stored pictures, decoded once: float32 in memory."""
    return list((images.float() / 127.5 - 1).split(minibatch))


def optimal_denoiser(batches: Iterable[Tensor], y: Tensor, sigma: float) -> Tensor:
    """One call of the optimal denoiser: y (B, C, H, W) against all pictures of all batches."""
    found = []
    for query in y.flatten(1):
        distances = torch.cat([(query - x.flatten(1)).square().sum(1) for x in batches])
        weights = torch.softmax(-distances / (2 * sigma**2), 0)
        parts = weights.split([len(x) for x in batches])
        pairs = zip(parts, batches, strict=True)
        found.append(sum(part @ x.flatten(1) for part, x in pairs))
    return torch.stack(found).view_as(y)


def optimal_product(matrix: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The same with distances as matrix products, x^2 - 2 <y, x>, of all pictures (N, n) at once.

    Faster, and off by rounding at low noise.
    """
    distances = matrix.square().sum(1) - 2 * y.flatten(1) @ matrix.T
    return (torch.softmax(-distances / (2 * sigma**2), 1) @ matrix).view_as(y)


def local_denoiser(
    batches: Iterable[Tensor], wiener: Tensor, y: Tensor, sigma: float, *, tau: float
) -> Tensor:
    """One call of the local analytic denoiser.

    Args:
        batches: The data set, `decoding` or `resident`; one softmax is normalized over a batch.
        wiener: Wiener matrix at this noise level, float32 (n, n); its making is not part of the
            comparison.
        y: Noisy images x0 + sigma z, float32 (B, C, H, W).
        sigma: Noise level.
        tau: Threshold of the mask.

    Returns:
        Denoised images (B, C, H, W).
    """
    diagonal = wiener.diagonal()
    ratio = wiener / diagonal.where(diagonal.abs() >= 1e-6, 1)[:, None]
    mask = (ratio.abs() >= tau * ratio.abs().max()).float()
    total, count = torch.zeros_like(y).flatten(1), 0
    for batch in batches:
        x = batch.flatten(1)
        for b, query in enumerate(y.flatten(1)):
            distances = (query - x).square() @ mask.T
            weights = torch.softmax(-distances / (2 * sigma**2), 0)
            total[b] += (weights * x).sum(0)
        count += 1
    return (total / count).view_as(y)
