"""What the seam learns of a pipeline: by real pipelines that guide in another way than most."""

import itertools
import math
from dataclasses import replace

import diffusers as df
import numpy as np
import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Interval, Schedule
from pilotage.pipelines import LayoutError, guided

from ...families import FAMILIES
from ...families.animatediff import FRAMES
from ...families.pag import pag_mix
from ..checks import (
    PaperGuidance,
    Rows,
    ag_rows_ok,
    apg_error,
    branches_of,
    cfg_bit_equal,
    equal,
    forecast_error,
    held_outputs,
    latents,
    resting_rows_ok,
)
from .homemade import (
    OWN,
    BackwardsPipeline,
    ReferencePipeline,
    SoftenedPipeline,
    Watching,
    own_family,
    recorded,
    stock_like,
)

APG_SETTINGS = 0.2, 2.0, -0.6
CLOSE = 1e-5  # what is measured in float32 of what was given: rounding of some thousand elements


def led_error(family, pipe, call, oracle=PaperGuidance):
    """Relative difference between APG on `pipe` and the stock pipeline led by the paper."""
    eta, r, beta = APG_SETTINGS
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    ours, plain = pipe(**call(), guidance=rule)[0], pipe(**call())[0]
    expected = oracle(family, call, eta, r, beta).run()[0]
    ours, expected, plain = (
        torch.as_tensor(np.asarray(v)).double() for v in (ours, expected, plain)
    )
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["sd3", "flux2_klein", "krea2"])
def test_branches_that_differ_by_little_in_low_precision(name):
    """By less than eight roundings, yet element by element they tell how they are combined."""
    changes = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = guided(FAMILIES[name].build())
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(dtype)
        plain, ours = (latents(pipe, name, guidance=g).double() for g in ("cfg", "apg"))
        changes[dtype] = ((ours - plain).norm() / plain.norm()).item()
        assert all(len(step.rows) == 3 for step in pipe.guidance_trace.steps)
    assert changes[torch.bfloat16] == pytest.approx(changes[torch.float32], rel=0.3)


# Pipelines that nobody knows


@pytest.fixture
def own(monkeypatch):
    """Makes the families of homemade.py known to the checks."""
    for name, family in OWN.items():
        monkeypatch.setitem(FAMILIES, name, family)


@pytest.mark.parametrize("name", OWN)
def test_a_loop_that_nobody_knows(own, name):
    assert cfg_bit_equal(name)
    assert apg_error(name) <= 1e-4
    assert ag_rows_ok(name)
    assert forecast_error(name) <= 1e-2
    assert resting_rows_ok(name)


@pytest.mark.parametrize("name", OWN)
def test_its_scale_is_measured(own, name):
    pipe, w = guided(OWN[name].build()), OWN[name].w(5.0)
    for batch in (1, 3):
        for _ in range(2):  # what was learned is kept for the second call
            rule = Watching()
            found = latents(pipe, name, batch, guidance=rule)
            assert rule.scales == pytest.approx([w] * 3, rel=CLOSE)
            torch.testing.assert_close(found, latents(pipe, name, batch), rtol=1e-4, atol=1e-4)


def test_a_call_that_passes_on_what_it_is_given():
    """Its options are those of the call that it overrides, with their defaults."""
    pipe, rule = guided(stock_like(BackwardsPipeline, "sd")), Watching()
    stock, found = latents(pipe, "sd"), latents(pipe, "sd", guidance=rule)
    assert not equal(stock, latents(FAMILIES["sd"].build(), "sd"))
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert rule.scales == pytest.approx([5.0] * 4, rel=CLOSE)
    pipe(prompt=["a cat"], num_inference_steps=2, output_type="latent", guidance=rule)
    assert rule.scales[4:] == pytest.approx([7.5] * 3, rel=CLOSE)
    with pytest.raises(ValueError, match="guidance_rescale cannot be combined with 'apg'"):
        latents(pipe, "sd", guidance="apg", guidance_rescale=0.7)
    with pytest.raises(ValueError, match="guidance_scale=1.0 switches guidance off"):
        latents(pipe, "sd", guidance="apg", guidance_scale=1.0)


