"""Guidance scales over the run and of every sample, on tensors alone."""

import math

import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Coefficients,
    Guidance,
    NoiseLevel,
    Run,
    SampleScales,
    ScaleSchedule,
    Schedule,
    apg,
    forecast,
    hold,
    load_guidance,
    resolve,
    save_guidance,
)

T, B, W = 9, 3, 5.0
SIGMAS = [1 - i / T for i in range(T)]


def predictions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, T, B, 4, 5, 5, generator=generator, dtype=torch.float64)


def drive(guidance, data=None, w=W):
    """Guided predictions (T, B, ...), and the run."""
    cond, uncond, x_t = predictions() if data is None else data
    run, guided = Run(guidance, cond.shape[1], T, on_cpu=True), []
    for t in range(T):
        rows = run.plan(x_t[t], NoiseLevel(1 - SIGMAS[t], SIGMAS[t], "flow"))
        if run.all_skipped:
            guided.append(run.reused(x_t[t]))
        else:
            guided.append(run.combine(cond[t], uncond[t][rows] if rows else None, w, x_t[t]))
    run.finish()
    return torch.stack(guided), run


def beta(p):
    return p * (1 - p) ** 2 * math.gamma(5) / (math.gamma(2) * math.gamma(3))


SHAPES = {"linear": lambda p: 2 * p, "cosine": lambda p: 1 - math.cos(math.pi * p), "beta": beta}


def test_beta_is_nothing_at_both_ends():
    """So a run of two steps has no shape, and keeps its scale."""
    assert ScaleSchedule("beta").factors(2) == (1.0, 1.0)
    first, middle, last = ScaleSchedule("beta").factors(3)
    assert first == last == 0 and middle == pytest.approx(3)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_over_the_steps(shape):
    values = [SHAPES[shape](t / (T - 1)) for t in range(T)]
    factors = [value * T / sum(values) for value in values]
    if shape != "beta":
        assert sum(values) == pytest.approx(T)  # as the paper has them
    cond, uncond, _ = predictions()
    guided, run = drive(CFG() | ScaleSchedule(shape))
    for t, factor in enumerate(factors):
        expected = cond[t] + factor * (W - 1) * (cond[t] - uncond[t])
        torch.testing.assert_close(guided[t], expected)
    assert run.trace.nfe == [2 * T] * B
    assert resolve(f"apg+scale-{shape}") == APG() | ScaleSchedule(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_over_the_noise(shape):
    cond, uncond, _ = predictions()
    guided, _ = drive(CFG() | ScaleSchedule(shape, over="noise"))
    for t, sigma in enumerate(SIGMAS):
        factor = SHAPES[shape](1 - sigma)
        expected = cond[t] + factor * (W - 1) * (cond[t] - uncond[t])
        torch.testing.assert_close(guided[t], expected)


def test_factors_are_taken_as_they_are():
    cond, uncond, _ = predictions()
    factors = [0.25 * t for t in range(T)]
    guided, _ = drive(APG(momentum=0.0) | ScaleSchedule(factors))
    for t, factor in enumerate(factors):
        w = 1 + factor * (W - 1)
        level = NoiseLevel(1 - SIGMAS[t], SIGMAS[t], "flow")
        x_t = predictions()[2][t]
        pair = level.to_x0(cond[t], x_t), level.to_x0(uncond[t], x_t)
        options = {"norm_threshold": 15 / 256, "threshold_unit": "rms"}
        expected = level.from_x0(apg(*pair, w, **options)[0], x_t)
        torch.testing.assert_close(guided[t], expected, rtol=1e-9, atol=1e-9)


def test_a_scale_for_every_sample():
    data = predictions()
    together, _ = drive(APG() | SampleScales((1.0, 0.5, 0.0)))
    for row, w in enumerate((W, 1 + 0.5 * (W - 1), 1.0)):
        alone, _ = drive(Guidance(APG()), data[:, :, row : row + 1], w)
        torch.testing.assert_close(together[:, row : row + 1], alone)
    torch.testing.assert_close(together[:, 2], data[0][:, 2])


@pytest.mark.parametrize(
    "policy", [AdaptiveGuidance(0.1, "native"), AdaptiveGuidance(0.1, then="forecast"), forecast()]
)
def test_what_is_evaluated_is_the_policys(policy):
    plain, before = drive(CFG() | policy)
    scaled, run = drive(CFG() | ScaleSchedule([1.0] * T, policy=policy))
    torch.testing.assert_close(scaled, plain)
    assert run.trace.nfe == before.trace.nfe
    assert min(run.trace.nfe) < 2 * T
    halved, _ = drive(CFG() | SampleScales([0.5] * B, policy))
    expected, _ = drive(CFG() | policy, w=1 + 0.5 * (W - 1))
    torch.testing.assert_close(halved, expected)


def test_both_at_once():
    cond, uncond, _ = predictions()
    policy = SampleScales((1.0, 0.5, 0.25), ScaleSchedule("linear"))
    guided, _ = drive(CFG() | policy)
    for row, share in enumerate(policy.factors):
        for t in range(T):
            factor = share * 2 * t / (T - 1)
            expected = cond[t, row] + factor * (W - 1) * (cond[t, row] - uncond[t, row])
            torch.testing.assert_close(guided[t, row], expected)


def test_saved_settings_come_back(tmp_path):
    for policy in (
        ScaleSchedule("beta", "noise", AdaptiveGuidance(0.9, then="forecast")),
        ScaleSchedule((0.5, 1.5), policy=Schedule(("both", "cond"))),
        SampleScales((0.5, 1.0), ScaleSchedule("linear", policy=hold())),
    ):
        save_guidance(tmp_path / "own.json", APG() | policy)
        assert load_guidance(tmp_path / "own.json") == APG() | policy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleSchedule("sine"), "shape is one of linear, cosine, beta"),
        (lambda: ScaleSchedule(()), "factors must be finite"),
        (lambda: ScaleSchedule((1.0, math.nan)), "factors must be finite"),
        (lambda: ScaleSchedule(over="time"), "over is 'steps' or 'noise'"),
        (lambda: ScaleSchedule((1.0,), "noise"), "goes over the steps"),
        (lambda: SampleScales((-1.0,)), "finite and >= 0"),
        (lambda: drive(CFG() | ScaleSchedule((1.0,) * 4)), "4 factors of the scale for a run of 9"),
        (lambda: drive(CFG() | SampleScales((1.0,))), "1 guidance scales for 3 samples"),
        (lambda: drive(resolve("cfg-pp+scale-linear")), "sets its own scale"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fitted_policies_keep_their_scale():
    some = Coefficients(((1.0,), (1.0, 1.0)), ((), (1.0,)), identity={"networks": {}})
    fitted = Schedule(("both", "estimate"), fill=some)
    for make in (lambda: ScaleSchedule(policy=fitted), lambda: SampleScales((1.0,), fitted)):
        with pytest.raises(ValueError, match="fitted for one guidance scale"):
            make()
