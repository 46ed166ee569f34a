"""Both forms of the guidance step against float64: the Triton kernels run in the interpreter here.

A result k may be off the float64 result H of the same inputs by twice what the plain rule L is off,
max|k - H| <= 2 (max|L - H| + eps max|H|), with eps of the output's dtype.
"""

import numpy as np
import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    FDG,
    TCFG,
    CFGRescale,
    CFGZeroStar,
    MagnitudeAware,
    NoiseLevel,
    cosine,
)
from pilotage.guidance.ops import SolverStep, guide_launch, guide_step

from ...oracles.apg import PaperMomentum, paper_apg
from ..rules.test_rules import paper_cfg_zero_star, paper_magnitude_aware, paper_rescale, paper_tcfg

W = 7.5
SHAPES = [(1, 1), (3, 4, 7, 5), (2, 3, 2, 3, 5), (2, 2, 181, 183)]
LARGE = SHAPES[-1]
LEVELS = [
    NoiseLevel(0.6, 0.8, "epsilon"),
    NoiseLevel(0.068, 0.9977, "epsilon"),
    NoiseLevel(0.9999995, 1e-3, "epsilon"),
    NoiseLevel(0.6, 0.8, "v_prediction"),
    NoiseLevel(0.3, 0.7, "flow", -1),
    NoiseLevel(0.6, 0.8, "sample"),
]
RULES = [
    CFG(),
    APG(),
    APG(0.3, 2.0, -0.75, "l2", "native"),
    APG(1, 0, 0),
    CFGRescale(),
    CFGRescale(1.0, "x0"),
    CFGZeroStar(0),
    CFGZeroStar(2, False),
    TCFG(),
    TCFG("x0"),
    MagnitudeAware(0.5),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
both = pytest.mark.parametrize("impl", ["reference", "fused"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel leaves unwritten shows as NaN or as a number far off."""
    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(allocate):
    def poisoning(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "cpu":
            tensor.fill_(float("nan") if tensor.is_floating_point() else 101)
        return tensor

    return poisoning


def draw(shape, level, dtype=torch.float32, seed=0, gap=0.3):
    """Two predictions of images that differ by `gap`, x_t and a momentum buffer."""
    generator = torch.Generator().manual_seed(seed)
    image, noise, update, buffer = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    x_t = (level.alpha * image + level.sigma * noise).to(dtype)
    preds = [level.from_x0(x0, x_t.double()).to(dtype) for x0 in (image, image - gap * update)]
    return *preds, x_t, buffer.float()


def views(rule, level, x_t, *preds):
    return [level.to_x0(p, x_t) if rule.space == "x0" else p for p in preds]


def paper(rule, cond, uncond, state):
    """The rule's formula for one sample, in float64."""
    if isinstance(rule, APG):
        buffer = PaperMomentum(rule.momentum)
        buffer.average = state
        unit = cond.size**0.5 if rule.threshold_unit == "rms" else 1
        return paper_apg(cond, uncond, W, buffer, rule.eta, rule.norm_threshold * unit)
    if isinstance(rule, CFGRescale):
        if cond.size == 1:  # no spread to rescale
            return uncond + W * (cond - uncond)
        return paper_rescale(cond, uncond, W, rule.phi)
    if isinstance(rule, CFGZeroStar) and rule.optimized_scale:
        return paper_cfg_zero_star(cond, uncond, W)
    if isinstance(rule, TCFG):
        return paper_tcfg(cond, uncond, W)
    if isinstance(rule, MagnitudeAware):
        return paper_magnitude_aware(cond, uncond, W, rule.alpha)
    return uncond + W * (cond - uncond)


def oracle(rule, level, cond, uncond, x_t, buffer):
    cond, uncond, x_t, buffer = (t.double() for t in (cond, uncond, x_t, buffer))
    pairs = zip(*views(rule, level, x_t, cond, uncond), buffer, strict=True)
    rows = [paper(rule, *(t.numpy() for t in pair)) for pair in pairs]
    guided = torch.from_numpy(np.stack(rows))
    return level.from_x0(guided, x_t) if rule.space == "x0" else guided


def plain(rule, level, cond, uncond, x_t, state):
    guided, _ = rule.combine(*views(rule, level, x_t, cond, uncond), W, state)
    guided = level.from_x0(guided, x_t) if rule.space == "x0" else guided
    return guided.to(cond.dtype)


def state_of(rule, buffer):
    if isinstance(rule, CFGZeroStar):
        return torch.full((len(buffer), 1), 3, dtype=torch.int32)
    return buffer if isinstance(rule, APG) else None


def assert_within_rule(result, low, exact):
    eps = torch.finfo(result.dtype).eps
    bound = 2 * ((low.double() - exact).abs().max() + eps * exact.abs().max())
    assert (result.double() - exact).abs().max() <= bound


@both
@every_rule
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"{level.prediction}-{level.sigma}")
def test_equals_the_paper_for_every_prediction_type(rule, level, impl):
    for dtype in DTYPES:
        cond, uncond, x_t, buffer = draw((2, 4, 7, 5), level, dtype)
        state = state_of(rule, buffer)
        given = {"x_t": x_t, "level": level, "state": state}
        result = guide_step(cond, uncond, W, rule, **given, impl=impl)
        assert result.prediction.dtype == dtype
        exact = oracle(rule, level, cond, uncond, x_t, buffer)
        low = plain(rule, level, cond, uncond, x_t, state)
        assert_within_rule(result.prediction, low, exact)


@both
@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_scalars_and_state(rule, shape, impl):
    """All that one read yields, for one program per sample and for ordered partial sums."""
    level, dtype = LEVELS[0], torch.float16
    cond, uncond, x_t, buffer = draw(shape, level, dtype)
    state = state_of(rule, buffer)
    given = {"x_t": x_t, "level": level, "state": state, "want_norms": True, "want_finite": True}
    result = guide_step(cond, uncond, W, rule, **given, gamma_space="x0", impl=impl)
    low = plain(rule, level, cond, uncond, x_t, state)
    exact = oracle(rule, level, cond, uncond, x_t, buffer)
    assert_within_rule(result.prediction, low, exact)
    pair = views(rule, level, x_t.double(), cond.double(), uncond.double())
    wide = state.double() if isinstance(rule, APG) else state
    guided, new_state = rule.combine(*pair, W, wide)
    images = [level.to_x0(p.double(), x_t.double()) for p in (cond, uncond)]
    update = new_state if isinstance(rule, APG) else pair[0] - pair[1]
    expected = {
        "gamma": cosine(*images),
        "cond_norm": pair[0].flatten(1).norm(dim=1),
        "update_norm": (guided - pair[0]).flatten(1).norm(dim=1),
        "parallel_share": cosine(update, pair[0]) ** 2,
        "finite": torch.ones(shape[0]),
    }
    for name, value in expected.items():
        scalar = getattr(result, name)
        assert scalar.dtype == torch.float32
        # Of a norm that is a difference of inner products, half of the digits may be lost.
        atol = 5e-4 * W * float(update.norm()) if name == "update_norm" else 2e-5
        torch.testing.assert_close(scalar.double(), value.double(), rtol=2e-5, atol=atol)
    if isinstance(rule, CFGZeroStar):
        assert result.state.tolist() == [[4]] * shape[0]
    elif isinstance(rule, APG) and rule.momentum:
        torch.testing.assert_close(result.state.double(), new_state, rtol=1e-5, atol=1e-5)
    else:
        assert result.state is None


@both
@every_rule
def test_scale_one_equal_branches_and_zeros(rule, impl):
    level = LEVELS[3]
    cond, uncond, x_t, _ = draw((2, 4, 7, 5), level)
    given = {"x_t": x_t, "level": level, "impl": impl, "state": state_of(rule, x_t * 0)}
    result = guide_step(cond, uncond, 1.0, rule, **given)
    torch.testing.assert_close(result.prediction, cond, rtol=1e-6, atol=1e-6)
    result = guide_step(cond, cond, W, rule, **given, gamma_space="x0", want_norms=True)
    torch.testing.assert_close(result.prediction, cond, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.gamma, torch.ones(2))
    zero = torch.zeros_like(cond)
    given |= {"x_t": zero, "gamma_space": "native", "want_norms": True}
    for pair in [(zero, uncond), (cond, zero), (zero, zero)]:
        result = guide_step(*pair, W, rule, **given)
        scalars = (result.gamma, result.cond_norm, result.update_norm, result.parallel_share)
        assert all(t.isfinite().all() for t in (result.prediction, *scalars))
    assert not result.prediction.any() and result.gamma.tolist() == [1, 1]


def layouts(preds, x_t):
    """The same values, lying differently: (cond, uncond, x_t)."""
    uncond, cond = preds.chunk(2)
    yield "halves", cond, uncond, x_t
    last = preds.contiguous(memory_format=torch.channels_last)
    yield "channels_last", *last.chunk(2)[::-1], x_t
    yield "all channels_last", *last.chunk(2)[::-1], x_t.to(memory_format=torch.channels_last)
    more = torch.cat([preds, preds + 1], 1)
    yield "sliced channels", *(half[:, : x_t.shape[1]] for half in more.chunk(2)[::-1]), x_t
    more = more.contiguous(memory_format=torch.channels_last)[:, : x_t.shape[1]]
    yield "sliced channels_last", *more.chunk(2)[::-1], x_t
    yield "every other", cond.repeat_interleave(2, -1)[..., ::2], uncond.mT.contiguous().mT, x_t


@both
@pytest.mark.parametrize("shape", [(2, 4, 7, 5), LARGE])
def test_tensors_are_read_where_they_lie(shape, impl):
    level, rule = LEVELS[0], APG()
    cond, uncond, x_t, buffer = draw(shape, level, torch.bfloat16)
    given = {"level": level, "gamma_space": "native", "impl": impl}
    first = guide_step(cond, uncond, W, rule, x_t=x_t, state=buffer, **given)
    preds = torch.cat([uncond, cond])
    for name, c, u, x in layouts(preds, x_t):
        if shape == LARGE and name != "channels_last":
            continue  # the interpreter is slow
        result = guide_step(c, u, W, rule, x_t=x, state=buffer, **given)
        for a, b in zip(result, first, strict=True):
            if a is not None:
                torch.testing.assert_close(
                    a, b, rtol=1e-5 if a.dtype == torch.float32 else 8e-3, atol=1e-5
                )


@both
@pytest.mark.parametrize("rule", [APG(), CFGRescale(), TCFG()], ids=str)
def test_repeats_bit_for_bit_whatever_the_batch(rule, impl):
    level = LEVELS[0]
    for shape in ((3, 4, 7, 5), LARGE)[: 2 if isinstance(rule, APG) else 1]:
        cond, uncond, x_t, buffer = draw(shape, level)
        given = {"level": level, "gamma_space": "x0", "want_norms": True, "impl": impl}
        state = state_of(rule, buffer)
        first = guide_step(cond, uncond, W, rule, x_t=x_t, state=state, **given)
        again = guide_step(cond, uncond, W, rule, x_t=x_t, state=state, **given)
        cond[0], uncond[0] = 1e4 * cond[0], -1e3 * uncond[0]
        mates = guide_step(cond, uncond, W, rule, x_t=x_t, state=state, **given)
        for a, b, c in zip(first, again, mates, strict=True):
            assert a is b is c is None or (torch.equal(a, b) and torch.equal(a[1:], c[1:]))


@both
@pytest.mark.parametrize("shape", [(2, 4, 7, 5), LARGE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finds_what_is_not_finite(shape, bad, impl):
    cond, uncond, _, _ = draw(shape, LEVELS[0])
    uncond[1].view(-1)[-1] = bad
    result = guide_step(cond, uncond, W, CFG(), want_finite=True, want_prediction=False, impl=impl)
    assert result.finite.tolist() == [1, 0] and result.prediction is None


@both
def test_the_first_steps_of_cfg_zero_star(impl):
    cond, uncond, _, _ = draw((3, 4, 7, 5), LEVELS[0])
    rule, done = CFGZeroStar(2), torch.tensor([[0], [1], [2]], dtype=torch.int32)
    result = guide_step(cond, uncond, W, rule, state=done, want_norms=True, impl=impl)
    assert result.prediction.flatten(1).any(1).tolist() == [False, False, True]
    assert result.state.tolist() == [[1], [2], [3]]
    torch.testing.assert_close(result.update_norm[:2], result.cond_norm[:2])
    result = guide_step(cond, uncond, W, rule, impl=impl)
    assert not result.prediction.any() and result.state.tolist() == [[1]] * 3


@both
@pytest.mark.parametrize("shape", [(2, 4, 7, 5), LARGE])
@pytest.mark.parametrize("has_previous", [False, True])
def test_solver_step_in_the_same_write(shape, has_previous, impl):
    numbers = {"k_x": 0.9, "k_d": 0.3, "d_x": 1 / 0.6, "d_p": -0.8 / 0.6, "input_scale": 0.25}
    numbers |= {"c_x": 0.9 + 0.3 / 0.6, "c_p": -0.3 * 0.8 / 0.6, "k_p": -0.2 * has_previous}
    solver = SolverStep.of(**numbers)
    level = LEVELS[0]
    cond, uncond, x_t, previous = draw(shape, level, torch.float16)
    given = {
        "x_t": x_t,
        "solver": solver,
        "impl": impl,
        "previous": previous if has_previous else None,
    }
    result = guide_step(cond, uncond, W, APG(), want_denoised=True, copies=2, **given)
    exact = oracle(APG(), level, cond, uncond, x_t, torch.zeros_like(x_t))
    image = level.to_x0(exact, x_t.double())
    x_next = 0.9 * x_t.double() + 0.3 * image - 0.2 * has_previous * previous.double()
    assert (result.x_next.dtype, result.denoised.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(result.denoised.double(), image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.x_next.double(), x_next, rtol=1e-3, atol=1e-3)
    assert result.next_input.shape == (2 * shape[0], *shape[1:])
    for half in result.next_input.chunk(2):
        torch.testing.assert_close(half.double(), 0.25 * x_next, rtol=1e-3, atol=1e-3)
    lean = guide_step(cond, uncond, W, APG(), want_prediction=False, **given)
    assert torch.equal(lean.x_next, result.x_next)
    assert lean.prediction is lean.denoised is lean.next_input is None


def test_noise_levels_on_the_device():
    """alpha and sigma as 0-d tensors give what numbers give."""
    number = LEVELS[0]
    tensors = NoiseLevel(torch.tensor(0.6), torch.tensor(0.8), "epsilon")
    cond, uncond, x_t, _ = draw((2, 4, 7, 5), number)
    for impl in ("reference", "fused"):
        a, b = (
            guide_step(cond, uncond, W, APG(), x_t=x_t, level=level, impl=impl)
            for level in (number, tensors)
        )
        torch.testing.assert_close(a.prediction, b.prediction)


def test_no_noise_leaves_the_prediction_finite():
    """At sigma = 0 a denoised image does not depend on the prediction."""
    level = NoiseLevel(1.0, 0.0, "epsilon")
    cond, uncond, x_t, buffer = draw((2, 4, 7, 5), LEVELS[0])
    for impl in ("reference", "fused"):
        result = guide_step(cond, uncond, W, APG(), x_t=x_t, level=level, state=buffer, impl=impl)
        assert torch.equal(result.prediction, cond)


def test_default_is_the_reference_on_the_cpu(monkeypatch):
    cond, uncond, _, _ = draw((2, 4, 7, 5), LEVELS[0])
    monkeypatch.setattr(guide_launch, "launch", None)
    default = guide_step(cond, uncond, W, TCFG())
    named = guide_step(cond, uncond, W, TCFG(), impl="reference")
    assert torch.equal(default.prediction, named.prediction)
    with pytest.raises(TypeError):
        guide_step(cond, uncond, W, TCFG(), impl="fused")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"impl": "cuda"}, "'reference' or 'fused'"),
        ({"rule": FDG()}, "expected one of CFG, CFGRescale, APG"),
        ({"rule": APG()}, "noise level"),
        ({"rule": APG(), "level": LEVELS[0]}, "x_t"),
        ({"gamma_space": "pixel"}, "'x0' or 'native'"),
        ({"copies": 1}, "solver step"),
        ({"want_denoised": True}, "solver step"),
        ({"x_t": torch.zeros(2, 3), "solver": SolverStep.of(k_x=1.0)}, "shape"),
        ({"x_t": torch.zeros(2, 4), "solver": SolverStep.of(k_p=1.0)}, "step before"),
        ({"rule": CFGZeroStar(1), "state": torch.zeros(2, dtype=torch.int32)}, "steps done"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        guide_step(torch.ones(2, 4), torch.ones(2, 4), W, **{"rule": CFG()} | settings)


def pair_of(shape, dtype, kind):
    """Two samples, alike but for the first one's peculiarity."""
    cond, uncond, x_t, buffer = draw((2, *shape), LEVELS[0], dtype)
    if kind == "zero cond":
        cond[0] = 0
    elif kind == "zero uncond":
        uncond[0] = 0
    elif kind == "equal":
        cond[0] = uncond[0]
    elif kind == "nothing":
        cond[0] = uncond[0] = x_t[0] = buffer[0] = 0
    elif kind == "not finite":
        cond[0].view(-1)[-1] = float("nan")
    return cond, uncond, x_t, buffer


@every_rule
@pytest.mark.parametrize(
    "kind", ["usual", "zero cond", "zero uncond", "equal", "nothing", "not finite"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_single_sample_is_guided_as_in_a_batch(rule, kind, dtype):
    """Its sums are floats, those of a batch tensors."""
    *given, buffer = pair_of((4, 7, 5), dtype, kind)
    state = state_of(rule, buffer.to(torch.promote_types(dtype, torch.float32)))
    wanted = {"level": LEVELS[0], "gamma_space": "x0", "want_norms": True, "want_finite": True}

    def guided(scale, rows):
        cond, uncond, x_t = (tensor[rows] for tensor in given)
        own = None if state is None else state[rows]
        return guide_step(cond, uncond, scale, rule, x_t=x_t, state=own, **wanted)

    for scale in (W, 1.0):
        batch, single = guided(scale, slice(2)), guided(scale, slice(1))
        for name, value in single._asdict().items():
            if value is not None:
                expected = getattr(batch, name)[:1]
                close = {"rtol": 1e-4, "atol": 1e-3} if name == "update_norm" else {}
                torch.testing.assert_close(value, expected, equal_nan=True, **close)


@every_rule
def test_gradients_and_transforms_of_a_single_sample(rule):
    """Floats would hide how the coefficients depend on the predictions."""
    cond, uncond, x_t, _ = draw((2, 4, 3, 3), LEVELS[0], torch.float64)

    def guided(cond, uncond):
        level = LEVELS[0]
        return guide_step(cond, uncond, W, rule, x_t=x_t[: len(cond)], level=level).prediction

    rows, tangents = (cond, uncond), (uncond, x_t)
    _, exact = torch.func.jvp(guided, rows, tangents)
    _, found = torch.func.jvp(guided, *(tuple(t[:1] for t in ts) for ts in (rows, tangents)))
    torch.testing.assert_close(found, exact[:1])
    leaves = [t[:1].clone().requires_grad_() for t in rows]
    assert torch.autograd.gradcheck(guided, leaves, check_forward_ad=True)
    samples = torch.func.vmap(lambda c, u: guided(c[None], u[None])[0])(cond[:1], uncond[:1])
    torch.testing.assert_close(samples, guided(cond, uncond)[:1])
