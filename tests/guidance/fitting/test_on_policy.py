"""Estimates fitted while a schedule runs, on a linear solver and network with known answers."""

import math

import pytest
import torch

from pilotage.guidance import CFG, Guidance, Run, Schedule
from pilotage.guidance.fitting.on_policy import FitOnPolicy
from pilotage.guidance.fitting.regression import ridge_regression

T, N, SIZE, W, PACE = 7, 6, 40, 4.0, 0.3
CHOICES = ("both", "both", "estimate", "cond", "both", "estimate", "estimate")


def cond_of(t, x):
    return torch.sin(x + t)


def uncond_of(t, x):
    return torch.cos(0.7 * x - t)


def sample(policy, uncond, seed=0, own=None):
    """States after every step of x <- x + PACE * guided, from noise; `own` collects them all."""
    x = torch.randn(N, SIZE, generator=torch.Generator().manual_seed(seed)).double()
    run = Run(Guidance(CFG(), policy), N, T, on_cpu=True)
    states = [x] if own is None else own
    states[:] = [x]
    for t in range(T):
        rows = run.plan(x)
        if run.all_skipped:
            x = x + PACE * run.reused(x)
        else:
            c = cond_of(t, x)
            u = uncond(t, x) if rows else None
            x = x + PACE * run.combine(c, u, W, x)
        states.append(x)
    run.finish()
    return torch.stack(states[1:])


def fitted(reference, uncond, choices=CHOICES, seed=0, rows=None, ridge=0.0, correct=False):
    """The states of a run fitted to a reference, and the coefficients found."""
    own, found = [], []

    def aim(t):
        return (reference[t] - own[t]) / PACE

    rows = range(N) if rows is None else rows
    policy = FitOnPolicy(choices, W, aim, found.append, rows=rows, ridge=ridge, correct=correct)
    states = sample(policy, uncond, seed, own)
    (coefficients,) = found
    return states, coefficients


def test_an_exact_linear_toy_is_recovered():
    """Where the wanted estimates are linear in what is kept, the run never leaves its reference."""
    generator = torch.Generator().manual_seed(3)
    true_c = torch.randn(T, T, generator=generator).double() / T
    true_u = torch.randn(T, T, generator=generator).double() / T
    kept_c, kept_d = [], {}

    def linear(t, x):
        """c - u at estimated steps is a sum of kept predictions."""
        c = cond_of(t, x)
        kept_c[t:] = [c]
        if CHOICES[t] == "both":
            u = uncond_of(t, x)
            kept_d[t] = c - u
            return u
        if CHOICES[t] == "cond":
            return c
        difference = sum(true_c[t, i] * kept_c[i] for i in range(t + 1))
        return c - difference - sum(true_u[t, k] * d for k, d in kept_d.items() if k < t)

    reference = sample(Schedule(("both",) * T), linear)
    states, found = fitted(reference, uncond_of)
    torch.testing.assert_close(states, reference, rtol=0, atol=1e-6)
    for t, choice in enumerate(CHOICES):
        if choice != "estimate":
            continue
        cond, uncond = [-true_c[t, i].item() for i in range(t + 1)], [0.0] * t
        cond[t] += 1
        for k in (k for k in range(t) if CHOICES[k] == "both"):
            cond[k] -= true_u[t, k].item()
            uncond[k] += true_u[t, k].item()
        assert found.cond[t] == pytest.approx(cond, abs=1e-6)
        assert found.uncond[t] == pytest.approx(uncond, abs=1e-6)
    # What was found guides other runs likewise.
    other = sample(Schedule(("both",) * T), linear, seed=5)
    again = sample(Schedule(CHOICES, fill=found), uncond_of, seed=5)
    torch.testing.assert_close(again, other, rtol=0, atol=1e-6)


def test_exact_weights_of_skipped_steps_are_recovered():
    """Where a skipped step is linear in the last guided predictions, its weights are found."""
    choices = ("both", "both", "forecast", "both", "cond", "forecast", "forecast")
    weights = {2: {0: -0.4, 1: 1.3}, 5: {0: 0.3, 1: 0.2, 3: -0.5, 4: 0.9}, 6: {3: 0.6, 4: 0.4}}
    x = torch.randn(N, SIZE, generator=torch.Generator().manual_seed(0)).double()
    states, guided = [], []
    for t, choice in enumerate(choices):
        if choice == "forecast":
            guided.append(sum(w * guided[i] for i, w in weights[t].items()))
        else:
            c, u = cond_of(t, x), uncond_of(t, x)
            guided.append(c if choice == "cond" else u + W * (c - u))
        x = x + PACE * guided[-1]
        states.append(x)
    got, found = fitted(torch.stack(states), uncond_of, choices)
    torch.testing.assert_close(got, torch.stack(states), rtol=0, atol=1e-5)
    for t, choice in enumerate(choices):
        expected = [weights.get(t, {}).get(i, 0.0) for i in range(t)]
        assert found.guided[t] == pytest.approx(expected, abs=1e-5)
        if choice == "forecast":
            assert found.cond[t] == (0.0,) * t + (1.0,) and found.uncond[t] == (0.0,) * t


