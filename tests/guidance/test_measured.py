"""What a trace says of a step, against the definitions in float64, straight from the tensors."""

import math

import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Guidance,
    HoldDifference,
    Interval,
    NoiseLevel,
    NonFinitePredictionError,
    Run,
    Schedule,
    Weights,
)
from pilotage.guidance.run import weighted_sum

LEVEL = NoiseLevel(0.6, 0.8, "v_prediction")
BATCH = 3


def predictions(step=0, gap=1.0):
    """A step's conditional and unconditional prediction and x_t, each (3, 4, 5, 6)."""
    generator = torch.Generator().manual_seed(step)
    cond, noise, x_t = torch.randn(3, BATCH, 4, 5, 6, generator=generator)
    return cond, cond + gap * (noise - 0.6 * cond), x_t


def length(vector):
    return math.sqrt(sum(value * value for value in vector))


def product(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def x0(pred, x_t):
    """0.6 x_t - 0.8 v of every sample, as lists of float64 numbers."""
    return (0.6 * x_t.double() - 0.8 * pred.double()).flatten(1).tolist()


@pytest.mark.parametrize("w", [6.0, torch.tensor([1.5, 3.0, 9.0]).view(BATCH, 1, 1, 1)], ids=type)
@pytest.mark.parametrize(
    "rule",
    [
        CFG(),
        APG(eta=0.4, norm_threshold=0.0, momentum=0.0, space="native"),
        APG(eta=0.4, norm_threshold=0.0, momentum=0.0),
        APG(eta=0.4, norm_threshold=9.0, momentum=0.0, threshold_unit="l2"),
    ],
    ids=str,
)
def test_norms_cosines_and_shares_are_their_definitions(rule, w):
    cond, uncond, x_t = predictions()
    run = Run(Guidance(rule), BATCH, 1, on_cpu=True, detailed=True)
    run.plan(x_t, LEVEL)
    guided = run.combine(cond, uncond, w, x_t)
    (record,) = run.trace.as_dicts()
    assert record["noise"] == pytest.approx(0.8 / 0.6)
    scales = torch.as_tensor(w).flatten().expand(BATCH).tolist()
    images = [x0(pred, x_t) for pred in (cond, uncond, guided)]
    native = [pred.double().flatten(1).tolist() for pred in (cond, uncond, guided)]
    for row, scale in enumerate(scales):
        c, u, _ = (pred[row] for pred in images)
        # The cosine is of denoised images where they can be had, the rest in the rule's space.
        assert record["gamma"][row] == pytest.approx(product(c, u) / length(c) / length(u), 1e-4)
        c, u, g = (pred[row] for pred in (images if rule.space == "x0" else native))
        moved = length([a - b for a, b in zip(g, c, strict=True)])
        apart = [a - b for a, b in zip(c, u, strict=True)]
        share = (product(apart, c) / length(apart) / length(c)) ** 2
        assert record["cond_norm"][row] == pytest.approx(length(c), rel=1e-4)
        assert record["update_norm"][row] == pytest.approx(moved, rel=1e-4)
        relative = moved / ((scale - 1) * length(apart))
        assert record["scale_factor"][row] == pytest.approx(relative, rel=1e-4)
        assert record["parallel_share"][row] == pytest.approx(share, rel=1e-3)
    if isinstance(rule, CFG):
        assert record["scale_factor"] == pytest.approx([1.0] * BATCH, rel=1e-4)
    else:
        assert max(record["scale_factor"]) < 0.95, "APG must take something away"


def test_what_is_measured_of_some_samples_is_theirs():
    """Each at its own scale; a factor of the policy is part of the scale."""
    factors = (2.0, 3.0)
    cond, uncond, x_t = predictions()
    policy = AdaptiveGuidance(0.5)  # of the second step: sample 1 alone is below
    run = Run(APG(eta=0.0, norm_threshold=0.0, momentum=0.0) | policy, BATCH, 2, True, True)
    run.plan(x_t, LEVEL)
    near = cond + 1e-3 * (uncond - cond)
    first = near.clone()
    first[1] = -cond[1]
    run.combine(cond, first, 4.0, x_t)
    assert run.plan(x_t, LEVEL) == [1]
    run.combine(cond, uncond[1:2], 4.0, x_t)
    alone = Run(APG(eta=0.0, norm_threshold=0.0, momentum=0.0) | policy, 1, 2, True, True)
    alone.plan(x_t[1:2], LEVEL)
    alone.combine(cond[1:2], uncond[1:2], 4.0, x_t[1:2])
    for name in ("gamma", "cond_norm", "update_norm", "scale_factor", "parallel_share"):
        some, one = run.trace.as_dicts()[1][name], alone.trace.as_dicts()[0][name]
        assert some == pytest.approx(one, rel=1e-5), name
    scaled = Run(CFG() | Schedule(("both",) * 2, factors), BATCH, 2, True, True)
    for factor in factors:
        scaled.plan(x_t, LEVEL)
        scaled.combine(cond, uncond, 4.0, x_t)
        record = scaled.trace.as_dicts()[-1]
        expected = factor * 3 * (cond - uncond).flatten(1).norm(dim=1)
        assert record["update_norm"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert record["scale_factor"] == pytest.approx([1.0] * BATCH, rel=1e-4)


def test_equal_and_empty_predictions_have_figures():
    cond, _, x_t = predictions()
    for pred in (cond, torch.zeros_like(cond)):
        run = Run(Guidance(CFG()), BATCH, 1, on_cpu=True, detailed=True)
        run.plan()
        run.combine(pred, pred, 4.0, x_t)
        (record,) = run.trace.as_dicts()
        assert record["gamma"] == pytest.approx([1.0] * BATCH)
        for name in ("update_norm", "scale_factor", "parallel_share"):
            assert record[name] == [0.0] * BATCH, name


# Where values are read


def stops(policy, on_cpu, steps=5, gap=0.1):
    """How many steps are guided, over predictions that agree from the first step on."""
    run = Run(CFG() | policy, BATCH, steps, on_cpu=on_cpu)
    for step in range(steps):
        cond, uncond, x_t = predictions(step, gap)
        rows = run.plan(x_t, LEVEL)
        run.combine(cond, uncond[rows] if rows else None, 4.0, x_t)
    run.finish()
    return [n - steps for n in run.trace.nfe]


@pytest.mark.parametrize(
    ("lag", "on_cpu", "expected"),
    [(None, True, 1), (None, False, 2), (0, False, 1), (1, True, 2), (2, True, 3), (2, False, 3)],
)
def test_a_stop_takes_effect_at_once_on_the_cpu_and_a_step_later_elsewhere(lag, on_cpu, expected):
    """Unless it is said: the samples agree at step 0, which is guided in any case."""
    for policy in (
        AdaptiveGuidance(0.5, lag=lag),
        AdaptiveGuidance(0.5, space="native", lag=lag),
    ):
        assert stops(policy, on_cpu) == [expected] * BATCH


@pytest.mark.parametrize("space", ["x0", "native"])
def test_a_cosine_that_equals_the_threshold_stops(space):
    """Guidance while gamma < gamma-bar: at the threshold itself, there is none any more."""
    cond, uncond, x_t = predictions()
    run = Run(CFG() | AdaptiveGuidance(2.0, space), BATCH, 1, on_cpu=True)
    run.plan(x_t, LEVEL)
    run.combine(cond, uncond, 4.0, x_t)
    gammas = run.trace.steps[0].gamma.tolist()
    for row, gamma in enumerate(gammas):
        run = Run(CFG() | AdaptiveGuidance(gamma, space), BATCH, 2, on_cpu=True)
        run.plan(x_t, LEVEL)
        run.combine(cond, uncond, 4.0, x_t)
        below = [i for i, value in enumerate(gammas) if value < gamma]
        assert run.plan(x_t, LEVEL) == below and row not in below


@pytest.mark.parametrize("policy", [AdaptiveGuidance(2.0), Interval(0, 9)], ids=str)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_prediction_that_is_not_finite_is_said_one_step_later_elsewhere(policy, on_cpu):
    steps, bad = 3, 1
    for last in (False, True):
        run = Run(CFG() | policy, BATCH, bad + 1 if last else steps, on_cpu=on_cpu)
        with pytest.raises(NonFinitePredictionError, match=f"at step {bad} of"):
            for step in range(bad + 1 if last else steps):
                cond, uncond, x_t = predictions(step)
                if step == bad:
                    uncond[1, 2, 3, 4] = math.nan
                run.plan(x_t, LEVEL)
                run.combine(cond, uncond, 4.0, x_t)
            assert last and not on_cpu
            run.finish()
        assert run.step.index == bad + (not on_cpu and not last)


# Guards of a run


def test_a_run_says_what_it_lacks():
    cond, _, x_t = predictions()
    run = Run(Guidance(CFG()), BATCH, 1, on_cpu=True)
    run.plan(x_t)
    with pytest.raises(ValueError, match="step 0 wants the unconditional predictions"):
        run.combine(cond, None, 4.0, x_t)
    with pytest.raises(ValueError, match="no sample reuses anything"):
        run.reused(x_t)
    held = Schedule(("both", "forecast"), fill=HoldDifference("x0"))
    run = Run(CFG() | held, BATCH, 2, on_cpu=True)
    run.plan(x_t)
    with pytest.raises(ValueError, match="need the noise level"):
        run.combine(cond, cond, 4.0, x_t)


def test_a_sum_of_nothing_is_refused():
    kept = {("guided", 0): torch.ones(2, 3)}
    with pytest.raises(ValueError, match="step 4 reuses nothing: all weights are 0"):
        weighted_sum(Weights(), kept, 4)
    with pytest.raises(ValueError, match="the guided prediction of step 1, which was not kept"):
        weighted_sum(Weights(guided={0: 1.0, 1: 1.0}), kept, 4)
    found = weighted_sum(Weights(guided={0: 3.0}), kept, 4)
    assert torch.equal(found, torch.full((2, 3), 3.0))
