"""Every rule but APG against its paper, its identities and invariants; all rules in a run.

The oracles are transcribed from the papers, in float64 and one sample at a time.
"""

import numpy as np
import pytest
import torch

from pilotage.guidance import (
    APG,
    CFG,
    FDG,
    TCFG,
    AdaptiveGuidance,
    Always,
    CFGRescale,
    CFGZeroStar,
    Decision,
    Guidance,
    MagnitudeAware,
    NoiseLevel,
    Policy,
    PolicyState,
    Run,
    available,
    cfg,
    cfg_rescale,
    cfg_zero_star,
    fdg,
    magnitude_aware,
    resolve,
    tangential_damping,
)
from pilotage.guidance.registry import TYPES
from pilotage.guidance.rules.frequency_decoupled import low_pass

from ..steps import combine

IMAGES = [(1, 4, 8, 8), (3, 5, 7, 9), (2, 3, 2, 5, 5), (2, 1, 6, 1), (2, 2, 2, 3)]
SHAPES = [*IMAGES, (2, 33, 16)]
W = 7.5


def draw(shape, seed=0, dtype=torch.float64, gap=0.5):
    """A conditional and an unconditional prediction that differ by `gap` standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    cond, noise = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return cond, cond + gap * noise


def paper_rescale(c, u, w, phi):
    guided = u + w * (c - u)
    rescaled = guided * np.std(c) / np.std(guided)
    return phi * rescaled + (1 - phi) * guided


def paper_cfg_zero_star(c, u, w):
    s = (c * u).sum() / (u**2).sum()
    return (1 - w) * s * u + w * c


def paper_tcfg(c, u, w):
    rows = torch.from_numpy(np.stack([c.ravel(), u.ravel()]))
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions.numpy()
    shares = directions @ u.ravel()
    shares[1:] = 0
    damped = (shares @ directions).reshape(u.shape)
    return damped + w * (c - damped)


def paper_magnitude_aware(c, u, w, alpha):
    ratio = np.sqrt(((c - u) ** 2).sum()) / np.sqrt((u**2).sum())
    return u + (1 + (w - 1) * np.exp(-alpha * ratio)) * (c - u)


def blur(image):
    """A 5x5 binomial kernel on the last two dimensions, reflected at the borders."""
    row = np.array([1, 4, 6, 4, 1]) / 16
    pad = [(0, 0)] * (image.ndim - 2) + [(2, 2), (2, 2)]
    height, width = image.shape[-2:]
    padded = np.pad(image, pad, mode="reflect")
    return sum(
        row[i] * row[j] * padded[..., i : i + height, j : j + width]
        for i in range(5)
        for j in range(5)
    )


def resize(image, size):
    """Bilinear, pixel centres at half-integers."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = image.shape[axis]
        position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        left = np.floor(position).astype(int)
        right = np.minimum(left + 1, old - 1)
        share = (position - left).reshape(-1, *(1,) * (-1 - axis))
        image = (1 - share) * image.take(left, axis) + share * image.take(right, axis)
    return image