# What a pipeline makes of its combination afterwards


@pytest.mark.parametrize("batch", [1, 3])
def test_a_combination_that_is_rescaled_is_refused_at_the_first_step(batch):
    """At batch 1 the factor is one number, so that the fit is exact: the sum of weights tells."""
    pipe = guided(stock_like(SoftenedPipeline, "sd"))
    for guidance in ("apg", "apg+ag", Watching()):
        with (
            Rows(pipe, "sd") as rows,
            pytest.raises(LayoutError, match="changes its combination|no sum of") as error,
        ):
            latents(pipe, "sd", batch, guidance=guidance, softened=0.7)
        assert rows.calls == [2 * batch], "refused before the second step"
        assert "guidance_rescale" in str(error.value) and "cfg" in str(error.value)
        if batch == 1:
            assert "which sum to 0." in str(error.value)
    assert equal(latents(pipe, "sd", softened=0.7), latents(pipe, "sd", guidance_rescale=0.7))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("option", ["softened", "guidance_rescale"])
def test_adaptive_guidance_leaves_a_rescaled_combination_as_it_is(batch, option):
    pipe = guided(stock_like(SoftenedPipeline, "sd"))
    extra = {option: 0.7, "num_inference_steps": 6}
    stock = latents(pipe, "sd", batch, **extra)
    assert not equal(stock, latents(pipe, "sd", batch, num_inference_steps=6))
    assert equal(stock, latents(pipe, "sd", batch, guidance=AdaptiveGuidance(1.5), **extra))
    # Three guided steps, then the conditional prediction alone: what the scheduler is given.
    given, expected = [], []
    for guidance, seen in ((Schedule(("both",) * 3 + ("cond",) * 4), given), (None, expected)):
        with recorded(pipe, seen):
            latents(pipe, "sd", batch, guidance=guidance, **extra)
    for (_, ours), (_, theirs) in zip(given[:3], expected[:3], strict=True):
        assert equal(ours, theirs)
    for (cond,), mixed in given[3:]:  # its norm is that of itself, to rounding
        assert len(cond) == batch
        torch.testing.assert_close(mixed, cond)


# Scales that change on the way


def dynamic_scale(call, timestep):
    """As CogVideoX sets it: by the timestep, which it takes for a step."""
    steps = call["num_inference_steps"]
    share = (steps - timestep) / steps
    return 1 + call["guidance_scale"] * (1 - math.cos(math.pi * share**5)) / 2


@pytest.mark.parametrize("batch", [1, 3])
def test_dynamic_cfg(batch):
    family = replace(FAMILIES["cogvideox"], scale_at=dynamic_scale)
    extra = {"use_dynamic_cfg": True}
    pipe, rule = guided(family.build()), Watching()
    stock = latents(pipe, family.name, batch, **extra)
    found = latents(pipe, family.name, batch, guidance=rule, **extra)
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    call = family.call(batch, False) | extra
    expected = [dynamic_scale(call, float(t)) for t in pipe.scheduler.timesteps]
    assert max(expected) > 1.5 and max(expected) - min(expected) > 0.5
    assert rule.scales == pytest.approx(expected, rel=CLOSE)
    assert led_error(family, pipe, lambda: family.call(batch, False) | extra) <= 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_adaptive_perturbed_attention(batch):
    """The scale of perturbed attention falls with the timestep, to nothing at the first ones."""
    pipe, rule = guided(FAMILIES["sd_pag"].build()), Watching()
    extra = {"pag_scale": 3.0, "pag_adaptive_scale": 0.004, "num_inference_steps": 5}

    def call():
        return FAMILIES["sd_pag"].call(batch, True) | extra

    stock, found = pipe(**call())[0], pipe(**call(), guidance=rule)[0]
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    scales = [max(3.0 - 0.004 * (1000 - t), 0.0) for t in pipe.scheduler.timesteps.tolist()]
    assert 0.0 in scales and len(set(scales)) > 2
    assert rule.scales == pytest.approx([5.0 + scale for scale in scales], rel=CLOSE)

    def mix(branches, call):
        at = call.setdefault("at", [])
        at.append(scales[len(at)])
        return pag_mix(branches, call | {"pag_scale": at[-1]})

    family = replace(FAMILIES["sd_pag"], mix=mix)
    assert led_error(family, pipe, call) <= 1e-4


