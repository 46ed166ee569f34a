"""The guider component in modular pipelines: against diffusers' guider, the seam, and the paper."""

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import diffusers as df
import pytest
import torch
from diffusers.guiders import LTX2Guidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.modular_pipelines import ComponentSpec
from torch.utils._python_dispatch import TorchDispatchMode

from pilotage.guidance import (
    APG,
    CFG,
    FDG,
    AdaptiveGuidance,
    Coefficients,
    Guidance,
    Interval,
    NonFinitePredictionError,
    Schedule,
    apg,
    resolve,
)
from pilotage.pipelines import LayoutError, UnknownSchedulerError, guided
from pilotage.pipelines.guiders import Guider

from .. import components as c
from ..families import FAMILIES, images, qwen, stable_diffusion, wan
from ..families.base import SD_NOISE, flow
from ..modular import checks, workflows
from ..modular.checks import ORDINARY
from ..modular.workflows import quiet

SCALE, SCALE_2 = 5.0, 3.0
STEPS = 4


@dataclass(frozen=True)
class Modular:
    """A modular pipeline, the stock pipeline of the same components, and what sets them apart."""

    blocks: str
    parts: Callable[..., dict]
    stock: str
    size: int = 16
    scale_name: str = "guidance_scale"
    scale_offset: float = 0.0
    text: bool = True
    network: str = "transformer"


# Wan's modular text encoder needs ftfy, which may be missing: its embeddings are given.
MODULAR = {
    "sdxl": Modular(
        "StableDiffusionXLAutoBlocks",
        stable_diffusion.sdxl,
        "StableDiffusionXLPipeline",
        network="unet",
    ),
    "sd3": Modular("StableDiffusion3AutoBlocks", images.sd3, "StableDiffusion3Pipeline"),
    "wan": Modular("WanBlocks", wan.wan, "WanPipeline", size=32, text=False),
    "wan22": Modular("Wan22Blocks", wan.wan2, "WanPipeline", size=32, text=False),
    "qwen_image": Modular(
        "QwenImageAutoBlocks", qwen.qwen_image, "QwenImagePipeline", 32, "true_cfg_scale"
    ),
    "z_image": Modular("ZImageAutoBlocks", qwen.z_image, "ZImagePipeline", scale_offset=1.0),
}
every_pipeline = pytest.mark.parametrize("name", MODULAR)