def pyramid(image, levels):
    bands = []
    for _ in range(levels - 1):
        size = image.shape[-2:]
        coarse = resize(blur(image), [(side + 1) // 2 for side in size])
        bands.append(image - blur(resize(coarse, size)))
        image = coarse
    return [*bands, image]


def paper_fdg(c, u, scales):
    """Algorithm 2 of arXiv 2506.19713, scales from the finest to the coarsest band."""
    bands = [
        c_k + (scale - 1) * (c_k - u_k)
        for c_k, u_k, scale in zip(
            pyramid(c, len(scales)), pyramid(u, len(scales)), scales, strict=True
        )
    ]
    image = bands.pop()
    for band in reversed(bands):
        image = band + blur(resize(image, band.shape[-2:]))
    return image


ORACLES = [
    (CFGRescale(), lambda c, u: paper_rescale(c, u, W, 0.7)),
    (CFGRescale(phi=1.0), lambda c, u: paper_rescale(c, u, W, 1.0)),
    (CFGZeroStar(zero_steps=0), lambda c, u: paper_cfg_zero_star(c, u, W)),
    (TCFG(), lambda c, u: paper_tcfg(c, u, W)),
    (MagnitudeAware(), lambda c, u: paper_magnitude_aware(c, u, W, 8.0)),
    (MagnitudeAware(alpha=0.5), lambda c, u: paper_magnitude_aware(c, u, W, 0.5)),
]
FDG_ORACLES = [
    (FDG(), [W, 1 + 4 / 9 * (W - 1)]),
    (FDG(low_scale=3.0, low_scale_unit="absolute"), [W, 3.0]),
    (FDG(low_scale=0.0, levels=3), [W, W, 1.0]),
]
ALL = [CFGRescale(), CFGZeroStar(zero_steps=0), TCFG(), MagnitudeAware(), FDG()]
every_rule = pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)


def check_oracle(rule, oracle, shape, gap):
    cond, uncond = draw(shape, seed=len(shape), gap=gap)
    guided, _ = combine(rule, cond, uncond, W)
    assert guided.shape == cond.shape
    for row in range(shape[0]):
        expected = oracle(cond[row].numpy(), uncond[row].numpy())
        np.testing.assert_allclose(guided[row].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gap", [0.01, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rule", "oracle"), ORACLES)
def test_equals_the_paper(rule, oracle, shape, gap):
    check_oracle(rule, oracle, shape, gap)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize(("rule", "scales"), FDG_ORACLES)
def test_fdg_equals_algorithm_2(rule, scales, shape):
    check_oracle(rule, lambda c, u: paper_fdg(c, u, scales), shape, gap=0.5)


@pytest.mark.parametrize(
    "rule",
    [
        CFGRescale(phi=0.0),
        CFGZeroStar(zero_steps=0, optimized_scale=False),
        MagnitudeAware(alpha=0.0),
        FDG(low_scale=1.0),
        FDG(low_scale=W, low_scale_unit="absolute", levels=3),
    ],
)
@pytest.mark.parametrize("shape", IMAGES)
def test_neutral_setting_is_cfg(rule, shape):
    cond, uncond = draw(shape)
    guided, _ = combine(rule, cond, uncond, W)
    torch.testing.assert_close(guided, cfg(cond, uncond, W), rtol=1e-12, atol=1e-12)


def test_rules_without_a_neutral_setting_are_cfg_on_neutral_inputs():
    """Nothing tangential where predictions are parallel; s = 1 where the update is orthogonal."""
    _, uncond = draw((3, 4, 8, 8))
    parallel = -1.7 * uncond
    guided, _ = combine(TCFG(), parallel, uncond, W)
    torch.testing.assert_close(guided, cfg(parallel, uncond, W), rtol=1e-12, atol=1e-12)
    swapped = uncond.flip(-1) * torch.tensor([1, 1, 1, 1, -1, -1, -1, -1])  # <swapped, uncond> = 0
    guided, _ = combine(CFGZeroStar(zero_steps=0), uncond + swapped, uncond, W)
    expected = cfg(uncond + swapped, uncond, W)
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@every_rule
def test_scale_one_is_conditional(rule):
    cond, uncond = draw((2, 4, 7, 8))
    guided, _ = combine(rule, cond, uncond, 1.0)
    torch.testing.assert_close(guided, cond, rtol=1e-12, atol=1e-12)


@every_rule
def test_samples_do_not_see_each_other(rule):
    cond, uncond = draw((3, 4, 7, 8))
    cond[1] *= 100
    together, _ = combine(rule, cond, uncond, W)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = combine(rule, cond[one], uncond[one], W)
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


