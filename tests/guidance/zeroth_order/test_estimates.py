"""The estimate on quadratics: mean and variance against the closed form."""

import torch

from pilotage.guidance.zeroth_order import forward_difference, perturbations

D = 6
MU = 0.3


def quadratic():
    """L(v) = v'Av / 2 + b'v with a symmetric A, and a point, in float64."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(D, D, dtype=torch.float64, generator=draw)
    a = a + a.T
    b, v = torch.randn(2, D, dtype=torch.float64, generator=draw)
    return (lambda x: ((x @ a) * x).sum(-1) / 2 + x @ b), a @ v + b, a, v


def covariance(gradient, a):
    """Of one direction's estimate (u'g + mu u'Au / 2) u.

    E[(u'g)^2 uu'] = |g|^2 I + 2 gg' by Isserlis. The second term is even in u, so it adds no mean
    and no cross term; E[(u'Au)^2 uu'] is summed over Isserlis' fifteen pairings.
    """
    identity = torch.eye(D, dtype=torch.float64)
    first = gradient.square().sum() * identity + gradient.outer(gradient)
    t, s = a.trace(), (a @ a).trace()
    return first + MU * MU / 4 * ((t * t + 2 * s) * identity + 4 * t * a + 8 * a @ a)


def test_unbiased_with_the_variance_of_the_closed_form():
    count, n = 4000, 3
    loss, gradient, a, v = quadratic()
    u = perturbations(D, 1, 0, count * n).double().view(count, n, D)
    rows = torch.stack([forward_difference(loss(v + MU * x), loss(v), x, MU) for x in u])
    expected = covariance(gradient, a) / n
    error = rows.mean(0) - gradient
    # Five standard errors of the mean, per element.
    assert (error.abs() < 5 * (expected.diagonal() / count).sqrt()).all()
    variance = rows.var(0).sum() / expected.diagonal().sum()
    assert abs(variance - 1) < 0.1


def test_directions_follow_from_seed_step_and_index():
    whole = perturbations(D, 5, 2, 4)
    assert torch.equal(whole[:3], perturbations(D, 5, 2, 3))
    for other in (perturbations(D, 6, 2, 4), perturbations(D, 5, 3, 4)):
        assert not torch.equal(whole, other)
