"""Re-implemented methods of others, each against a plain loop of its formulas."""

import math

import numpy as np
import pytest
import torch

from examples.studies import rivals
from pilotage.guidance import CFG, Run, gate
from pilotage.guidance.policies.interval import Interval

T, SHAPE, W = 20, (2, 3, 10, 12), 5.0


def network(x, t, branch):
    """Two branches of a made-up network."""
    return torch.sin(x * (1.0 + 0.3 * branch) + 0.2 * t) + 0.1 * branch


def sampled(guidance, total=T):
    """Euler steps of the made-up network, in float64; the states, and what was evaluated."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    run, states = Run(guidance, len(x), total, on_cpu=True), [x]
    for t in range(total):
        rows = run.plan(x)
        if run.all_skipped:
            v = run.reused(x)
        else:
            cond = network(x, t, 1)
            if run.skipped:
                cond[run.skipped] = run.reused(x)[run.skipped]
            v = run.combine(cond, network(x, t, 0)[rows] if rows else None, W, x)
        x = x - v / total
        states.append(x)
    return states, run.trace


def plain(decide, skip, total=T):
    """The same by hand: `decide(t, states)` says whether to evaluate, `skip` what else is used."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    states, made = [x], {}
    for t in range(total):
        if decide(t, states):
            c, u = network(x, t, 1), network(x, t, 0)
            made[t] = v = u + W * (c - u)
        else:
            v = skip(t, made, x)
        x = x - v / total
        states.append(x)
    return states


PLACES = (0, 1, 3, 4, 8, 12, 15)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor(order):
    def skip(t, made, x):
        factors, before = [], None
        for i in made:  # as at every evaluated step: F of every order from those before
            own = [made[i]]
            if before is not None:
                for old in before[1][:order]:
                    own.append((own[-1] - old) / (i - before[0]))
            before, factors = (i, own), own
        k = t - before[0]
        return sum(f * k**j / math.factorial(j) for j, f in enumerate(factors))

    got, _ = sampled(CFG() | rivals.held_at(PLACES, T, rivals.Taylor(order)))
    torch.testing.assert_close(got[-1], plain(lambda t, s: t in PLACES, skip)[-1])


def test_adams_bashforth():
    def skip(t, made, x):
        *_, before, last = (0, *made)
        if len(made) < 2:
            return made[last]
        return made[last] + (t + 0.5 - last) / (last - before) * (made[last] - made[before])

    got, _ = sampled(CFG() | rivals.held_at(PLACES, T, rivals.AdamsBashforth()))
    torch.testing.assert_close(got[-1], plain(lambda t, s: t in PLACES, skip)[-1])


@pytest.mark.parametrize(("delta", "most"), [(0.01, 4), (0.05, 2), (1.0, 4)])
def test_adaptive_diffusion(delta, most):
    """Sample by sample: others in the batch make no difference."""
    got, trace = sampled(CFG() | rivals.AdaptiveDiffusion(delta, most))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    for row in range(len(x)):
        one, moved, skipped, v, evaluations = x[row], [], 0, None, 0
        for t in range(T):
            small = len(moved) > 2 and (
                abs((moved[-1] + moved[-3]) / 2 - moved[-2]) <= delta * moved[-2]
            )
            if t > 3 and small and skipped < most:
                skipped += 1
            else:
                c, u = network(one, t, 1), network(one, t, 0)
                v, skipped, evaluations = u + W * (c - u), 0, evaluations + 2
            new = one - v / T
            moved.append((new - one).abs().mean().item())
            one = new
        torch.testing.assert_close(got[-1][row], one)
        assert trace.nfe[row] == evaluations
    if delta == 1:
        assert trace.nfe[0] < 2 * T


def test_fastercache():
    """Numpy's transforms, and the authors' times in a run of 1000 timesteps."""
    states, trace = sampled(rivals.spectrum_reuse(T))
    x, low, high, cost = states[0].numpy(), None, None, 0
    for t in range(T):
        now = 1000 - 50 * t - 1
        c = network(torch.from_numpy(x), t, 1).numpy()
        fc = np.fft.fftshift(np.fft.fft2(c), axes=(-2, -1))
        if t % 5 == 0 or now >= 641:
            u = network(torch.from_numpy(x), t, 0).numpy()
            difference = np.fft.fftshift(np.fft.fft2(u), axes=(-2, -1)) - fc
            rows, columns = np.ogrid[:10, :12]
            disc = (rows - 5) ** 2 + (columns - 6) ** 2 <= (10 // 5) ** 2
            low, high = difference * disc, difference * ~disc
            cost += 2
        else:
            low = low * (1.1 if 99 < now < 901 else 1)
            high = high * (1.1 if now < 301 else 1)
            whole = np.fft.ifftshift(fc + low + high, axes=(-2, -1))
            u = np.fft.ifft2(whole).real
            cost += 1
        x = x - (u + W * (c - u)) / T
    np.testing.assert_allclose(states[-1].numpy(), x, rtol=1e-9, atol=1e-9)
    assert trace.nfe == [cost] * 2


def test_gating_and_step_ag():
    """The difference kept after the first part, and the conditional prediction alone."""
    kept = {}
    for guidance, later in (
        (CFG() | gate(first=0.3), lambda c: c + (W - 1) * kept["difference"]),
        (CFG() | Interval(stop_step=6), lambda c: c),
    ):
        states, trace = sampled(guidance)
        x = states[0]
        for t in range(T):
            c = network(x, t, 1)
            if t < 6:
                kept["difference"] = c - network(x, t, 0)
                v = c + (W - 1) * kept["difference"]
            else:
                v = later(c)
            x = x - v / T
        torch.testing.assert_close(states[-1], x)
        assert trace.nfe == [26, 26]


def test_linear_predictors_are_least_squares():
    guided = torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(1)).double()
    choices = ("both", "both", "forecast", "both", "forecast", "forecast")
    fill = rivals.linear_predictors(guided, choices, ridge=0.0)
    for t, known in ((2, [0, 1]), (4, [0, 1, 3]), (5, [0, 1, 3])):
        regressors = guided[known].flatten(1).T.numpy()
        expected = np.linalg.lstsq(regressors, guided[t].flatten().numpy(), rcond=None)[0]
        assert [fill.guided[t][i] for i in known] == pytest.approx(expected.tolist())
        assert sum(map(abs, fill.guided[t])) == pytest.approx(abs(expected).sum())


def test_a_mask_is_annealed():
    """The best of those tried, each once, with the prefix in place; here the best there is."""
    asked = []
    best = (0, 1, 2, 5, 9, 12, 15, 18)

    def loss(mask):
        asked.append(mask)
        return sum(abs(a - b) for a, b in zip(mask, best, strict=True)) / 100

    found = rivals.annealed(20, 8, loss, 150)
    assert len(asked) == len(set(asked)) <= 150
    assert all(mask[:2] == (0, 1) and len(mask) == 8 and max(mask) < 20 for mask in asked)
    assert loss(found) == min(map(loss, list(asked)))
    assert rivals.annealed(20, 8, loss, 150) == found