def test_exact_weights_of_corrected_steps_are_recovered():
    """Where the reference is a linear multistep solver of other weights, these are found."""
    choices = ("both", "both", "both", "forecast", "both", "forecast", "both")
    weights = {
        1: {0: -0.3, 1: 1.4}, 2: {0: 0.2, 1: -0.5, 2: 1.2}, 3: {1: -0.6, 2: 1.5},
        4: {1: 0.1, 2: -0.2, 4: 1.1}, 5: {2: -0.4, 4: 1.3}, 6: {1: 0.1, 4: 0.3, 6: 0.7},
    }  # fmt: skip
    x = torch.randn(N, SIZE, generator=torch.Generator().manual_seed(0)).double()
    states, guided = [], []
    for t, choice in enumerate(choices):
        known = list(guided)
        if choice == "both":
            c, u = cond_of(t, x), uncond_of(t, x)
            known.append(u + W * (c - u))
        of = weights.get(t, {t: 1.0})
        guided.append(sum(w * known[i] for i, w in of.items()))
        x = x + PACE * guided[-1]
        states.append(x)
    got, found = fitted(torch.stack(states), uncond_of, choices, correct=True)
    torch.testing.assert_close(got, torch.stack(states), rtol=0, atol=1e-5)
    for t, choice in enumerate(choices):
        expected = [weights.get(t, {}).get(i, 0.0) for i in range(t + (choice == "both" and t > 0))]
        assert found.guided[t] == pytest.approx(expected, abs=1e-4)
    again = sample(Schedule(choices, fill=found), uncond_of)
    torch.testing.assert_close(again, got, rtol=1e-5, atol=1e-5)


def test_only_evaluated_and_skipped_steps_are_corrected():
    with pytest.raises(ValueError, match="only schedules of 'both' and 'forecast'"):
        fitted(torch.zeros(T, N, SIZE), uncond_of, CHOICES, correct=True)


def test_nothing_to_correct_leaves_predictions_as_they_are():
    """The penalty is on the distance to a step's own prediction, not on the weights."""
    reference = sample(Schedule(("both",) * T), uncond_of)
    got, found = fitted(reference, uncond_of, ("both",) * T, correct=True, ridge=0.1)
    torch.testing.assert_close(got, reference)
    for t in range(1, T):
        assert found.guided[t] == pytest.approx([0.0] * t + [1.0], abs=1e-9)


def test_a_skipped_step_reuses_the_last_few():
    """Steps further back are given up, also where they would help."""
    choices = ("both",) * 5 + ("forecast", "both")
    reference = sample(Schedule(("both",) * T), uncond_of)
    _, found = fitted(reference, uncond_of, choices)
    assert found.guided[5][0] == 0 and all(found.guided[5][1:])


MIXED = ("both", "both", "forecast", "estimate", "forecast", "both", "estimate")


@pytest.mark.parametrize("choices", [CHOICES, MIXED])
@pytest.mark.parametrize("rows", [None, (0, 2, 3)])
def test_the_schedule_found_repeats_the_run_it_was_fitted_on(rows, choices):
    reference = sample(Schedule(("both",) * T), uncond_of)
    states, found = fitted(reference, uncond_of, choices, rows=rows, ridge=1e-3)
    again = sample(Schedule(choices, fill=found), uncond_of)
    torch.testing.assert_close(again, states, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states, reference)


def test_an_estimate_is_the_one_that_ends_nearest_to_the_reference():
    """No other sum of the kept predictions brings that step's state closer."""
    reference = sample(Schedule(("both",) * T), uncond_of)
    choices = ("both", "both", *["estimate"] * (T - 2))
    states, found = fitted(reference, uncond_of, choices)
    least = (states[2] - reference[2]).square().sum()
    for kind, i in (("cond", 0), ("cond", 2), ("uncond", 1)):
        for change in (-1e-3, 1e-3):
            weights = [list(row) for row in getattr(found, kind)]
            weights[2][i] += change
            # A difference c_k - u_k is kept as one: its two weights move together.
            both = {"cond": [list(row) for row in found.cond], "uncond": list(found.uncond)}
            both[kind] = weights
            if kind == "uncond":
                both["cond"][2][i] -= change
            moved = type(found)(both["cond"], both["uncond"])
            other = sample(Schedule(choices, fill=moved), uncond_of)
            assert (other[2] - reference[2]).square().sum() >= least - 1e-9


def test_ridge_regression_of_given_vectors():
    generator = torch.Generator().manual_seed(1)
    known, aim = torch.randn(4, 50, generator=generator), torch.randn(50, generator=generator)
    penalty = 0.1 * known.double().square().sum(1).mean()
    rows = torch.cat([known.double().T, penalty.sqrt() * torch.eye(4).double()])
    oracle = torch.linalg.lstsq(rows, torch.cat([aim.double(), torch.zeros(4)])).solution
    torch.testing.assert_close(ridge_regression(known, aim, 0.1), oracle, rtol=1e-9, atol=1e-9)
    known[1, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        ridge_regression(known, aim, 0.1)


def test_choices_that_cannot_be_followed():
    with pytest.raises(ValueError, match="no step before it evaluates"):
        FitOnPolicy(("estimate", "both"), W, lambda t: None, print, range(N))


def test_nothing_to_fit_and_steps_without_guidance():
    reference = sample(Schedule(("both",) * T), uncond_of)
    states, found = fitted(reference, uncond_of, ("both",) * (T - 1) + ("cond",))
    torch.testing.assert_close(states[:-1], reference[:-1], rtol=0, atol=0)
    assert found.cond[2] == (0.0, 0.0, 1.0) and not any(found.uncond[2])
    policy = FitOnPolicy(("both", "both", "estimate"), W, lambda t: reference[t], print, range(N))
    run = Run(Guidance(CFG(), policy), N, 3, on_cpu=True)
    x = reference[0]
    run.plan(x)
    run.unguided(x, x)
    run.plan(x)
    run.combine(x, 2 * x, W, x)
    run.plan(x)
    with pytest.raises(ValueError, match="at step 0 the pipeline did not guide"):
        run.combine(x, None, W, x)
