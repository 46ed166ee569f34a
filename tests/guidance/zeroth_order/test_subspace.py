"""Subspace Gradient against a decomposition of the covariance, in float64."""

import numpy as np
import pytest
import torch

from pilotage.guidance.zeroth_order import SubspaceGradient, low_variance_components


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
    subspace = SubspaceGradient(tau, nu)
    gradient = torch.randn(d, generator=torch.Generator().manual_seed(1))
    for token in history:
        assert torch.equal(subspace.project(gradient), gradient)
        subspace.record(token)
    expected = gradient.double() - torch.from_numpy(projector) @ gradient.double()
    torch.testing.assert_close(subspace.project(gradient).double(), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_noise_when_nu_is_zero_or_nothing_moved():
    assert len(low_variance_components(walk(20, 8), 0.0)) == 0
    assert len(low_variance_components(torch.ones(20, 8), 0.5)) == 0


def test_projection_is_kept_for_tau_steps_then_renewed():
    subspace, gradient = SubspaceGradient(20, 0.2), torch.ones(8)
    for token in walk(20, 8):
        subspace.record(token)
    first = subspace.project(gradient)
    for token in walk(20, 8, seed=5):
        assert torch.equal(subspace.project(gradient), first)
        subspace.record(token)
    assert not torch.equal(subspace.project(gradient), first)


def test_state_continues():
    one, other, gradient = SubspaceGradient(20, 0.2), SubspaceGradient(20, 0.2), torch.ones(8)
    tokens = walk(45, 8)
    for token in tokens[:27]:
        one.record(token)
    other.load_state_dict(one.state_dict())
    for token in tokens[27:]:
        assert torch.equal(one.project(gradient), other.project(gradient))
        one.record(token)
        other.record(token)
    assert torch.equal(one.project(gradient), other.project(gradient))


def test_bad_settings():
    with pytest.raises(ValueError, match="tau"):
        SubspaceGradient(1)
    with pytest.raises(ValueError, match="nu"):
        SubspaceGradient(nu=1.0)
