"""Schedules: what steps evaluate, and what fills in for the rest, on tensors alone."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Always,
    Coefficients,
    ExtrapolateDifference,
    Gram,
    Guidance,
    HoldDifference,
    NoiseLevel,
    Run,
    Schedule,
    extrapolate,
    fit_coefficients,
    forecast,
    gate,
    hold,
    linear_ag,
    load_guidance,
    save_guidance,
)
from pilotage.guidance.base import BOTH, Decision, Policy, PolicyState, Weights

T = 8
W = 4.0
LEVEL = NoiseLevel(0.6, 0.8, "v_prediction")


def drive(policy, cond, uncond, rule=None, w=W, x_t=None):
    """A run over given predictions: guided predictions (T, B, n), and the run."""
    guided = []
    run = Run(Guidance(rule or CFG(), policy), cond.shape[1], len(cond), on_cpu=True)
    for t in range(len(cond)):
        x = torch.zeros_like(cond[t]) if x_t is None else x_t[t]
        rows = run.plan(x, LEVEL)
        if run.all_skipped:
            guided.append(run.reused(x))
        else:
            guided.append(run.combine(cond[t], uncond[t][rows] if rows else None, w, x))
        check_kept(run)
    run.finish()
    return torch.stack(guided), run


def check_kept(run):
    """A run keeps what its later steps reuse, and nothing else."""
    decisions = run.guidance.policy.decisions(run.total)
    if isinstance(run.guidance.policy, Schedule):
        later = [d.reuse for d in decisions[run.step.index + 1 :] if d.reuse]
        wanted = {(kind, i) for sum_ in later for kind, i, _ in sum_.terms()}
        assert set(run.kept) == {(kind, i) for kind, i in wanted if i <= run.step.index}


ONE = Coefficients(((1.0,),), ((),))


def without_forecasts():
    return Coefficients([[0.0] * (t + 1) for t in range(4)], [[0.0] * t for t in range(4)])


def three_steps():
    """The estimate of the last step is made of every prediction before it."""
    cond = ((1.0,), (1.0, 1.0), (1.0, 1.0, 1.0))
    return Coefficients(cond, ((), (1.0,), (1.0, 1.0)), guided=((), (1.0,), (0.0, 0.0)))


def test_twenty_steps_cost_25_evaluations():
    cond, uncond = torch.randn(2, 20, 1, 3)
    some = fit_coefficients(Gram.of(cond, uncond))
    for then in ("cond", "estimate"):
        policy = linear_ag(then=then, coefficients=some)
        assert policy.nfe(20) == 25
        assert drive(policy, cond, uncond)[1].trace.nfe == [25]


def test_the_papers_pattern_is_the_default():
    """Ten alternating steps, then ten estimated ones; for LinearAG and its baselines."""
    cond, uncond = torch.randn(2, 20, 1, 3)
    some = fit_coefficients(Gram.of(cond, uncond))
    for policy in (linear_ag(some), hold(), extrapolate()):
        assert policy.choices_for(20) == ("both", "estimate") * 5 + ("estimate",) * 10


def test_estimates_are_fed_back():
    """Against a plain loop that keeps everything and puts estimates in the place of predictions."""
    cond, uncond = torch.randn(2, T, 3, 10, generator=torch.Generator().manual_seed(3)).double()
    some = fit_coefficients(Gram.of(cond, uncond), ridge=0.5)
    choices = ("both", "estimate", "cond", "estimate", "both", "estimate", "estimate", "cond")
    guided, run = drive(Schedule(choices, fill=some), cond, uncond)
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
    held, run = drive(hold(period=3, first=1.0, space=space), cond, uncond, x_t=x_t)
    straight, _ = drive(extrapolate(period=3, first=1.0, space=space), cond, uncond, x_t=x_t)
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
    for fill in (HoldDifference(space), ExtrapolateDifference(space), given):
        got, run = drive(Schedule(choices, fill=fill), cond, uncond, rule, x_t=x_t)
        seen = [LEVEL.to_x0(g, x) if space == "x0" else g for g, x in zip(got, x_t, strict=True)]
        for t, (j, k) in before.items():
            if fill is given:
                expected = sum(some[t][i] * seen[i] for i in range(t))
            elif fill == HoldDifference(space):
                expected = seen[k]
            else:
                expected = seen[k] + (t - k) / (k - j) * (seen[k] - seen[j])
            torch.testing.assert_close(seen[t], expected, rtol=1e-5, atol=1e-5)
        assert run.trace.nfe == [3 * 2 + 2] * 2 == [run.guidance.policy.nfe(T)] * 2
        assert [s.index for s in run.trace.steps if s.skipped] == list(before)
        # The others are what they would be without the forecasts.
        if fill is not given:
            without = [c if c != "forecast" else "cond" for c in choices]
            plain, _ = drive(Schedule(without, fill=fill), cond, uncond, rule, x_t=x_t)
            for t in set(range(T)) - set(before):
                torch.testing.assert_close(got[t], plain[t], rtol=1e-5, atol=1e-5)


def test_forecast_evaluates_the_first_steps_and_then_every_second():
    choices = forecast().choices_for(20)
    assert choices == ("both",) * 4 + ("forecast", "both") * 8
    assert forecast().nfe(20) == 24
    assert forecast(first=0, period=3).choices_for(6) == (
        ("both",) + ("forecast", "forecast", "both") + ("forecast",) * 2
    )
    assert forecast(first=1).choices_for(3) == ("both",) * 3
    cond, uncond, x_t = torch.randn(3, T, 2, 9, generator=torch.Generator().manual_seed(6)).double()
    guided, run = drive(forecast(first=0.25), cond, uncond, x_t=x_t)
    for t in range(T):
        k = t - bool(run.trace.steps[t].skipped)
        held = LEVEL.to_x0(uncond[k] + W * (cond[k] - uncond[k]), x_t[k])
        torch.testing.assert_close(LEVEL.to_x0(guided[t], x_t[t]), held, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("then", ["cond", "estimate", "forecast"])
def test_linear_ag_costs_the_same_whatever_follows(then):
    cond, uncond = torch.randn(2, T, 2, 9, generator=torch.Generator().manual_seed(9)).double()
    found = fit_coefficients(Gram.of(cond, uncond))
    held = [[*[0.0] * (t - 1), 1.0][:t] for t in range(T)]
    policy = linear_ag(then=then, coefficients=replace(found, guided=held))
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


def test_estimates_stay_in_the_networks_dtype():
    cond, uncond = torch.randn(2, 4, 2, 9, generator=torch.Generator().manual_seed(8)).half()
    guided, _ = drive(hold(first=1.0), cond, uncond)
    assert guided.dtype == torch.float16


def test_a_step_without_guidance_leaves_a_hole_that_is_named():
    cond, _ = torch.randn(2, T, 2, 9)
    run = Run(Guidance(CFG(), hold()), 2, T, on_cpu=True)
    run.plan(cond[0], LEVEL)
    run.unguided(cond[0], cond[0])
    assert run.plan(cond[1], LEVEL) == []
    with pytest.raises(ValueError, match="step 0, which was not kept: the pipeline did not guide"):
        run.combine(cond[1], None, W, cond[1])


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("policy", [forecast(first=0), AdaptiveGuidance(-1.0, then="forecast")])
def test_skipped_steps_take_what_the_pipeline_did_not_guide_for_guided(policy, planned):
    cond, x_t = torch.randn(2, T, 2, 9, dtype=torch.float64)
    run = Run(Guidance(CFG(), policy), 2, T, on_cpu=True)
    run.plan(x_t[2], LEVEL)
    run.combine(5 * cond[2], cond[2], W, x_t[2])
    run.plan(x_t[3], LEVEL)
    run.reused(x_t[3])
    (run.plan if planned else run.begin)(x_t[0], LEVEL)
    run.unguided(cond[0], x_t[0])
    while run.plan(x_t[1], LEVEL):
        run.unguided(cond[0], x_t[0])
    assert run.all_skipped
    held = LEVEL.to_x0(cond[0], x_t[0])
    torch.testing.assert_close(LEVEL.to_x0(run.reused(x_t[1]), x_t[1]), held)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear_ag(), "pilotage fit"),
        (lambda: hold(then="linear"), "a choice is one of both, estimate, cond, forecast"),
        (lambda: hold(period=0), "periods are whole numbers from 1 on"),
        (lambda: hold(first=1.5), "first part is a share"),
        (lambda: Schedule(), "a choice of both, estimate, cond"),
        (lambda: Schedule(("both", "skip")), "skip"),
        (lambda: Schedule(("both",), (1.0, 2.0)), "2 factors for 1 choices"),
        (lambda: Schedule(("both",), (math.nan,)), "finite"),
        (
            lambda: Schedule(("cond", "estimate")),
            "estimated, but no step .* evaluates both branches",
        ),
        (lambda: Schedule(("forecast", "both")), "skipped, but no step .* evaluates anything"),
        (
            lambda: Schedule(("both", "both"), fill=ONE),
            "2 steps cannot guide a run of 1",
        ),
        (lambda: forecast(first=1.5), "first part is a share"),
        (lambda: forecast(period=0), "period must be >= 1"),
        (lambda: forecast(space="x"), "space is 'x0' or 'native'"),
        (lambda: Coefficients(((1.0,),), ((1.0,),)), "row t must hold"),
        (lambda: Coefficients(((1.0,),), ((),), guided=((1.0, 1.0),)), "weights of guided"),
        (
            lambda: linear_ag(then="forecast", coefficients=without_forecasts()),
            "no weights for skipping step 3",
        ),
        (
            lambda: Schedule(("both", "forecast", "estimate"), fill=three_steps()),
            "made of predictions of step 1, which is skipped",
        ),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("space", ["native", "x0"])
@pytest.mark.parametrize("one_branch", [False, True])
def test_corrected_steps_are_sums_of_what_was_stepped(space, one_branch):
    """Against a loop in float64: a correction's terms are earlier results, and the step's own."""
    generator = torch.Generator().manual_seed(4)
    cond, uncond, x_t = torch.randn(3, 4, 2, 9, generator=generator).double()
    w = 1.0 if one_branch else W
    rows = ((), (0.3, 0.6), (-0.2, 1.3), (0.4, 0.0, -0.5, 1.2))
    choices = ("both", "both", "forecast", "both")
    fill = Coefficients(
        tuple((0.0,) * t + (1.0,) for t in range(4)),
        tuple((0.0,) * t for t in range(4)),
        rows,
        space,
    )
    a, s = 0.6, 0.8  # of LEVEL, v-prediction: x0 = a x - s v
    expected: list = []
    for t in range(4):
        terms = [(e if space == "native" else a * x_t[i] - s * e) for i, e in enumerate(expected)]
        if choices[t] == "both":
            own = uncond[t] + w * (cond[t] - uncond[t])
            terms.append(own if space == "native" else a * x_t[t] - s * own)
        if rows[t]:
            found = sum(weight * term for weight, term in zip(rows[t], terms, strict=True))
            expected.append(found if space == "native" else (a * x_t[t] - found) / s)
        else:
            expected.append(own)
    policy = Schedule(choices, fill=fill)
    run = Run(Guidance(CFG(), policy), 2, 4, on_cpu=True, one_branch=one_branch)
    for t in range(4):
        both = run.plan(x_t[t], LEVEL)
        assert both == ([0, 1] if choices[t] == "both" and not one_branch else [])
        if run.all_skipped:
            got = run.reused(x_t[t])
        elif one_branch:
            got = run.unguided(cond[t], x_t[t])
        else:
            got = run.combine(cond[t], uncond[t], w, x_t[t], own=uncond[t] + w * (cond - uncond)[t])
        torch.testing.assert_close(got, expected[t], rtol=0, atol=1e-12)
    assert run.kept == {}
    assert Guidance(CFG(), policy).combines(policy.decisions(4))


def test_a_correction_is_of_its_own_sample():
    """Beside a sample that is not corrected."""
    corrected = Decision(reuse=Weights(guided={0: 0.5, 1: 2.0}))
    run = Run(Guidance(CFG(), Told([[BOTH, BOTH], [BOTH, corrected]])), 2, 2, on_cpu=True)
    cond, uncond = torch.randn(2, 2, 2, 9, generator=torch.Generator().manual_seed(5))
    guided = []
    for t in range(2):
        run.plan()
        guided.append(run.combine(cond[t], uncond[t], W, torch.zeros(2, 9)))
    plain = uncond + W * (cond - uncond)
    torch.testing.assert_close(guided[1][0], plain[1, 0])
    torch.testing.assert_close(guided[1][1], 0.5 * plain[0, 1] + 2 * plain[1, 1])


@dataclass(frozen=True)
class Told(Policy):
    """Does what it is told, and keeps everything."""

    steps: tuple

    def start(self, batch, total, on_cpu):
        state = _Told()
        state.steps = self.steps
        return state


class _Told(PolicyState):
    def decide(self, step):
        return self.steps[step.index]

    def keep_until(self, kind, step):
        return 99


def test_a_correction_is_made_of_guided_predictions():
    with pytest.raises(ValueError, match="a correction is a sum of guided predictions"):
        Decision(reuse=Weights(cond={0: 1.0}))
    fill = Coefficients(((1.0,), (0.0, 1.0)), ((), (0.0,)), guided=((), (0.5, 0.5)))
    with pytest.raises(ValueError, match="no weights for skipping step 1"):
        Schedule(("both", "forecast"), fill=fill)


def test_a_run_of_another_length_is_refused():
    cond, uncond = torch.randn(2, T, 2, 9)
    some = fit_coefficients(Gram.of(cond, uncond))
    for policy in (Schedule(("both",) * T), linear_ag(coefficients=some)):
        with pytest.raises(ValueError, match=f"cannot guide a run of {T + 1}"):
            Run(Guidance(CFG(), policy), 2, T + 1, on_cpu=True)


def test_saved_settings_come_back(tmp_path):
    cond, uncond = torch.randn(2, T, 2, 9)
    some = fit_coefficients(Gram.of(cond, uncond), identity={"scheduler": "X"})
    forecasting = replace(three_steps(), guided=((), (1.0,), (0.5, 0.5)))
    for guidance in (
        APG(eta=0.25) | linear_ag(then="estimate", coefficients=some),
        Guidance(CFG(), Schedule(("both",) * T, (1.5,) * T, some, {"networks": {"unet": "a"}})),
        Guidance(CFG(), extrapolate(period=3)),
        Guidance(CFG(), forecast(first=0.5)),
        Guidance(CFG(), Schedule(("both", "both", "forecast"), fill=forecasting)),
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
    policies = {linear_ag(coefficients=one): 1, linear_ag(coefficients=two): 2}
    assert len(policies) == 2
    schedule = Schedule(("both",) * T, fill=one, identity={"scheduler": "X"})
    assert {schedule: 1}[schedule] == 1


@pytest.mark.parametrize(
    ("policy", "space"),
    [
        (hold(space="x0"), "x0"),
        (hold(period=1, then="cond", space="x0"), None),  # guided at first, then not
        (hold(period=1, then="estimate", space="x0"), "x0"),
        (extrapolate(), "native"),
        (forecast(), "x0"),
        (gate(space="x0"), "x0"),
        (Schedule(("both", "cond", "both")), None),
        (Schedule(("both", "estimate")), "native"),
        (Schedule(("both", "forecast"), fill=HoldDifference("x0")), "x0"),
    ],
    ids=str,
)
def test_a_schedule_has_a_space_if_something_is_filled_in(policy, space):
    assert policy.space == space
    assert Guidance(CFG(), policy).needs_level == (space == "x0")
