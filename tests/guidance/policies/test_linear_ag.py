"""LinearAG, its baselines and the history they share, on tensors alone."""

import math
from dataclasses import replace

import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Always,
    Coefficients,
    Extrapolate,
    ExtrapolateDifference,
    Forecast,
    Gram,
    Guidance,
    Hold,
    HoldDifference,
    LinearAG,
    NoiseLevel,
    Run,
    Schedule,
    Weights,
    fit_coefficients,
    load_guidance,
    r_squared,
    save_guidance,
)
from pilotage.guidance.fitting.regression import residuals
from pilotage.guidance.policies.history import HistoryPlan

T = 8
W = 4.0
LEVEL = NoiseLevel(0.6, 0.8, "v_prediction")


def linear_trajectories(count=6, elements=40, seed=0, constant=0.0):
    """Unconditional predictions that are linear in what precedes them, and the true weights."""
    generator = torch.Generator().manual_seed(seed)
    beta_c = torch.randn(T, T, generator=torch.Generator().manual_seed(99)).double() / T
    beta_u = torch.randn(T, T, generator=torch.Generator().manual_seed(98)).double() / T
    cond = torch.randn(T, count, elements, generator=generator).double()
    uncond = torch.randn(T, count, elements, generator=generator).double()
    for t in range(1, T):
        uncond[t] = torch.einsum("i,ibn->bn", beta_c[t, : t + 1], cond[: t + 1])
        uncond[t] += torch.einsum("i,ibn->bn", beta_u[t, :t], uncond[:t]) + constant
    return cond, uncond, beta_c, beta_u


def drive(policy, cond, uncond, rule=None, w=W, x_t=None):
    """A run over given predictions: guided predictions (T, B, n), the rows asked for, the run."""
    guided = []
    run = Run(Guidance(rule or CFG(), policy), cond.shape[1], len(cond), on_cpu=True)
    for t in range(len(cond)):
        rows = run.plan()
        given = uncond[t][rows] if rows else None
        x = torch.zeros_like(cond[t]) if x_t is None else x_t[t]
        if run.all_rest:
            guided.append(run.forecast(x, LEVEL))
            continue
        c, u = run.combine(rows, cond[t], given, x, w, LEVEL)
        guided.append(u + w * (c - u))
    run.finish()
    return torch.stack(guided), run


ONE = Coefficients(((1.0,),), ((),))


def without_forecasts():
    return Coefficients([[0.0] * (t + 1) for t in range(4)], [[0.0] * t for t in range(4)])


def three_steps():
    """The estimate of the last step is made of every prediction before it."""
    cond = ((1.0,), (1.0, 1.0), (1.0, 1.0, 1.0))
    return Coefficients(cond, ((), (1.0,), (1.0, 1.0)), guided=((), (1.0,), (0.0, 0.0)))


