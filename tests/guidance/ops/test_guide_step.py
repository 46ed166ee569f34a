"""The kernels of the guidance step against the rules themselves.

Without a CUDA device they run in Triton's interpreter; see tests/conftest.py.

A result k may be off H, what `Rule.combine` gives for the same inputs in float64, by twice what its
result L in the inputs' own precision is off: max|k - H| <= 2 (max|L - H| + eps max|H|), with eps of
the output's dtype.
"""

from dataclasses import dataclass, replace

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
    Predictions,
    Step,
)
from pilotage.guidance.ops import guide_launch, guide_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
W = 7.5
SMALL, LARGE = (2, 4, 7, 5), (2, 2, 181, 183)
EPSILON = NoiseLevel(0.6, 0.8, "epsilon")
LEVELS = [
    NoiseLevel(0.068, 0.9977, "epsilon"),
    NoiseLevel(0.9999995, 1e-3, "epsilon"),
    NoiseLevel(0.6, 0.8, "v_prediction"),
    NoiseLevel(0.3, 0.7, "flow", -1),
    NoiseLevel(0.6, 0.8, "sample"),
]
IN_X0 = [APG(), CFGRescale(1.0, "x0"), TCFG("x0"), MagnitudeAware(0.5, "x0")]
RULES = [
    *IN_X0,
    CFG(),
    APG(0.3, 2.0, -0.75, "l2", "native"),
    APG(1, 0, 0),
    CFGRescale(),
    CFGZeroStar(0),
    CFGZeroStar(2, False),
    TCFG(),
    MagnitudeAware(0.5),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write shows as NaN, or as a `finite` that is false."""
    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(allocate):
    def poisoning(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else False)

    return poisoning


def draw(shape, level=EPSILON, dtype=torch.float32, seed=0):
    """Predictions of images that differ by .3, x_t and a momentum buffer."""
    generator = torch.Generator().manual_seed(seed)
    image, noise, update, buffer = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    x_t = (level.alpha * image + level.sigma * noise).to(dtype)
    preds = [level.from_x0(x0, x_t.double()).to(dtype) for x0 in (image, image - 0.3 * update)]
    return [t.to(DEVICE) for t in (*preds, x_t, buffer.float())]


def guided(impl, rule, cond, uncond, x_t, state=None, level=EPSILON, w=W, **options):
    step = Step(2, 9, level, None, x_t)
    predictions = Predictions({"cond": cond, "uncond": uncond}, step)
    return guide_step(rule, predictions, step, w, state, impl=impl, **options)


def fused(*args, **options):
    return guided("fused", *args, **options)


def assert_within(kernel, low, exact):
    eps = torch.finfo(kernel.dtype).eps
    bound = 2 * ((low.double() - exact).abs().max() + eps * exact.abs().max())
    assert (kernel.double() - exact).abs().max() <= bound


def check(rule, cond, uncond, x_t, state, **options):
    """The kernel against `combine`; the kernel's result."""
    result = fused(rule, cond, uncond, x_t, state, **options)
    low = guided("reference", rule, cond, uncond, x_t, state, **options)
    wide = (None if t is None else t.double() for t in (cond, uncond, x_t, state))
    exact = guided("reference", rule, *wide, **options)
    assert result.prediction.dtype == cond.dtype and result.prediction.shape == cond.shape
    assert_within(result.prediction, low.prediction, exact.prediction)
    assert (result.state is None) == (exact.state is None)
    if result.state is not None:
        assert result.state.dtype == torch.float32
        assert_within(result.state, low.state, exact.state)
    if result.gamma is not None:
        torch.testing.assert_close(result.gamma.double(), exact.gamma, rtol=2e-5, atol=2e-5)
    assert result.finite.ndim == 0 and result.finite
    return result


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_what_the_rule_combines(rule, dtype):
    *given, buffer = draw(SMALL, dtype=dtype)
    other = "native" if rule.space == "x0" else "x0"
    check(rule, *given, None, gamma_space=other)
    check(rule, *given, buffer, gamma_space=rule.space)


@pytest.mark.parametrize("rule", IN_X0, ids=str)
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"{level.prediction}-{level.sigma}")
def test_denoised_images_of_every_prediction_type(rule, level):
    check(rule, *draw(SMALL, level, torch.float16), level=level)


