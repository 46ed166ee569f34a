"""Schedules with estimates fitted on their own runs, on the embedded model."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from pilotage.eval.embedded import load_embedded
from pilotage.guidance import CFG, Guidance, Schedule, hold, linear_ag
from pilotage.pipelines.fitting.fit import fit
from pilotage.pipelines.fitting.on_policy import ScheduleFitter
from pilotage.pipelines.fitting.runs import Runs

PROMPTS = ["noto style fox", "twemoji style red apple", "fluent style cactus"]
STEPS = 5
CHOICES = ("both", "both", "estimate", "cond", "estimate")


@pytest.fixture(scope="module")
def pipe():
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def fitter(pipe):
    return ScheduleFitter(Runs(pipe, PROMPTS, num_inference_steps=STEPS, batch_size=1))


def run(pipe, guidance):
    """Final latents of the prompts, all at once, and the evaluations of each."""
    call = {"guidance_scale": 7.5, "num_inference_steps": STEPS, "output_type": "latent"}
    generator = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    latents = pipe(PROMPTS, guidance=guidance, generator=generator, **call).images
    return latents, pipe.guidance_trace.nfe


def test_a_schedule_does_what_it_was_fitted_to(pipe, fitter):
    network = pipe.unet
    sizes = []
    handle = network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        found, latents = fitter.fit(CHOICES)
    finally:
        handle.remove()
    assert pipe.unet is network
    assert max(sizes) <= 2 and sum(sizes) == len(PROMPTS) * (STEPS + 2), "the denoiser's rows"
    schedule = Schedule(CHOICES, fill=found.coefficients)
    again, nfe = run(pipe, schedule)
    assert nfe == [STEPS + 2] * len(PROMPTS)
    torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)
    plain, _ = run(pipe, "cfg")
    torch.testing.assert_close(fitter.states[-1], plain, rtol=1e-3, atol=1e-3)
    assert (found.trajectories, found.held_out) == (2, 1)
    apart = (again[:2] - plain[:2]).square().sum() / plain[:2].square().sum()
    assert found.figures["distance"][-1] == pytest.approx(apart.item(), rel=1e-2)
    assert found.figures["distance"][:2] == (0.0, 0.0)
    with pytest.raises(ValueError, match="num_inference_steps was 5, here it is 4"):
        pipe(PROMPTS[0], guidance=schedule, num_inference_steps=4)


def test_nothing_estimated_is_plain_guidance(fitter):
    found, latents = fitter.fit(("both",) * STEPS)
    assert max(found.figures["distance"]) < 1e-9  # what corrects them changes no more than digits
    torch.testing.assert_close(latents, fitter.states[-1], rtol=1e-3, atol=1e-3)


def test_runs_end_nearer_than_with_the_regression_along_plain_guidance(pipe, fitter):
    choices = ("both", "both", "estimate", "both", "estimate")
    found, latents = fitter.fit(choices)
    regressed = fit(Runs(pipe, PROMPTS, num_inference_steps=STEPS, progress=False)).coefficients
    other, _ = run(pipe, Schedule(choices, fill=regressed))
    far, near = ((x - fitter.states[-1]).square().mean() for x in (other, latents))
    assert near < 0.9 * far


def test_fitted_forecasts_end_nearer_than_held_predictions_and_fewer_steps(pipe, fitter):
    choices = ("both", "both", "forecast", "both", "forecast")
    found, latents = fitter.fit(choices)
    again, nfe = run(pipe, Schedule(choices, fill=found.coefficients))
    assert nfe == [6] * len(PROMPTS)
    torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)
    held, _ = run(pipe, Schedule(choices))
    generator = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"guidance_scale": 7.5, "num_inference_steps": 3, "output_type": "latent"}
    fewer = pipe(PROMPTS, generator=generator, **options).images
    near, *far = ((x - fitter.states[-1]).square().mean() for x in (latents, held, fewer))
    assert near < 0.9 * min(far)


def test_a_schedule_fitted_to_a_finer_run_ends_nearer_to_it_than_the_full_run(pipe):
    """And what it does is the solver's step on the weighted sums of denoised images."""
    runs = Runs(pipe, PROMPTS, num_inference_steps=STEPS, batch_size=3)
    fitter = ScheduleFitter(runs, finer=4)
    generator = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"guidance_scale": 7.5, "num_inference_steps": 4 * STEPS, "output_type": "latent"}
    fine = pipe(PROMPTS, guidance="cfg", generator=generator, **options).images
    torch.testing.assert_close(fitter.states[-1], fine, rtol=1e-3, atol=1e-3)
    choices = ("both", "both", "both", "forecast", "both")
    found, latents = fitter.fit(choices)
    again, nfe = run(pipe, Schedule(choices, fill=found.coefficients))
    assert nfe == [8] * len(PROMPTS) and found.coefficients.space == "x0"
    torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)
    plain, _ = run(pipe, "cfg")
    near, far = ((x[:2] - fine[:2]).square().mean() for x in (again, plain))
    assert near < 0.5 * far
    torch.testing.assert_close(
        again, stepped(pipe, choices, found.coefficients.guided), rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def stepped(pipe, choices, rows):
    """A corrected run, written out: v-prediction, the pipeline's scheduler, nothing of ours."""
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    scheduler, history = copy.deepcopy(pipe.scheduler), []
    scheduler.set_timesteps(STEPS)
    shape = (1, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    seeds = range(len(PROMPTS))
    x = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in seeds])
    x = x * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        a = scheduler.alphas_cumprod[t].sqrt()
        s = (1 - scheduler.alphas_cumprod[t]).sqrt()
        known = list(history)
        if choices[index] == "both":
            u, c = (pipe.unet(x, t, encoder_hidden_states=e).sample for e in (uncond, cond))
            known.append(a * x - s * (u + 7.5 * (c - u)))
        x0 = (
            sum(w * k for w, k in zip(rows[index], known, strict=True)) if rows[index] else known[0]
        )
        history.append(x0)
        x = scheduler.step((a * x - x0) / s, t, x, return_dict=False)[0]
    return x