@every_rule
@pytest.mark.parametrize("shape", [(2, 8, 9, 4), (2, 6, 5, 7, 3)])
def test_non_contiguous_inputs(rule, shape):
    cond, uncond = (pred.movedim(-1, 1) for pred in draw(shape))
    strided, _ = combine(rule, cond, uncond, W)
    plain, _ = combine(rule, cond.contiguous(), uncond.contiguous(), W)
    torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [*ALL, CFGZeroStar(zero_steps=0, optimized_scale=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(rule, dtype):
    """Inputs in half precision, arithmetic in float32: as good as float64 on the same inputs."""
    cond, uncond = draw((2, 4, 64, 64), dtype=torch.float32)
    cond, uncond = (100 * cond).to(dtype), (100 * uncond).to(dtype)  # squares overflow fp16
    guided, _ = combine(rule, cond, uncond, 10.0)
    expected, _ = combine(rule, cond.double(), uncond.double(), 10.0)
    assert guided.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(guided.double(), expected, rtol=1e-5, atol=1e-3)


@every_rule
def test_repeats_bit_for_bit(rule):
    cond, uncond = draw((2, 4, 33, 31), dtype=torch.float32)
    first, _ = combine(rule, cond, uncond, W)
    second, _ = combine(rule, cond.clone(), uncond.clone(), W)
    assert torch.equal(first, second)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_degenerate_predictions_stay_finite(rule, dtype):
    pred, _ = draw((2, 4, 8, 8))
    pred = pred.to(dtype)
    zero = torch.zeros_like(pred)
    equal, _ = combine(rule, pred, pred, W)
    torch.testing.assert_close(equal, pred, check_dtype=False)
    nothing, _ = combine(rule, zero, zero, W)
    assert not nothing.any()
    for cond, uncond in [(pred, zero), (zero, pred), (zero + 0.1, zero + 0.3), (pred, -pred)]:
        guided, _ = combine(rule, cond, uncond, W)
        assert guided.isfinite().all()
        assert guided.abs().max() <= 100


def test_settings_without_a_limit_in_the_formula_stay_finite():
    """alpha = 0 on an all-zero p_u is CFG: nothing is damped."""
    pred, _ = draw((2, 4, 8, 8))
    guided = magnitude_aware(pred, torch.zeros_like(pred), W, alpha=0.0)
    torch.testing.assert_close(guided, W * pred)


def test_rescale_gives_the_deviation_of_the_conditional():
    cond, uncond = draw((3, 4, 8, 8), gap=2.0)
    guided = cfg_rescale(cond, uncond, W, phi=1.0)
    torch.testing.assert_close(guided.flatten(1).std(1), cond.flatten(1).std(1))


def test_rescale_of_a_constant_prediction_is_cfg():
    """Rounding is no deviation: 0.1 has no float, and neither has its mean."""
    cond, uncond = torch.full((1, 3, 7, 7), 0.1), torch.full((1, 3, 7, 7), 0.7)
    torch.testing.assert_close(cfg_rescale(cond, uncond, W), cfg(cond, uncond, W))


def test_optimized_scale_leaves_an_orthogonal_update():
    """At w = 0 the result is s v_u, the closest point to v_c on the line of v_u."""
    cond, uncond = draw((3, 4, 8, 8))
    nearest = cfg_zero_star(cond, uncond, 0.0)
    residual = (cond - nearest) * uncond
    assert residual.flatten(1).sum(1).abs().max() < 1e-10


@pytest.mark.parametrize("zero_steps", [0, 1, 2])
def test_zero_init_lasts_for_the_first_steps(zero_steps):
    rule = CFGZeroStar(zero_steps=zero_steps)
    for step in range(4):
        cond, uncond = draw((2, 4, 8, 8), seed=step, dtype=torch.float16)
        guided, state = combine(rule, cond, uncond, W, index=step)
        assert state is None
        expected, _ = combine(CFGZeroStar(zero_steps=0), cond, uncond, W)
        assert torch.equal(guided, expected if step >= zero_steps else torch.zeros_like(cond))


def test_tangential_damping_projects():
    cond, uncond = draw((3, 4, 8, 8), gap=1.0)
    damped = tangential_damping(cond, uncond)
    removed = uncond - damped
    assert (damped * removed).flatten(1).sum(1).abs().max() < 1e-10
    rows = torch.stack([cond.flatten(1), uncond.flatten(1)], 1)
    first = torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]
    assert (first * removed.flatten(1)).sum(1).abs().max() < 1e-10


def test_tangential_damping_without_a_first_direction_is_the_mean_of_all():
    cond = torch.tensor([[[[1.0, 0.0]]]])
    uncond = torch.tensor([[[[0.0, 1.0]]]])
    assert torch.equal(tangential_damping(cond, uncond), uncond / 2)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_tangential_damping_of_extreme_lengths(size):
    """Squares of the inner products are beyond float32."""
    cond, uncond = draw((2, 4, 8, 8), dtype=torch.float32)
    expected = tangential_damping(cond, uncond)
    torch.testing.assert_close(tangential_damping(size * cond, size * uncond) / size, expected)


def test_magnitude_aware_scale_lies_between_one_and_w():
    cond, uncond = draw((3, 4, 8, 8))
    update = (cond - uncond).flatten(1).norm(dim=1)
    last = (W - 1) * update
    for alpha in (0.1, 1.0, 8.0):
        guided = magnitude_aware(cond, uncond, W, alpha=alpha)
        moved = (guided - cond).flatten(1).norm(dim=1)
        assert (moved < last).all()
        last = moved


def test_magnitude_aware_does_not_depend_on_the_unit():
    cond, uncond = draw((3, 4, 8, 8))
    guided = magnitude_aware(cond, uncond, W)
    torch.testing.assert_close(magnitude_aware(3 * cond, 3 * uncond, W), 3 * guided)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("side", [5, 8])
def test_fdg_bands(side, levels):
    """A constant update is all low, a checkerboard all high."""
    cond, _ = draw((2, 3, side, side))
    index = torch.arange(side, dtype=torch.float64)
    checkerboard = 2 * (index[:, None] + index).remainder(2) - 1
    for update, scale in [(torch.ones_like(checkerboard), 3.0), (checkerboard, W)]:
        guided = fdg(cond, cond - update, W, 3.0, levels=levels)
        expected = cond + (scale - 1) * update
        torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


def test_low_pass_reads_every_frame_and_channel_alone():
    video, _ = draw((1, 6, 7, 8))
    for channel in range(6):
        one = slice(channel, channel + 1)
        torch.testing.assert_close(low_pass(video[:, one], 3), low_pass(video, 3)[:, one])
    assert torch.equal(low_pass(video, 1), video)


def test_fdg_on_video_is_fdg_on_its_frames():
    cond, uncond = draw((2, 3, 4, 7, 8))
    guided, _ = combine(FDG(), cond, uncond, W)
    for frame in range(4):
        alone, _ = combine(FDG(), cond[:, :, frame], uncond[:, :, frame], W)
        torch.testing.assert_close(guided[:, :, frame], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_fdg_is_the_same_in_every_space(kind):
    alpha, sigma = (0.3, 0.7) if kind == "flow" else (0.6, 0.8)
    cond, uncond = draw((2, 4, 8, 8))
    x_t, _ = draw((2, 4, 8, 8), seed=1)
    level = NoiseLevel(alpha, sigma, kind)
    direct, _ = combine(FDG(), cond, uncond, W)
    native, _ = combine(FDG(), level.from_x0(cond, x_t), level.from_x0(uncond, x_t), W)
    torch.testing.assert_close(level.to_x0(native, x_t), direct, rtol=1e-9, atol=1e-9)


def test_fdg_refuses_packed_tokens():
    cond, uncond = draw((2, 33, 16))
    with pytest.raises(ValueError, match=r"FDG: .*\(B, C, H, W\).*\(2, 33, 16\)"):
        combine(FDG(), cond, uncond, W)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CFGRescale, {"phi": -0.1}),
        (CFGRescale, {"phi": 1.5}),
        (CFGRescale, {"phi": float("nan")}),
        (CFGRescale, {"space": "pixel"}),
        (CFGZeroStar, {"zero_steps": -1}),
        (CFGZeroStar, {"zero_steps": 0.04}),
        (TCFG, {"space": "pixel"}),
        (MagnitudeAware, {"alpha": -1}),
        (MagnitudeAware, {"alpha": float("inf")}),
        (MagnitudeAware, {"alpha": float("nan")}),
        (MagnitudeAware, {"space": "pixel"}),
        (FDG, {"low_scale": float("nan")}),
        (FDG, {"low_scale_unit": "percent"}),
        (FDG, {"levels": 1}),
        (FDG, {"levels": 2.5}),
    ],
)
def test_bad_settings(kind, settings):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: "):
        kind(**settings)