class Truncated(PaperGuidance):
    """Leaves steps alone that the pipeline does not guide."""

    def batched(self, args, kwargs, output):
        if len(args[0]) == len(self.arguments["prompt"]):
            self.index += 1
            return output
        return super().batched(args, kwargs, output)


@pytest.mark.parametrize("batch", [1, 3])
def test_truncated_guidance(batch):
    """Z-Image leaves the second branch out when little noise is left."""
    family = FAMILIES["z_image"]
    pipe, rule = guided(family.build()), Watching()
    extra = {"cfg_truncation": 0.6, "num_inference_steps": 6}

    def call():
        return family.call(batch, True) | extra

    stock = pipe(**call())[0]
    with Rows(pipe, "z_image") as rows:
        found = pipe(**call(), guidance=rule)[0]
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    guided_steps = rows.calls.count(2 * batch)
    assert 0 < guided_steps < 6 and rows.calls == [2 * batch] * guided_steps + [batch] * (
        6 - guided_steps
    )
    assert pipe.guidance_trace.nfe == [6 + guided_steps] * batch
    assert rule.scales == pytest.approx([6.0] * guided_steps, rel=CLOSE)
    assert equal(stock, pipe(**call(), guidance=AdaptiveGuidance(1.5))[0])
    assert led_error(family, pipe, call, Truncated) <= 1e-4


# Callbacks: the loop reads the attribute that they change, or keeps its argument

READS = ["sd", "sd3", "cogvideox", "hidream", "ltx"]
KEEPS = ["aura_flow", "flux", "wan", "qwen_image_21", "sdxl_controlnet", "pixart_sigma"]


def scale_changer(at, scale):
    def change(pipe, step, timestep, tensors):
        if step == at:
            for name in ("_guidance_scale", "_true_cfg_scale"):
                if hasattr(pipe, name):
                    setattr(pipe, name, scale)
        return tensors

    return {"callback_on_step_end": change, "num_inference_steps": 4}


@pytest.mark.parametrize("name", [*READS, *KEEPS])
def test_a_callback_that_changes_the_scale(name):
    """The rule is given what was really used."""
    pipe, rule = guided(FAMILIES[name].build()), Watching()
    extra = scale_changer(1, 3.0)
    stock = latents(pipe, name, **extra)
    changes = not equal(stock, latents(pipe, name, num_inference_steps=4))
    assert changes == (name in READS)
    found = latents(pipe, name, guidance=rule, **extra)
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    family = FAMILIES[name]
    w = family.w(family.call(1, True)[family.scale_name])
    expected = [3.0 if name in READS and i >= 2 else w for i in range(len(rule.scales))]
    assert rule.scales == pytest.approx(expected, rel=CLOSE)
    assert equal(stock, latents(pipe, name, guidance=AdaptiveGuidance(1.5), **extra))


CUTOFFS = {
    "sd": df.callbacks.SDCFGCutoffCallback,
    "sdxl": df.callbacks.SDXLCFGCutoffCallback,
    "sd3": df.callbacks.SD3CFGCutoffCallback,
}


def conditional_half(pipe, step, timestep, tensors):
    """Those of diffusers take one prompt; this is the same for more."""
    if step == 1:
        pipe._guidance_scale = 0.0
        tensors = {name: value.chunk(2)[1] for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CUTOFFS)
