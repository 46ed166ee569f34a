"""Where one way of computing ends and another begins."""

import pytest
import torch

from pilotage.guidance.analytic import (
    DatasetStatistics,
    ELSDenoiser,
    LSDenoiser,
    OptimalDenoiser,
)

from ...oracles import analytic as oracles


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("spread", "same"), [(1e-8, True), (3e-7, True), (3e-6, False)])
def test_images_that_are_the_same_but_for_rounding(spread, same):
    """A mean variance of 1e-12 a coordinate, however many images there are."""
    images = draw(1, 1, 4, 5) + spread * draw(60, 1, 4, 5, seed=1)
    if same:
        with pytest.raises(ValueError, match="all 60 images are the same"):
            DatasetStatistics.from_images(images, value_range=None)
    else:
        found = DatasetStatistics.from_images(images, value_range=None)
        assert float(found.eigenvalues.mean()) == pytest.approx(spread**2, rel=0.5)


@pytest.mark.parametrize("size", [1.0, 50.0])
@pytest.mark.parametrize("sigma", [0.5, 4.0, 30.0])
def test_large_coordinates_cost_no_precision(size, sigma):
    """Distances are products only where x^2 and <y, x> do not cancel in float32."""
    base = size * draw(1, 1, 16, 16).sign()
    images = base + 0.1 * sigma * draw(12, 1, 16, 16, seed=1)
    y = images[:3] + sigma * draw(3, 1, 16, 16, seed=2)
    exact, _, _ = oracles.coordinatewise(
        y.float(), images.float(), sigma, torch.ones(256, 256, dtype=torch.float64)
    )
    found = OptimalDenoiser(images.float(), value_range=None)(y.float(), sigma)
    lost = (found.double() - exact).abs().max()
    assert lost <= 2e-4 * sigma + 4 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("k", [0, 2, 4, 2.5])
@pytest.mark.parametrize("make", [ELSDenoiser, LSDenoiser])
def test_a_window_has_a_middle(make, k):
    with pytest.raises(ValueError, match="odd whole number"):
        make(draw(6, 1, 5, 5), k=k, value_range=None)