RULES = TYPES["rule"]


@pytest.mark.parametrize("name", RULES)
def test_names(name):
    assert resolve(name) == Guidance(RULES[name](), Always())
    assert resolve(f"{name}+ag") == RULES[name]() | AdaptiveGuidance()
    assert name in available()


def test_alias_and_unknown_name():
    assert resolve("CFG-Zero-Star") == resolve("cfg-zero*") == Guidance(CFGZeroStar())
    with pytest.raises(ValueError, match=r"known are apg, cfg, .*cfg-zero\*.*tcfg.*always"):
        resolve("cfg-zero")
    with pytest.raises(ValueError, match="names two rules"):
        resolve("cfg-zero-star+tcfg")


LEVEL = NoiseLevel(0.3, 0.7, "flow")
ROWS = [[0, 2], [1], [0, 1, 2], [], [2, 1], [0, 1]]


class Listed(Policy):
    """Guides exactly the samples of `rows`, a list of rows for every step."""

    name = "listed"

    def __init__(self, rows):
        self.rows = rows

    def start(self, batch, total, on_cpu):
        return ListedState(batch, self.rows)


class ListedState(PolicyState):
    def __init__(self, batch, rows):
        self.batch, self.rows = batch, rows

    def decide(self, step):
        rows = self.rows[step.index]
        return [Decision() if row in rows else Decision(("cond",)) for row in range(self.batch)]