def parts_of(name, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODULAR[name].parts(**changes)


def build(name, parts=None):
    """A modular pipeline that ends in latents."""
    blocks = getattr(df, MODULAR[name].blocks)()
    blocks.sub_blocks.pop("decode")
    if not MODULAR[name].text:
        blocks.sub_blocks.pop("text_encoder")
    quiet(blocks)
    pipe = blocks.init_pipeline()
    parts = parts or parts_of(name)
    pipe.update_components(**{k: v for k, v in parts.items() if k in pipe.components})
    return pipe


shared = cache(build)


def use(pipe, guider):
    """Makes `guider` the guider of `pipe`; of Wan 2.2 also its second, at another scale."""
    parts = {"guider": guider}
    if "guider_2" in pipe.components:
        own = isinstance(guider, Guider)
        parts["guider_2"] = guider.partner(SCALE_2) if own else guider.new(guidance_scale=SCALE_2)
    pipe.update_components(**parts)
    return guider


def inputs(name, rows=(0, 1), **extra):
    """What a modular pipeline and its stock one are called with, for some samples."""
    spec, batch = MODULAR[name], len(rows)
    call = {"num_inference_steps": STEPS, "height": spec.size, "width": spec.size}
    if spec.text:
        call["prompt"] = [c.PROMPTS[row] for row in rows]
        call["negative_prompt"] = [c.NEGATIVES[row] for row in rows]
    else:
        for i, prompt in enumerate(("prompt_embeds", "negative_prompt_embeds")):
            call[prompt] = torch.stack([c.noise(16, c.WIDTH, seed=100 * i + r) for r in rows])
        call["num_frames"] = 9
    if name == "z_image":
        call["max_sequence_length"] = 128
    if name == "qwen_image":
        call["max_sequence_length"] = 512
    generators = [torch.Generator().manual_seed(row) for row in rows]
    return call | {"generator": generators if batch > 1 else generators[0]} | extra


def latents(pipe, name, rows=(0, 1), **extra):
    return pipe(**inputs(name, rows, **extra), output="latents")


def stock_latents(name, guidance):
    """What the stock pipeline gives through the seam."""
    spec = MODULAR[name]
    pipe = guided(getattr(df, spec.stock)(**parts_of(name)))
    pipe.set_progress_bar_config(disable=True)
    call = inputs(name) | {spec.scale_name: SCALE - spec.scale_offset, "output_type": "latent"}
    if name == "wan22":
        call["guidance_scale_2"] = SCALE_2
    output = pipe(**call, guidance=guidance)[0]
    if name == "qwen_image":
        side = spec.size // pipe.vae_scale_factor
        scale = pipe.vae_scale_factor
        output = pipe._unpack_latents(output, side * scale, side * scale, scale)
    return output, pipe.guidance_trace


class Recorder(Guider):
    """Keeps what went in and came out at every step."""

    def forward(self, pred_cond, pred_uncond=None):
        output = super().forward(pred_cond, pred_uncond)
        self.__dict__.setdefault("outputs", []).append(output)
        return output


@every_pipeline
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_cfg_is_classifier_free_guidance_bit_for_bit(name, scale):
    pipe = shared(name)
    use(pipe, df.ClassifierFreeGuidance(guidance_scale=scale))
    expected = latents(pipe, name)
    guider = use(pipe, Guider("cfg", guidance_scale=scale))
    assert torch.equal(latents(pipe, name), expected)
    first = sum(t >= 875 for t in pipe.scheduler.timesteps) if name == "wan22" else STEPS
    assert guider.passes == (2 * STEPS if scale > 1 else first + 2 * (STEPS - first))


@every_pipeline
@pytest.mark.parametrize("guidance", ["apg", "apg+ag", "interval"])
def test_equals_the_seam_on_the_stock_pipeline(name, guidance):
    pipe = shared(name)
    guidance = resolve(guidance)
    if isinstance(guidance.policy, Interval):
        guidance = Guidance(APG(), Interval(noise_low=0.9))
    guider = use(pipe, Guider(guidance, SCALE).bind(pipe))
    expected, trace = stock_latents(name, guidance)
    torch.testing.assert_close(latents(pipe, name), expected, rtol=1e-4, atol=1e-4)
    assert guider.guidance_trace.nfe == trace.nfe
    noise = [step.noise for step in guider.guidance_trace.steps]
    assert noise == pytest.approx([step.noise for step in trace.steps])


# Of every kind of loop one; all are in tests/modular.
SOME = (
    "Flux2KleinBase image_conditioned",
    "Helios text2video",
    "LTX image2video",
    "LTX2 condition",
    "MiniMaxMusic3",
    "QwenImageLayered",
    "StableDiffusionXL inpainting",
    "Wan22",
    "ZImage image2image",
)


@pytest.mark.parametrize("name", [*SOME, *ORDINARY])
def test_guides_as_it_should(name):
    """As diffusers' guider, as the paper, and in as many passes as Adaptive Guidance promises."""
    assert checks.cfg_bit_equal(name)
    assert checks.apg_error(name) < checks.LIMIT
    assert checks.passes_ok(name)


@pytest.mark.parametrize(
    "name", ["LTX2 image2video", "LTX2 condition", "QwenImageLayered", "Helios text2video"]
)
def test_branches_that_are_equal_at_the_first_step(name):
    """They say nothing of what the blocks make of them: that is learned at the next one."""
    outputs = []

    def hook(module, args, kwargs, output):
        if checks.TAKERS[name].steps(kwargs):
            outputs.append(output)
        return outputs[0] if len(outputs) == 2 else output

    pipe = checks.TAKERS[name].build()
    for denoiser in checks.TAKERS[name].denoisers:
        getattr(pipe, denoiser).register_forward_hook(hook, with_kwargs=True)
    expected = checks.stock(name, pipe)
    results = []
    for rule in (APG(eta=1.0, norm_threshold=0.0, momentum=0.0), APG()):
        outputs.clear()
        results.append(checks.guided_by(name, rule, pipe))
    neutral, found = results
    torch.testing.assert_close(neutral, expected, rtol=1e-4, atol=1e-4)
    assert (found - expected).norm() > 1e-2 * expected.norm()


def test_every_workflow_has_a_tiny_pipeline():
    assert set(checks.with_slot()) == {checks.report_name(name) for name in workflows.MODULAR}


SCHEDULERS = {
    df.DDIMScheduler: STEPS,
    df.DPMSolverMultistepScheduler: STEPS,
    df.HeunDiscreteScheduler: 2 * STEPS - 1,
    df.PNDMScheduler: STEPS + 1,
}


@pytest.mark.parametrize(("scheduler", "evaluations"), SCHEDULERS.items())
def test_runs_end_with_the_scheduler(scheduler, evaluations):
    """Also where there are more network evaluations than steps."""
    config = {"skip_prk_steps": True} if scheduler is df.PNDMScheduler else {}
    parts = parts_of("sdxl") | {"scheduler": scheduler(**SD_NOISE, **config)}
    pipe, stock = build("sdxl", parts), df.StableDiffusionXLPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    expected = stock(**inputs("sdxl"), guidance_scale=SCALE, output_type="latent")[0]
    for guider in (Guider("cfg", SCALE), Guider("cfg", SCALE).bind(pipe)):
        use(pipe, guider)
        torch.testing.assert_close(latents(pipe, "sdxl"), expected, rtol=1e-4, atol=1e-4)
        assert len(guider.guidance_trace.steps) == evaluations
        assert guider.passes == 2 * evaluations
    guider = use(pipe, Guider("apg+ag", SCALE).bind(pipe))
    first = latents(pipe, "sdxl")
    assert len(guider.guidance_trace.steps) == evaluations
    assert guider._shared.run is None
    assert torch.equal(latents(pipe, "sdxl"), first)


@pytest.mark.parametrize(("scheduler", "evaluations"), SCHEDULERS.items())
def test_diffusers_guider_takes_steps_for_evaluations(scheduler, evaluations):
    """Its guidance ends after as many evaluations as there are steps; ours goes on."""
    config = {"skip_prk_steps": True} if scheduler is df.PNDMScheduler else {}
    pipe = build("sdxl")
    pipe.update_components(scheduler=scheduler(**SD_NOISE, **config))
    use(pipe, df.ClassifierFreeGuidance(SCALE))
    theirs = latents(pipe, "sdxl")
    use(pipe, Guider("cfg", SCALE))
    assert torch.equal(latents(pipe, "sdxl"), theirs) == (evaluations == STEPS)
    use(pipe, Guider(CFG() | Interval(stop_step=STEPS), SCALE).bind(pipe))
    assert torch.equal(latents(pipe, "sdxl"), theirs)


def test_controlnet_in_guess_mode():
    """The unconditional pass gets no residuals, and is told apart by `is_conditional`."""
    pipe = build("sdxl", parts_of("sdxl") | {"controlnet": c.controlnet(**c.SDXL)})
    call = {"control_image": c.per_sample(2, 3, 16, 16, low=0.0), "guess_mode": True}
    use(pipe, df.ClassifierFreeGuidance(SCALE))
    expected = latents(pipe, "sdxl", **call)
    use(pipe, Guider("cfg", SCALE))
    assert torch.equal(latents(pipe, "sdxl", **call), expected)
    guider = use(pipe, Guider("apg+ag", SCALE).bind(pipe))
    assert torch.isfinite(latents(pipe, "sdxl", **call)).all()
    assert guider.passes < 2 * STEPS


def gammas(name):
    """Cosine of every step and sample, in x0 space, from a guided run."""
    pipe = shared(name)
    guider = use(pipe, Guider(AdaptiveGuidance(2.0), SCALE).bind(pipe))
    latents(pipe, name)
    return torch.stack([step.gamma for step in guider.guidance_trace.steps])


@pytest.mark.parametrize("name", ["sdxl", "wan", "qwen_image"])
@pytest.mark.parametrize("rule", [CFG(), APG()])
def test_samples_stop_each_on_their_own(name, rule):
    """One sample stops after the first step, the other goes on; neither notices its mate."""
    pipe, gamma = shared(name), gammas(name)[0]
    early, late = int(gamma.argmax()), int(gamma.argmin())
    policy = AdaptiveGuidance(float(gamma.mean()))
    guider = use(pipe, Recorder(rule | policy, SCALE).bind(pipe))
    together = latents(pipe, name)
    steps = guider.guidance_trace.steps
    assert [early in step.rows for step in steps] == [True] + [False] * (STEPS - 1)
    assert late in steps[1].rows
    for step, output in zip(steps, guider.outputs, strict=True):
        if early not in step.rows:
            assert torch.equal(output.pred[early], output.pred_cond[early])
        assert (output.pred_uncond is None) == (not step.rows)
    assert guider.passes == STEPS + sum(bool(step.rows) for step in steps)
    for row in (early, late):
        guider = use(pipe, Guider(rule | policy, SCALE).bind(pipe))
        alone = latents(pipe, name, [row])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)
        nfe = [row in step.rows for step in steps]
        assert [bool(step.rows) for step in guider.guidance_trace.steps] == nfe


