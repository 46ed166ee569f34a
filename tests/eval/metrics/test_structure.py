"""MS-SSIM and LPIPS against independent computations."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch.nn import functional
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as reference_ms_ssim,
)

from pilotage.eval.metrics.lpips import LPIPS
from pilotage.eval.metrics.ms_ssim import ms_ssim


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def similar(side=(179, 206), seed=0):
    """Pictures with structure at every scale, and noisy copies of other contrast."""
    x = functional.interpolate(rand(2, 3, 12, 12, seed=seed), side, mode="bicubic").clamp(0, 1)
    x = (0.7 * x + 0.2 * rand(2, 3, *side, seed=seed + 1)).clamp(0, 1)
    return x, (0.8 * x + 0.15 * rand(2, 3, *side, seed=seed + 2)).clamp(0, 1)


def by_scipy(x, y):
    """MS-SSIM of two channels in float64, with scipy's Gaussian filter."""
    x, y, product = x.double().numpy(), y.double().numpy(), 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):

        def smooth(z):
            return gaussian_filter(z, 1.5, truncate=5 / 1.5, mode="reflect")[5:-5, 5:-5]

        mx, my = smooth(x), smooth(y)
        vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        value = (2 * cov + 0.0009) / (vx + vy + 0.0009)
        if scale == 4:
            value = value * (2 * mx * my + 0.0001) / (mx**2 + my**2 + 0.0001)
        product *= max(value.mean(), 0) ** weight
        height, width = (n // 2 * 2 for n in x.shape)
        x, y = (
            z[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3)) for z in (x, y)
        )
    return product


def test_ms_ssim_is_its_definition():
    x, y = similar()
    expected = [np.mean([by_scipy(x[i, c], y[i, c]) for c in range(3)]) for i in range(2)]
    assert ms_ssim(x, y).tolist() == pytest.approx(expected, abs=1e-4)
    assert 0.3 < min(expected) < max(expected) < 0.99
    torch.testing.assert_close(ms_ssim(x, x), torch.ones(2))
    assert ms_ssim(x, 1 - x).max() < 0.1


def test_ms_ssim_is_torchmetrics_for_one_channel():
    """It takes the mean over channels before the product, so channels must be equal here."""
    x, y = (z[:, :1].expand(-1, 3, -1, -1) for z in similar(seed=5))
    expected = reference_ms_ssim(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(x, y), expected, atol=2e-3, rtol=0)


def test_ms_ssim_of_small_pictures():
    assert ms_ssim(rand(1, 3, 176, 176), rand(1, 3, 176, 176, seed=1)).isfinite().all()
    with pytest.raises(ValueError, match="at least 176x176 pixels, got 200x175: use SSIM"):
        ms_ssim(rand(1, 3, 175, 200), rand(1, 3, 175, 200))
    with pytest.raises(ValueError, match="shapes"):
        ms_ssim(rand(1, 3, 176, 176), rand(1, 3, 176, 177))


SHAPES = {
    "features.0": (64, 3, 11, 11),
    "features.3": (192, 64, 5, 5),
    "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3),
    "features.10": (256, 256, 3, 3),
}


@pytest.fixture(scope="module")
def weights():
    """Random weights with the names and shapes of the published files."""
    found = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        scale = (2 / np.prod(shape[1:])) ** 0.5
        found[f"{name}.weight"] = (rand(*shape, seed=number) - 0.5) * 3 * scale
        found[f"{name}.bias"] = rand(shape[0], seed=10 + number) - 0.5
        found[f"lin{number}.model.1.weight"] = rand(1, shape[0], 1, 1, seed=20 + number)
    return found


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, path)
    return path


def by_definition(weights, x, y):
    """LPIPS in float64, layer by layer, position by position."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    settings = [(4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False)]
    maps = [((2 * z.double() - 1) - shift) / scale for z in (x, y)]
    total = 0.0
    for number, (name, (stride, padding, pool)) in enumerate(zip(SHAPES, settings, strict=True)):
        for i in range(2):
            z = maps[i][None]
            if pool:
                z = functional.max_pool2d(z, kernel_size=3, stride=2)
            w, b = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
            maps[i] = functional.conv2d(z, w, b, stride, padding)[0].clamp(min=0)
        head = weights[f"lin{number}.model.1.weight"].double().flatten()
        one, other = (m / m.norm(dim=0, keepdim=True).clamp(min=1e-10) for m in maps)
        height, width = one.shape[1:]
        places = [(h, w) for h in range(height) for w in range(width)]
        total += sum(float(((one - other)[:, h, w] ** 2) @ head) for h, w in places) / len(places)
    return total


def test_lpips_is_its_definition(file, weights):
    metric = LPIPS(file)
    x, y = rand(2, 3, 40, 47), rand(2, 3, 40, 47, seed=1)
    expected = [by_definition(weights, a, b) for a, b in zip(x, y, strict=True)]
    assert metric(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert metric(x, x).tolist() == [0, 0]
    torch.testing.assert_close(metric(x, y), metric(y, x))


def test_lpips_says_what_it_needs(file, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no LPIPS weights at .*alexnet-owt-7be5be79"):
        LPIPS(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="does not hold the weights of LPIPS.*features.0.weight"):
        LPIPS(other)
    torch.save(weights, other)
    with pytest.raises(ValueError, match="does not hold the weights of LPIPS as safetensors"):
        LPIPS(other)
    with pytest.raises(ValueError, match="at least 31x31 pixels, got 40x30"):
        LPIPS(file)(rand(1, 3, 30, 40), rand(1, 3, 30, 40))
    assert LPIPS(file)(rand(1, 3, 31, 31), rand(1, 3, 31, 31, seed=1)) > 0
