"""Fréchet distance against closed forms, SciPy's matrix root, torchmetrics; its interval."""

import numpy as np
import pytest
import scipy.linalg
import torch

from examples.studies.agreement import fid_of_torchmetrics, made_up
from pilotage.eval.metrics import bootstrap
from pilotage.eval.metrics.bootstrap import interval
from pilotage.eval.metrics.features import FeatureStatistics
from pilotage.eval.metrics.frechet import frechet_distance, frechet_interval


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean, covariance, count=11):
    return FeatureStatistics(count, mean, covariance * (count - 1))


def with_moments(mean, covariance, count=200):
    """Features whose sample mean and covariance are exactly these."""
    x = randn(count, len(mean))
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_one_dimension():
    a, b = (torch.tensor([[x] for x in xs], dtype=torch.float64) for xs in ([1, 3, 8], [0, 0.5]))
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_commuting_covariances():
    """Same eigenvectors: the distance is that of the roots of the eigenvalues."""
    basis = torch.linalg.qr(randn(6, 6)).Q
    one, two = torch.tensor([4.0, 1, 9, 0, 2, 5]).double(), torch.tensor([1.0, 1, 0, 3, 7, 5])
    two = two.double()
    shift = randn(6, seed=1)
    a, b = (gaussian(m, basis @ v.diag() @ basis.T) for m, v in ((shift, one), (0 * shift, two)))
    expected = float(shift.square().sum() + (one.sqrt() - two.sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_features_with_known_moments():
    half = randn(5, 5, seed=2)
    covariance = half @ half.T + torch.eye(5)
    a = with_moments(torch.zeros(5).double(), covariance)
    b = with_moments(torch.ones(5).double(), 4 * covariance)
    expected = 5 + float(covariance.trace())  # (2 - 1)^2 tr
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def scipy_distance(a, b):
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a.numpy(), b.numpy()))
    root = np.real(scipy.linalg.sqrtm(s1 @ s2))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root))


@pytest.mark.parametrize("counts", [(80, 90), (80, 500), (500, 60)])
def test_scipy_root(counts):
    a, b = randn(counts[0], 40), randn(counts[1], 40, seed=1) @ randn(40, 40, seed=2) / 6 + 0.2
    assert frechet_distance(a, b) == pytest.approx(scipy_distance(a, b), rel=1e-9)


def test_torchmetrics_on_the_same_features():
    a, b = made_up(300, 48)
    assert frechet_distance(a, b) == pytest.approx(fid_of_torchmetrics(a, b), rel=1e-6)


@pytest.mark.parametrize("count", [2, 20, 64, 65, 100])
def test_singular_covariances_by_both_routes(count):
    """N below, at and above D = 64: features and their statistics say the same."""
    a, b = randn(count, 64), 2 * randn(count + 7, 64, seed=3) + 1
    both = [
        frechet_distance(x, y)
        for x in (a, FeatureStatistics.of(a))
        for y in (b, FeatureStatistics.of(b))
    ]
    assert both == pytest.approx([both[0]] * 4, rel=1e-9)
    assert frechet_distance(a, a) <= 1e-10 * float(a.square().sum())


def test_low_rank_against_exact_subspace():
    """Features in a line of 30 dimensions: the one-dimensional formula."""
    line = torch.nn.functional.normalize(randn(1, 30), dim=1)
    a, b = randn(9, 1), 3 * randn(12, 1, seed=1) + 2
    expected = frechet_distance(a, b)
    assert frechet_distance(a @ line, b @ line) == pytest.approx(expected, rel=1e-10)
    statistics = [FeatureStatistics.of(x @ line) for x in (a, b)]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-7)


def test_identical_constant_features():
    same = torch.full((4, 3), 2.0)
    assert frechet_distance(same, same) == 0
    assert frechet_distance(same, same + 1) == pytest.approx(3)


def test_bad_features():
    good = randn(5, 3)
    with pytest.raises(ValueError, match="at least 2 pictures are needed, got 1"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(good, FeatureStatistics.of(good[:1]))
    with pytest.raises(ValueError, match="3 and 2"):
        frechet_distance(good, good[:, :2])
    bad = good.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity, in rows \[3\]"):
        frechet_distance(bad, good)
    with pytest.raises(ValueError, match="shape"):
        frechet_distance(good[0], good)


def test_interval_of_a_mean_covers_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "LEVEL", 0.8)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        values = torch.randn(60, generator=generator) + 5
        low, high = interval(values, resamples=400, seed=seed)
        covered += low <= 5 <= high
    assert 0.71 <= covered / 200 <= 0.89  # 3 standard errors around 0.8
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)


def test_interval_of_the_distance_has_its_spread():
    """Against the spread of fresh samples of the same size."""
    real, count = randn(600, 8), 120
    samples = [randn(count, 8, seed=s) * 1.5 + 0.5 for s in range(1, 81)]
    fresh = torch.tensor([frechet_distance(real, s) for s in samples]).std()
    low, high = frechet_interval(real, samples[0], resamples=200)
    value = frechet_distance(real, samples[0])
    assert low < value < high
    assert (high - low) / (2 * 1.96) == pytest.approx(float(fresh), rel=0.35)


@pytest.mark.parametrize("count", [12, 50])
def test_interval_of_the_distance_resamples_the_distance(count):
    """The cheap form equals the distance of resampled features, above and below D = 20."""
    real, fake, seed = randn(90, 20), randn(count, 20, seed=5) + 1, 3
    generator = torch.Generator().manual_seed(seed)
    draws = torch.tensor(
        [
            frechet_distance(real, fake[torch.randint(count, (count,), generator=generator)])
            for _ in range(20)
        ]
    ).double()
    ends = torch.quantile(draws, torch.tensor([0.025, 0.975]).double())
    expected = ends - draws.mean() + frechet_distance(real, fake)
    found = frechet_interval(real, fake, resamples=20, seed=seed)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_groups_are_resampled_whole(monkeypatch):
    """Copies say nothing new: the interval is that of the values copied."""
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    alone, copied = interval(values), values.repeat(4)
    groups = list(range(20)) * 4
    assert interval(values, groups=range(20)) == pytest.approx(alone)
    assert interval(copied, groups=groups) == pytest.approx(alone)
    low, high = interval(copied)
    assert high - low < 0.7 * (alone[1] - alone[0])
    # Unequal groups: the mean of a resample is over its values, not over its groups.
    unequal = torch.tensor([1.0, 1, 1, 5])
    assert interval(unequal, groups="aaab") == (1, 5)
    monkeypatch.setattr(bootstrap, "LEVEL", 0.1)
    assert interval(unequal, groups="aaab") == (2, 2)


def test_interval_of_the_distance_resamples_groups():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 40, 4, generator=generator)
    assert frechet_interval(real, fake, groups=range(40)) == frechet_interval(real, fake)
    widths = []
    for groups in (None, list(range(40)) * 4):
        low, high = frechet_interval(real, fake.repeat(4, 1), groups=groups)
        widths.append(high - low)
    assert widths[0] < 0.7 * widths[1]
    with pytest.raises(ValueError, match="at least 2 groups"):
        frechet_interval(real, fake, groups=[0] * 40)


def test_bad_intervals():
    values = torch.rand(5)
    with pytest.raises(ValueError, match="resamples"):
        interval(values, resamples=1)
    with pytest.raises(ValueError, match="at least 2"):
        interval(values[:1])
    with pytest.raises(ValueError, match="NaN"):
        interval(torch.tensor([1.0, torch.nan]))
