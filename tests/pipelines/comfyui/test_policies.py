"""Policies within ComfyUI's samplers: what the network evaluates, and what fills in."""

import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Guidance, forecast, hold, load_guidance
from pilotage.guidance.saved import save_guidance
from pilotage.pipelines.comfyui import SamplingError, guided, trace_of, with_policy, with_rule

from .standin import OwnGuider


def cosines(steps):
    """Of both branches, for every sample and evaluation, in float64."""
    pairs = [(s["cond_denoised"].double(), s["uncond_denoised"].double()) for s in steps]
    of = [torch.cosine_similarity(c.flatten(1), u.flatten(1), dim=1) for c, u in pairs]
    return torch.stack(of, dim=1).tolist()


def stops(steps, threshold):
    """How many evaluations of every sample are guided."""
    return [
        next((i + 1 for i, cosine in enumerate(row) if cosine >= threshold), len(steps))
        for row in cosines(steps)
    ]


def between(steps):
    """A threshold at which the samples stop as differently as they can, not near any cosine."""
    ordered = sorted(value for row in cosines(steps) for value in row)
    gaps = [pair for pair in zip(ordered, ordered[1:], strict=False) if pair[1] - pair[0] > 1e-5]
    thresholds = [(low + high) / 2 for low, high in gaps]
    best = max(thresholds, key=lambda t: len(set(stops(steps, t))))
    assert len(set(stops(steps, best))) > 1, "these samples agree at the same steps"
    return best


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_every_sample_stops_on_its_own(comfy, recorder, sampler, prompts):
    """Rows counted at the network, and no sample is influenced by the others of its batch."""
    model, options = comfy.model(), {"sampler": sampler, "steps": 10, "cfg": 4.0}
    given = comfy.prompts(comfy.width, prompts)
    comfy.sample(recorder(model), **options, batch=3, prompts=given)
    threshold = between(recorder.steps)
    expected, evaluations = stops(recorder.steps, threshold), len(recorder.steps)
    run = guided(model, AdaptiveGuidance(threshold))
    with comfy.counting(model) as rows:
        together = comfy.sample(run, **options, batch=3, prompts=given)
    assert trace_of(run).nfe == [evaluations + stop for stop in expected]
    assert sum(rows) == sum(trace_of(run).nfe)
    for row in range(3):
        one = [p[row % prompts : row % prompts + 1] for p in given]
        alone = comfy.sample(run, **options, batch=3, prompts=one)[row]
        assert (alone - together[row]).abs().max() <= 1e-4 * together.abs().max()


def test_what_is_shared_by_a_batch_is_evaluated_whole(comfy, recorder):
    """A patch of the network may hold something per sample: no sample is left out of a batch."""
    model = comfy.model()
    comfy.sample(recorder(model), steps=10, cfg=4.0, batch=3)
    policy = AdaptiveGuidance(between(recorder.steps))
    expected = comfy.sample(guided(model, policy), steps=10, cfg=4.0, batch=3)
    patched = model.clone()
    patched.model_options["model_function_wrapper"] = lambda function, args: function(
        args["input"], args["timestep"], **args["c"]
    )
    run = guided(patched, policy)
    with comfy.counting(model) as rows:
        result = comfy.sample(run, steps=10, cfg=4.0, batch=3)
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert set(rows) == {6, 3}
    assert sum(rows) == sum(trace_of(run).nfe)


@pytest.mark.parametrize("rule", ["cfg", "apg"])
@pytest.mark.parametrize(("sampler", "evaluated"), [("euler", 12), ("dpmpp_2m", 12), ("heun", 23)])
def test_forecast_returns_the_kept_image(comfy, recorder, rule, sampler, evaluated):
    model, seen = comfy.model(), []
    run = recorder(guided(model, f"{rule}+forecast"))
    with comfy.counting(model) as rows:
        comfy.sample(
            run, sampler, steps=20, callback=lambda i, denoised, x, n: seen.append(denoised)
        )
    assert len(recorder.steps) == evaluated
    assert trace_of(run).nfe == [2 * evaluated] == [sum(rows)]
    if sampler == "euler":
        evaluations = iter(recorder.results())
        for step, denoised in zip(trace_of(run).steps, seen, strict=True):
            last = last if step.skipped else next(evaluations)  # noqa: F821
            torch.testing.assert_close(denoised, last)


