"""Statistics of pictures that need no network: saturation, contrast, colourfulness, similarity.

Pictures are tensors (N, 3, H, W) in [0, 1], RGB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R Rec. 601
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
C1, C2 = 0.01**2, 0.03**2


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """PIL pictures of one size as float32 (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: no pictures, or pictures of different sizes.
    """
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    if not arrays:
        raise ValueError("no pictures")
    sizes = {array.shape[:2] for array in arrays}
    if len(sizes) > 1:
        raise ValueError(f"pictures of different sizes (height, width): {sorted(sizes)}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def checked_pictures(images: Tensor) -> Tensor:
    """Pictures as they are.

    Raises:
        ValueError: another shape than (N, 3, H, W), or NaN.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected RGB pictures (N, 3, H, W), got shape {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("pictures contain NaN or infinity")
    return images


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation of each picture, shape (N,), in [0, 1].

    S = (max - min) / max over the colour channels of a pixel, 0 for black. The APG paper does not
    say which saturation it reports; this definition is ours.
    """
    images = checked_pictures(images)
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.where(high > 0, 1)).flatten(1).mean(1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the Rec. 601 luma of each picture, shape (N,), in [0, 0.5].

    The population deviation over pixels. As for `saturation`, the definition is ours.
    """
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    luma = torch.einsum("nchw,c->nhw", checked_pictures(images), weights)
    return luma.flatten(1).std(1, correction=0)


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness M3 of each picture (Hasler & Süsstrunk 2003), shape (N,), for [0, 255] RGB.

    With rg = R - G and yb = (R + G) / 2 - B: the length of their deviations plus 0.3 times the
    length of their means, over the pixels. The paper's words: 0 none, 33 moderate, 109 extreme.
    """
    red, green, blue = (checked_pictures(images) * 255).unbind(1)
    rg, yb = (red - green).flatten(1), ((red + green) / 2 - blue).flatten(1)
    deviation = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return deviation + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture to its reference (Wang et al. 2004), shape (N,).

    Gaussian window of 11 pixels with sigma 1.5, K = (.01, .03), values in [0, 1], the mean over all
    pixels and channels, in float64. At the border pictures are mirrored (the edge pixel is not
    repeated); the paper's own code leaves out a border of five pixels instead. The values are those
    of torchmetrics 1.4.2 to 1.9; its version 1.4.0 leaves out the border.

    Raises:
        ValueError: a picture is smaller than the window, or the shapes differ.
    """
    x, y = _checked_pair(images, reference)
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs pictures of {WINDOW}x{WINDOW} pixels or more, got "
            f"{x.shape[3]}x{x.shape[2]}"
        )
    # One by one, as large pictures in float64 take much memory.
    pairs = zip(x.split(1), y.split(1), strict=True)
    return torch.cat([_ssim(*pair) for pair in pairs]).to(images.dtype)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture to its reference in dB, shape (N,).

    Of values in [0, 1], over all channels. Infinity for equal pictures.

    Raises:
        ValueError: the shapes differ.
    """
    x, y = _checked_pair(images, reference)
    return (-10 * (x - y).square().flatten(1).mean(1).log10()).to(images.dtype)


def _checked_pair(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64."""
    if images.shape != reference.shape:
        raise ValueError(
            f"shapes differ: {tuple(images.shape)} and, of the reference, {tuple(reference.shape)}"
        )
    return checked_pictures(images).double(), checked_pictures(reference).double()


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = (_blurred(x * x) - mean_x.square()).clamp(min=0)
    var_y = (_blurred(y * y) - mean_y.square()).clamp(min=0)
    shared = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * shared + C2) / (var_x + var_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def _blurred(images: Tensor) -> Tensor:
    """Every pixel's mean under the Gaussian window, the pictures mirrored at their borders."""
    radius = WINDOW // 2
    heights = [math.exp(-((i - radius) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    blurred = torch.nn.functional.pad(images, [radius] * 4, mode="reflect")
    # Sums of shifted pictures, as PyTorch's convolutions in float64 are slow.
    for dim in (2, 3):
        shifted = [blurred.narrow(dim, i, images.shape[dim]) for i in range(WINDOW)]
        total = torch.zeros_like(shifted[0])
        for height, part in zip(heights, shifted, strict=True):
            total.add_(part, alpha=height / sum(heights))
        blurred = total
    return blurred
