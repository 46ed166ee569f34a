"""CFG++ against its own step, written down from the paper in float64."""

import math

import diffusers as df
import pytest
import torch

from pilotage.guidance import CFGPlusPlus, NoiseLevel, cfg_plus_plus_scale
from pilotage.pipelines import (
    FusedDDIMScheduler,
    FusedEulerScheduler,
    UnknownSchedulerError,
    guided,
)

from ...families import FAMILIES
from ..checks import latents

STRENGTH = 0.6


def paper_run(pipe, name, alphas):
    """The final latents of a stock loop whose scheduler takes CFG++'s step instead of its own.

    Args:
        alphas: (step) -> (alpha, sigma, next alpha, next sigma) and what to divide latents by.
    """
    outputs, state = [], {}
    handle = pipe.unet.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    stock = pipe.scheduler.step

    def step(_prediction, timestep, sample, **_):
        uncond, cond = outputs[-1].double().chunk(2)
        x = sample.double() if "x" not in state else state["x"]
        alpha, sigma, next_alpha, next_sigma = alphas(len(outputs) - 1)
        guided_noise = uncond + STRENGTH * (cond - uncond)
        denoised = (x - sigma * guided_noise) / alpha
        state["x"] = next_alpha * denoised + next_sigma * uncond
        # Euler counts its own steps.
        stock(_prediction, timestep, sample, return_dict=False)
        return (state["x"].to(sample),)

    pipe.scheduler.step = step
    try:
        latents(pipe, name)
    finally:
        del pipe.scheduler.step
        handle.remove()
    return state["x"]


def schedulers():
    config = FAMILIES["sd"].build().scheduler.config
    plain = {"clip_sample": False, "thresholding": False}
    return {
        "ddim": df.DDIMScheduler.from_config(config, **plain),
        "euler": df.EulerDiscreteScheduler.from_config(config),
    }


def levels(scheduler, kind):
    """Step -> (alpha, sigma, next alpha, next sigma), from the scheduler's own tables."""

    def of(step):
        if kind == "euler":  # variance exploding: x = x_0 + sigma * noise
            return 1.0, float(scheduler.sigmas[step]), 1.0, float(scheduler.sigmas[step + 1])
        now = int(scheduler.timesteps[step])
        following = now - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        table = scheduler.alphas_cumprod.double()
        last = scheduler.final_alpha_cumprod.double()
        squares = table[now], table[following] if following >= 0 else last
        pairs = [(float(s.sqrt()), float((1 - s).sqrt())) for s in squares]
        return *pairs[0], *pairs[1]

    return of


@pytest.mark.parametrize("kind", ["ddim", "euler"])
def test_equals_the_paper(kind):
    pipe = FAMILIES["sd"].build()
    pipe.scheduler = schedulers()[kind]
    expected = paper_run(pipe, "sd", levels(pipe.scheduler, kind))
    got = latents(guided(pipe), "sd", guidance="cfg-pp")
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    stock = latents(pipe, "sd")
    assert (got - stock).abs().max() > 1e-2 * expected.abs().max()


def test_the_scale_is_finite_where_one_level_has_no_signal_or_no_noise():
    whole, none = NoiseLevel(0.0, 1.0, "epsilon"), NoiseLevel(1.0, 0.0, "epsilon")
    middle = NoiseLevel(0.6, 0.8, "epsilon")
    assert cfg_plus_plus_scale(STRENGTH, whole, middle) == pytest.approx(STRENGTH)
    assert cfg_plus_plus_scale(STRENGTH, middle, none) == pytest.approx(STRENGTH)
    a, s, a2, s2 = 0.6, 0.8, 0.8, 0.6
    expected = STRENGTH * a2 * s / (a2 * s - a * s2)
    next_level = NoiseLevel(a2, s2, "epsilon")
    assert cfg_plus_plus_scale(STRENGTH, middle, next_level) == pytest.approx(expected)


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, math.inf])
def test_bad_strengths(strength):
    with pytest.raises(ValueError, match="CFGPlusPlus: strength"):
        CFGPlusPlus(strength)


@pytest.mark.parametrize(
    ("scheduler", "extra", "message"),
    [
        (df.DPMSolverMultistepScheduler, {}, "DPMSolverMultistepScheduler"),
        (df.EulerAncestralDiscreteScheduler, {}, "EulerAncestralDiscreteScheduler"),
        (df.DDIMScheduler, {"eta": 0.5}, "eta"),
        (df.DDIMScheduler, {"clip": True}, "clip_sample"),
    ],
)
def test_other_solvers_are_refused_before_any_step(scheduler, extra, message):
    pipe = guided(FAMILIES["sd"].build())
    clip = {"clip_sample": extra.pop("clip", False)} if scheduler is df.DDIMScheduler else {}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **clip)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UnknownSchedulerError, match=message):
        latents(pipe, "sd", guidance="cfg-pp", **extra)
    assert not calls


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (df.DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 0}),
        (FusedDDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 0}),
        (df.EulerDiscreteScheduler, {"final_sigmas_type": "sigma_min"}),
        (FusedEulerScheduler, {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_a_step_that_stays_at_its_noise_level_is_refused(scheduler, settings):
    """There w_t is infinite, and the picture would be NaN without a word."""
    pipe = guided(FAMILIES["sd"].build())
    settings = settings | {"clip_sample": False, "skip_prk_steps": False}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    with pytest.raises(UnknownSchedulerError, match="every step to change the noise level"):
        latents(pipe, "sd", guidance="cfg-pp")


def test_on_flow_models():
    """The step of a flow model leads from one level to the next as well: x0 and noise of v."""
    pipe = guided(FAMILIES["sd3"].build())
    sigmas = None

    def expected():
        nonlocal sigmas
        outputs, state = [], {}
        handle = pipe.transformer.register_forward_hook(lambda *call: outputs.append(call[2][0]))
        stock = pipe.scheduler.step

        def step(_prediction, timestep, sample, **_):
            uncond, cond = outputs[-1].double().chunk(2)
            x = sample.double() if "x" not in state else state["x"]
            sigma, following = (float(pipe.scheduler.sigmas[len(outputs) - 1 + i]) for i in (0, 1))
            denoised = x - sigma * (uncond + STRENGTH * (cond - uncond))
            noise = x + (1 - sigma) * uncond
            state["x"] = (1 - following) * denoised + following * noise
            stock(_prediction, timestep, sample, return_dict=False)
            return (state["x"].to(sample),)

        pipe.scheduler.step = step
        try:
            latents(pipe, "sd3")
        finally:
            del pipe.scheduler.step
            handle.remove()
        return state["x"]

    want = expected()
    got = latents(pipe, "sd3", guidance="cfg-pp")
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
