"""Estimators on quadratics: mean and variance against the closed form."""

import math

import pytest
import torch

from pilotage.guidance.zeroth_order import (
    Estimator,
    antithetic_difference,
    forward_difference,
    loss_deviation,
    perturbations,
)

D = 6
MU = 0.3


def quadratic():
    """L(v) = v'Av / 2 + b'v with a symmetric A, and a point, in float64."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(D, D, dtype=torch.float64, generator=draw)
    a = a + a.T
    b, v = torch.randn(2, D, dtype=torch.float64, generator=draw)
    return (lambda x: ((x @ a) * x).sum(-1) / 2 + x @ b), a @ v + b, a, v


def estimates(kind, distribution, count, n):
    loss, gradient, a, v = quadratic()
    u = perturbations(D, 1, 0, range(count * n), distribution).double().view(count, n, D)
    base = loss(v)
    rows = []
    for directions in u:
        plus = loss(v + MU * directions)
        if kind == "forward":
            rows.append(forward_difference(plus, base, directions, MU))
        else:
            minus = loss(v - MU * directions)
            rows.append(antithetic_difference(plus, minus, directions, MU))
    return torch.stack(rows), gradient, a


def covariance(kind, distribution, gradient, a):
    """Of one direction's estimate (u'g + mu u'Au / 2) u.

    Gaussian: E[(u'g)^2 uu'] = |g|^2 I + 2 gg' by Isserlis, signs: the same minus 2 diag(g^2). The
    second term is even in u, so it adds no mean and no cross term; E[(u'Au)^2 uu'] is summed over
    Isserlis' fifteen pairings, for signs over all 2^d directions. Antithetic pairs cancel it.
    """
    identity = torch.eye(D, dtype=torch.float64)
    first = gradient.square().sum() * identity + gradient.outer(gradient)
    if distribution == "rademacher":
        first = first - 2 * torch.diag(gradient.square())
    if kind == "antithetic":
        return first
    if distribution == "gaussian":
        t, s = a.trace(), (a @ a).trace()
        second = (t * t + 2 * s) * identity + 4 * t * a + 8 * a @ a
    else:
        u = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * D)
        second = torch.einsum("n,ni,nj->ij", ((u @ a) * u).sum(1).square(), u, u) / len(u)
    return first + MU * MU / 4 * second


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("kind", ["forward", "antithetic"])
def test_unbiased_with_the_variance_of_the_closed_form(kind, distribution):
    count, n = 4000, 3
    rows, gradient, a = estimates(kind, distribution, count, n)
    expected = covariance(kind, distribution, gradient, a) / n
    error = rows.mean(0) - gradient
    # Five standard errors of the mean, per element.
    assert (error.abs() < 5 * (expected.diagonal() / count).sqrt()).all()
    variance = rows.var(0).sum() / expected.diagonal().sum()
    assert abs(variance - 1) < 0.1


def test_expected_cosine():
    """sqrt(n / (d + n + 1)) in a space of d = 64, n = 8: why a small basis pays."""
    d, n, trials = 64, 8, 200
    g = torch.zeros(d)
    g[0] = 1.0
    total = 0.0
    for t in range(trials):
        u = perturbations(d, 2, t, range(n))
        estimate = forward_difference(u @ g, torch.tensor(0.0), u, 1.0)
        total += (estimate[0] / estimate.norm()).item()
    assert total / trials == pytest.approx(math.sqrt(n / (d + n + 1)), abs=0.03)


@pytest.mark.parametrize("difference", ["forward", "antithetic"])
def test_estimator_is_offsets_then_formula(difference):
    estimator = Estimator(difference, directions=4, mu=0.1)
    loss, gradient, _, v = quadratic()
    points = v + estimator.offsets(D, 3, 7).double()
    assert len(points) == estimator.evaluations == {"forward": 5, "antithetic": 8}[difference]
    u = perturbations(D, 3, 7, range(4)).double()
    values = loss(points)
    if difference == "forward":
        assert torch.equal(points[0], v)
        expected = forward_difference(values[1:], values[0], u, 0.1)
    else:
        expected = antithetic_difference(values[:4], values[4:], u, 0.1)
    torch.testing.assert_close(
        estimator.gradient(values, D, 3, 7).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert (expected @ gradient) > 0


@pytest.mark.parametrize("difference", ["forward", "antithetic"])
def test_normalised_estimate_does_not_depend_on_the_scale_of_the_loss(difference):
    estimator = Estimator(difference, directions=4, mu=0.1, normalise=True)
    loss, _, _, v = quadratic()
    values = loss(v + estimator.offsets(D, 3, 7).double())
    one, other = (estimator.gradient(c * values, D, 3, 7) for c in (1.0, 1e-6))
    torch.testing.assert_close(one, other)
    perturbed = values[1:] if difference == "forward" else values
    plain = Estimator(difference, directions=4, mu=0.1).gradient(values, D, 3, 7)
    torch.testing.assert_close(one, (0.1 * plain / perturbed.std(correction=0)).float())
    assert loss_deviation(torch.full((3,), 2.0)) == 1


def test_directions_follow_from_seed_step_and_index():
    whole = perturbations(D, 5, 2, range(4))
    assert torch.equal(whole[[3, 1]], perturbations(D, 5, 2, [3, 1]))
    for other in (perturbations(D, 6, 2, range(4)), perturbations(D, 5, 3, range(4))):
        assert not torch.equal(whole, other)
    assert perturbations(D, 5, 2, range(9), "rademacher").abs().eq(1).all()
    assert len(perturbations(D, 5, 2, [])) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"difference": "central"}, "unknown difference 'central'"),
        ({"distribution": "cauchy"}, "unknown distribution 'cauchy'"),
        ({"directions": 0}, "at least 1"),
        ({"mu": 0.0}, "positive"),
        ({"mu": math.nan}, "positive"),
        ({"directions": 1, "normalise": True}, "two perturbed losses"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Estimator(**settings)


def test_wrong_number_of_losses():
    with pytest.raises(ValueError, match="expected 3 losses"):
        Estimator().gradient(torch.zeros(2), D, 0, 0)