@every_rule
@pytest.mark.parametrize("shape", [(3, 1), (1, 2, 3, 2, 3, 5)])
def test_odd_shapes(rule, shape):
    check(rule, *draw(shape, dtype=torch.bfloat16), gamma_space="native")


@pytest.fixture
def two_launches(monkeypatch):
    """What holds for large samples, for small ones: three blocks in two parts."""
    for name, value in {"ONE_PROGRAM": 256, "BLOCK": 128, "PARTS": 2}.items():
        monkeypatch.setattr(guide_launch, name, value)


@every_rule
def test_large_samples_are_summed_in_parts(rule, two_launches):
    *given, buffer = draw((2, 3, 11, 9))
    check(rule, *given, buffer, gamma_space=rule.space)


def test_a_sample_of_more_than_65536_elements():
    halves = torch.cat(draw(LARGE, dtype=torch.float16)[:2]).to(memory_format=torch.channels_last)
    result = check(APG(), *halves.chunk(2), *draw(LARGE)[2:], gamma_space="x0")
    assert result.prediction.stride() == halves[:2].stride()


@every_rule
def test_scale_one_equal_branches_and_zeros(rule):
    cond, uncond, x_t, _ = draw(SMALL)
    result = fused(rule, cond, uncond, x_t, w=1)
    torch.testing.assert_close(result.prediction, cond, rtol=1e-6, atol=1e-6)
    result = fused(rule, cond, cond, x_t, gamma_space="x0")
    torch.testing.assert_close(result.prediction, cond, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.gamma, torch.ones_like(result.gamma))
    zero = torch.zeros_like(cond)
    for pair in [(zero, uncond), (cond, zero), (zero, zero)]:
        result = check(rule, *pair, zero, None, gamma_space="native")
        assert result.prediction.isfinite().all() and result.gamma.isfinite().all()
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


def test_tensors_are_read_where_they_lie():
    cond, uncond, x_t, buffer = draw(SMALL, dtype=torch.bfloat16)
    plain = fused(APG(), cond, uncond, x_t, buffer, gamma_space="native")
    for _, *given in layouts(torch.cat([uncond, cond]), x_t):
        result = fused(APG(), *given, buffer, gamma_space="native")
        for a, b in zip(result, plain, strict=True):
            if a is not None:
                rtol = 8e-3 if a.dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


def test_dimensions_too_many_to_be_read_in_place():
    turned = [t.permute(0, 5, 3, 1, 4, 2) for t in draw((2, 2, 3, 2, 3, 2))]
    gaps = [t.repeat_interleave(2, 1)[:, ::2] for t in turned]
    check(APG(), gaps[0], *turned[1:])


def test_broadcast_inputs():
    cond, uncond, x_t, buffer = draw(SMALL)
    check(APG(), cond, uncond[:1].expand_as(cond), x_t[:, :1], buffer)


@pytest.mark.parametrize("rule", [APG(), CFGRescale(), TCFG()], ids=str)
def test_repeats_bit_for_bit_whatever_the_batch(rule):
    cond, uncond, x_t, buffer = draw((3, 4, 7, 5))
    state = buffer if isinstance(rule, APG) else None
    first = fused(rule, cond, uncond, x_t, state, gamma_space="x0")
    again = fused(rule, cond, uncond, x_t, state, gamma_space="x0")
    cond[0], uncond[0] = 1e4 * cond[0], -1e3 * uncond[0]
    mates = fused(rule, cond, uncond, x_t, state, gamma_space="x0")
    for a, b, c in zip(first, again, mates, strict=True):
        if a is not None:
            assert torch.equal(a, b) and (a.ndim == 0 or torch.equal(a[1:], c[1:]))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finds_what_is_not_finite(batch, bad):
    cond, uncond, x_t, _ = draw((batch, *SMALL[1:]))
    uncond[-1].view(-1)[-1] = bad
    result = fused(CFG(), cond, uncond, x_t, want_prediction=False)
    assert result.finite.dtype == torch.bool and result.finite.shape == ()
    assert not result.finite
    assert result[:-1] == (None,) * 4


def test_finds_what_is_not_finite_in_any_part(two_launches):
    for position in (0, 296):
        cond, uncond, x_t, _ = draw((2, 3, 11, 9))
        cond[0].view(-1)[position] = float("nan")
        assert not fused(CFG(), cond, uncond, x_t).finite


