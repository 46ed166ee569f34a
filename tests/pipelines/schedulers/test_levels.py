"""Noise levels of the fused schedulers by the definitions, from the betas of training alone."""

import math

import diffusers
import pytest
import torch

from pilotage.pipelines import (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
    noise_level,
)

FIRST, LAST, STEPS = 0.00085, 0.012, 1000
SD = {"beta_start": FIRST, "beta_end": LAST, "beta_schedule": "scaled_linear"}


def squares():
    """alpha_t^2 of every training timestep: the product of what is kept until then."""
    kept, found = 1.0, []
    for step in range(STEPS):
        share = step / (STEPS - 1)
        beta = (math.sqrt(FIRST) * (1 - share) + math.sqrt(LAST) * share) ** 2
        kept *= 1 - beta
        found.append(kept)
    return found


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "cls", [FusedDDIMScheduler, FusedEulerScheduler, FusedDPMSolverMultistepScheduler]
)
def test_alpha_and_sigma_are_the_roots_of_what_is_kept_and_lost(cls, kind):
    scheduler = cls(**SD, prediction_type=kind, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    kept, x = squares(), torch.ones(1, 2, 2, 2)
    for t in scheduler.timesteps:
        level = noise_level(scheduler, t)
        assert level.prediction == kind and level.sign == 1
        alpha, sigma = math.sqrt(kept[int(t)]), math.sqrt(1 - kept[int(t)])
        assert level.alpha == pytest.approx(alpha, rel=1e-4)
        assert level.sigma == pytest.approx(sigma, rel=1e-4)
        assert level.ratio == pytest.approx(sigma / alpha, rel=1e-4)
        scheduler.step(x, t, x)


def test_flow_levels_are_the_times():
    scheduler = FusedFlowMatchEulerScheduler()
    scheduler.set_timesteps(10)
    x = torch.ones(1, 2, 2, 2)
    for t in scheduler.timesteps:
        level = noise_level(scheduler, t)
        assert (level.prediction, level.sign) == ("flow", 1)
        assert level.sigma == pytest.approx(float(t) / STEPS, rel=1e-6)
        assert level.alpha == pytest.approx(1 - float(t) / STEPS, abs=1e-6)
        scheduler.step(x, t, x)


@pytest.mark.parametrize("churn", [0.2, 1.0, 3.0])
def test_any_churn_is_the_stock_schedulers(churn):
    found = []
    for cls in (diffusers.EulerDiscreteScheduler, FusedEulerScheduler):
        scheduler, generator = cls(**SD), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(5)
        x = torch.randn(1, 3, 4, 4, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            pred = 0.5 * scheduler.scale_model_input(x, t)
            x = scheduler.step(pred, t, x, s_churn=churn, generator=generator).prev_sample
        found.append(x)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stock", "ours", "sigmas"),
    [
        (diffusers.EulerDiscreteScheduler, FusedEulerScheduler, [12.0, 4.0, 4.0, 1.0, 0.2, 0.0]),
        (
            diffusers.FlowMatchEulerDiscreteScheduler,
            FusedFlowMatchEulerScheduler,
            [1.0, 0.7, 0.7, 0.3],
        ),
    ],
)
def test_a_run_that_begins_at_a_timestep_that_is_there_twice(stock, ours, sigmas):
    """It begins at the second of them."""
    x, found = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for cls in (stock, ours):
        scheduler = cls()
        scheduler.set_timesteps(sigmas=sigmas)
        t = scheduler.timesteps[1]
        assert t == scheduler.timesteps[2]
        found.append(scheduler.step(0.5 * x, t, x).prev_sample)
        assert scheduler.step_index == 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert (found[0] - x).abs().max() > 0.1