def test_one_branch_is_fitted_likewise(pipe):
    """At w = 1, where a step has one evaluation; there is nothing to estimate."""
    runs = Runs(pipe, PROMPTS, guidance_scale=1.0, num_inference_steps=STEPS, batch_size=3)
    fitter = ScheduleFitter(runs, finer=4)
    choices = ("both", "both", "both", "forecast", "both")
    found, latents = fitter.fit(choices)
    generator = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "output_type": "latent"}
    schedule = Schedule(choices, fill=found.coefficients)
    again = pipe(PROMPTS, guidance=schedule, generator=generator, **options).images
    assert pipe.guidance_trace.nfe == [4] * len(PROMPTS)
    torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)
    plain = pipe(PROMPTS, generator=generator, **options).images
    near, far = ((x[:2] - fitter.states[-1][:2]).square().mean() for x in (again, plain))
    assert near < 0.5 * far
    with pytest.raises(ValueError, match="needs a guidance_scale > 1"):
        fitter.fit(CHOICES)


def test_a_finer_run_elsewhere_is_refused(pipe):
    """With leading spacing the steps of a run are not among those of a finer one."""
    stock = pipe.scheduler
    try:
        pipe.scheduler = type(stock).from_config(stock.config, timestep_spacing="leading")
        runs = Runs(pipe, PROMPTS[:2], num_inference_steps=3)
        with pytest.raises(ValueError, match="does not pass through the timesteps"):
            ScheduleFitter(runs, finer=7)
        with pytest.raises(ValueError, match="finer is a whole number"):
            ScheduleFitter(runs, finer=0)
    finally:
        pipe.scheduler = stock


@pytest.mark.parametrize(("then", "cost"), [("estimate", STEPS + 1), ("forecast", STEPS + 2)])
def test_linear_ag_takes_what_was_fitted_to_its_pattern(pipe, fitter, then, cost):
    found, latents = fitter.fit(hold(then=then).choices_for(STEPS))
    policy = linear_ag(found.coefficients, then=then)
    again, nfe = run(pipe, Guidance(CFG(), policy))
    assert nfe == [cost] * len(PROMPTS)
    torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)


def test_steps_that_were_not_fitted_are_not_estimated(fitter):
    """Coefficients of one schedule hold weights for its own estimated and skipped steps only."""
    found = fitter.fit(("both", "both", "estimate", "forecast", "both"))[0].coefficients
    Schedule(("both", "both", "estimate", "forecast", "cond"), fill=found)
    for index, choice, message in (
        (4, "estimate", "hold no estimate of step 4"),
        (1, "estimate", "hold no estimate of step 1"),
        (4, "forecast", "hold no weights for skipping step 4"),
    ):
        choices = ["both"] * STEPS
        choices[index] = choice
        with pytest.raises(ValueError, match=message):
            Schedule(choices, fill=found)
    with pytest.raises(ValueError, match="hold no estimate of step 1"):
        linear_ag(found, first=0.6, then="estimate")


def test_other_schedulers(pipe):
    """A first-order one works alike; one that clips or adds noise is refused."""
    stock, runs = pipe.scheduler, Runs(pipe, PROMPTS[:2], num_inference_steps=STEPS)
    try:
        pipe.scheduler = DDIMScheduler.from_config(stock.config, clip_sample=True)
        with pytest.raises(ValueError, match="the steps of DDIMScheduler are random or clipped"):
            ScheduleFitter(runs).fit(CHOICES)
        pipe.scheduler = DDIMScheduler.from_config(stock.config, clip_sample=False)
        found = ScheduleFitter(runs).fit(CHOICES)
        assert 0 < found[0].figures["distance"][2] < 0.2
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
            stock.config, rescale_betas_zero_snr=False
        )
        with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler are random or"):
            ScheduleFitter(runs).fit(CHOICES)
    finally:
        pipe.scheduler = stock


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS[:1]}, "at least 2 prompts"),
        ({"guidance_scale": 0.9}, "finite and >= 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"ridge": -1.0}, "ridge"),
    ],
)
def test_bad_settings_fail_before_anything_runs(pipe, changes, message):
    ridge = changes.get("ridge", 1e-4)
    settings = {"prompts": PROMPTS} | {k: v for k, v in changes.items() if k != "ridge"}
    with pytest.raises(ValueError, match=message):
        ScheduleFitter(Runs(pipe, **settings), ridge=ridge)


def test_choices_of_another_length(fitter):
    with pytest.raises(ValueError, match="2 choices for a run of 5 steps"):
        fitter.fit(("both", "cond"))
