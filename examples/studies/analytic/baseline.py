r"""The local denoiser as one would write it down: the baseline of the speed comparison.

From the formulas of Lukoianov et al. (https://arxiv.org/abs/2509.09672), with the mask by rows as
in their text (their code takes columns): masks are dense, and, as in their code, the data set is
decoded through a DataLoader at every call, the softmax is normalized within each mini-batch and
batches are averaged. It is ours; no published code is in it.
"""

from __future__ import annotations

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


def local_denoiser(
    pictures: Dataset,
    wiener: Tensor,
    y: Tensor,
    sigma: float,
    *,
    tau: float,
    minibatch: int = 256,
    workers: int = 0,
) -> Tensor:
    """One call of the local analytic denoiser.

    Args:
        pictures: The data set.
        wiener: Wiener matrix at this noise level, float32 (n, n); its making is not part of the
            comparison.
        y: Noisy images x0 + sigma z, float32 (B, C, H, W).
        sigma: Noise level.
        tau: Threshold of the mask.
        minibatch: Images over which one softmax is normalized.
        workers: Processes of the DataLoader.

    Returns:
        Denoised images (B, C, H, W).
    """
    diagonal = wiener.diagonal()
    ratio = wiener / diagonal.where(diagonal.abs() >= 1e-6, 1)[:, None]
    mask = (ratio.abs() >= tau * ratio.abs().max()).float()
    total, batches = torch.zeros_like(y).flatten(1), 0
    for batch in DataLoader(pictures, batch_size=minibatch, num_workers=workers):
        x = batch.flatten(1)
        for b, query in enumerate(y.flatten(1)):
            distances = (query - x).square() @ mask.T
            weights = torch.softmax(-distances / (2 * sigma**2), 0)
            total[b] += (weights * x).sum(0)
        batches += 1
    return (total / batches).view_as(y)
