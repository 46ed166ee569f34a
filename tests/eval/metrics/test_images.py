"""Picture statistics against colours whose values are known by hand."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_ssim_is_one_for_equal_pictures_and_less_otherwise():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    darker = images.clone()
    darker[1] *= 0.5
    values = ssim(darker, images)
    assert values[0] == pytest.approx(1) and values[1] < 0.95


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
