"""Subspace Gradient against a decomposition of the covariance, in float64."""

import numpy as np
import pytest
import torch

from pilotage.guidance.zeroth_order import low_variance_components


def oracle(history, nu):
    """Projector onto the noisy components, from the eigenvectors of the correlation matrix."""
    x = history.double().numpy()
    z = (x - x.mean(0)) / x.std(0)
    values, vectors = np.linalg.eigh(z.T @ z)
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    total, held, noisy = values.sum(), 0.0, []
    for i in range(min(len(x) - 1, x.shape[1])):
        if held >= (1 - nu) * total:
            noisy.append(i)
        held += values[i]
    return vectors[:, noisy] @ vectors[:, noisy].T, len(noisy)


def walk(tau, d, seed=0):
    """Tokens that move along three directions, and a little along all."""
    draw = torch.Generator().manual_seed(seed)
    path = torch.randn(tau, 3, generator=draw).cumsum(0) @ torch.randn(3, d, generator=draw)
    return path + 0.02 * torch.randn(tau, d, generator=draw)


@pytest.mark.parametrize(("tau", "d"), [(40, 12), (12, 40), (128, 33)])
@pytest.mark.parametrize("nu", [1e-3, 0.2])
def test_projection_is_the_oracles(tau, d, nu):
    history = walk(tau, d)
    projector, rank = oracle(history, nu)
    assert 0 < rank < d
    noise = low_variance_components(history, nu)
    torch.testing.assert_close(noise.T @ noise, torch.from_numpy(projector), rtol=0, atol=1e-8)


def test_nothing_is_noise_when_nu_is_zero_or_nothing_moved():
    assert len(low_variance_components(walk(20, 8), 0.0)) == 0
    assert len(low_variance_components(torch.ones(20, 8), 0.5)) == 0
