"""Rules with a past, and those that act on a solver's steps, against their papers."""

import numpy as np
import pytest
import torch

from pilotage.guidance import (
    SMC,
    TAG,
    Guidance,
    HiGS,
    Momentum,
    NoiseLevel,
    Predictions,
    Run,
    Step,
    cfg,
)
from pilotage.guidance.rules.history_guided import high_pass
from pilotage.guidance.rules.past import noise_share, past

from ...oracles.steps import PaperHiGS, PaperMomentum, PaperSMC, paper_tag
from ..steps import combine

W = 5.0
IMAGES = [(1, 4, 8, 8), (3, 5, 7, 9), (2, 3, 2, 5, 6)]
NOISE = (0.99, 0.9, 0.7, 0.5, 0.35, 0.2)
KINDS = ("flow", "epsilon", "v_prediction", "sample")


def level_of(share, kind):
    """A noise level with sigma / (alpha + sigma) = share, of unit variance but for flow models."""
    alpha, sigma = 1 - share, share
    scale = 1.0 if kind == "flow" else (alpha**2 + sigma**2) ** -0.5
    return NoiseLevel(alpha * scale, sigma * scale, kind)


def trajectory(shape, seed=0):
    """Denoised images of both branches and inputs of a run whose images change slowly."""
    generator = torch.Generator().manual_seed(seed)
    cond, uncond, x_t = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    for _ in NOISE:
        drift = 0.3 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        cond, uncond, x_t = cond + drift[0], uncond + drift[1], x_t + drift[2]
        yield cond, uncond, x_t


def guide(rule, level, cond, uncond, x_t, state, w=W):
    """`Rule.combine` with predictions of a network that predicts `level.prediction`."""
    step = Step(0, len(NOISE), level, None, x_t)
    native = {"cond": level.from_x0(cond, x_t), "uncond": level.from_x0(uncond, x_t)}
    predictions = Predictions(native, step)
    guided, state = rule.combine(predictions, step, w, state)
    return predictions.to_native(guided, rule.space), state


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "beta", "window"), [(0.5, 0.6, (0.3, 0.95)), (1.5, 0, (0, 1))])
def test_momentum_is_the_papers_on_euler_steps(shape, kind, alpha, beta, window):
    """Of the velocity of a flow; of the noise, over sigma / alpha, for other networks."""
    rule, state = Momentum(alpha, beta, *window), None
    oracles = [PaperMomentum(alpha, beta) for _ in range(shape[0])]
    for share, (cond, uncond, x_t) in zip(NOISE, trajectory(shape), strict=True):
        level, lower = level_of(share, kind), level_of(share - 0.1, kind)
        native, state = guide(rule, level, cond, uncond, x_t, state)
        found = level.to_x0(native, x_t)
        denoised = cfg(cond, uncond, W)
        if kind == "flow":
            z, dt, velocity = x_t, lower.sigma - level.sigma, (x_t - denoised) / level.sigma
            after = found + lower.sigma / level.sigma * (x_t - found)
        else:
            z, dt = x_t / level.alpha, lower.ratio - level.ratio
            velocity = (z - denoised) / level.ratio
            after = found + lower.ratio / level.ratio * (z - found)
        for row, oracle in enumerate(oracles):
            acts = window[0] <= share <= window[1]
            expected = oracle.step(z[row].numpy(), velocity[row].numpy(), dt, acts)
            np.testing.assert_allclose(after[row].numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eta", "alpha", "low"), [(0.0, 0.75, 0.4), (1.0, 0.5, 0.3)])
def test_higs_is_algorithm_3(shape, kind, eta, alpha, low):
    rule, state = HiGS(1.75, eta, alpha, low), None
    oracles = [PaperHiGS(1.75, low, 1.0, eta, alpha) for _ in range(shape[0])]
    moved = []
    for share, (cond, uncond, x_t) in zip(NOISE, trajectory(shape), strict=True):
        level = level_of(share, kind)
        native, state = guide(rule, level, cond, uncond, x_t, state)
        found, denoised = level.to_x0(native, x_t), cfg(cond, uncond, W)
        for row, oracle in enumerate(oracles):
            pred = denoised[row].numpy()
            expected = pred + oracle.step(pred, share)
            np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-8, atol=1e-8)
        moved.append(float((found - denoised).norm()))
    assert [value > 1e-6 for value in moved] == [low < s <= 1 and s != NOISE[0] for s in NOISE]


