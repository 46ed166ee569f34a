"""Prediction types are views of one denoised image."""

import pytest
import torch

from pilotage.guidance import PREDICTION_TYPES, NoiseLevel
from pilotage.guidance.prediction import sum_of

LEVELS = [(alpha, (1 - alpha**2) ** 0.5) for alpha in (0.9, 0.1, 2.0**-12)]


def make_prediction(kind, x0, noise, alpha, sigma):
    """What a perfect network of each convention outputs, from the definitions."""
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "sample": x0,
    }[kind]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_x0_is_recovered(kind, alpha, sigma):
    if kind == "flow":
        alpha = 1 - sigma
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    x_t = alpha * x0 + sigma * noise
    pred = make_prediction(kind, x0, noise, alpha, sigma)
    for number in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        level = NoiseLevel(number(alpha), number(sigma), kind)
        torch.testing.assert_close(level.to_x0(pred, x_t), x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(level.from_x0(x0, x_t), pred, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [float, torch.tensor])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_without_noise_a_picture_says_nothing_of_a_prediction(kind, number):
    x_t = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    found = NoiseLevel(number(1.0), number(0.0), kind).from_x0(2 * x_t, x_t)
    assert torch.equal(found, torch.zeros_like(x_t))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 1.7])
def test_v_of_data_with_a_standard_deviation(sigma_data):
    """Karras et al.'s preconditioning is a v-prediction of the data divided by sigma_data."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    ratio = 3.0
    alpha = (ratio**2 + sigma_data**2) ** -0.5
    level = NoiseLevel(alpha, ratio * alpha, "v_prediction", sigma_data=sigma_data)
    x_t = alpha * (x0 + ratio * noise)
    unit, share = x0 / sigma_data, alpha * sigma_data
    pred = share * noise - ratio * alpha * unit
    torch.testing.assert_close(level.to_x0(pred, x_t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(level.from_x0(x0, x_t), pred, rtol=1e-9, atol=1e-9)
    assert level.ratio == pytest.approx(ratio)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_negated_outputs(kind):
    """A network that outputs -pred, told so, gives the same denoised image."""
    x_t, pred = torch.randn(2, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    plain, negated = NoiseLevel(0.6, 0.8, kind), NoiseLevel(0.6, 0.8, kind, sign=-1)
    torch.testing.assert_close(negated.to_x0(-pred, x_t), plain.to_x0(pred, x_t))
    torch.testing.assert_close(negated.from_x0(x_t * 2, x_t), -plain.from_x0(x_t * 2, x_t))


def test_half_precision_is_converted_in_float32():
    level = NoiseLevel(0.6, 0.8, "v_prediction")
    x_t, pred = torch.randn(2, 1, 4, 8, 8, dtype=torch.float16)
    denoised = level.to_x0(pred, x_t)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, 0.6 * x_t.float() - 0.8 * pred.float())


def test_unknown_type_lists_the_known():
    with pytest.raises(ValueError, match="epsilon.*flow"):
        NoiseLevel(1.0, 0.1, "score").coefficients()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_is_finite_where_all_elements_are(dtype):
    large = torch.full((2, 3, 64), 6e4, dtype=dtype)
    assert sum_of(large).isfinite()
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 100, -1):
            spoiled = large.clone()
            spoiled.view(-1)[place] = bad
            assert not sum_of(spoiled).isfinite()
            spoiled.view(-1)[50] = torch.inf
            assert not sum_of(spoiled).isfinite()