@every_pipeline
def test_an_unwanted_pass_is_not_made(name):
    pipe = shared(name)
    guider = use(pipe, Guider(CFG() | Interval(1, 3), SCALE).bind(pipe))
    networks = [
        getattr(pipe, n) for n in ("unet", "transformer", "transformer_2") if n in vars(pipe)
    ]
    counts = []
    handles = [n.register_forward_hook(lambda *_: counts.append(1)) for n in networks]
    latents(pipe, name)
    for handle in handles:
        handle.remove()
    assert len(counts) == guider.passes == STEPS + 2


@every_pipeline
def test_nothing_is_left_for_the_next_call(name):
    pipe, runs = shared(name), {}
    guider = use(pipe, Guider(APG() | AdaptiveGuidance(0.5), SCALE).bind(pipe))
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]

    def keep(*_):
        runs[id(guider._shared.run)] = weakref.ref(guider._shared.run)

    handle = getattr(pipe, MODULAR[name].network).register_forward_hook(keep)
    first = latents(pipe, name)
    handle.remove()
    assert [run() for run in runs.values()] == [None]
    assert not any(network._forward_pre_hooks for network in networks)
    trace = guider.guidance_trace
    assert torch.equal(latents(pipe, name), first)
    assert guider.guidance_trace is not trace
    assert guider.guidance_trace.nfe == trace.nfe


