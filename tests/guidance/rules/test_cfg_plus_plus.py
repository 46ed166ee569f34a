"""CFG++ by its definition: the guided picture, noised again with the unconditional noise."""

import pytest
import torch

from pilotage.guidance import CFGPlusPlus, CFGZeroStar, NoiseLevel, Predictions, Step


def noise_of(level, pred, x_t):
    """epsilon of a prediction, from x_t = alpha x_0 + sigma epsilon."""
    if level.prediction == "epsilon":
        return level.sign * pred
    alpha, sigma = level.alpha, level.sigma
    if level.prediction == "v_prediction":  # v = alpha epsilon - sigma x_0
        return (sigma * x_t + alpha * level.sign * pred) / (alpha**2 + sigma**2)
    return x_t + alpha * level.sign * pred  # of flow matching, v = epsilon - x_0, alpha + sigma = 1


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(
    ("kind", "now", "later"),
    [
        ("epsilon", (0.6, 0.8), (0.8, 0.6)),
        ("epsilon", (0.3, 0.954), (1.0, 0.0)),
        ("v_prediction", (0.6, 0.8), (0.96, 0.28)),
        ("flow", (0.25, 0.75), (0.4, 0.6)),
        ("flow", (0.9, 0.1), (1.0, 0.0)),
    ],
)
@pytest.mark.parametrize("number", [float, torch.tensor])
def test_a_step_is_that_of_the_paper(strength, kind, now, later, number):
    cond, uncond, x_t = torch.randn(
        3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    level, next_level = (NoiseLevel(number(a), number(s), kind) for a, s in (now, later))
    step = Step(3, 20, level, next_level, x_t)
    given = Predictions({"cond": cond, "uncond": uncond}, step)
    guided, _ = CFGPlusPlus(strength).combine(given, step, 9.9, None)
    noise = [noise_of(level, pred, x_t) for pred in (cond, uncond, guided)]

    def picture(epsilon):
        return (x_t - level.sigma * epsilon) / level.alpha

    def stepped(x0, epsilon):
        return next_level.alpha * x0 + next_level.sigma * epsilon

    expected = stepped(picture(noise[1] + strength * (noise[0] - noise[1])), noise[1])
    found = stepped(picture(noise[2]), noise[2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_zero_prediction_is_for_velocities():
    assert [CFGZeroStar(steps).needs_flow for steps in (0, 1, 2)] == [False, True, True]
