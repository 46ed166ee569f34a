"""KID and CMMD against double loops and torchmetrics; precision, recall on built manifolds."""

import math

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from pilotage.eval.metrics import blocks
from pilotage.eval.metrics.blocks import prepared
from pilotage.eval.metrics.cmmd import cmmd
from pilotage.eval.metrics.kid import kernel_distance
from pilotage.eval.metrics.precision_recall import density_coverage, precision_recall, radii


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops(a, b, kernel, own_pairs):
    """Mean kernels by plain loops; `own_pairs`: count a point with itself."""
    a, b = a.tolist(), b.tolist()

    def mean(x, y, same):
        pairs = [
            (i, j) for i in range(len(x)) for j in range(len(y)) if own_pairs or not same or i != j
        ]
        return math.fsum(kernel(x[i], y[j]) for i, j in pairs) / len(pairs)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def cubic(x, y):
    return (math.fsum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3


def gaussian(x, y):
    return math.exp(-math.fsum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / 200)


@pytest.mark.parametrize("block", [40, 2**22])
def test_kid_is_the_double_loop(monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    a, b = randn(13, 5), randn(9, 5, seed=1) + 0.3
    expected = loops(a, b, cubic, own_pairs=False)
    assert kernel_distance(a, b).value == pytest.approx(expected, rel=1e-6)
    assert kernel_distance(a, b).std is None


def test_kid_is_torchmetrics_for_equal_sizes():
    a, b = randn(40, 7), 1.2 * randn(40, 7, seed=1)
    assert kernel_distance(a, b).value == pytest.approx(float(poly_mmd(a, b)), rel=1e-6)


def test_kid_is_unbiased():
    """Sets of one distribution: zero on average, and below zero about half the time."""
    values = torch.tensor(
        [
            kernel_distance(randn(20, 4, seed=s), randn(30, 4, seed=1000 + s)).value
            for s in range(200)
        ]
    )
    assert abs(values.mean()) < 3 * values.std() / 200**0.5 and (values < 0).any()


def test_kid_subsets():
    a, b = randn(60, 4), randn(50, 4, seed=1) + 0.5
    whole = kernel_distance(a, b)
    parts = kernel_distance(a, b, subsets=50, subset_size=30)
    assert parts == kernel_distance(a, b, subsets=50, subset_size=30)
    assert parts.std > 0 and abs(parts.value - whole.value) < 4 * parts.std / 50**0.5
    one = kernel_distance(a, b, subsets=3, subset_size=50)  # all of b, in another order
    assert one.value == pytest.approx(sum(_subset_values(a, b, 3, 50)) / 3, rel=1e-6)
    with pytest.raises(ValueError, match="cannot be drawn from 60 and 50"):
        kernel_distance(a, b, subsets=5, subset_size=51)
    for subsets, size in ((0, 30), (5, 1)):
        with pytest.raises(ValueError, match=f"{subsets} subsets of {size} cannot be drawn"):
            kernel_distance(a, b, subsets=subsets, subset_size=size)


def _subset_values(a, b, subsets, size):
    generator = torch.Generator().manual_seed(0)
    for _ in range(subsets):
        rows = torch.randperm(len(a), generator=generator)[:size]
        torch.randperm(len(b), generator=generator)
        yield kernel_distance(a[rows], b).value


def test_cmmd_is_the_double_loop():
    a, b = 8 * randn(11, 6), 8 * randn(8, 6, seed=1) + 2
    x, y = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
    expected = 1000 * loops(x, y, gaussian, own_pairs=True)
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-6)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("metric", [kernel_distance, cmmd, precision_recall, density_coverage])
def test_bad_features(metric):
    good = randn(8, 3)
    with pytest.raises(ValueError, match="3 and 2"):
        metric(good, good[:, :2])
    with pytest.raises(ValueError, match="NaN"):
        metric(good, good.log())
    with pytest.raises(ValueError, match="shape"):
        metric(good, good[0])


def test_too_few_pictures():
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(randn(1, 3), randn(5, 3))
    with pytest.raises(ValueError, match="k = 3 neighbours need at least 4 pictures, got 3"):
        precision_recall(randn(3, 3), randn(9, 3))
    for metric in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="k = 0 neighbours"):
            metric(randn(5, 3), randn(5, 3), k=0)


@pytest.mark.parametrize("block", [300, 2**22])
def test_precision_recall_of_manifolds(monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    a = randn(40, 3)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)
    assert density_coverage(a, a + 100) == (0, 0)
    assert density_coverage(a, a).coverage == 1
    # Two far clusters: generated pictures know one of them only, or add one that is not real.
    two = torch.cat([a, a + 100])
    assert precision_recall(two, a) == (1, 0.5)
    assert precision_recall(a, two) == (0.5, 1)
    assert density_coverage(two, a).coverage == 0.5
    assert density_coverage(a, two).density == pytest.approx(density_coverage(a, a).density / 2)


def test_density_of_a_ring():
    """On a regular polygon a ball of k = 2 holds a point and its two neighbours: density 3 / 2."""
    angle = torch.arange(12).double() * 2 * math.pi / 12
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    jitter = 1 + 1e-9  # balls end exactly at the neighbours; do not leave that to rounding
    assert density_coverage(ring * jitter, ring, k=2) == (pytest.approx(1.5), 1)


def test_radii_are_sorted_distances():
    a = randn(9, 2)
    distances = torch.stack([(a - row).norm(dim=1) for row in a]).sort(1).values
    for k in (1, 3, 8):
        torch.testing.assert_close(radii(*prepared(a), k)[0], distances[:, k])


def test_balls_against_loops():
    """Precision, recall, density, coverage from their definitions."""
    real, fake, k = randn(15, 2), randn(12, 2, seed=1) * 0.7 + 0.4, 3

    def ball(points, i):
        return sorted(float((points[i] - p).norm()) for p in points)[k]

    def inside(points, i, x):
        return float((points[i] - x).norm()) <= ball(points, i)

    hits = [[inside(real, i, x) for i in range(15)] for x in fake]
    back = [[inside(fake, j, x) for j in range(12)] for x in real]
    assert precision_recall(real, fake, k) == (sum(map(any, hits)) / 12, sum(map(any, back)) / 15)
    covered = sum(any(row[i] for row in hits) for i in range(15)) / 15
    density = sum(map(sum, hits)) / (k * 12)
    assert density_coverage(real, fake, k) == (pytest.approx(density), pytest.approx(covered))
