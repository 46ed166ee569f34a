"""Ridge regression of LinearAG's coefficients, against the stacked data itself."""

import math

import pytest
import torch

from pilotage.guidance import Gram, fit_coefficients, linear_ag, r_squared

from ..policies.test_schedule import T, W, drive


def linear_trajectories(count=6, elements=40, seed=0):
    """Unconditional predictions that are linear in what precedes them, and the true weights."""
    generator = torch.Generator().manual_seed(seed)
    beta_c = torch.randn(T, T, generator=torch.Generator().manual_seed(99)).double() / T
    beta_u = torch.randn(T, T, generator=torch.Generator().manual_seed(98)).double() / T
    cond = torch.randn(T, count, elements, generator=generator).double()
    uncond = torch.randn(T, count, elements, generator=generator).double()
    for t in range(1, T):
        uncond[t] = torch.einsum("i,ibn->bn", beta_c[t, : t + 1], cond[: t + 1])
        uncond[t] += torch.einsum("i,ibn->bn", beta_u[t, :t], uncond[:t])
    return cond, uncond, beta_c, beta_u


@pytest.mark.parametrize("target", ["uncond", "difference"])
def test_an_exact_linear_toy_is_recovered(target):
    """The weights of a step whose past is not itself linear, and the predictions of all steps."""
    cond, uncond, beta_c, beta_u = linear_trajectories()
    for t in range(1, T):
        past = torch.randn(uncond.shape, generator=torch.Generator().manual_seed(t)).double()
        past[t] = torch.einsum("i,ibn->bn", beta_c[t, : t + 1], cond[: t + 1])
        past[t] += torch.einsum("i,ibn->bn", beta_u[t, :t], past[:t])
        gram = Gram.of(cond[:, :3], past[:, :3]) + Gram.of(cond[:, 3:], past[:, 3:])
        found = fit_coefficients(gram, target=target, ridge=0)
        true = torch.cat([beta_c[t, : t + 1], beta_u[t, :t]])
        got = torch.tensor([*found.cond[t], *found.uncond[t]], dtype=torch.float64)
        torch.testing.assert_close(got, true, rtol=0, atol=1e-6)
    found = fit_coefficients(Gram.of(cond, uncond), target=target, ridge=0)
    new_cond, new_uncond, *_ = linear_trajectories(seed=5)
    for then in ("cond", "estimate"):
        policy = linear_ag(found, then=then)
        guided, run = drive(policy, new_cond, new_uncond)
        full = new_uncond + W * (new_cond - new_uncond)
        estimated = T if then == "estimate" else T // 2
        torch.testing.assert_close(guided[:estimated], full[:estimated], rtol=0, atol=1e-6)
        torch.testing.assert_close(guided[estimated:], new_cond[estimated:], rtol=0, atol=0)
        assert run.trace.nfe == [T + T // 4] * 6


@pytest.mark.parametrize("target", ["uncond", "difference"])
def test_coefficients_are_those_of_ridge_regression(target):
    """Against the normal equations of the stacked data, one step at a time."""
    cond, uncond = torch.randn(2, T, 5, 30, generator=torch.Generator().manual_seed(1)).double()
    ridge = 0.03
    found = fit_coefficients(Gram.of(cond, uncond), target=target, ridge=ridge)
    flat_c, flat_u = cond.flatten(1), uncond.flatten(1)
    for t in range(1, T):
        known = torch.cat([flat_c[: t + 1], flat_u[:t]]).T
        aim = flat_u[t] if target == "uncond" else flat_c[t] - flat_u[t]
        scale = known.square().sum(0).mean()
        rows = torch.cat([known, (ridge * scale).sqrt() * torch.eye(known.shape[1]).double()])
        oracle = torch.linalg.lstsq(rows, torch.cat([aim, torch.zeros(known.shape[1])])).solution
        if target == "difference":
            oracle = -oracle
            oracle[t] += 1
        got = torch.tensor([*found.cond[t], *found.uncond[t]], dtype=torch.float64)
        torch.testing.assert_close(got, oracle, rtol=1e-9, atol=1e-9)


def test_errors_from_inner_products_are_errors_of_estimates():
    cond, uncond = torch.randn(2, T, 5, 30, generator=torch.Generator().manual_seed(2)).double()
    gram = Gram.of(cond, uncond)
    found = fit_coefficients(gram, ridge=0.1)
    for t in range(T):
        guess = sum(b * cond[i] for i, b in enumerate(found.cond[t]))
        guess = guess + sum(b * uncond[i] for i, b in enumerate(found.uncond[t]))
        error = (uncond[t] - guess).square().sum()
        for of, square in (("uncond", uncond[t]), ("difference", cond[t] - uncond[t])):
            expected = 1 - error / square.square().sum()
            torch.testing.assert_close(r_squared(gram, found, of)[t], expected, rtol=0, atol=1e-9)


def test_trajectories_are_added_to_none():
    cond, uncond = torch.randn(2, T, 5, 30, generator=torch.Generator().manual_seed(3)).double()
    empty, gram = Gram.empty(T), Gram.of(cond, uncond)
    assert (empty.steps, empty.trajectories) == (T, 0)
    both = empty + gram
    assert torch.equal(both.products, gram.products) and both.trajectories == 5
    flat = torch.cat([cond, uncond]).flatten(1)
    expected = torch.tensor([[float((a * b).sum()) for b in flat] for a in flat])
    torch.testing.assert_close(both.products, expected.double(), rtol=1e-5, atol=1e-4)


def test_bad_trajectories():
    cond, uncond = torch.randn(2, T, 2, 9)
    cond[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Gram.of(cond, uncond)
    with pytest.raises(ValueError, match="no trajectories"):
        fit_coefficients(Gram.empty(T))