@pytest.mark.parametrize("shape", [*IMAGES, (2, 33, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_tag_is_algorithm_2_after_a_step_of_euler_or_ddim(shape, kind):
    """Any step that is linear in the sample and the denoised image, from one level to another."""
    for share, (cond, uncond, x_t) in zip(NOISE, trajectory(shape), strict=True):
        level, lower = level_of(share, kind), level_of(share - 0.1, kind)
        native, state = guide(TAG(1.15), level, cond, uncond, x_t, None)
        assert state is None

        def solve(denoised, level=level, lower=lower, x_t=x_t):
            noise = (x_t - level.alpha * denoised) / level.sigma
            return lower.alpha * denoised + lower.sigma * noise

        plain, found = solve(cfg(cond, uncond, W)), solve(level.to_x0(native, x_t))
        for row in range(shape[0]):
            expected = paper_tag(x_t[row].numpy(), plain[row].numpy(), 1.15)
            np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [*IMAGES, (2, 33, 16)])
@pytest.mark.parametrize(("decay", "gain"), [(5.0, 0.2), (0.05, 0.3), (0.0, 0.1)])
def test_smc_is_the_authors_code(shape, decay, gain):
    rule, state = SMC(decay, gain), None
    oracles = [PaperSMC(decay, gain) for _ in range(shape[0])]
    for cond, uncond, _ in trajectory(shape):
        found, state = combine(rule, cond, uncond, W, state)
        for row, oracle in enumerate(oracles):
            expected = oracle.step(cond[row].numpy(), uncond[row].numpy(), W)
            np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_noise_levels_on_the_device_are_those_on_the_host():
    """One level for every sample, below, at, within, at and above the ends of the window."""
    rule, levels = HiGS(noise_low=0.4, noise_high=0.9), (0.2, 0.4, 0.65, 0.9, 0.95)
    draw = torch.Generator().manual_seed(0)
    cond, uncond, x_t, old = torch.randn(4, len(levels), 3, 6, 5, generator=draw).double()
    share = torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1, 1)
    level = NoiseLevel(1 - share, share, "flow")
    together, _ = guide(rule, level, cond, uncond, x_t, old)
    for i, one in enumerate(levels):
        rows = [part[i : i + 1] for part in (cond, uncond, x_t, old)]
        alone, _ = guide(rule, level_of(one, "flow"), *rows)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("rule", [Momentum(0.0), HiGS(0.0), TAG(1.0), SMC(gain=0.0)], ids=str)
def test_neutral_setting_is_cfg(rule):
    state, level = None, level_of(0.6, "flow")
    for cond, uncond, x_t in trajectory((2, 3, 6, 7)):
        found, state = guide(rule, level, cond, uncond, x_t, state)
        expected = level.from_x0(cfg(cond, uncond, W), x_t)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_two_steps_of_adams_and_bashforth():
    """beta = 0 and alpha = 1/2: 3/2 v_i - 1/2 v_{i-1}."""
    rule, state, velocities = Momentum(0.5, 0.0, 0.0, 1.0), None, []
    level = level_of(0.6, "flow")
    for cond, uncond, x_t in trajectory((2, 3, 6, 7)):
        found, state = guide(rule, level, cond, uncond, x_t, state)
        velocities.append(level.from_x0(cfg(cond, uncond, W), x_t))
        if len(velocities) > 1:
            expected = 1.5 * velocities[-1] - 0.5 * velocities[-2]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_tag_leaves_the_part_along_the_sample():
    for cond, uncond, x_t in trajectory((2, 3, 6, 7)):
        level = level_of(0.6, "epsilon")
        plain = cfg(level.from_x0(cond, x_t), level.from_x0(uncond, x_t), W)
        found, _ = guide(TAG(3.0), level, cond, uncond, x_t, None)
        assert ((found - plain) * x_t).flatten(1).sum(1).abs().max() < 1e-9
        for factor in (1.0, 7.0):  # the scale of the sample does not count
            again, _ = TAG(3.0).combine(
                Predictions({"cond": plain, "uncond": plain}, Step(0, 1)),
                Step(0, 1, x_t=factor * x_t),
                1.0,
                None,
            )
            torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(5, 8), (16, 16), (1, 7)])