@pytest.mark.parametrize("target", ["uncond", "difference"])
@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_an_exact_linear_toy_is_recovered(target, constant):
    """The weights of a step whose past is not itself linear, and the predictions of all steps."""
    cond, uncond, beta_c, beta_u = linear_trajectories(constant=constant)
    for t in range(1, T):
        past = torch.randn(uncond.shape, generator=torch.Generator().manual_seed(t)).double()
        past[t] = torch.einsum("i,ibn->bn", beta_c[t, : t + 1], cond[: t + 1])
        past[t] += torch.einsum("i,ibn->bn", beta_u[t, :t], past[:t]) + constant
        gram = Gram.of(cond[:, :3], past[:, :3]) + Gram.of(cond[:, 3:], past[:, 3:])
        found = fit_coefficients(gram, target=target, ridge=0, intercept=constant != 0)
        true = torch.cat([beta_c[t, : t + 1], beta_u[t, :t]])
        got = torch.tensor([*found.cond[t], *found.uncond[t]], dtype=torch.float64)
        torch.testing.assert_close(got, true, rtol=0, atol=1e-6)
        if constant:
            assert found.intercept[t] == pytest.approx(constant, abs=1e-6)
    found = fit_coefficients(Gram.of(cond, uncond), target=target, ridge=0, intercept=constant != 0)
    new_cond, new_uncond, *_ = linear_trajectories(seed=5, constant=constant)
    for tail in ("cond", "linear"):
        policy = LinearAG(tail=tail, coefficients=found)
        guided, run = drive(policy, new_cond, new_uncond)
        full = new_uncond + W * (new_cond - new_uncond)
        estimated = T if tail == "linear" else T // 2
        torch.testing.assert_close(guided[:estimated], full[:estimated], rtol=0, atol=1e-6)
        torch.testing.assert_close(guided[estimated:], new_cond[estimated:], rtol=0, atol=0)
        assert run.trace.nfe == [T + T // 4] * 6


def test_twenty_steps_cost_25_evaluations():
    cond, uncond = torch.randn(2, 20, 1, 3)
    some = fit_coefficients(Gram.of(cond, uncond))
    for tail in ("cond", "linear"):
        policy = LinearAG(tail=tail, coefficients=some)
        assert policy.nfe(20) == 25
        assert drive(policy, cond, uncond)[1].trace.nfe == [25]


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
    found = fit_coefficients(gram, ridge=0.1, intercept=True)
    for t in range(T):
        guess = sum(b * cond[i] for i, b in enumerate(found.cond[t])) + found.intercept[t]
        guess = guess + sum(b * uncond[i] for i, b in enumerate(found.uncond[t]))
        error = (uncond[t] - guess).square().sum()
        torch.testing.assert_close(residuals(gram, found)[t], error, rtol=1e-9, atol=0)
        for of, square in (("uncond", uncond[t]), ("difference", cond[t] - uncond[t])):
            expected = 1 - error / square.square().sum()
            torch.testing.assert_close(r_squared(gram, found, of)[t], expected, rtol=0, atol=1e-9)


def test_estimates_are_fed_back():
    """Against a plain loop that keeps everything and puts estimates in the place of predictions."""
    cond, uncond = torch.randn(2, T, 3, 10, generator=torch.Generator().manual_seed(3)).double()
    some = fit_coefficients(Gram.of(cond, uncond), ridge=0.5)
    choices = ("both", "estimate", "cond", "estimate", "both", "estimate", "estimate", "cond")
    guided, run = drive(Schedule(choices, stand_in=some), cond, uncond)
    seen = []
    for t, choice in enumerate(choices):
        u = uncond[t]
        if choice != "both":
            u = sum(b * cond[i] for i, b in enumerate(some.cond[t]))
            u = u + sum(b * seen[i] for i, b in enumerate(some.uncond[t]))
        seen.append(u)
        expected = cond[t] if choice == "cond" else u + W * (cond[t] - u)
        torch.testing.assert_close(guided[t], expected, rtol=1e-5, atol=1e-5)
    assert run.trace.nfe == [T + 2] * 3
    estimated = [step.index for step in run.trace.steps if step.estimated]
    assert estimated == [t for t, choice in enumerate(choices) if choice == "estimate"]


@pytest.mark.parametrize("space", ["native", "x0"])
def test_hold_and_extrapolate_are_their_definitions(space):
    cond, uncond, x_t = torch.randn(3, T, 2, 9, generator=torch.Generator().manual_seed(4)).double()

    def view(pred, t):
        return pred[t] if space == "native" else LEVEL.to_x0(pred[t], x_t[t])

    def back(value, t):
        return value if space == "native" else LEVEL.from_x0(value, x_t[t])

    delta = [view(cond, t) - view(uncond, t) for t in range(T)]
    held, run = drive(Hold(period=3, head=1.0, space=space), cond, uncond, x_t=x_t)
    straight, _ = drive(Extrapolate(period=3, head=1.0, space=space), cond, uncond, x_t=x_t)
    assert run.trace.nfe == [T + 3] * 2
    for t in range(T):
        k = 3 * (t // 3)
        slope = 0 if k == 0 else (delta[k] - delta[k - 3]) / 3
        for got, difference in ((held, delta[k]), (straight, delta[k] + (t - k) * slope)):
            u = back(view(cond, t) - difference, t)
            torch.testing.assert_close(got[t], u + W * (cond[t] - u), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [CFG(), APG()])
@pytest.mark.parametrize("space", ["native", "x0"])
def test_forecasts_are_made_of_what_the_rule_made(space, rule):
    """Held, continued and by given weights, against the guided predictions of the other steps."""
    cond, uncond, x_t = torch.randn(3, T, 2, 9, generator=torch.Generator().manual_seed(5)).double()
    choices = ("both", "cond", "forecast", "both", "estimate", "forecast", "forecast", "both")
    before = {2: (0, 1), 5: (3, 4), 6: (3, 4)}
    chance = torch.Generator().manual_seed(1)
    some = torch.randn(T, T, generator=chance).double().tolist()
    some = [[w if choices[i] != "forecast" else 0.0 for i, w in enumerate(row)] for row in some]
    hold_cond = [[*[0.0] * t, 1.0] for t in range(T)]
    hold_cond[4][3] = -1.0
    hold_uncond = [[0.0] * t for t in range(T)]
    hold_uncond[4][3] = 1.0
    guided_rows = [row[:t] for t, row in enumerate(some)]
    given = Coefficients(hold_cond, hold_uncond, guided=guided_rows, space=space)
    for stand_in in (HoldDifference(space), ExtrapolateDifference(space), given):
        got, run = drive(Schedule(choices, stand_in=stand_in), cond, uncond, rule, x_t=x_t)
        seen = [LEVEL.to_x0(g, x) if space == "x0" else g for g, x in zip(got, x_t, strict=True)]
        for t, (j, k) in before.items():
            if stand_in is given:
                expected = sum(some[t][i] * seen[i] for i in range(t))
            elif stand_in == HoldDifference(space):
                expected = seen[k]
            else:
                expected = seen[k] + (t - k) / (k - j) * (seen[k] - seen[j])
            torch.testing.assert_close(seen[t], expected, rtol=1e-5, atol=1e-5)
        assert run.trace.nfe == [3 * 2 + 2] * 2 == [run.guidance.policy.nfe(T)] * 2
        assert [s.index for s in run.trace.steps if s.resting] == list(before)
        # The others are what they would be without the forecasts.
        if stand_in is not given:
            without = [c if c != "forecast" else "cond" for c in choices]
            plain, _ = drive(Schedule(without, stand_in=stand_in), cond, uncond, rule, x_t=x_t)
            for t in set(range(T)) - set(before):
                torch.testing.assert_close(got[t], plain[t], rtol=1e-5, atol=1e-5)


def test_forecast_evaluates_the_first_steps_and_then_every_second():
    choices = Forecast().choices_for(20)
    assert choices == ("both",) * 4 + ("forecast", "both") * 8
    assert Forecast().nfe(20) == 24
    assert Forecast(head=0, period=3).choices_for(6) == (
        ("both",) + ("forecast", "forecast", "both") + ("forecast",) * 2
    )
    assert Forecast(head=1).choices_for(3) == ("both",) * 3
    cond, uncond, x_t = torch.randn(3, T, 2, 9, generator=torch.Generator().manual_seed(6)).double()
    guided, run = drive(Forecast(head=0.25), cond, uncond, x_t=x_t)
    for t in range(T):
        k = t - bool(run.trace.steps[t].resting)
        held = LEVEL.to_x0(uncond[k] + W * (cond[k] - uncond[k]), x_t[k])
        torch.testing.assert_close(LEVEL.to_x0(guided[t], x_t[t]), held, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", ["cond", "linear", "forecast"])
def test_linear_ag_costs_the_same_with_every_tail(tail):
    cond, uncond = torch.randn(2, T, 2, 9, generator=torch.Generator().manual_seed(9)).double()
    found = fit_coefficients(Gram.of(cond, uncond))
    held = [[*[0.0] * (t - 1), 1.0][:t] for t in range(T)]
    policy = LinearAG(tail=tail, coefficients=replace(found, guided=held))
    _, run = drive(policy, cond, uncond)
    assert run.trace.nfe == [policy.nfe(T)] * 2 == [T + T // 4] * 2


@pytest.mark.parametrize("rule", [CFG(), APG()])
def test_a_schedule_of_both_is_ordinary_guidance(rule):
    cond, uncond, x_t = torch.randn(3, T, 2, 9, generator=torch.Generator().manual_seed(6))
    plain, _ = drive(Schedule(("both",) * T), cond, uncond, rule, x_t=x_t)
    expected, _ = drive(Always(), cond, uncond, rule, x_t=x_t)
    assert torch.equal(plain, expected)


def test_factors_scale_the_update():
    cond, uncond = torch.randn(2, T, 2, 9, generator=torch.Generator().manual_seed(7)).double()
    factors = tuple(0.5 + 0.25 * t for t in range(T))
    guided, _ = drive(Schedule(("both",) * T, factors), cond, uncond)
    for t in range(T):
        w = 1 + factors[t] * (W - 1)
        torch.testing.assert_close(guided[t], uncond[t] + w * (cond[t] - uncond[t]))


def test_history_keeps_only_what_later_steps_use():
    """Places are given back: holding needs two, alternating LinearAG no more than its head."""
    hold = [HoldDifference().weights(t, [2 * (t // 2)]) if t % 2 else None for t in range(20)]
    assert HistoryPlan(hold).places == 3  # c and u of the last real step, c of this one
    never = HistoryPlan([None] * 20)
    assert never.places == 0 and not never.place_of
    line = [
        ExtrapolateDifference().weights(t, [i for i in range(t) if i % 3 == 0]) if t % 3 else None
        for t in range(30)
    ]
    assert HistoryPlan(line).places == 5
    held = [HoldDifference().forecast(t, [2 * (t // 2)]) if t % 2 else None for t in range(20)]
    assert HistoryPlan(held).places == 1


def test_the_future_cannot_be_used():
    with pytest.raises(ValueError, match="uses uncond of step 1"):
        HistoryPlan([None, Weights({1: 1.0}, {1: 1.0})])
    with pytest.raises(ValueError, match="uses cond of step 3"):
        HistoryPlan([None, Weights({3: 1.0})])
    with pytest.raises(ValueError, match="uses guided of step 1"):
        HistoryPlan([None, Weights(guided={1: 1.0})])


def test_estimates_stay_in_the_networks_dtype():
    cond, uncond = torch.randn(2, 4, 2, 9, generator=torch.Generator().manual_seed(8)).half()
    guided, _ = drive(Hold(head=1.0), cond, uncond)
    assert guided.dtype == torch.float16


def test_a_step_without_guidance_leaves_a_hole_that_is_named():
    cond, uncond = torch.randn(2, T, 2, 9)
    run = Run(Guidance(CFG(), Hold()), 2, T, on_cpu=True)
    run.plan()
    run.leave(cond[0], cond[0], LEVEL)
    assert run.plan() == []
    with pytest.raises(ValueError, match="step 0, at which the pipeline did not guide"):
        run.combine([], cond[1], None, cond[1], W, LEVEL)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("policy", [Forecast(head=0), AdaptiveGuidance(-1.0, tail="forecast")])
def test_forecasts_take_what_the_pipeline_did_not_guide_for_guided(policy, planned):
    cond, x_t = torch.randn(2, T, 2, 9, dtype=torch.float64)
    run = Run(Guidance(CFG(), policy), 2, T, on_cpu=True)
    run.plan()
    run.combine([0, 1], 5 * cond[2], cond[2], x_t[2], W, LEVEL)
    run.plan()
    run.forecast(x_t[3], LEVEL)
    (run.plan if planned else run.begin_step)()
    run.leave(cond[0], x_t[0], LEVEL)
    while run.plan():
        run.leave(cond[0], x_t[0], LEVEL)
    assert run.all_rest
    held = LEVEL.to_x0(cond[0], x_t[0])
    torch.testing.assert_close(LEVEL.to_x0(run.forecast(x_t[1], LEVEL), x_t[1]), held)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearAG(), "pilotage fit"),
        (lambda: Hold(tail="linear"), "tail is 'cond', 'hold' or 'forecast'"),
        (lambda: Hold(period=0), "period must be >= 1"),
        (lambda: Hold(head=1.5), "head is a share"),
        (lambda: Schedule(), "a choice of both, estimate, cond"),
        (lambda: Schedule(("both", "skip")), "skip"),
        (lambda: Schedule(("both",), (1.0, 2.0)), "2 factors for 1 choices"),
        (lambda: Schedule(("both",), (math.nan,)), "finite"),
        (lambda: Schedule(("cond", "estimate")), "no step before it evaluates"),
        (lambda: Schedule(("forecast", "both")), "no step before it evaluates anything"),
        (lambda: Schedule(("both", "both"), stand_in=ONE), "fitted for 1 steps"),
        (lambda: Forecast(head=1.5), "head is a share"),
        (lambda: Forecast(period=0), "period must be >= 1"),
        (lambda: Forecast(space="x"), "space is 'x0' or 'native'"),
        (lambda: Coefficients(((1.0,),), ((1.0,),)), "row t must hold"),
        (lambda: Coefficients(((1.0,),), ((),), guided=((1.0,),)), "weights of guided"),
        (
            lambda: LinearAG(tail="forecast", coefficients=without_forecasts()),
            "no forecast of step 3",
        ),
        (
            lambda: Schedule(("both", "forecast", "estimate"), stand_in=three_steps()),
            "made of predictions of step 1, which is forecast",
        ),
        (lambda: Coefficients(((1.0,),), ((),), (1.0, 2.0)), "2 intercepts for 1 steps"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_of_another_length_is_refused():
    cond, uncond = torch.randn(2, T, 2, 9)
    some = fit_coefficients(Gram.of(cond, uncond))
    for policy in (Schedule(("both",) * T), LinearAG(coefficients=some)):
        run = Run(Guidance(CFG(), policy), 2, T + 1, on_cpu=True)
        with pytest.raises(ValueError, match=f"cannot guide a run of {T + 1}"):
            run.plan()


def test_bad_trajectories():
    cond, uncond = torch.randn(2, T, 2, 9)
    cond[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Gram.of(cond, uncond)
    with pytest.raises(ValueError, match="no trajectories"):
        fit_coefficients(Gram.empty(T))


def test_saved_settings_come_back(tmp_path):
    cond, uncond = torch.randn(2, T, 2, 9)
    some = fit_coefficients(Gram.of(cond, uncond), intercept=True, identity={"scheduler": "X"})
    forecasting = replace(three_steps(), guided=((), (1.0,), (0.5, 0.5)))
    for guidance in (
        APG(eta=0.25) | LinearAG(tail="linear", coefficients=some),
        Guidance(CFG(), Schedule(("both",) * T, (1.5,) * T, some, {"networks": {"unet": "a"}})),
        Guidance(CFG(), Extrapolate(period=3)),
        Guidance(CFG(), Forecast(head=0.5)),
        Guidance(CFG(), Schedule(("both", "both", "forecast"), stand_in=forecasting)),
        Guidance(APG()),
    ):
        path = tmp_path / "own.json"
        save_guidance(path, guidance, {"ssim": 0.9})
        assert load_guidance(path) == guidance
        assert [p.name for p in tmp_path.iterdir()] == ["own.json"]
    text = path.read_text()
    for broken in (text[: len(text) // 2], "{}", text.replace('"apg"', '"agp"')):
        path.write_text(broken)
        with pytest.raises(ValueError, match="not a file of guidance settings"):
            load_guidance(path)


def test_fitted_settings_can_be_keys():
    """Identities are plain dictionaries; equal numbers fitted on two models differ."""
    cond, uncond = torch.randn(2, T, 2, 9)
    one, two = (fit_coefficients(Gram.of(cond, uncond), identity={"scheduler": s}) for s in "XY")
    policies = {LinearAG(coefficients=one): 1, LinearAG(coefficients=two): 2}
    assert len(policies) == 2
    schedule = Schedule(("both",) * T, stand_in=one, identity={"scheduler": "X"})
    assert {schedule: 1}[schedule] == 1