def test_an_interrupted_run_is_dropped():
    pipe = shared("sdxl")
    guider = use(pipe, Guider(APG() | AdaptiveGuidance(-1.0), SCALE).bind(pipe))
    first = latents(pipe, "sdxl")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:  # step 2 of 4, when the unconditional branch is no longer evaluated
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, "sdxl")
    handle.remove()
    assert guider.num_conditions == 2  # what text encoders ask before the next run
    assert torch.equal(latents(pipe, "sdxl"), first)


def test_two_pipelines_of_one_network_do_not_share_state():
    pipes = [build("sd3", parts) for parts in [parts_of("sd3")] * 2]
    assert pipes[0].transformer is pipes[1].transformer
    for pipe in pipes:
        use(pipe, Guider("apg", SCALE).bind(pipe))
    expected = [latents(pipe, "sd3", rows) for pipe, rows in zip(pipes, ([0], [1]), strict=True)]
    again = []

    def other_pipeline(*_):
        handle.remove()
        again.append(latents(pipes[1], "sd3", [1]))

    pipes[1].update_components(scheduler=flow(shift=3.0))
    handle = pipes[0].transformer.register_forward_hook(other_pipeline)
    assert torch.equal(latents(pipes[0], "sd3", [0]), expected[0])
    assert torch.equal(again[0], expected[1])


def test_wan22_is_one_run_through_both_networks():
    pipe = shared("wan22")
    guider = use(pipe, Guider(APG(momentum=-0.9), SCALE).bind(pipe))
    latents(pipe, "wan22")
    assert guider.guidance_trace is pipe.guider_2.guidance_trace
    assert len(guider.guidance_trace.steps) == STEPS
    assert (guider.guidance_scale, pipe.guider_2.guidance_scale) == (SCALE, SCALE_2)
    pipe.update_components(guider_2=guider.new(guidance_scale=SCALE_2))
    with pytest.raises(LayoutError, match="partner"):
        latents(pipe, "wan22")


def test_sharing_the_latch_of_an_all_stopped_first_network():
    """A sample that stopped under the first network stays so under the second."""
    pipe = shared("wan22")
    guider = use(pipe, Guider(CFG() | AdaptiveGuidance(-1.0), SCALE).bind(pipe))
    latents(pipe, "wan22")
    assert guider.passes == STEPS + 1


def test_a_compiled_network():
    pipe = build("sd3")
    guider = use(pipe, Guider("apg", SCALE).bind(pipe))
    eager = latents(pipe, "sd3")
    pipe.transformer.compile(backend="eager")
    torch.testing.assert_close(latents(pipe, "sd3"), eager, rtol=1e-5, atol=1e-5)
    use(pipe, guider.new())
    torch.testing.assert_close(latents(pipe, "sd3"), eager, rtol=1e-5, atol=1e-5)


def test_disabled_and_rescaled():
    pipe = shared("sd3")
    guider = use(pipe, Guider("apg", SCALE, enabled=False).bind(pipe))
    unguided = latents(pipe, "sd3")
    assert guider.passes == STEPS and guider.num_conditions == 1
    use(pipe, df.ClassifierFreeGuidance(1.0))
    assert torch.equal(unguided, latents(pipe, "sd3"))
    use(pipe, guider)
    guider.enable()
    at_five = latents(pipe, "sd3")
    guider.guidance_scale = 2.0
    at_two = latents(pipe, "sd3")
    assert guider.new().guidance_scale == guider.config["guidance_scale"] == 2.0
    assert not torch.equal(at_five, at_two)