def test_the_filter_takes_the_mean_and_keeps_what_is_fine(size):
    rows, columns = size
    flat = torch.ones(2, 3, rows, columns, dtype=torch.float64)
    factor = torch.sigmoid(torch.tensor(-2.5, dtype=torch.float64))
    torch.testing.assert_close(high_pass(flat, 0.05), factor * flat)
    place = torch.arange(columns, dtype=torch.float64)
    fine = torch.cos(torch.pi / columns * (place + 0.5) * (columns - 1)) * flat
    torch.testing.assert_close(high_pass(fine, 0.05), fine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_counted_alike_on_the_device(kind):
    level = level_of(0.35, kind)
    assert noise_share(level) == pytest.approx(0.35)
    tensors = NoiseLevel(torch.tensor(level.alpha), torch.tensor(level.sigma), kind)
    for rule in (Momentum(noise_low=0.2), HiGS(noise_low=0.2)):
        states = [None, None]
        for cond, uncond, x_t in trajectory((2, 3, 6, 7)):
            found = []
            for i, one in enumerate((level, tensors)):
                guided, states[i] = guide(rule, one, cond, uncond, x_t, states[i])
                found.append(guided)
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_sample_without_a_past_takes_its_first():
    first = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    state = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    state[1] = 0
    found = past(state, first)
    assert torch.equal(found[1], first[1])
    assert torch.equal(found[[0, 2]], state[[0, 2]])
    assert past(None, first) is first


@pytest.mark.parametrize("rule", [Momentum(noise_low=0.0), HiGS(noise_low=0.0), TAG()], ids=str)
def test_one_branch_is_two_that_agree(rule):
    """In a run of one branch the rule acts as on equal branches; others' rules do not."""
    alone, beside = (Run(Guidance(rule), 2, len(NOISE), True, one_branch=one) for one in (1, 0))
    changed = False
    for share, (cond, _, x_t) in zip(NOISE, trajectory((2, 3, 6, 7)), strict=True):
        level = level_of(share, "flow")
        native = level.from_x0(cond, x_t)
        assert alone.plan(x_t, level) == []
        found = alone.unguided(native, x_t)
        assert beside.plan(x_t, level) == [0, 1]
        torch.testing.assert_close(found, beside.combine(native, native, W, x_t))
        changed |= not torch.allclose(found, native)
    assert changed
    assert alone.trace.nfe == [len(NOISE)] * 2
    assert beside.trace.nfe == [2 * len(NOISE)] * 2


@pytest.mark.parametrize("rule", [Momentum(noise_low=0.0), HiGS(noise_low=0.0), TAG(), SMC()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(rule, dtype):
    """Strided inputs in half precision, arithmetic in float32: as float64 on the same inputs."""
    level, states = level_of(0.5, "flow"), [None, None]
    for cond, uncond, x_t in trajectory((2, 32, 32, 3)):
        low = [100 * t.movedim(-1, 1).to(dtype) for t in (cond, uncond, x_t)]  # squares overflow
        found = []
        for i, (c, u, x) in enumerate((low, [t.double().contiguous() for t in low])):
            step = Step(0, 1, level, None, x)
            predictions = Predictions({"cond": c, "uncond": u}, step)
            guided, states[i] = rule.combine(predictions, step, W, states[i])
            found.append(guided)
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-2)


def test_packed_tokens_have_no_frequencies():
    with pytest.raises(ValueError, match=r"HiGS: .*\(B, C, H, W\).*\(2, 33, 16\)"):
        combine(HiGS(), *torch.randn(2, 2, 33, 16), W)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Momentum, {"weight": float("inf")}),
        (Momentum, {"decay": 1.0}),
        (Momentum, {"noise_low": 0.9, "noise_high": 0.3}),
        (HiGS, {"weight": float("nan")}),
        (HiGS, {"decay": 0.0}),
        (HiGS, {"noise_high": 1.5}),
        (TAG, {"eta": float("nan")}),
        (SMC, {"gain": -0.1}),
        (SMC, {"decay": float("inf")}),
    ],
)
def test_bad_settings(kind, settings):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: "):
        kind(**settings)