def test_the_documented_cutoff(name, batch):
    """Guided until then, and one branch from then on, as in the stock pipeline."""
    pipe, rule = guided(FAMILIES[name].build()), Watching()
    documented = CUTOFFS[name](cutoff_step_ratio=None, cutoff_step_index=1)
    extra = {
        "callback_on_step_end": documented if batch == 1 else conditional_half,
        "callback_on_step_end_tensor_inputs": documented.tensor_inputs,
        "num_inference_steps": 5,
    }
    given = []
    with recorded(pipe, given, FAMILIES[name].denoisers[0]):
        stock = latents(pipe, name, batch, **extra)
    branches = [len(outputs[0]) // batch for outputs, _ in given]
    kept = branches.count(2)
    assert 0 < kept < len(branches)
    assert equal(stock, latents(pipe, name, batch, guidance="cfg", **extra))
    found = latents(pipe, name, batch, guidance=rule, **extra)
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert pipe.guidance_trace.nfe == [sum(branches)] * batch
    assert rule.scales == pytest.approx([5.0] * kept, rel=CLOSE)
    # Adaptive Guidance above 1 guides as long as the pipeline does.
    assert equal(stock, latents(pipe, name, batch, guidance=AdaptiveGuidance(1.5), **extra))
    # APG the same steps as a policy that guides these alone.
    window = APG(norm_threshold=2.0) | Interval(0, kept)
    expected = latents(pipe, name, batch, guidance=window, num_inference_steps=5)
    found = latents(pipe, name, batch, guidance=APG(norm_threshold=2.0), **extra)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_image", "consisid"])
def test_a_scale_below_one_is_not_extrapolated_silently(name, scale):
    """A cut-off by the scale alone, where the loop goes on with both branches: below w = 1 a rule
    would make the negative prompt's picture."""
    pipe, extra = guided(FAMILIES[name].build()), scale_changer(1, scale)
    stock = latents(pipe, name, **extra)
    assert not equal(stock, latents(pipe, name, num_inference_steps=4))
    for guidance in ("apg", "tcfg", "apg+ag"):
        with pytest.raises(LayoutError, match=f"scale {scale:g} at step 2") as error:
            latents(pipe, name, guidance=guidance, **extra)
        assert f"'{guidance}'" in str(error.value)
    for guidance in ("cfg", AdaptiveGuidance(1.5)):  # whose combination is the pipeline's own
        assert equal(stock, latents(pipe, name, guidance=guidance, **extra))


@pytest.mark.parametrize("name", ["aura_flow", "allegro", "pixart_sigma"])
def test_a_cutoff_that_the_loop_does_not_read(name):
    """AuraFlow's loop keeps its argument: the rule goes on at that."""
    pipe, extra = guided(FAMILIES[name].build()), scale_changer(1, 0.0)
    stock = latents(pipe, name, num_inference_steps=4, guidance="apg")
    assert equal(stock, latents(pipe, name, guidance="apg", **extra))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("low", [1.0, 2.0])
def test_a_scale_for_every_frame(batch, low):
    """Stable Video Diffusion; at its defaults the first frame is not guided."""
    family, rule = FAMILIES["svd"], Watching()
    pipe = guided(family.build())

    def call():
        return family.call(batch, False) | {"min_guidance_scale": low}

    stock = pipe(**call())[0]
    found = pipe(**call(), guidance=rule)[0]
    torch.testing.assert_close(*map(torch.as_tensor, (found, stock)), rtol=1e-4, atol=1e-4)
    frames = torch.linspace(low, 5.0, FRAMES)
    for w in rule.seen:
        assert w.shape == (1, FRAMES, 1, 1, 1)
        torch.testing.assert_close(w.flatten(), frames, rtol=CLOSE, atol=CLOSE)
    family = replace(family, w=lambda scale: frames.double().view(FRAMES, 1, 1, 1))
    assert led_error(family, pipe, call) <= 1e-4


def test_a_frame_below_one_is_not_extrapolated_silently():
    pipe = guided(FAMILIES["svd"].build())
    with pytest.raises(LayoutError, match="guidance scale 0.5 at step 0"):
        latents(pipe, "svd", guidance="apg", min_guidance_scale=0.5)


# More than two branches


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("text, picture", [(3.0, 8.0), (2.0, 1.0), (1.01, 1.5), (7.0, 3.5)])
@pytest.mark.parametrize("name", ["pix2pix", "sdxl_pix2pix"])
def test_two_scales_of_editing(name, text, picture, batch):
    """Whichever has the larger one: with s_I > 2 s_T the picture's branch has the largest share."""
    family, rule = FAMILIES[name], Watching()
    pipe = guided(family.build())

    def call():
        scales = {"guidance_scale": text, "image_guidance_scale": picture}
        return family.call(batch, True) | scales

    stock, found = pipe(**call())[0], pipe(**call(), guidance=rule)[0]
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert rule.scales == pytest.approx([text] * len(rule.scales), rel=CLOSE)
    assert equal(stock, pipe(**call(), guidance=AdaptiveGuidance(1.5))[0])
    assert led_error(family, pipe, call) <= 1e-4


@pytest.mark.parametrize("name", ["pix2pix", "sdxl_pix2pix"])
def test_editing_without_a_text_scale(name):
    """At s_T = 1 the pipelines evaluate one branch."""
    pipe, extra = guided(FAMILIES[name].build()), {"guidance_scale": 1.0}
    stock = latents(pipe, name, **extra)
    assert equal(stock, latents(pipe, name, guidance="cfg", **extra))
    for guidance in ("apg", "ag"):
        with pytest.raises(ValueError, match=f"off, so that '{guidance}' has nothing to act on"):
            latents(pipe, name, guidance=guidance, **extra)


@pytest.mark.parametrize("name", ["sd_pag", "sdxl_pag", "pixart_sigma_pag"])
def test_perturbed_attention_without_other_guidance(name):
    """Two branches, c + s (c - p): the scale is 1 + s."""
    pipe, rule = guided(FAMILIES[name].build()), Watching()
    extra = {"guidance_scale": 1.0, "pag_scale": 2.0}
    stock = latents(pipe, name, **extra)
    torch.testing.assert_close(
        latents(pipe, name, guidance=rule, **extra), stock, rtol=1e-4, atol=1e-4
    )
    assert rule.scales == pytest.approx([3.0] * len(rule.scales), rel=CLOSE)
    assert equal(stock, latents(pipe, name, guidance=AdaptiveGuidance(1.5), **extra))


def attribute_changer(at, **values):
    def change(pipe, step, timestep, tensors):
        if step == at:
            for name, value in values.items():
                assert hasattr(pipe, name)
                setattr(pipe, name, value)
        return tensors

    return {"callback_on_step_end": change, "num_inference_steps": 4}


class StubbornPix2PixPipeline(df.StableDiffusionInstructPix2PixPipeline):
    """Evaluates all branches at any scale."""

    do_classifier_free_guidance = True


def test_a_conditional_branch_whose_weight_becomes_one():
    """Then what is added to it is guidance at no scale; where nothing is added there is none."""
    pipe, name = guided(stock_like(StubbornPix2PixPipeline, "pix2pix")), "pix2pix"
    extra = attribute_changer(1, _guidance_scale=1.0)
    stock = latents(pipe, name, **extra)
    for guidance in ("apg", Watching()):
        with pytest.raises(LayoutError, match="at step 2, .*: at the scale 1 is left"):
            latents(pipe, name, guidance=guidance, **extra)
    for guidance in ("cfg", AdaptiveGuidance(1.5)):
        assert equal(stock, latents(pipe, name, guidance=guidance, **extra))
    extra = attribute_changer(1, _guidance_scale=1.0, _image_guidance_scale=1.0)
    rule, stock = Watching(), latents(pipe, name, **extra)
    found = latents(pipe, name, guidance=rule, **extra)
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert rule.scales == pytest.approx([5.0, 5.0, 1.0, 1.0], rel=CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["sd", "sd_pag"])
def test_a_combination_that_changes_on_the_way(name, batch):
    """Learned at the first step, looked at again at every one."""
    pipe, extra = guided(FAMILIES[name].build()), attribute_changer(1, _guidance_rescale=0.7)
    stock = latents(pipe, name, batch, **extra)
    assert not equal(stock, latents(pipe, name, batch, num_inference_steps=4))
    for guidance in ("apg", Watching()):
        with pytest.raises(LayoutError, match="changed the way it combines its branches at step 2"):
            latents(pipe, name, batch, guidance=guidance, **extra)
    assert equal(stock, latents(pipe, name, batch, guidance=AdaptiveGuidance(1.5), **extra))


@pytest.mark.parametrize("name", ["sd", "sd_pag", "pix2pix", "late_cond"])
def test_branches_that_are_equal_in_a_later_call(own, name):
    """What was learned is kept for calls like it; the weights of equal branches cannot be told."""
    family = FAMILIES[name]
    pipe, rule = guided(family.build()), Watching()
    latents(pipe, name, negative=True, guidance=rule)
    call = family.call(3, True)
    same = {"negative_prompt": call["prompt"]}
    stock, found = (latents(pipe, name, **same, guidance=g) for g in (None, rule))
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert latents(pipe, name, **same, guidance="apg+ag").isfinite().all()


# Loops that evaluate the network more often than a step


def test_a_reference_pass_is_no_branch():
    """Of the write pass and the read pass of a step, the second one guides."""
    family = own_family(ReferencePipeline, "batch: uncond cond")
    pipe, rule = guided(family.build()), Watching()
    calls = itertools.count()
    family = replace(family, steps=lambda kwargs: next(calls) % 2 == 1)

    def call():
        return family.call(3, True)

    stock, found = pipe(**call())[0], pipe(**call(), guidance=rule)[0]
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert rule.scales == pytest.approx([5.0] * 3, rel=CLOSE)
    assert pipe.guidance_trace.nfe == [4 * 3] * 3
    assert led_error(family, pipe, call) <= 1e-4
    # The latents of both passes are needed for every row that is evaluated at all.
    for guidance in (AdaptiveGuidance(1.5), "hold", Interval(0, 1)):
        with pytest.raises(LayoutError, match="pass that takes no part"):
            pipe(**call(), guidance=guidance)
    with Rows(pipe, "sd") as rows:
        held = pipe(**call(), guidance=Schedule(("both", "forecast", "both")))[0]
    assert rows.calls == [6] * 4
    stock = family.build()
    held_outputs(stock, "sd", ("both", "forecast", "both"))
    torch.testing.assert_close(held, stock(**call())[0])


# Branches that are equal


@pytest.mark.parametrize("name", ["sd", "pix2pix"])
def test_branches_that_differ_later(name):
    """Stock until they do, and then guided as ever."""
    family, rule = FAMILIES[name], Watching()
    pipe = guided(family.build())

    def change(pipe, step, timestep, tensors):
        if step == 1:
            embeds = tensors["prompt_embeds"].clone()
            cond = slice(0, 3) if name == "pix2pix" else slice(3, None)
            embeds[cond] = embeds[cond].flip(-1)
            tensors["prompt_embeds"] = embeds
        return tensors

    def call():
        call = family.call(3, True)
        return call | {
            "negative_prompt": call["prompt"],
            "num_inference_steps": 5,
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            "image_guidance_scale" if name == "pix2pix" else "eta": 1.0,
        }

    stock, found = pipe(**call())[0], pipe(**call(), guidance=rule)[0]
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    total = len(pipe.guidance_trace.steps)
    assert rule.scales == pytest.approx([5.0] * (total - 2), rel=CLOSE)
    assert pipe.guidance_trace.nfe == [branches_of(name) * total] * 3
    assert led_error(family, pipe, call) <= 1e-4
    with Rows(pipe, name) as rows:
        pipe(**call(), guidance=AdaptiveGuidance(-1.0))
    assert rows.calls == [3 * branches_of(name)] * 3 + [3] * (total - 3)
    assert sum(rows.calls) == sum(pipe.guidance_trace.nfe)


@pytest.mark.parametrize("name", ["sd", "flux", "sd_pag", "late_cond"])
def test_branches_that_never_differ(own, name):
    """Nothing can be told of them: the pipeline goes on as it does, and what is counted is so."""
    family = FAMILIES[name]
    pipe, steps = guided(family.build()), 5 + (name == "sd")

    def call():
        call = family.call(3, True)
        return call | {"negative_prompt": call["prompt"], "num_inference_steps": 5}

    stock, count = pipe(**call())[0], branches_of(name)
    for guidance in ("cfg", "apg", "apg+ag", "hold", Interval(0, 2)):
        with Rows(pipe, name) as rows:
            assert equal(stock, pipe(**call(), guidance=guidance)[0])
        assert sum(rows.calls) == sum(pipe.guidance_trace.nfe) == 3 * count * steps
    choices = ("both", "forecast", "both", "forecast", "forecast", "both")[:steps]
    with Rows(pipe, name) as rows:
        found = pipe(**call(), guidance=Schedule(choices))[0]
    nfe = count * choices.count("both")
    assert sum(rows.calls) == 3 * nfe and pipe.guidance_trace.nfe == [nfe] * 3
    stock = family.build()
    held_outputs(stock, name, choices)
    torch.testing.assert_close(found, stock(**call())[0])


# The scale, measured

MEASURED = {  # families of every kind -> w of their call
    name: FAMILIES[name].w(FAMILIES[name].call(1, True)[FAMILIES[name].scale_name])
    for name in (
        *("sd", "sdxl", "sdxl_controlnet", "sd3", "flux", "wan", "z_image", "kandinsky3"),
        *("pixart_sigma", "cogvideox", "ltx", "hidream", "lumina", "dit", "if", "stable_cascade"),
        *("flux_kontext", "krea2", "animatediff", "stable_audio"),
    )
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MEASURED)
def test_the_scale_measured_is_the_arguments(name, batch):
    pipe, rule = guided(FAMILIES[name].build()), Watching()
    latents(pipe, name, batch, guidance=rule)
    assert rule.scales == pytest.approx([MEASURED[name]] * len(rule.scales), rel=CLOSE)
    assert len(rule.scales) == len(pipe.guidance_trace.steps) > 1
    assert pipe.guidance_pattern.residual <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sd_pag", "wan", "late_cond"])
def test_low_precision(own, name, dtype):
    """What is lost to low precision is at most twice what the stock loop loses by it.

    Under APG, what the stock loop loses that is led by the algorithm in float64.
    """
    family, eps = FAMILIES[name], torch.finfo(dtype).eps
    low = replace(family, build=lambda: family.build().to(dtype))

    def call():
        negative = family.scale_name == "true_cfg_scale"
        return family.call(2, negative) | {"num_inference_steps": 4}

    def run(family, guidance=None):
        return torch.as_tensor(guided(family.build())(**call(), guidance=guidance)[0]).double()

    eta, r, beta = APG_SETTINGS
    apg = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    stock = run(low)
    assert equal(stock, run(low, "cfg"))
    exact = run(family)
    led = [PaperGuidance(f, call, eta, r, beta).run()[0] for f in (family, low)]
    for found, low_stock, expected in (
        (run(low, Watching()), stock, exact),
        (run(low, apg), torch.as_tensor(led[1]).double(), torch.as_tensor(led[0]).double()),
    ):
        lost = (low_stock - expected).abs().max()
        assert (found - expected).abs().max() <= 2 * (lost + eps * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_combination_that_is_rescaled_in_low_precision(batch, dtype):
    """More than rounding, in any precision."""
    pipe = guided(stock_like(SoftenedPipeline, "sd").to(dtype))
    with pytest.raises(LayoutError, match="changes its combination|no sum of"):
        latents(pipe, "sd", batch, guidance="apg", softened=0.7)


@pytest.mark.parametrize("name", ["ltx_condition", "sana_wm"])
def test_schedulers_that_are_told_a_time_for_every_token(name):
    """They step the other way round, and what is given has the time 0."""
    assert apg_error(name) <= 1e-4


def test_tokens_that_are_given_in_part_are_refused():
    pipe = guided(FAMILIES["ltx_condition"].build())

    def call(guidance):
        arguments = FAMILIES["ltx_condition"].call(1, True)
        for condition in arguments["conditions"]:
            condition.strength = 0.5
        return pipe(**arguments, guidance=guidance)[0]

    with pytest.raises(LayoutError, match="tokens are guided in part only"):
        call("apg")
    assert equal(call("cfg"), call(None))


def test_a_pipeline_that_takes_small_noise_levels_for_larger_ones():
    """PRXPixel divides by no less than 0.05, which its last steps are below."""
    assert apg_error("prx_pixel") <= 1e-4
