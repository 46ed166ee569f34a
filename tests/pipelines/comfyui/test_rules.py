"""Rules within ComfyUI's samplers, against the papers' formulas in float64."""

import warnings
from dataclasses import dataclass

import pytest
import torch

from pilotage.guidance import APG, CFG, AdaptiveGuidance, CFGPlusPlus, CFGRescale, CFGZeroStar, Rule
from pilotage.pipelines.comfyui import SamplingError, guided

from .oracles import apg, rescale

# Thresholds in units of a whole latent, so that the ball is reached at some steps and not at all.
PAPER = APG(eta=0.0, norm_threshold=0.5, momentum=-0.5, threshold_unit="l2")
SAMPLERS = ("euler", "heun", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2m", "dpm_adaptive")


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", [CFG(), AdaptiveGuidance(2.0)], ids=["cfg", "ag"])
def test_cfg_is_the_samplers_own(comfy, sampler, guidance):
    """Bit for bit, also of samplers that add noise: a rehearsal takes no random numbers."""
    model = comfy.model()
    stock = comfy.sample(model, sampler, cfg=4.0, batch=2)
    assert torch.equal(comfy.sample(guided(model, guidance), sampler, cfg=4.0, batch=2), stock)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_apg_is_algorithm_1(comfy, recorder, close, sampler):
    """At every evaluation of a run, with the momentum of all before it."""
    model = recorder(guided(comfy.model(), PAPER))
    comfy.sample(model, sampler, steps=6, cfg=6.0, batch=2)
    expected = apg(recorder.pairs(), 6.0)
    close(recorder.results(), expected)
    plain = [c + 5 * (c - u) for c, u in recorder.pairs()]
    assert any(
        (p - e).abs().max() > 0.01 * e.abs().max() for p, e in zip(plain, expected, strict=True)
    )


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_rules_on_network_outputs(comfy, recorder, close, kind):
    model = recorder(guided(comfy.model(kind=kind), CFGRescale(phi=0.7)))
    comfy.sample(model, steps=6, cfg=6.0, batch=2)
    close(recorder.results(), [rescale(step, kind) for step in recorder.steps])


def test_cfg_plus_plus(comfy):
    """Its step is that of CFG++: the picture is guided, the noise put back is unconditional."""
    model, seen = comfy.model(), []
    run = guided(model, CFGPlusPlus(strength=0.6))

    def record(args):
        seen.append([args[n].double() for n in ("input", "cond_denoised", "uncond_denoised")])
        seen[-1].append(args["sigma"].double().view(-1, 1, 1, 1))
        return args["denoised"]

    run.set_model_sampler_post_cfg_function(record)
    comfy.sample(run, "euler", steps=6, cfg=2.0)
    for (x, cond, uncond, s), (after, _, _, later) in zip(seen, seen[1:], strict=False):
        expected = uncond + 0.6 * (cond - uncond) + later * (x - uncond) / s
        assert (after - expected).abs().max() <= 1e-5 * expected.abs().max()
    for sampler in ("euler_ancestral", "heun", "dpmpp_2m"):
        with pytest.raises(SamplingError, match="is for Euler steps"):
            comfy.sample(run, sampler, cfg=2.0)


def test_zeroed_steps_are_for_flow_models(comfy, recorder):
    with pytest.raises(ValueError, match="flow velocity"):
        comfy.sample(guided(comfy.model(), CFGZeroStar()))
    model = recorder(guided(comfy.model(kind="flow"), CFGZeroStar(zero_steps=1)))
    comfy.sample(model, steps=4)
    first = recorder.steps[0]
    torch.testing.assert_close(first["denoised"], first["input"])  # a velocity of zero stays


def test_unknown_network_outputs_are_refused(standin):
    model = standin.model(kind="skewed")
    with pytest.raises(ValueError, match="space='x0'"):
        standin.sample(guided(model, "rescale"))
    assert standin.sample(guided(model, PAPER)).isfinite().all()


def test_at_a_scale_of_1_nothing_is_guided(comfy):
    model = comfy.model()
    stock = comfy.sample(model, steps=5, cfg=1.0, batch=2)
    told = pytest.warns(UserWarning, match="cfg = 1 switches guidance off")
    with told, comfy.counting(model) as rows:
        result = comfy.sample(guided(model, "apg+ag"), steps=5, cfg=1.0, batch=2)
    assert torch.equal(result, stock)
    assert rows == [2] * 5


@dataclass(frozen=True)
class Counts(Rule):
    """Remembers where it was."""

    name = "counts"
    places: tuple = ()

    def combine(self, predictions, step, w, state):
        self.places[0].append((step.index, step.total, step.level.ratio))
        return predictions.get("cond", "native"), None


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 6), ("heun", 11)])
def test_steps_are_evaluations(comfy, recorder, sampler, evaluations):
    """A sampler that evaluates twice a step has twice the steps, but for the last one."""
    places = []
    comfy.sample(recorder(guided(comfy.model(), Counts(places=(places,)))), sampler, steps=6)
    sigmas = [float(step["sigma"][0]) for step in recorder.steps]
    assert [place[:2] for place in places] == [(i, evaluations) for i in range(evaluations)]
    assert [place[2] for place in places] == pytest.approx(sigmas, rel=1e-6)


def test_a_rising_noise_level_is_no_new_run(comfy, recorder):
    """What `test_apg_is_algorithm_1` relies on for dpm_2_ancestral."""
    comfy.sample(recorder(comfy.model()), "dpm_2_ancestral", steps=6)
    sigmas = [float(step["sigma"][0]) for step in recorder.steps]
    assert any(a < b for a, b in zip(sigmas, sigmas[1:], strict=False))


def test_what_is_plain_stays_untouched(comfy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = guided(comfy.model(), CFG())
        assert comfy.sample(model, cfg=1.0).isfinite().all()
