"""Rules that act on a solver's steps, in pipelines: against the papers' code around stock steps."""

import functools

import diffusers
import pytest
import torch

from pilotage.guidance import (
    APG,
    TAG,
    CFGZeroStar,
    HiGS,
    MagnitudeAware,
    Momentum,
    SampleScales,
)
from pilotage.pipelines import LayoutError, guided

from ... import components
from ...families import FAMILIES
from ...families.base import SD_NOISE
from ...oracles.steps import PaperHiGS, PaperMomentum, paper_tag
from ..checks import Rows, equal, latents

SOLVERS = {
    "sd": {
        "ddim": lambda: diffusers.DDIMScheduler(**SD_NOISE, clip_sample=False),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**SD_NOISE),
    },
    "sd3": {"flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)},
}
CASES = [(name, solver) for name, made in SOLVERS.items() for solver in made]


def build(name, solver):
    pipe = FAMILIES[name].build()
    pipe.scheduler = SOLVERS[name][solver]()
    return pipe


def around_steps(scheduler, of):
    """Let a stock scheduler step as ``of(stock, index, model_output, timestep, sample)`` says."""
    stock, index = scheduler.step, iter(range(1000))

    @functools.wraps(stock)
    def step(model_output, timestep, sample, *args, **kwargs):
        def plain(output):
            return stock(output, timestep, sample, *args, **kwargs)

        return of(plain, next(index), model_output, timestep, sample)

    scheduler.step = step


def samples(tensor):
    return [row.double().numpy() for row in tensor]


def stack(rows, like):
    return torch.stack([torch.from_numpy(row) for row in rows]).to(like)


def paper_tag_steps(plain, index, output, timestep, sample):
    after = plain(output)[0]
    return (stack(map(paper_tag, samples(sample), samples(after), [1.15] * 3), sample),)


def paper_momentum_steps(scheduler):
    oracles = [PaperMomentum(0.5, 0.6) for _ in range(3)]

    def of(plain, index, output, timestep, sample):
        now, later = (float(scheduler.sigmas[i]) for i in (index, index + 1))
        acts = 0.3 <= now <= 0.95
        rows = zip(oracles, samples(sample), samples(output), strict=True)
        plain(output)  # counts the step
        return (stack([o.step(z, v, later - now, acts) for o, z, v in rows], sample),)

    return of


def paper_higs_steps(scheduler):
    oracles = [PaperHiGS(1.75, 0.4, 1.0, 0.0, 0.75) for _ in range(3)]

    def of(plain, index, output, timestep, sample):
        sigma = float(scheduler.sigmas[index])
        denoised = samples(sample.double() - sigma * output.double())
        pushed = [d + o.step(d, sigma) for o, d in zip(oracles, denoised, strict=True)]
        return plain(((sample - stack(pushed, sample)) / sigma).to(output))

    return of


def check(rule, name, solver, of, **extra):
    pipe, stock = guided(build(name, solver)), build(name, solver)
    with Rows(pipe, name) as rows:
        ours = latents(pipe, name, guidance=rule, **extra)
    assert sum(rows.calls) == sum(pipe.guidance_trace.nfe)
    plain = latents(stock, name, **extra)
    around_steps(stock.scheduler, of(stock.scheduler))
    expected = latents(stock, name, **extra)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).norm() > 20 * (ours - expected).norm()
    return pipe.guidance_trace


SCALES = [{"guidance_scale": 4.0}, {"guidance_scale": 1.0}]


@pytest.mark.parametrize("extra", SCALES, ids=["two branches", "one"])
@pytest.mark.parametrize(("name", "solver"), CASES)
def test_tag_is_the_papers_code_after_the_schedulers_step(name, solver, extra):
    trace = check(TAG(1.15), name, solver, lambda _: paper_tag_steps, **extra)
    branches = 2 if extra["guidance_scale"] > 1 else 1
    assert trace.nfe == [branches * len(trace.steps)] * 3


