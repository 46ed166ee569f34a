"""Policies and the state of a run, on tensors alone."""

import math

import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Always,
    Guidance,
    Interval,
    NoiseLevel,
    NonFinitePredictionError,
    Run,
    Schedule,
    StepRecord,
    Trace,
    cosine,
    forecast,
)

LEVEL = NoiseLevel(0.6, 0.8, "v_prediction")
W = 5.0
RATIO = 0.8 / 0.6  # sigma / alpha of LEVEL


def trajectory(steps, batch=3, seed=0):
    """Pairs of predictions that come closer to each other, each sample at its own pace."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        cond, noise, x_t = torch.randn(3, batch, 4, 6, 6, generator=generator)
        gap = torch.tensor([2.0 ** -(step * (row + 1)) for row in range(batch)])
        yield cond, cond + gap.view(-1, 1, 1, 1) * noise, x_t


def drive(guidance, steps=6, batch=3, select=None, w=W, **options):
    """Run a guidance over the trajectory; returns the guided predictions and the run."""
    rows_of = list(range(batch)) if select is None else select
    run = Run(guidance, len(rows_of), steps, on_cpu=True, **options)
    guided = []
    for cond, uncond, x_t in trajectory(steps, batch):
        cond, uncond, x_t = cond[rows_of], uncond[rows_of], x_t[rows_of]
        rows = run.plan(x_t, LEVEL)
        if run.all_skipped:
            guided.append(run.reused(x_t))
            continue
        if run.skipped:
            cond = cond.clone()
            cond[run.skipped] = run.reused(x_t)[run.skipped]
        guided.append(run.combine(cond, uncond[rows] if rows else None, w, x_t))
    run.finish()
    return guided, run


def test_cosine_is_per_sample_and_total():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(cosine(a, b), torch.tensor([0.0, 1.0, 1.0, 0.0]))


def test_threshold_above_one_is_cfg():
    never, run = drive(CFG() | AdaptiveGuidance(1.01))
    plain, _ = drive(Guidance(CFG()))
    assert all(torch.equal(a, b) for a, b in zip(never, plain, strict=True))
    assert run.trace.nfe == [12, 12, 12]


def test_threshold_minus_one_stops_after_the_first_step():
    guided, run = drive(CFG() | AdaptiveGuidance(-1.0))
    assert run.trace.nfe == [7, 7, 7]
    conds = [cond for cond, _, _ in trajectory(6)]
    for got, cond in zip(guided[1:], conds[1:], strict=True):
        torch.testing.assert_close(got, cond, rtol=0, atol=0)


def test_latch_equals_the_definition():
    """k of sample i is the first step whose cosine reaches the threshold, that step included."""
    guidance = CFG() | AdaptiveGuidance(0.99)
    _, run = drive(guidance)
    gammas = [cosine(LEVEL.to_x0(c, x), LEVEL.to_x0(u, x)).tolist() for c, u, x in trajectory(6)]
    for row, nfe in enumerate(run.trace.nfe):
        k = next(i + 1 for i, gamma in enumerate(gammas) if gamma[row] >= 0.99)
        assert nfe == 6 + k
    assert len(set(run.trace.nfe)) > 1, "the samples should stop at different steps"


@pytest.mark.parametrize("rule", [CFG(), APG()])
def test_samples_do_not_depend_on_batch_mates(rule):
    together, run = drive(rule | AdaptiveGuidance(0.99))
    for row in range(3):
        alone, single = drive(rule | AdaptiveGuidance(0.99), select=[row])
        assert single.trace.nfe == run.trace.nfe[row : row + 1]
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guidance", [Guidance(APG()), APG() | AdaptiveGuidance(0.97)])
def test_views_of_one_network_give_one_result(guidance):
    """Epsilon, v, sample and flow outputs of one denoiser: the same pictures, the same stops.

    A flow model sees the same noise level as x / (alpha + sigma), its own alpha and sigma likewise.
    """
    results, costs = [], []
    for kind in ("epsilon", "v_prediction", "sample", "flow"):
        run, guided = Run(guidance, 3, 6, on_cpu=True), []
        for step, (cond, uncond, noise) in enumerate(trajectory(6)):
            sigma = 0.9 - 0.1 * step
            alpha = (1 - sigma**2) ** 0.5
            scale = 1 / (alpha + sigma) if kind == "flow" else 1.0
            level = NoiseLevel(alpha * scale, sigma * scale, kind)
            x_t = (scale * (alpha * cond + sigma * noise)).double()
            native = [level.from_x0(denoised.double(), x_t) for denoised in (cond, uncond)]
            rows = run.plan(x_t, level)
            combined = run.combine(native[0], native[1][rows] if rows else None, W, x_t)
            guided.append(level.to_x0(combined, x_t))
        results.append(torch.stack(guided))
        costs.append(run.trace.nfe)
    for result, cost in zip(results, costs, strict=True):
        assert cost == costs[0]
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("space", ["x0", "native"])
@pytest.mark.parametrize("rule", [CFG(), APG(norm_threshold=0.5, momentum=0.0)])
def test_forecasts_afterwards_keep_guidance_at_the_same_cost(rule, space):
    """Past its threshold a sample is guided and holds what guided it in turn, at its own pace."""
    steps, policy = 7, AdaptiveGuidance(0.99, space, then="forecast")
    plain, _ = drive(Guidance(rule), steps)
    stopped, dropped = drive(rule | AdaptiveGuidance(0.99, space), steps)
    got, run = drive(rule | policy, steps)
    first = [dropped.trace.nfe[row] - steps for row in range(3)]  # guided steps
    assert len(set(first)) == 3 and min(first) < 3
    for row, k in enumerate(first):
        assert run.trace.nfe[row] == 2 * k + (steps - k) // 2 * 2
        for t, (_, _, x_t) in enumerate(trajectory(steps)):
            rests = t >= k and (t - k) % 2 == 0
            assert (row in run.trace.steps[t].skipped) is rests
            expected = plain[t][row]
            if rests:
                before = [x for _, _, x in trajectory(steps)][t - 1]
                expected = plain[t - 1][row]
                if space == "x0":
                    held = LEVEL.to_x0(expected, before[row])
                    expected = LEVEL.from_x0(held, x_t[row])
            torch.testing.assert_close(got[t][row], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stopped[-1][0], got[-1][0])


def test_lag_delays_every_decision_by_exactly_that():
    base = drive(CFG() | AdaptiveGuidance(0.99, lag=0), steps=8)[1].trace.nfe
    late = drive(CFG() | AdaptiveGuidance(0.99, lag=1), steps=8)[1].trace.nfe
    assert late == [min(n + 1, 16) for n in base]


def test_interval_by_step_and_by_noise():
    assert drive(Guidance(APG(), Interval(1, 4)))[1].trace.nfe == [9, 9, 9]
    assert drive(Guidance(CFG(), Interval(noise_low=RATIO)))[1].trace.nfe == [6, 6, 6]
    assert drive(Guidance(CFG(), Interval(noise_high=RATIO)))[1].trace.nfe == [12, 12, 12]
    with pytest.raises(ValueError, match="empty"):
        Interval(4, 4)
    with pytest.raises(ValueError, match="empty"):
        Interval(noise_low=3, noise_high=1)
    with pytest.raises(ValueError, match="empty"):
        Interval(noise_low=3, noise_high=3)


def test_steps_that_the_pipeline_does_not_guide_ask_no_policy():
    run = Run(Guidance(CFG(), Interval(noise_low=1.0)), 2, 3, on_cpu=True)
    run.begin()
    run.unguided(*torch.ones(2, 2, 4, 6, 6))
    assert run.plan(level=LEVEL) == [0, 1]
    assert run.trace.nfe == [1, 1]
    assert run.step.index == 1


def test_runs_share_nothing():
    first, _ = drive(Guidance(APG(momentum=-0.75)))
    second, _ = drive(Guidance(APG(momentum=-0.75)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("policy", [Always(), AdaptiveGuidance(0.99), AdaptiveGuidance(-1.0)])
def test_cfg_hands_on_what_the_pipeline_made(policy):
    """Wherever guidance is the pipeline's own: at guided steps and for samples without."""
    run = Run(CFG() | policy, 3, 6, on_cpu=True)
    for cond, uncond, x_t in trajectory(6):
        rows = run.plan(x_t, LEVEL)
        own = cond.clone()
        own[rows] = uncond[rows] + W * (cond[rows] - uncond[rows])
        result = run.combine(cond, uncond[rows] if rows else None, W, x_t, own=own)
        assert result is (own if rows else cond)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(APG()),
        CFG() | Schedule(("both",) * 3, (2.0,) * 3),
        CFG() | Schedule(("both", "estimate", "estimate")),
    ],
    ids=str,
)
def test_what_the_pipeline_made_is_not_taken_for_anything_else(guidance):
    results = []
    for own in (None, torch.zeros(3, 4, 6, 6)):
        run, guided = Run(guidance, 3, 3, on_cpu=True), []
        for step, (cond, uncond, x_t) in enumerate(trajectory(3)):
            uncond = uncond if run.plan(x_t, LEVEL) else None
            guided.append(run.combine(cond, uncond, W, x_t, own=own if step else None))
        results.append(guided)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_scales_are_numbers_or_tensors(kind):
    """One for all samples, or one for each, of which the guided ones' are taken."""
    scales = torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1, 1)
    together, _ = drive(APG() | AdaptiveGuidance(0.99), w=scales)
    for row in range(3):
        w = kind(scales[row].item())
        alone, _ = drive(APG() | AdaptiveGuidance(0.99), select=[row], w=w)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-6, atol=1e-6)