def test_predictions_that_are_not_finite():
    pipe = build("sd3")
    use(pipe, Guider("apg", SCALE).bind(pipe))
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(NonFinitePredictionError, match="step 0"):
        latents(pipe, "sd3")


def test_half_precision_latents_keep_their_dtype():
    pipe = build("sd3")
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipe, part).to(torch.bfloat16)
    guider = use(pipe, Recorder("apg", SCALE).bind(pipe))
    latents(pipe, "sd3")
    assert {output.pred.dtype for output in guider.outputs} == {torch.bfloat16}


def test_presets_are_those_of_the_pipeline():
    pipe = shared("sdxl")
    assert Guider("interval", SCALE).guidance.policy == Interval()
    assert Guider("interval", SCALE).bind(pipe).guidance == resolve("interval", "sdxl")
    assert Guider(Interval(1, 2), SCALE).bind(pipe).guidance.policy == Interval(1, 2)
    with pytest.raises(ValueError, match="no known window"):
        Guider("interval", SCALE).bind(shared("sd3"))


def test_what_a_schedule_is_made_of_cannot_be_checked():
    fitted = Coefficients([[1.0], [0.0, 1.0]], [[], [0.5]], identity={"model": "other"})
    schedule = Schedule(("both", "estimate"), fill=fitted)
    with pytest.raises(ValueError, match="which a guider cannot check"):
        Guider(schedule, SCALE).bind(shared("sdxl"))


@pytest.mark.parametrize("guidance", ["apg", "ag", "interval", APG(space="native")])
def test_unbound_guiders_say_what_to_do(guidance):
    pipe = shared("sd3")
    use(pipe, Guider(guidance, SCALE))
    with pytest.raises(LayoutError, match="bind"):
        latents(pipe, "sd3")


def test_a_guider_bound_to_another_pipeline():
    """Whether the other one has never run, is done, or has other timesteps."""
    pipe, other = shared("sd3"), build("sd3")
    guider = use(pipe, Guider("apg", SCALE).bind(other))
    with pytest.raises(LayoutError, match="not the one that runs"):
        latents(pipe, "sd3")
    use(other, guider)
    latents(other, "sd3")
    for steps in (STEPS, 7):
        with pytest.raises(LayoutError, match="not the one that runs"):
            latents(pipe, "sd3", num_inference_steps=steps)
    del other
    gc.collect()
    with pytest.raises(LayoutError, match="bind"):
        latents(pipe, "sd3")


def test_pipelines_that_cannot_be_bound():
    with pytest.raises(LayoutError, match="FluxModularPipeline has no guider among"):
        Guider("apg", SCALE).bind(df.FluxAutoBlocks().init_pipeline())
    with pytest.raises(LayoutError, match="no guider.*guided"):
        Guider("apg", SCALE).bind(df.StableDiffusionXLPipeline(**parts_of("sdxl")))