@pytest.mark.parametrize("extra", SCALES, ids=["two branches", "one"])
def test_momentum_is_the_papers_on_a_flow(extra):
    check(Momentum(), "sd3", "flow", paper_momentum_steps, num_inference_steps=8, **extra)


@pytest.mark.parametrize("extra", SCALES, ids=["two branches", "one"])
def test_higs_is_the_papers_on_a_flow(extra):
    check(HiGS(), "sd3", "flow", paper_higs_steps, num_inference_steps=8, **extra)


def test_a_distilled_network_takes_rules_for_one_branch():
    distilled = FAMILIES["sd"].build()
    distilled.unet = components.unet(in_channels=4, time_cond_proj_dim=8)
    pipe = guided(distilled)
    plain = latents(pipe, "sd")
    for guidance in ("momentum", "higs", "tag", "tag+forecast"):
        found = latents(pipe, "sd", guidance=guidance)
        assert torch.isfinite(found).all() and not equal(found, plain)
        assert len(set(pipe.guidance_trace.nfe)) == 1
    with pytest.raises(LayoutError, match="evaluates one branch"):
        latents(pipe, "sd", guidance="tcfg")


def test_names_mean_the_settings_of_the_model():
    for name, extra, rule in (
        ("sd3", "tag", TAG(1.05)),
        ("sdxl", "higs", HiGS(noise_low=0.538)),
        ("wan", "cfg-zero-star", CFGZeroStar(zero_steps=2)),
        ("sd", "tag", TAG()),
    ):
        assert guided(FAMILIES[name].build()).resolve_guidance(extra).rule == rule
    pipe = FAMILIES["sd3"].build()
    pipe.transformer.register_to_config(qk_norm="rms_norm")  # as Stable Diffusion 3.5's
    assert guided(pipe).resolve_guidance("magnitude").rule == MagnitudeAware(12.0)


@pytest.mark.parametrize("rule", ["cfg", APG()], ids=str)
def test_every_sample_has_its_scale(rule):
    scales = [2.0, 6.0, 1.0]
    pipe = guided(FAMILIES["sd3"].build())
    together = latents(pipe, "sd3", guidance=rule, guidance_scale=scales)
    assert pipe.guidance_trace.nfe == [2 * len(pipe.guidance_trace.steps)] * 3
    for row, scale in enumerate(scales):
        alone = "cfg" if scale == 1 else rule
        expected = latents(pipe, "sd3", guidance=alone, guidance_scale=scale)
        torch.testing.assert_close(together[row], expected[row], rtol=1e-4, atol=1e-4)
    tensor = latents(pipe, "sd3", guidance=rule, guidance_scale=torch.tensor(scales))
    assert equal(tensor, together)
    same = latents(pipe, "sd3", guidance=rule, guidance_scale=[4.0] * 3)
    assert equal(same, latents(pipe, "sd3", guidance=rule, guidance_scale=4.0))


def test_a_scale_that_counts_from_0():
    """Z-Image's scale is w - 1."""
    pipe = guided(FAMILIES["z_image"].build())
    together = latents(pipe, "z_image", guidance="apg", guidance_scale=[1.0, 5.0, 2.0])
    for row, scale in enumerate((1.0, 5.0, 2.0)):
        expected = latents(pipe, "z_image", guidance="apg", guidance_scale=scale)
        torch.testing.assert_close(together[row], expected[row], rtol=1e-4, atol=1e-4)


def test_scales_that_make_no_sense():
    pipe = guided(FAMILIES["sd3"].build())
    for scales, message in (
        ([2.0, 3.0], "2 guidance scales for 3 samples"),
        ([2.0, 0.5, 3.0], "at least one above"),
        ([1.0, 1.0, 1.0], "at least one above"),
        ([2.0, "3", 1.0], "must be a finite number, got '3'"),
    ):
        with pytest.raises(ValueError, match=message):
            latents(pipe, "sd3", guidance="apg", guidance_scale=scales)
    with pytest.raises(ValueError, match="1 guidance scales for 3 samples"):
        latents(pipe, "sd3", guidance=APG() | SampleScales((1.0,)))