def test_hold_estimates_the_unconditional_prediction(comfy, recorder, close):
    """The last difference of network outputs, guided by as if it were evaluated."""
    model = recorder(guided(comfy.model(), hold()))
    with comfy.counting(model) as rows:
        comfy.sample(model, steps=20, cfg=4.0)
    assert sum(rows) == 25
    expected, difference = [], None
    for step, record in zip(recorder.steps, trace_of(model).steps, strict=True):
        cond, uncond = step["cond_denoised"].double(), step["uncond_denoised"].double()
        sigma = step["sigma"].double()[:, None, None, None]
        if record.rows:
            difference = (uncond - cond) / sigma  # of noise predictions, with the sign of c - u
        guides = record.rows or record.estimated
        expected.append(cond - 3 * difference * sigma if guides else cond)
    close(recorder.results(), expected)


def test_rule_and_policy_are_set_apart(comfy, tmp_path):
    model = with_policy(with_rule(comfy.model(), APG()), forecast())
    one = comfy.sample(model, steps=6)
    assert torch.equal(
        comfy.sample(with_rule(with_policy(comfy.model(), forecast()), APG()), steps=6), one
    )
    save_guidance(tmp_path / "mine.json", Guidance(APG(), forecast()))
    loaded = guided(comfy.model(), load_guidance(tmp_path / "mine.json"))
    assert torch.equal(comfy.sample(loaded, steps=6), one)


def test_skipped_steps_and_samplers_that_read_branches(comfy):
    with pytest.raises(SamplingError, match="reads the unconditional prediction"):
        comfy.sample(guided(comfy.model(), "forecast"), "euler_cfg_pp")
    assert comfy.sample(guided(comfy.model(), "apg+ag"), "euler_cfg_pp").isfinite().all()


def test_what_a_sampler_wants_evaluated_is_counted(comfy):
    """CFG++ samplers evaluate both branches at any scale, also where nothing is guided."""
    model = comfy.model()
    run = guided(model, AdaptiveGuidance(2.0))
    with comfy.counting(model) as rows, pytest.warns(UserWarning, match="cfg = 1"):
        comfy.sample(run, "euler_cfg_pp", steps=4, cfg=1.0)
    assert trace_of(run).nfe == [sum(rows)] == [8]


def test_schedules_need_the_number_of_evaluations(comfy):
    for guidance in ("forecast", "hold"):
        with pytest.raises(SamplingError, match="chooses its steps as it goes"):
            comfy.sample(guided(comfy.model(), guidance), "dpm_adaptive")


def test_a_guider_with_ways_of_its_own_is_refused(standin):
    model = guided(standin.model(), "apg")
    with pytest.raises(SamplingError, match="OwnGuider evaluates the branches"):
        standin.sample(model, guider=OwnGuider)


def test_partly_skipped_batches(comfy):
    """A policy may skip single samples: they alone reuse what was made of them."""
    from dataclasses import dataclass

    from pilotage.guidance import Decision, Policy, PolicyState, Weights

    class Turns(PolicyState):
        def decide(self, step):
            skip = Decision((), reuse=Weights(guided={step.index - 1: 1.0}))
            return [Decision(), skip if step.index % 2 else Decision()]

        def keep_until(self, kind, step):
            return step + 1 if kind == "guided" else -1

    @dataclass(frozen=True)
    class Every(Policy):
        name = "every-other"
        space = "x0"

        def start(self, batch, total, on_cpu):
            return Turns()

    model, seen = comfy.model(), []
    run = guided(model, APG() | Every())
    with comfy.counting(model) as rows:
        comfy.sample(run, steps=4, batch=2, callback=lambda i, d, x, n: seen.append(d.clone()))
    assert trace_of(run).nfe == [8, 4] and sum(rows) == 12
    torch.testing.assert_close(seen[1][1], seen[0][1])
    assert not torch.allclose(seen[1][0], seen[0][0])
