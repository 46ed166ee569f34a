"""Picture statistics against colours whose values are known by hand."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from pilotage.eval.metrics.images import colourfulness, contrast, psnr, saturation, ssim, to_tensor


def flat(*colours, size=16):
    """One picture per colour (r, g, b)."""
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, size, size).contiguous()


def test_saturation_of_known_colours():
    images = flat((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1.0, 0.5, 0.75))
    torch.testing.assert_close(saturation(images), torch.tensor([1.0, 0.0, 0.0, 0.5]))


def test_saturation_is_the_standard_librarys_hsv():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for image, value in zip(images, saturation(images), strict=True):
        pixels = image.flatten(1).T.tolist()
        expected = np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels])
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_contrast_of_a_half_black_picture():
    images = flat((1.0, 1.0, 1.0), (0.3, 0.3, 0.3))
    images[0, :, :8] = 0
    torch.testing.assert_close(contrast(images), torch.tensor([0.5, 0.0]), atol=1e-6, rtol=1e-5)


def test_contrast_weighs_channels_as_rec_601():
    images = flat((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    images[:, :, :8] = 0
    expected = torch.tensor([0.299, 0.587, 0.114]) / 2
    torch.testing.assert_close(contrast(images), expected, atol=1e-6, rtol=1e-5)


def ssim_of_scipy(x, y):
    """Wang et al. 2004, formula (13), in float64; scipy's mirror does not repeat the edge pixel."""

    def mean(image):
        return gaussian_filter(image, 1.5, mode="mirror", radius=5, axes=(1, 2))

    x, y = x.double().numpy(), y.double().numpy()
    c1, c2, mx, my = 0.01**2, 0.03**2, mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    above = (2 * mx * my + c1) * (2 * cov + c2)
    return (above / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()


def pairs(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *size, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    return images, torch.stack([smooth[0], images[1] * 0.5, 1 - images[2]])


@pytest.mark.parametrize("size", [(11, 11), (12, 31), (40, 24)])
def test_ssim_is_the_papers_formula(size):
    images, others = pairs(size)
    expected = torch.tensor(
        [ssim_of_scipy(x, y) for x, y in zip(images, others, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(ssim(images, others), expected, rtol=1e-12, atol=1e-13)
    single = ssim(images.float(), others.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


def test_ssim_and_psnr_are_those_of_torchmetrics():
    """Of the tested version: stored figures were made with it."""
    images, others = pairs((40, 24))
    expected = structural_similarity_index_measure(images, others, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(images, others), expected, rtol=1e-10, atol=1e-10)
    expected = peak_signal_noise_ratio(
        images, others, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    # Its logarithm of 10 is in float32.
    torch.testing.assert_close(psnr(images, others), expected, rtol=1e-6, atol=0)


def test_ssim_is_one_for_equal_pictures():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(images, images), torch.ones(3), rtol=0, atol=1e-7)
    flat_pair = flat((0.99, 0.99, 0.99)), flat((0.99, 0.99, 0.99)) - 1e-4
    assert ssim(*flat_pair).item() > 0.9999


@pytest.mark.parametrize("size", [(10, 40), (40, 10), (1, 1)])
def test_pictures_smaller_than_the_window(size):
    images = torch.zeros(1, 3, *size)
    with pytest.raises(ValueError, match=f"11x11 pixels or more, got {size[1]}x{size[0]}"):
        ssim(images, images)


@pytest.mark.parametrize("metric", [ssim, psnr])
def test_pairs_of_different_shapes(metric):
    with pytest.raises(ValueError, match="shapes differ"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))


def test_bad_pictures():
    with pytest.raises(ValueError, match="no pictures"):
        to_tensor([])
    with pytest.raises(ValueError, match="different sizes"):
        to_tensor([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))])
    with pytest.raises(ValueError, match="shape"):
        saturation(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="NaN"):
        contrast(torch.full((1, 3, 8, 8), float("nan")))


def test_colourfulness_of_known_pictures():
    """A half red, half green picture: rg = ±255, yb = 127.5 everywhere."""
    images = flat((1.0, 0.0, 0.0), (0.4, 0.4, 0.4))
    images[0, 0, :8], images[0, 1, :8] = 0, 1
    expected = torch.tensor([255 + 0.3 * 127.5, 0.0])
    torch.testing.assert_close(colourfulness(images), expected, atol=1e-4, rtol=1e-5)


def test_colourfulness_is_the_papers_formula():
    images = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for image, value in zip(images.double().numpy() * 255, colourfulness(images), strict=True):
        rg, yb = image[0] - image[1], 0.5 * (image[0] + image[1]) - image[2]
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_psnr_of_a_known_error():
    images = torch.full((3, 3, 8, 8), 0.5)
    other = images + torch.tensor([0.1, 0.01, 0.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        psnr(other, images), torch.tensor([20.0, 40.0, torch.inf]), rtol=1e-4, atol=0
    )