def test_momentum_over_several_steps():
    states = [None] * 3
    for seed in range(4):
        cond, uncond, x_t, _ = draw(SMALL, LEVELS[2], torch.float16, seed)
        given = {"level": LEVELS[2]}
        kernel = fused(APG(), cond, uncond, x_t, states[0], **given)
        low = guided("reference", APG(), cond, uncond, x_t, states[1], **given)
        wide = (t.double() for t in (cond, uncond, x_t))
        exact = guided("reference", APG(), *wide, states[2], **given)
        assert_within(kernel.prediction, low.prediction, exact.prediction)
        states = [result.state for result in (kernel, low, exact)]
        assert_within(*states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_may_be_tensors(dtype):
    """w, alpha and sigma as 0-d tensors give what numbers give."""
    cond, uncond, x_t, buffer = draw(SMALL)
    numbers = torch.tensor([W, 0.5, 0.75], dtype=dtype, device=DEVICE)
    w, alpha, sigma = numbers.unbind()
    tensors = fused(APG(), cond, uncond, x_t, buffer, NoiseLevel(alpha, sigma, "flow"), w)
    numbers = fused(APG(), cond, uncond, x_t, buffer, NoiseLevel(0.5, 0.75, "flow"))
    torch.testing.assert_close(tensors.prediction, numbers.prediction)


@pytest.mark.parametrize("number", [float, torch.tensor])
@pytest.mark.parametrize("rule", IN_X0, ids=str)
def test_without_noise_the_conditional_prediction_stays(rule, number):
    """At sigma = 0 a denoised image says nothing of the prediction."""
    level = NoiseLevel(number(1.0), number(0.0), "epsilon")
    cond, uncond, x_t, buffer = draw(SMALL)
    result = check(rule, cond, uncond, x_t, buffer, level=level)
    assert torch.equal(result.prediction, cond)


def test_without_a_prediction_the_state_stays():
    cond, uncond, x_t, buffer = draw(SMALL)
    options = {"want_prediction": False, "gamma_space": "x0"}
    for impl in ("reference", "fused"):
        result = guided(impl, APG(), cond, uncond, x_t, buffer, **options)
        assert result.prediction is None and result.state is buffer
        assert result.gamma.isfinite().all()


def test_default_is_the_rule_itself_on_the_cpu(monkeypatch):
    given = [t.cpu() for t in draw(SMALL)[:3]]
    monkeypatch.setattr(guide_launch, "launch", None)
    default, named = (guided(impl, TCFG(), *given) for impl in (None, "reference"))
    assert torch.equal(default.prediction, named.prediction)
    with pytest.raises(TypeError):
        fused(TCFG(), *given)


@dataclass(frozen=True)
class Doubled(CFG):
    name = "doubled"

    def combine(self, predictions, step, w, state):
        return 2 * super().combine(predictions, step, w, state)[0], None


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (CFG(), {"impl": "cuda"}, "'reference' or 'fused', got 'cuda'"),
        (FDG(), {}, "no fused kernel for FDG"),
        (Doubled(), {}, "no fused kernel for Doubled"),
        (CFGZeroStar(3), {}, "no fused kernel for CFGZeroStar.* at this step"),
        (APG(), {"want_update": True}, "no fused kernel"),
        (APG(), {"level": None}, "noise level of the scheduler and x_t"),
        (CFG(), {"gamma_space": "x0", "level": None}, "noise level of the scheduler and x_t"),
        (CFG(), {"w": torch.ones(2, 1, 1, 1)}, r"one scale for all samples, got \(2, 1, 1, 1\)"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(rule, options, message):
    options = {"impl": "fused"} | options
    with pytest.raises(ValueError, match=message):
        guided(options.pop("impl"), rule, *draw(SMALL)[:3], **options)


def test_compiled_as_one_graph():
    """torch.compile inlines the eager form, so that Inductor may fuse it with what is around."""
    cond, uncond, x_t, buffer = draw(SMALL, dtype=torch.float16)

    def step(cond, uncond, x_t, buffer, w):
        options = {"level": replace(EPSILON, alpha=w / 10), "gamma_space": "native", "w": w}
        return guided(None, APG(), cond, uncond, x_t, buffer, **options)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    given = (cond, uncond, x_t, buffer, torch.tensor(6.0, device=DEVICE))
    for a, b in zip(compiled(*given), step(*given), strict=True):
        assert a is b is None or torch.equal(a, b)