class Negated(Guider):
    """Guides what the network returns, where the blocks negate it afterwards."""

    def forward(self, pred_cond, pred_uncond=None):
        negated = [None if pred is None else -pred for pred in (pred_cond, pred_uncond)]
        output = super().forward(*negated)
        return GuiderOutput(pred=-output.pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class Rescaled(Guider):
    """Blocks that take part of the contrast away afterwards."""

    def forward(self, pred_cond, pred_uncond=None):
        output = super().forward(pred_cond, pred_uncond)
        return GuiderOutput(pred=0.8 * output.pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def test_what_blocks_do_to_a_combination_is_seen():
    pipe = shared("sd3")
    rule = APG(eta=0.3, momentum=-0.5)
    use(pipe, Guider(rule, SCALE).bind(pipe))
    expected = latents(pipe, "sd3")
    use(pipe, Negated(rule, SCALE).bind(pipe))
    torch.testing.assert_close(latents(pipe, "sd3"), expected, rtol=1e-5, atol=1e-5)
    use(pipe, Rescaled(rule, SCALE).bind(pipe))
    for rows in ((0,), (0, 1)):
        with pytest.raises(LayoutError, match="weights of its branches are 4, -3.2, which sum to"):
            latents(pipe, "sd3", rows)
    assert type(pipe.scheduler) is df.FlowMatchEulerDiscreteScheduler
    # Where plain guidance stays, it may be anything.
    assert use(pipe, Rescaled("ag", SCALE).bind(pipe)).guidance.keeps_combination
    assert torch.isfinite(latents(pipe, "sd3")).all()


def test_a_cache_that_counts_steps():
    pipe = build("wan")
    config = df.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    df.apply_pyramid_attention_broadcast(pipe.transformer, config)
    use(pipe, Guider(APG() | Interval(1, 3), SCALE).bind(pipe))
    with pytest.raises(LayoutError, match="a cache is enabled in the network"):
        latents(pipe, "wan")


def test_the_sound_of_ltx2():
    """It follows the video, or is left to a guider of its own."""
    name, steps = "LTX2 text2video", c.STEPS
    pipe, calls = workflows.MODULAR[name].build(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    guider = Guider(CFG() | AdaptiveGuidance(-1.0), SCALE).bind(pipe)
    pipe.update_components(guider=guider, audio_guider=guider.partner(SCALE_2))
    pipe(**inputs_of(name))
    assert len(calls) == guider.passes == steps + 1
    calls.clear()
    pipe.update_components(audio_guider=workflows.OfTwoBranches(SCALE_2))
    pipe(**inputs_of(name))
    assert len(calls) == 2 * steps and guider.passes == steps + 1
    own = LTX2Guidance(guidance_scale=SCALE, stg_scale=1.0)
    pipe.update_components(audio_guider=own)
    with pytest.raises(LayoutError, match="stg_scale=0"):
        pipe(**inputs_of(name))
    pipe.update_components(guider=Guider("cfg", SCALE))
    with pytest.raises(LayoutError, match="bind"):
        pipe(**inputs_of(name))


def inputs_of(name):
    call = workflows.MODULAR[name].call(1, True)
    return {argument: value for argument, value in call.items() if "." not in argument}


def test_ordinary_pipelines_take_both_ways():
    """Through the seam, and by a component: the same, but that the seam evaluates samples alone."""
    family = FAMILIES["hunyuan15"]
    call = family.call(2, True)
    pipe = family.build()
    pipe.guider = Guider("apg+ag", SCALE).bind(pipe)
    for _ in range(2):  # the second call asks for conditions after the last step of the first
        ours = pipe(**(call | {"generator": c.generators(2)}))[0]
    other = guided(family.build())
    other.guider.guidance_scale = SCALE
    before = other.guider
    expected = other(**call, guidance="apg+ag")[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert other.guider is before
    other.guider.guidance_scale = 1.0
    with pytest.raises(ValueError, match="guider.guidance_scale=1.0 switches guidance off"):
        other(**call, guidance="apg")


def test_schedulers_and_rules_that_do_not_fit():
    pipe = build("sdxl")
    pipe.update_components(scheduler=df.DDIMInverseScheduler(**SD_NOISE))
    use(pipe, Guider("apg", SCALE).bind(pipe))
    with pytest.raises(
        UnknownSchedulerError, match="DDIMInverseScheduler are not known .it steps towards noise"
    ):
        latents(pipe, "sdxl")
    pipe = shared("qwen_image")
    use(pipe, Guider(FDG(), SCALE).bind(pipe))
    with pytest.raises(ValueError, match="packed tokens"):
        latents(pipe, "qwen_image")
    pipe = shared("sdxl")
    use(pipe, Guider("forecast", SCALE).bind(pipe))
    with pytest.raises(ValueError, match="skips steps"):
        latents(pipe, "sdxl")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="known are"):
        Guider("agp")
    with pytest.raises(TypeError, match="float"):
        Guider(7.5)
    with pytest.raises(ValueError, match="nothing to act on"):
        Guider("apg", 1.0)
    for scale in (0, -1.0, float("nan"), "7", True):
        with pytest.raises(ValueError, match="guidance_scale"):
            Guider("cfg", scale)
    guider = Guider("apg", SCALE)
    with pytest.raises(ValueError, match="nothing to act on"):
        guider.guidance_scale = 0.5
    assert guider.guidance_scale == SCALE
    with pytest.raises(LayoutError, match="prepare_inputs"):
        guider.forward(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(LayoutError, match="set_state"):
        Guider("cfg").prepare_inputs({"x": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match="unknown rule 'mine': known are .*cfg"):
        Guider({"rule": {"name": "mine"}, "policy": {"name": "always"}})


SAVED = [
    "apg+ag",
    APG(eta=0.5, momentum=-0.75),
    AdaptiveGuidance(0.999, space="native", lag=2),
    APG(norm_threshold=0.1) | Interval(noise_low=0.28),
]


@pytest.mark.parametrize("guidance", SAVED)
def test_saved_and_loaded(tmp_path, guidance):
    guider = Guider(guidance, 3.5, enabled=False, detailed_trace=True)
    guider.save_pretrained(tmp_path)

    def no_constant(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "guider_config.json").read_text()
    assert json.loads(text, parse_constant=no_constant)["_class_name"] == "Guider"
    loaded = Guider.from_pretrained(tmp_path)
    assert loaded.guidance == guider.guidance
    assert dict(loaded.config) == dict(guider.config)
    assert loaded.guidance_scale == 3.5 and not loaded._enabled
    assert guider.new(guidance_scale=2).guidance == guider.guidance
    assert "guidance_scale" in repr(guider)


def test_endless_threshold_survives():
    guidance = AdaptiveGuidance(float("inf"))
    assert Guider.from_config(Guider(guidance).config).guidance.policy == guidance


def test_component_of_a_saved_pipeline(tmp_path):
    pipe = build("sd3")
    Guider("apg+ag", SCALE).save_pretrained(tmp_path / "guider")
    spec = ComponentSpec("guider", Guider, pretrained_model_name_or_path=str(tmp_path / "guider"))
    use(pipe, spec.load().bind(pipe))
    expected = latents(pipe, "sd3")
    pipe.save_pretrained(str(tmp_path / "pipe"), overwrite_modular_index=True)
    index = json.loads((tmp_path / "pipe" / "modular_model_index.json").read_text())
    assert index["guider"][:2] == ["pilotage.pipelines.guiders", "Guider"]
    loaded = pipe.blocks.init_pipeline(str(tmp_path / "pipe"))
    loaded.load_components(["guider", "scheduler", "transformer"])
    rest = {k: v for k, v in pipe.components.items() if k not in ("guider", "scheduler")}
    loaded.update_components(**rest)
    loaded.guider.bind(loaded)
    assert torch.equal(latents(loaded, "sd3"), expected)


def test_a_rule_of_ones_own(tmp_path):
    """Used and copied freely; saved only if it is registered."""

    class Halved(APG):
        name = "halved"

    guider = Guider(replace(Halved(), eta=0.5), SCALE)
    assert guider.new().guidance.rule.eta == 0.5
    with pytest.raises(ValueError, match="Halved has no name"):
        guider.save_config(tmp_path)
    assert not any(tmp_path.iterdir())


W, ETA, RADIUS, BETA = 7.5, 0.3, 4.0, -0.6


def x0_pairs(steps=3, dtype=torch.float64):
    """Conditional and unconditional denoised images of some steps, of two samples."""
    seeds = range(0, 4 * steps, 4)
    conds = [c.per_sample(2, 4, 8, 8, seed=seed).double() for seed in seeds]
    noises = [c.per_sample(2, 4, 8, 8, seed=seed + 2).double() for seed in seeds]
    pairs = zip(conds, noises, strict=True)
    return [(cond.to(dtype), (cond + 0.3 * noise).to(dtype)) for cond, noise in pairs]


def diffusers_apg(pairs, scale, first_step=0, **settings):
    """diffusers' guider over some steps, fed the way a modular pipeline does."""
    guider = df.AdaptiveProjectedGuidance(guidance_scale=scale, **settings)
    for step, (cond, uncond) in enumerate(pairs, first_step):
        guider.set_state(step, 10, torch.tensor(step))
        guider.prepare_inputs({"x": (cond, uncond)})
        yield guider.forward(cond, uncond).pred


def our_apg(pairs, w=W, eta=ETA, norm_threshold=RADIUS, momentum=BETA):
    buffer = None
    for cond, uncond in pairs:
        settings = {"eta": eta, "norm_threshold": norm_threshold, "momentum": momentum}
        guided, buffer = apg(cond, uncond, w, buffer, **settings)
        yield guided


SAME = {
    "eta": ETA,
    "adaptive_projected_guidance_rescale": RADIUS,
    "adaptive_projected_guidance_momentum": BETA,
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_diffusers_apg_is_ours_once_set_right(dtype, tolerance):
    """On denoised images, with the original formulation and one unit of scale less."""
    pairs = x0_pairs(dtype=dtype)
    theirs = diffusers_apg(pairs, W - 1, use_original_formulation=True, **SAME)
    for a, b in zip(our_apg(pairs), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    buffers, buffer = MomentumBuffer(BETA), None
    for cond, uncond in pairs:
        theirs = normalized_guidance(cond, uncond, W - 1, buffers, ETA, RADIUS, True)
        settings = {"eta": ETA, "norm_threshold": RADIUS, "momentum": BETA}
        ours, buffer = apg(cond, uncond, W, buffer, **settings)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(buffer, buffers.running_average, rtol=tolerance, atol=tolerance)


def inner(a, b):
    return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)


def parallel(update, direction):
    return inner(update, direction) / inner(direction, direction) * direction


def test_diffusers_default_formula_starts_from_the_unconditional_prediction():
    """u + w g' takes the whole parallel part away once more, whatever eta says."""
    pairs = x0_pairs(1)
    (cond, uncond), settings = pairs[0], {"eta": 0.0, "adaptive_projected_guidance_rescale": 0.0}
    (theirs,) = diffusers_apg(pairs, W, **settings)
    (ours,) = our_apg(pairs, eta=0.0, norm_threshold=0.0)
    torch.testing.assert_close(ours - theirs, parallel(cond - uncond, cond))
    (theirs,) = diffusers_apg(pairs, W, eta=1.0, adaptive_projected_guidance_rescale=1.0)
    (ours,) = our_apg(pairs, eta=1.0, norm_threshold=1.0)
    assert (ours - theirs).norm() > 0.5 * (ours - cond).norm()


def test_diffusers_projects_the_raw_prediction():
    """The part parallel to the denoised image, which saturates, goes through unreduced."""
    (d_cond, d_uncond) = x0_pairs(1)[0]
    d_uncond = d_uncond - 0.2 * d_cond
    alpha, sigma = 0.6, 0.8
    x_t = alpha * d_cond + sigma * torch.randn(d_cond.shape, dtype=torch.float64)
    eps = [(x_t - alpha * d) / sigma for d in (d_cond, d_uncond)]
    settings = {"use_original_formulation": True, "adaptive_projected_guidance_rescale": 0.0}
    (guided,) = diffusers_apg([tuple(eps)], W - 1, eta=0.0, **settings)
    left = parallel((x_t - sigma * guided) / alpha - d_cond, d_cond)
    of_cfg = parallel((W - 1) * (d_cond - d_uncond), d_cond)
    assert (left.flatten(1).norm(dim=1) > 0.8 * of_cfg.flatten(1).norm(dim=1)).all()
    ours, _ = apg(d_cond, d_uncond, W, eta=0.0)
    assert parallel(ours - d_cond, d_cond).abs().max() < 1e-12


def test_diffusers_defaults_are_cfg_with_a_cap_on_the_update():
    """Its threshold of 15 is on the norm over all elements: small latents never reach it."""
    pairs = x0_pairs()
    for (cond, uncond), pred in zip(pairs, diffusers_apg(pairs, W), strict=True):
        assert (cond - uncond).flatten(1).norm(dim=1).max() < 15
        torch.testing.assert_close(pred, uncond + W * (cond - uncond))
    assert not torch.allclose(apg(*pairs[0], W)[0], pairs[0][1] + W * (pairs[0][0] - pairs[0][1]))


def test_diffusers_defaults_shrink_the_guidance_of_large_latents():
    """SDXL's latents, a difference of rms .1, so of norm 25.6: .586 of CFG's guidance is left."""
    cond = c.per_sample(2, 4, 128, 128, seed=1).double()
    difference = c.per_sample(2, 4, 128, 128, seed=3).double()
    difference *= 0.1 / difference.square().mean((1, 2, 3), keepdim=True).sqrt()
    share = 15 / (0.1 * math.sqrt(4 * 128 * 128))
    assert round(share, 3) == 0.586
    pair = (cond, cond - difference)
    (pred,) = diffusers_apg([pair], W)
    torch.testing.assert_close(pred - pair[1], share * W * difference)
    (uncapped,) = diffusers_apg([pair], W, adaptive_projected_guidance_rescale=0.0)
    torch.testing.assert_close(uncapped - pair[1], W * difference)


def test_diffusers_makes_its_momentum_buffer_at_step_0_only():
    """As second guider of Wan 2.2, or with a late start, it has none."""
    pairs = x0_pairs()
    late = list(diffusers_apg(pairs, W, first_step=3, **SAME))
    without = SAME | {"adaptive_projected_guidance_momentum": None}
    for a, b in zip(late, diffusers_apg(pairs, W, **without), strict=True):
        assert torch.equal(a, b)


class Float64Ops(TorchDispatchMode):
    """Counts the operations with a float64 result."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, torch.Tensor) and result.dtype == torch.float64
        return result


def test_diffusers_computes_in_float64():
    pairs = x0_pairs(1, torch.float16)
    with Float64Ops() as theirs:
        list(diffusers_apg(pairs, W, **SAME))
    with Float64Ops() as ours:
        list(our_apg(pairs))
    assert theirs.count > 0 and ours.count == 0
