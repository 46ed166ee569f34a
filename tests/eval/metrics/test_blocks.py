"""Blocks of float32 against whole matrices of float64: equal counts, whatever is nearly tied."""

import itertools

import pytest
import torch

from pilotage.eval.metrics import blocks
from pilotage.eval.metrics.blocks import dots, nearest, prepared, slices
from pilotage.eval.metrics.kid import kernel_distance
from pilotage.eval.metrics.precision_recall import neighbour_metrics


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(a, b):
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def brute_force(real, fake, k=3, k_density=5):
    """All four metrics from whole matrices of float64 distances."""
    own, other, cross = exactly(real, real), exactly(fake, fake), exactly(fake, real)

    def radius(distances, k):
        return distances.sort(1).values[:, k]  # the row itself comes first

    near, wide = cross <= radius(own, k), cross <= radius(own, k_density)
    back = cross <= radius(other, k)[:, None]
    shares = near.any(1).double().mean().item(), back.any(0).double().mean().item()
    density = wide.sum().item() / (k_density * len(fake))
    return shares, (density, wide.any(0).double().mean().item())


def kid(real, fake):
    """From whole matrices of float64 kernels."""
    real, fake = real.double(), fake.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def own(x):
        return (kernel(x, x).sum() - kernel(x, x).trace()) / (len(x) * (len(x) - 1))

    return float(own(real) + own(fake) - 2 * kernel(real, fake).mean())


def grid():
    """Integers: nearly every distance occurs many times."""
    return torch.tensor(list(itertools.product(range(5), repeat=3)), dtype=torch.float64)


def near_ties(seed):
    """Pictures on spheres around a few centres, whose radii differ by 1e-9 or not at all."""
    centres = 1000 + 10 * randn(12, 16)
    directions = torch.nn.functional.normalize(randn(12, 20, 16, seed=seed), dim=2)
    radii = 1 + 1e-9 * torch.arange(20).sub(10).div(4, rounding_mode="floor").double()
    return (centres[:, None] + radii[:, None] * directions).flatten(0, 1)


CASES = {
    "normal": (randn(150, 24), 0.8 * randn(120, 24, seed=1) + 0.1),
    "float32, far from zero": (
        (500 + randn(150, 24)).float(),
        (500 + randn(130, 24, seed=1)).float(),
    ),
    "differences below float32": (1e4 + 1e-4 * randn(90, 8), 1e4 + 1e-4 * randn(90, 8, seed=1)),
    "grid": (grid(), grid() + 1),
    "half a grid apart": (grid(), grid() + 0.5),
    "near ties": (near_ties(1), near_ties(2)),
    "copies": (randn(20, 6).repeat(6, 1), torch.cat([randn(20, 6), randn(40, 6, seed=1)])),
    "copies only": (torch.ones(40, 5), torch.ones(30, 5)),
    "a tenth each far apart": (
        randn(100, 6) * torch.logspace(-15, 15, 100, dtype=torch.float64)[:, None],
        randn(100, 6, seed=1) * torch.logspace(-15, 15, 100, dtype=torch.float64)[:, None],
    ),
    "huge": (1e25 * randn(60, 9), 1e25 * randn(60, 9, seed=1)),
    "tiny": (1e-25 * randn(60, 9), 1e-25 * randn(60, 9, seed=1)),
}


@pytest.mark.parametrize("block", [700, 2**22])
@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_float64(monkeypatch, name, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    real, fake = CASES[name]
    assert neighbour_metrics(real, fake) == brute_force(real, fake)
    assert neighbour_metrics(fake, real, 1, 7) == brute_force(fake, real, 1, 7)


@pytest.mark.parametrize("name", CASES)
def test_nearest_is_that_of_float64(monkeypatch, name):
    monkeypatch.setattr(blocks, "BLOCK", 900)
    real, fake = CASES[name]
    one, other = prepared(real, fake)
    values, order = exactly(fake, real).sort(dim=1, stable=True)
    distances, found = nearest(other, one, 4)
    assert torch.equal(distances, values[:, :4]) and torch.equal(found, order[:, :4])
    table = exactly(real, real).fill_diagonal_(torch.inf)
    distances, found = nearest(one, one, 2)
    assert torch.equal(distances, table.sort(1).values[:, :2])
    assert not (found == torch.arange(len(real))[:, None]).any()


def test_kid_is_that_of_float64(monkeypatch):
    """Features as networks give them: not negative, their mean larger than their spread."""
    for block in (100_000, 2**22):
        monkeypatch.setattr(blocks, "BLOCK", block)
        real, fake = (randn(1100, 96) + 1).relu(), (1.05 * randn(900, 96, seed=1) + 1).relu()
        expected = kid(real, fake)
        assert kernel_distance(real, fake).value == pytest.approx(expected, rel=1e-6)
        assert kernel_distance(real.float(), fake.float()).value == pytest.approx(
            kid(real.float(), fake.float()), rel=1e-6
        )
        far = kernel_distance(real + 30, fake + 30).value
        assert far == pytest.approx(kid(real + 30, fake + 30), rel=1e-6)


def test_low_precision_elsewhere_changes_nothing():
    real, fake = (x.float() for x in CASES["normal"])
    wanted = kernel_distance(real, fake), neighbour_metrics(real, fake)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (kernel_distance(real, fake), neighbour_metrics(real, fake)) == wanted
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_error_of_squares_is_below_its_bound(monkeypatch):
    """Also the bound is not so wide that everything would be computed twice."""
    a, b = prepared(3 + randn(200, 512), randn(150, 512, seed=1))
    (block,) = blocks.blocks(a, b)
    error = (block.squares - (exactly(a.given, b.given) * a.scale).square()).abs()
    bound = a.slack[:, None] + b.slack
    assert (error <= bound).all()
    assert (bound / block.squares).max() < 1e-3


def test_dots_are_those_of_the_features_given():
    a, b = prepared(100 + randn(30, 40), 100 + randn(20, 40, seed=1))
    torch.testing.assert_close(
        dots(a, slice(4, 9), b, slice(2, None)), a.given[4:9] @ b.given[2:].T, rtol=1e-10, atol=0
    )


def test_blocks_hold_no_more_than_stated(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    parts = list(slices(95, 300))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 95 and max(p.stop - p.start for p in parts) * 300 <= 1000
    assert list(slices(2, 5000)) == [slice(0, 1), slice(1, 2)]  # never less than a row
