"""Runs leave nothing behind, and do not meet; and what becomes of other nodes' patches."""

from dataclasses import dataclass

import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Decision, Policy, PolicyState, Weights, hold
from pilotage.guidance.base import BOTH, COND
from pilotage.pipelines.comfyui import guided, trace_of
from pilotage.pipelines.comfyui.rehearsal import rehearse

from .oracles import apg
from .samplers import KSAMPLER

PAPER = APG(eta=0.0, norm_threshold=0.5, momentum=-0.5, threshold_unit="l2")


class Interrupted(Exception):
    pass


class RowState(PolicyState):
    def __init__(self, skips):
        self.skips = skips

    def decide(self, step):
        skip = Decision((), reuse=Weights(guided={step.index - 1: 1.0}))
        second = (skip if step.index else BOTH) if self.skips else COND
        return [BOTH, second]

    def keep_until(self, kind, step):
        return step + 1 if kind == "guided" and self.skips else -1


@dataclass(frozen=True)
class Rows(Policy):
    """The second of two samples is skipped from its second step on, or never guided."""

    name = "rows"
    space = "x0"
    skips: bool = True

    def start(self, batch, total, on_cpu):
        return RowState(self.skips)


@pytest.mark.parametrize("guidance", ["apg", "apg+ag", "apg+forecast", "hold"])
def test_an_interrupted_run_leaves_nothing_behind(comfy, guidance):
    model, fresh = guided(comfy.model(), guidance), guided(comfy.model(), guidance)
    expected = comfy.sample(fresh, steps=8)

    def interrupt(step, *_):
        if step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        comfy.sample(model, steps=8, callback=interrupt, seed=3)
    assert len(trace_of(model).steps) == 5
    assert torch.equal(comfy.sample(model, steps=8), expected)
    assert torch.equal(comfy.sample(model, steps=8), expected)  # nor does one that ends


def nested(comfy, outer, inner):
    """Results of a run amid whose steps another model samples, each with how it is alone."""
    given = {"steps": 8, "cfg": 4.0}, {"steps": 5, "cfg": 6.0, "seed": 2}
    models = [outer, inner]
    alone = [comfy.sample(model, **options) for model, options in zip(models, given, strict=True)]
    found = []

    def run(step, *_):
        if step % 3 == 1:
            found.append(comfy.sample(inner, **given[1]))

    around = comfy.sample(outer, **given[0], callback=run)
    assert len(found) == 3
    return [(around, alone[0]), *((result, alone[1]) for result in found)]


def test_two_models_at_once_keep_apart(comfy):
    models = [guided(comfy.model(seed), "apg+forecast") for seed in (0, 1)]
    assert all(torch.equal(a, b) for a, b in nested(comfy, *models))


def test_runs_of_one_model_keep_apart(standin):
    """ComfyUI itself gives a model to one run at a time; nothing here relies on that."""
    model = guided(standin.model(), "apg+forecast")
    assert all(torch.equal(a, b) for a, b in nested(standin, model, model.clone()))


def perturbed(model, comfy, scale=0.7):
    """A node after the manner of perturbed attention: one more branch, added afterwards."""
    import importlib

    def post(args):
        options = dict(args["model_options"])
        network = dict(options["transformer_options"], patches_replace={"attn1": {}})
        options["transformer_options"] = network
        calculate = importlib.import_module("comfy.samplers").calc_cond_batch
        given = (args["model"], [args["cond"]], args["input"], args["sigma"], options)
        (other,) = calculate(*given)
        return args["denoised"] + (args["cond_denoised"] - 0.9 * other) * scale

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post)
    return clone


def halved(model):
    """A node that takes the combination into its own hands, as RescaleCFG does."""

    def combine(args):
        scale = 1 + (args["cond_scale"] - 1) / 2
        return args["uncond"] + scale * (args["cond"] - args["uncond"])

    clone = model.clone()
    clone.set_model_sampler_cfg_function(combine)
    return clone


def test_patches_after_act_on_what_the_rule_made(comfy, recorder, close):
    """Algorithm 1 of the two branches; the other node adds to it."""
    first, model = type(recorder)(), guided(comfy.model(), PAPER)
    comfy.sample(recorder(perturbed(first(model), comfy)), steps=6, cfg=6.0, batch=2)
    expected = apg(first.pairs(), 6.0)
    close(first.results(), expected)
    both = zip(first.results(), recorder.results(), strict=True)
    assert not any(torch.equal(made, added) for made, added in both)


