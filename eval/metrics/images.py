"""Statistics of pictures that need no network: saturation, contrast, colourfulness, similarity.

Pictures are tensors (N, 3, H, W) in [0, 1], RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .extractors import torchmetrics

LUMA = (0.299, 0.587, 0.114)  # ITU-R Rec. 601


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


def _checked(images: Tensor) -> Tensor:
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
    images = _checked(images)
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.where(high > 0, 1)).flatten(1).mean(1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the Rec. 601 luma of each picture, shape (N,), in [0, 0.5].

    The population deviation over pixels. As for `saturation`, the definition is ours.
    """
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    luma = torch.einsum("nchw,c->nhw", _checked(images), weights)
    return luma.flatten(1).std(1, correction=0)


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness M3 of each picture (Hasler & Süsstrunk 2003), shape (N,), for [0, 255] RGB.

    With rg = R - G and yb = (R + G) / 2 - B: the length of their deviations plus 0.3 times the
    length of their means, over the pixels. The paper's words: 0 none, 33 moderate, 109 extreme.
    """
    red, green, blue = (_checked(images) * 255).unbind(1)
    rg, yb = (red - green).flatten(1), ((red + green) / 2 - blue).flatten(1)
    deviation = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return deviation + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture to its reference, shape (N,).

    torchmetrics' SSIM (Gaussian window of 11 pixels, sigma 1.5, range 1), over all channels.
    """
    return torchmetrics("functional.image").structural_similarity_index_measure(
        _checked(images), _checked(reference), data_range=1.0, reduction="none"
    )


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture to its reference in dB, shape (N,).

    torchmetrics' (range 1). Infinity for equal pictures.
    """
    return torchmetrics("functional.image").peak_signal_noise_ratio(
        _checked(images), _checked(reference), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )


PER_PICTURE: dict[str, Callable[[Tensor], Tensor]] = {
    "saturation": saturation,
    "contrast": contrast,
    "colourfulness": colourfulness,
}
TO_BASELINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ssim": ssim, "psnr": psnr}
