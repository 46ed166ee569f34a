"""What an author of a rule or policy may get wrong is refused, never drawn."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Always,
    CFGPlusPlus,
    Coefficients,
    Decision,
    Guidance,
    NoiseLevel,
    NonFinitePredictionError,
    Policy,
    PolicyState,
    Rule,
    Run,
    Schedule,
    Weights,
    forecast,
)

W = 5.0
LEVELS = NoiseLevel(0.6, 0.8, "v_prediction"), NoiseLevel(0.8, 0.6, "v_prediction")


class Told(Policy):
    """Decisions given as a function of the step, one for each of two samples."""

    name = "told"

    def __init__(self, of, keep=99):
        self.of, self.keep = of, keep

    def start(self, batch, total, on_cpu):
        return ToldState(self.of, self.keep)


class ToldState(PolicyState):
    def __init__(self, of, keep):
        self.of, self.keep = of, keep

    def decide(self, step):
        return self.of(step.index)

    def keep_until(self, kind, step):
        return self.keep


class Own(Rule):
    name = "own"

    def __init__(self, make):
        self.make = make

    def combine(self, predictions, step, w, state):
        return self.make(*predictions.pair("native"), w, state)


def drive(guidance, steps=3, samples=(0, 1)):
    """Guided predictions of a run over made-up predictions of two samples, or of one of them."""
    run, found = Run(guidance, len(samples), steps, on_cpu=True), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        cond, uncond, x_t = torch.randn(3, 2, 4, 6, 6, generator=generator)[:, list(samples)]
        rows = run.plan(x_t, *LEVELS)
        if run.all_skipped:
            found.append(run.reused(x_t))
            continue
        if run.skipped:
            cond[run.skipped] = run.reused(x_t)[run.skipped]
        found.append(run.combine(cond, uncond[rows] if rows else None, W, x_t))
    run.finish()
    return found


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c, u, w, s: u + w * (c - u), TypeError, "a state, got .*Tensor"),
        (lambda c, u, w, s: None, TypeError, "a state, got .*NoneType"),
        (lambda c, u, w, s: (None, None), TypeError, "the guided prediction"),
        (lambda c, u, w, s: (c.mean(0, keepdim=True), None), ValueError, r"\(1, 4, 6, 6\), exp"),
        (lambda c, u, w, s: (c[:, :1], None), ValueError, r"\(2, 1, 6, 6\), expected \(2, 4"),
        (lambda c, u, w, s: (c, torch.tensor(1.0)), ValueError, r"a state .* shape \(2, \*\)"),
        (lambda c, u, w, s: (c, (c, u)), ValueError, "a state"),
    ],
)
def test_what_a_rule_returns(make, error, message):
    with pytest.raises(error, match=message):
        drive(Guidance(Own(make)))


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(Own(lambda c, u, w, s: (c * math.nan, None))),
        CFG() | Told(lambda i: [Decision(factor=math.nan)] * 2),
        CFG() | Told(lambda i: [Decision((), reuse=Weights(guided={0: math.nan}))] * 2 if i else B),
    ],
)
def test_a_nan_that_guidance_made_is_not_silent(guidance):
    with pytest.raises(NonFinitePredictionError, match="made of it"):
        drive(guidance)


B = [Decision()] * 2
COND = Decision(("cond",))


@pytest.mark.parametrize(
    ("decide", "error", "message"),
    [
        (lambda i: [Decision()], ValueError, "decide for 2 samples at step 0"),
        (lambda i: [Decision()] * 3, ValueError, "decide for 2 samples"),
        (lambda i: [None, None], ValueError, "decide for 2 samples"),
        (lambda i: [Decision(("cond",), reuse=lambda kept: None)] * 2, TypeError, "given as Wei"),
    ],
)
def test_what_a_policy_decides(decide, error, message):
    with pytest.raises(error, match=message):
        drive(CFG() | Told(decide))


def test_what_was_not_kept_is_named():
    held = [Decision((), reuse=Weights(guided={0: 1.0}))] * 2
    with pytest.raises(ValueError, match="step 0, which was not kept"):
        drive(CFG() | Told(lambda i: held if i else B, keep=-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"evaluate": ["cond"]},
        {"evaluate": "both"},
        {"evaluate": ("uncond",)},
        {"evaluate": ("cond", "weak")},
        {"evaluate": ()},
        {"reuse": Weights({0: 1.0})},
    ],
)
def test_decisions_that_mean_nothing(settings):
    with pytest.raises(ValueError, match="evaluates|reuses past|a correction is"):
        Decision(**settings)


def test_a_sample_never_reuses_what_only_its_batch_mate_evaluated():
    late = Decision(("cond",), reuse=Weights({2: 1.0, 1: -1.0}, {1: 1.0}))

    def decide(step):
        return [[Decision(), Decision()], [COND, Decision()], [late, Decision()]][step]

    with pytest.raises(ValueError, match="of a sample that did not evaluate it"):
        drive(CFG() | Told(decide))


def test_samples_may_do_different_things_at_one_step():
    """Guided, scaled, estimated and skipped rows at once are what each is alone."""
    hold = Decision(("cond",), reuse=Weights({1: 1.0, 0: -1.0}, {0: 1.0}))
    skip = Decision((), reuse=Weights(guided={0: 1.0}))
    for other in (hold, skip, COND, Decision(factor=2.0), Decision(factor=torch.tensor(0.5))):
        both = drive(APG() | Told(lambda i, o=other: [Decision(), o] if i == 1 else B))
        for row, own in ((0, Decision()), (1, other)):
            policy = Told(lambda i, o=own: [o if i == 1 else Decision()])
            alone = drive(APG() | policy, samples=(row,))
            for together, single in zip(both, alone, strict=True):
                torch.testing.assert_close(together[row], single[0], rtol=1e-5, atol=1e-5)


def test_factors_as_tensors_are_each_samples_own():
    def decide(make):
        return Told(lambda i: [Decision(factor=make(1.0)), Decision(factor=make(3.0))])

    for a, b in zip(drive(CFG() | decide(float)), drive(CFG() | decide(torch.tensor)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_skipped_step_may_reuse_a_skipped_one():
    policy = Told(lambda i: [Decision((), reuse=Weights(guided={i - 1: 1.0}))] * 2 if i else B)
    first, *others = drive(CFG() | policy, steps=4)
    for guided in others:
        torch.testing.assert_close(guided, first)


def test_cfg_plus_plus_refuses_what_belongs_to_another_steps_scale():
    for policy in (forecast(), Schedule(("both",) * 3, (1.0, 2.0, 1.0))):
        with pytest.raises(ValueError, match="sets its own scale"):
            drive(CFGPlusPlus() | policy, steps=3)
    drive(CFGPlusPlus() | AdaptiveGuidance(0.5))


def test_spaces_and_weights_are_checked():
    class Elsewhere(Rule):
        name, space = "elsewhere", "X0"

    class Blind(Policy):
        name, needs_gamma = "blind", True

    with pytest.raises(ValueError, match="Elsewhere: space"):
        Guidance(Elsewhere())
    with pytest.raises(ValueError, match="Blind: space .* got 'None'"):
        CFG() | Blind()
    with pytest.raises(ValueError, match="NaN or infinite"):
        Coefficients(((math.nan,),), ((),))


def test_a_rule_derived_from_cfg_is_its_own():
    class Mixin:
        def combine(self, predictions, step, w, state):
            return predictions.get("cond", "native"), None

    @dataclass(frozen=True)
    class Mine(Mixin, CFG):
        name: ClassVar[str] = "mine"

    @dataclass(frozen=True)
    class Same(CFG):
        name: ClassVar[str] = "same"

    assert not Guidance(Mine()).keeps_combination
    assert Guidance(Same(), Always()).is_plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_guided_prediction_is_accumulated_in_float32(dtype):
    cond, uncond, x_t = torch.randn(3, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    run = Run(CFG() | Told(lambda i: [Decision(factor=2.0)]), 1, 1, on_cpu=True)
    run.plan(x_t)
    guided = run.combine(cond, uncond, W, x_t)
    w = 1 + 2 * (W - 1)
    assert torch.equal(guided, (uncond.float() + w * (cond.float() - uncond.float())).to(dtype))