def test_patches_before_are_part_of_the_update(comfy, recorder, close):
    """The rule acts on the conditional prediction and the whole update, with the scale as it is."""
    first = type(recorder)()
    model = guided(first(perturbed(comfy.model(), comfy)), PAPER)
    comfy.sample(recorder(model), steps=6, cfg=6.0, batch=2)
    pairs = [
        (s["cond_denoised"].double(), (6 * s["cond_denoised"] - s["denoised"]).double() / 5)
        for s in first.steps
    ]
    close(recorder.results(), apg(pairs, 6.0))


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_combinations_are_part_of_the_update(comfy, recorder, close, order):
    """ComfyUI has one place for them, before everything else: the order makes no difference."""
    model = comfy.model()
    model = guided(halved(model), PAPER) if order == "before" else halved(guided(model, PAPER))
    comfy.sample(recorder(model), steps=6, cfg=6.0, batch=2)
    halves = [(cond, cond - (cond - uncond) / 2) for cond, uncond in recorder.pairs()]
    close(recorder.results(), apg(halves, 6.0))


def test_skipped_steps_reuse_what_all_nodes_made(comfy, recorder):
    """Also what those after Pilotage added, and a sample that is skipped on its own."""
    seen = []
    model = recorder(perturbed(guided(comfy.model(), Rows(skips=True)), comfy))
    comfy.sample(model, steps=4, batch=2, callback=lambda i, d, x, n: seen.append(d.clone()))
    assert all(torch.equal(step[1], seen[0][1]) for step in seen)
    assert torch.equal(seen[0], recorder.results()[0])
    assert not torch.allclose(seen[1][0], seen[0][0])
    seen.clear()
    held = guided(comfy.model(), "forecast")
    told = {"callback": lambda i, d, x, n: seen.append(d.clone())}
    comfy.sample(perturbed(held, comfy), steps=8, **told)
    skipped = [i for i, step in enumerate(trace_of(held).steps) if step.skipped]
    assert skipped and all(torch.equal(seen[i], seen[i - 1]) for i in skipped)


def test_samples_without_guidance_keep_what_others_made_of_them(comfy, recorder, close):
    first = type(recorder)()
    model = guided(first(perturbed(comfy.model(), comfy)), PAPER | Rows(skips=False))
    comfy.sample(recorder(model), steps=3, batch=2)
    made = [step["denoised"][1].double() for step in first.steps]
    close([result[1] for result in recorder.results()], made)
    assert not any(
        torch.allclose(s["denoised"][1], s["cond_denoised"][1], rtol=1e-3) for s in first.steps
    )


def test_estimates_are_of_the_whole_update(comfy, recorder, close):
    """A held difference is that which all nodes before have made together."""
    first = type(recorder)()
    model = guided(first(perturbed(comfy.model(), comfy)), hold(space="x0"))
    comfy.sample(recorder(model), steps=8, cfg=4.0)
    expected, update = [], None
    for step, record in zip(first.steps, trace_of(model).steps, strict=True):
        cond = step["cond_denoised"].double()
        if record.rows:
            update = step["denoised"].double() - cond
        expected.append(cond + update if record.guided else step["denoised"].double())
    close(recorder.results(), expected)


def test_a_policy_alone_leaves_other_nodes_their_combination(comfy, recorder):
    """Bit for bit while both branches are evaluated; afterwards their share of one branch."""
    other = perturbed(halved(comfy.model()), comfy)
    stock = comfy.sample(other, steps=6)
    assert torch.equal(comfy.sample(guided(other, AdaptiveGuidance(2.0)), steps=6), stock)
    comfy.sample(recorder(guided(other, AdaptiveGuidance(-2.0))), steps=6)
    for step in recorder.steps[1:]:
        assert torch.equal(step["cond_denoised"], step["uncond_denoised"])
        assert not torch.allclose(step["denoised"], step["cond_denoised"])  # still perturbed


def test_nodes_that_evaluate_branches_themselves(comfy):
    """The function that another node has put in the place of ComfyUI's is called by Pilotage's."""
    import importlib

    calls = []

    def calculate(args):
        calls.append([cond is not None for cond in args["conds"]])
        own = importlib.import_module("comfy.samplers").calc_cond_batch
        return own(*(args[n] for n in ("model", "conds", "input", "sigma", "model_options")))

    model = comfy.model().clone()
    model.set_model_sampler_calc_cond_batch_function(calculate)
    expected = comfy.sample(guided(comfy.model(), "ag"), steps=6)
    assert torch.equal(comfy.sample(guided(model, "ag"), steps=6), expected)
    assert calls[0] == [True, True] and len(calls) == 6


def test_rehearsals_take_no_random_numbers(standin):
    def noisy(model, x, sigmas, extra, callback):
        for sigma in sigmas[:-1]:
            x = model(x, sigma * x.new_ones(len(x)), **extra) + torch.randn(x.shape)
        return x

    class Guider:
        inner_model = standin.model().model

    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    noise, sigmas = torch.zeros(2, 4, 8, 8), torch.tensor([3.0, 1.0, 0.0])
    found = rehearse(KSAMPLER(noisy), Guider(), sigmas, {"model_options": {}}, noise, noise)
    assert found.sigmas == (3.0, 1.0) and found.total == 2 and not found.is_euler
    assert torch.equal(torch.randn(3), expected)
