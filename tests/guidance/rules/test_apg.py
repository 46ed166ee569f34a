"""APG against the paper's Algorithm 1, its identities and invariants."""

import numpy as np
import pytest
import torch

from pilotage.guidance import APG, CFG, NoiseLevel, apg, cfg, resolve

from ...oracles.apg import PaperMomentum, paper_apg
from ..steps import combine

SHAPES = [(1, 4, 8, 8), (3, 5, 7, 9), (2, 3, 2, 5, 5), (2, 33, 16)]


def draw(shape, seed=0, dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("eta", "r", "beta"), [(0, 0, 0), (0, 2.5, -0.75), (0.5, 0, -0.5), (1, 4, 0), (0, 1e6, -0.5)]
)
def test_equals_algorithm_1_over_a_trajectory(shape, eta, r, beta):
    oracle = [PaperMomentum(beta) for _ in range(shape[0])]
    state = None
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    for step in range(4):
        cond, uncond = draw(shape, seed=step)
        guided, state = combine(rule, cond, uncond, 7.5, state)
        for row in range(shape[0]):
            expected = paper_apg(cond[row].numpy(), uncond[row].numpy(), 7.5, oracle[row], eta, r)
            np.testing.assert_allclose(guided[row].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(dtype):
    """Inputs in half precision, arithmetic in float32: as good as float64 on the same inputs."""
    cond, uncond = draw((2, 4, 64, 64), dtype=torch.float32).to(dtype)
    cond = cond * 100  # squares overflow fp16
    options = {"eta": 0.0, "norm_threshold": 50.0, "momentum": -0.5}
    result, buffer = apg(cond, uncond, 10.0, uncond.float(), **options)
    expected, _ = apg(cond.double(), uncond.double(), 10.0, uncond.double(), **options)
    assert result.dtype == buffer.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-3)


def test_neutral_setting_is_cfg():
    cond, uncond = draw((3, 4, 8, 8))
    guided, _ = apg(cond, uncond, 7.5, uncond, eta=1.0, norm_threshold=0.0, momentum=0.0)
    torch.testing.assert_close(guided, cfg(cond, uncond, 7.5), rtol=1e-12, atol=1e-12)


def test_scale_one_is_conditional():
    cond, uncond = draw((2, 4, 8, 8))
    for rule in (CFG(), APG()):
        torch.testing.assert_close(combine(rule, cond, uncond, 1.0)[0], cond)


def test_update_is_orthogonal_and_bounded():
    cond, uncond = draw((4, 4, 16, 16))
    guided, _ = apg(cond, uncond, 2.0, norm_threshold=3.0)
    update = (guided - cond).flatten(1)
    assert (update * cond.flatten(1)).sum(1).abs().max() < 1e-10
    assert update.norm(dim=1).max() <= 3.0 + 1e-12


def test_rms_threshold_does_not_depend_on_resolution():
    """Tiling a sample leaves every element of the result as it was."""
    cond, uncond = draw((2, 4, 8, 8))
    options = {"norm_threshold": 0.5, "threshold_unit": "rms"}
    small, _ = apg(cond, uncond, 9.0, **options)
    large, _ = apg(cond.repeat(1, 1, 3, 2), uncond.repeat(1, 1, 3, 2), 9.0, **options)
    torch.testing.assert_close(large, small.repeat(1, 1, 3, 2))
    n = cond[0].numel()
    l2, _ = apg(cond, uncond, 9.0, norm_threshold=0.5 * n**0.5)
    torch.testing.assert_close(small, l2)


def test_samples_do_not_see_each_other():
    cond, uncond = draw((3, 4, 8, 8), dtype=torch.float32)
    together, buffer = apg(cond, uncond, 9.0, uncond, norm_threshold=2.0, momentum=-0.5)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = apg(cond[one], uncond[one], 9.0, uncond[one], norm_threshold=2.0, momentum=-0.5)
        torch.testing.assert_close(together[one], alone, rtol=1e-6, atol=1e-6)


def test_degenerate_predictions_stay_finite():
    cond, _ = draw((2, 4, 8, 8))
    zero = torch.zeros_like(cond)
    equal, _ = apg(cond, cond, 15.0, norm_threshold=1.0)
    torch.testing.assert_close(equal, cond)
    guided, _ = apg(zero, cond, 15.0, norm_threshold=1.0)
    assert guided.isfinite().all()


def test_non_contiguous_inputs():
    cond, uncond = draw((2, 8, 8, 4))
    strided = apg(cond.movedim(-1, 1), uncond.movedim(-1, 1), 5.0, norm_threshold=1.0)[0]
    plain = apg(
        cond.movedim(-1, 1).contiguous(),
        uncond.movedim(-1, 1).contiguous(),
        5.0,
        norm_threshold=1.0,
    )[0]
    torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_views_of_one_network_give_one_result(kind):
    """In x0 space it does not matter what the network predicts."""
    alpha, sigma = (0.3, 0.7) if kind == "flow" else (0.6, 0.8)
    x_t, cond, uncond = draw((2, 4, 8, 8), count=3)
    level = NoiseLevel(alpha, sigma, kind)
    pred_cond, pred_uncond = level.from_x0(cond, x_t), level.from_x0(uncond, x_t)
    direct, _ = combine(APG(), cond, uncond, 10.0)
    through, _ = combine(
        APG(), level.to_x0(pred_cond, x_t), level.to_x0(pred_uncond, x_t), 10.0, None
    )
    torch.testing.assert_close(through, direct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"norm_threshold": -1}, {"eta": float("nan")}, {"threshold_unit": "max"}, {"space": "pixel"}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="APG"):
        APG(**settings)


def test_presets_are_the_papers():
    """Table 10: per-element thresholds times sqrt(elements) are the published norms."""
    for family, elements, r, beta in [
        ("sdxl", 4 * 128 * 128, 15, -0.5),
        ("sd2", 4 * 96 * 96, 7.5, -0.75),
        ("dit", 4 * 32 * 32, 5, -0.5),
        ("edm2-s", 4 * 64 * 64, 2.5, -0.75),
    ]:
        rule = resolve("apg", family).rule
        assert rule.norm_threshold * elements**0.5 == pytest.approx(r)
        assert (rule.eta, rule.momentum, rule.space) == (0.0, beta, "x0")
