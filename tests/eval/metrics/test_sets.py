"""Vendi score, FD of infinitely many pictures, nearest training pictures."""

import math

import numpy as np
import pytest
import torch

from pilotage.eval.metrics.fd_infinity import fd_infinity
from pilotage.eval.metrics.features import FeatureStatistics
from pilotage.eval.metrics.frechet import frechet_distance
from pilotage.eval.metrics.memorised import nearest_training, share_close
from pilotage.eval.metrics.vendi import vendi_score


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_vendi_of_equal_and_of_orthogonal_pictures():
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1)
    assert vendi_score(3 * torch.eye(6)) == pytest.approx(6)
    # Three kinds, as often as each other, whatever their length; then one of them more often.
    kinds = torch.eye(5)[:3].repeat(7, 1) * torch.linspace(1, 9, 21)[:, None]
    assert vendi_score(kinds) == pytest.approx(3)
    shares = [0.5, 0.25, 0.25]
    uneven = torch.eye(3)[[0, 0, 1, 2]]
    assert vendi_score(uneven) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_vendi_is_its_definition(shape):
    """exp of the entropy of the eigenvalues of K / N, by numpy."""
    x = randn(*shape)
    rows = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    values = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    values = values[values > 1e-12]
    assert vendi_score(x) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)
    assert vendi_score(x.float()) == pytest.approx(vendi_score(x), rel=1e-5)


def test_vendi_needs_directions():
    with pytest.raises(ValueError, match="features of picture 1 are all zero"):
        vendi_score(torch.tensor([[1.0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="NaN"):
        vendi_score(torch.tensor([[1.0, math.nan]]))


def test_fd_infinity_is_a_line_through_distances():
    """Against numpy's line through the distances of the same parts."""
    real, fake = randn(500, 6), 1.2 * randn(400, 6, seed=1) + 0.2
    found = fd_infinity(real, fake, points=7, seed=3)
    assert found.counts == [40, 100, 160, 220, 280, 340, 400]
    generator = torch.Generator().manual_seed(3)
    distances = [
        frechet_distance(real, fake[torch.randperm(400, generator=generator)[:n]])
        for n in found.counts
    ]
    assert found.distances == pytest.approx(distances)
    x = 1 / np.array(found.counts)
    slope, value = np.polyfit(x, distances, 1)
    assert found.value == pytest.approx(value)
    assert found.fit == pytest.approx(np.corrcoef(x, distances)[0, 1] ** 2)
    statistics = fd_infinity(FeatureStatistics.of(real), fake, points=7, seed=3)
    assert statistics.value == pytest.approx(found.value)


def test_fd_infinity_takes_the_bias_away():
    """Sets of one distribution, the real one known exactly: the distance is 0, FD is not."""
    real = FeatureStatistics(2, torch.zeros(8).double(), torch.eye(8).double())
    plain, limit = [], []
    for seed in range(12):
        fake = randn(600, 8, seed=seed)
        plain.append(frechet_distance(real, fake))
        limit.append(fd_infinity(real, fake, seed=seed).value)
    assert np.mean(plain) > 0.02
    assert abs(np.mean(limit)) < 3 * np.std(limit, ddof=1) / 12**0.5 + 0.1 * np.mean(plain)


def test_fd_infinity_of_too_few():
    with pytest.raises(ValueError, match="at least 30 pictures are needed, got 29"):
        fd_infinity(randn(50, 3), randn(29, 3))
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        fd_infinity(randn(50, 3), randn(50, 3), points=1)
    with pytest.raises(ValueError, match="different dimensions: 3 and 2"):
        fd_infinity(randn(50, 3), randn(50, 2))


def test_copies_of_training_pictures_are_found():
    train, held_out = randn(300, 20), randn(200, 20, seed=1)
    fresh = randn(150, 20, seed=2)
    copies = train[40:90] + 0.01 * randn(50, 20, seed=3)
    found = nearest_training(train, torch.cat([copies, fresh]))
    assert found.positions[:50].tolist() == list(range(40, 90))
    expected = torch.cdist(torch.cat([copies, fresh]), train).min(1)
    torch.testing.assert_close(found.distances, expected.values)
    assert torch.equal(found.positions, expected.indices)
    known = nearest_training(train, held_out).distances
    assert share_close(found.distances[:50], known) == 1
    assert share_close(found.distances[50:], known) < 0.12  # 0.05 expected; 0.12: chance of 1e-4
    assert share_close(known, known) == pytest.approx(0.05, abs=0.005)


def test_of_equal_training_pictures_the_first_is_named():
    train = torch.tensor([[0.0, 1], [5, 5], [5, 5]])
    found = nearest_training(train, torch.tensor([[5.0, 5], [0, 0]]))
    assert found.positions.tolist() == [1, 0] and found.distances.tolist() == [0, 1]