def trajectory(dtype=torch.float32):
    """Six steps whose predictions come closer to each other, each sample at its own pace."""
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        cond, noise, x_t = torch.randn(3, 3, 4, 6, 7, generator=generator)
        gap = torch.tensor([2.0 ** -(step * (row + 1)) for row in range(3)])
        yield cond.to(dtype), (cond + gap.view(-1, 1, 1, 1) * noise).to(dtype), x_t.to(dtype)


def drive(guidance, select=(0, 1, 2), dtype=torch.float32):
    """Run a guidance on the selected samples; the guided predictions, and NFEs."""
    select = list(select)
    run = Run(guidance, len(select), 6, on_cpu=True)
    guided = []
    for cond, uncond, x_t in trajectory(dtype):
        cond, uncond, x_t = cond[select], uncond[select], x_t[select]
        rows = run.plan(x_t, LEVEL, NoiseLevel(0.5, 0.5, "flow"))
        guided.append(run.combine(cond, uncond[rows] if rows else None, W, x_t))
        assert guided[-1].dtype == dtype
    run.finish()
    return guided, run.trace.nfe


@pytest.mark.parametrize("rule", [kind() for kind in RULES.values()], ids=list(RULES))
def test_a_run_may_guide_any_samples_at_any_step(rule):
    """Others' comings and goings change nothing; a sample that is not guided is conditional."""
    together, _ = drive(rule | Listed(ROWS))
    for row in range(3):
        alone, _ = drive(rule | Listed([[0] if row in rows else [] for rows in ROWS]), [row])
        for rows, (cond, _, _), a, b in zip(ROWS, trajectory(), together, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-5, atol=1e-5)
            if row not in rows:
                assert torch.equal(a[row], cond[row])


@pytest.mark.parametrize("rule", [kind() for kind in RULES.values()], ids=list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_rule_runs_with_adaptive_guidance(rule, dtype):
    guidance = rule | AdaptiveGuidance(0.99, lag=0)
    together, nfe = drive(guidance, dtype=dtype)
    assert len(set(nfe)) > 1, "the samples should stop at different steps"
    assert all(pred.isfinite().all() for pred in together)
    again, _ = drive(guidance, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for row in range(3):
        alone, single = drive(guidance, [row], dtype=dtype)
        assert single == nfe[row : row + 1]
        if dtype == torch.float32:
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[row : row + 1], b, rtol=1e-5, atol=1e-5)


def test_defaults():
    """The papers' settings, and plain rules without a setting."""
    assert CFGRescale().phi == 0.7
    assert CFGZeroStar().zero_steps == 1
    assert MagnitudeAware().alpha == 8.0
    assert 1 + FDG().low_scale * (10 - 1) == pytest.approx(5)
    assert {rule.space for rule in (CFG(), *ALL)} == {"native"}
    assert APG().space == "x0"