def test_what_happens_afterwards_happens_to_the_guided_prediction():
    cond, uncond, x_t = next(trajectory(1))
    guided = []
    for after in (None, torch.Tensor.neg):
        run = Run(CFG() | Interval(0, 1), 3, 2, on_cpu=True)
        run.plan()
        guided.append(run.combine(cond, uncond, W, x_t, after=after))
        run.plan()
        assert run.combine(cond, None, W, x_t, after=after) is cond
    assert torch.equal(guided[1], -guided[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_prediction_names_the_step(value):
    run = Run(Guidance(APG()), 3, 20, on_cpu=True)
    for step, (cond, uncond, x_t) in enumerate(trajectory(3)):
        run.plan(x_t, LEVEL)
        if step == 2:
            uncond[1, 0, 0, 0] = value
            with pytest.raises(NonFinitePredictionError, match="step 2 of 20"):
                run.combine(cond, uncond, W, x_t)
        else:
            run.combine(cond, uncond, W, x_t)


def test_trace_records_norms_when_asked():
    guided, run = drive(Guidance(APG(norm_threshold=0.0, momentum=0.0)), detailed=True)
    cond, uncond, x_t = next(trajectory(6))
    in_x0 = cosine(LEVEL.to_x0(cond, x_t), LEVEL.to_x0(uncond, x_t)).tolist()
    assert run.trace.as_dicts()[0]["gamma"] == pytest.approx(in_x0, rel=1e-5)
    records = run.trace.as_dicts()
    assert [r["step"] for r in records] == list(range(6))
    for record, (cond, _, x_t) in zip(records, trajectory(6), strict=True):
        denoised = LEVEL.to_x0(cond, x_t)
        expected = denoised.flatten(1).norm(dim=1).tolist()
        assert record["cond_norm"] == pytest.approx(expected, rel=1e-5)
        assert len(record["gamma"]) == len(record["update_norm"]) == 3
    plain, run = drive(Guidance(APG(norm_threshold=0.0, momentum=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(guided, plain, strict=True))
    assert "gamma" not in run.trace.as_dicts()[0]


def test_one_branch_is_all_that_is_evaluated():
    run = Run(CFG() | forecast(first=0), 2, 5, on_cpu=True, one_branch=True)
    for cond, _, x_t in trajectory(5, batch=2):
        assert run.plan(x_t, LEVEL) == []
        if run.all_skipped:
            run.reused(x_t)
        else:
            run.unguided(cond, x_t)
    assert run.trace.nfe == [3, 3]
    assert [record.skipped for record in run.trace.steps] == [[], [0, 1], [], [0, 1], []]


def test_evaluations_are_counted_by_branches():
    steps = [
        StepRecord(0, None, [0, 1], branches=3),
        StepRecord(1, None, [], [1], branches=3),
        StepRecord(2, None, [0], [2], unused=[1, 2], branches=3),
    ]
    trace = Trace(3, steps)
    assert trace.nfe == [3 + 1 + 3, 3 + 0 + 3, 1 + 1 + 3]
    drawn = trace.plot().axes[0].lines[0].get_ydata().tolist()
    assert drawn == pytest.approx([7 / 3, 2 / 3, 9 / 3])


def test_figures_of_other_samples_than_were_guided_are_not_drawn():
    trace = Trace(2, [StepRecord(0, None, [0], gamma=torch.tensor([0.5]))])
    lines = trace.plot().axes[1].lines
    assert [line.get_ydata().tolist() for line in lines] == [[0.5]]
    trace.steps.append(StepRecord(1, None, [0], gamma=torch.tensor([0.5, 0.6])))
    with pytest.raises(ValueError, match="longer"):
        trace.plot()
