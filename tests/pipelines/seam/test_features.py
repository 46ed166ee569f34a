"""Guidance beside the other features of diffusers: each as it is without."""

import copy
import functools
import itertools

import accelerate
import diffusers
import peft
import pytest
import torch

import pilotage.pipelines
from pilotage.eval.embedded import embedded_folder
from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    CFGZeroStar,
    Decision,
    Interval,
    Policy,
    PolicyState,
    Schedule,
    Weights,
    forecast,
    hold,
    load_guidance,
)
from pilotage.pipelines import LayoutError, guided

from ... import components
from ...families import FAMILIES
from ..checks import Rows, equal, latents


def test_from_pipe_keeps_dtypes():
    stock = FAMILIES["sd"].build().to(torch.bfloat16)
    cls = pilotage.pipelines.StableDiffusionImg2ImgPipeline
    other = cls.from_pipe(stock)
    assert isinstance(other, cls)
    assert stock.unet.dtype == stock.vae.dtype == other.unet.dtype == torch.bfloat16
    assert other.unet is stock.unet
    assert cls.from_pipe(stock, torch_dtype=torch.float32).unet.dtype == torch.float32


def test_from_pipe_does_not_disturb_to_afterwards():
    pipe = pilotage.pipelines.StableDiffusionPipeline.from_pipe(FAMILIES["sd"].build())
    assert pipe.to(torch.float64).unet.dtype == torch.float64


def test_custom_pipeline(tmp_path):
    guided(FAMILIES["sd"].build()).save_pretrained(tmp_path / "model")
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "pipeline.py").write_text(
        "from diffusers import StableDiffusionPipeline\n\n\n"
        "class ShoutingPipeline(StableDiffusionPipeline):\n"
        "    def encode_prompt(self, prompt, *args, **kwargs):\n"
        "        loud = [p.upper() + '!' for p in prompt] if isinstance(prompt, list) else prompt\n"
        "        return super().encode_prompt(loud, *args, **kwargs)\n"
    )
    pipe = pilotage.pipelines.StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "custom"), trust_remote_code=True
    )
    assert type(pipe).__name__ == "ShoutingPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert equal(latents(pipe, "sd"), latents(pipe, "sd", guidance="cfg"))
    assert not equal(latents(pipe, "sd"), latents(pipe, "sd", guidance="apg"))


def test_compiled_denoiser():
    pipe = guided(FAMILIES["sd"].build())
    expected = latents(pipe, "sd", guidance="apg+ag")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(
        latents(pipe, "sd", guidance="apg+ag"), expected, rtol=1e-4, atol=1e-4
    )


def test_offloaded_modules():
    """Accelerate's hooks on the modules, as enable_model_cpu_offload sets them."""
    pipe = guided(FAMILIES["sd"].build())
    expected = latents(pipe, "sd", guidance="apg")
    hook = None
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = accelerate.cpu_offload_with_hook(module, "cpu", hook)
    assert equal(latents(pipe, "sd", guidance="apg"), expected)
    assert equal(latents(pipe, "sd", guidance="cfg"), latents(pipe, "sd"))


def test_lora():
    from peft import LoraConfig

    pipe = guided(FAMILIES["sd"].build())
    plain = latents(pipe, "sd", guidance="apg")
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)
    with_lora = latents(pipe, "sd", guidance="apg")
    assert not equal(plain, with_lora)
    assert equal(latents(pipe, "sd", guidance="cfg"), latents(pipe, "sd"))
    off = {"cross_attention_kwargs": {"scale": 0.0}}
    assert equal(latents(pipe, "sd", guidance="cfg", **off), latents(pipe, "sd", **off))
    torch.testing.assert_close(latents(pipe, "sd", guidance="apg", **off), plain)


def test_ip_adapter_images_are_gathered():
    pipe = guided(FAMILIES["sd"].build())
    pipe.unet._load_ip_adapter_weights([components.ip_adapter(pipe.unet)])
    embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))  # uncond, cond
    extra = {"ip_adapter_image_embeds": [embeds]}
    assert equal(latents(pipe, "sd", **extra), latents(pipe, "sd", guidance="cfg", **extra))
    other = {"ip_adapter_image_embeds": [embeds.flip(0)]}
    assert not equal(latents(pipe, "sd", **extra), latents(pipe, "sd", **other))
    with Rows(pipe, "sd") as rows:
        latents(pipe, "sd", guidance="ag", **extra)
    steps = len(pipe.guidance_trace.steps)
    assert sum(rows.calls) == sum(pipe.guidance_trace.nfe) < 3 * 2 * steps


def test_empty_and_per_prompt_negatives():
    pipe = guided(FAMILIES["sdxl"].build())
    for negative in ("", ["", "a cat", "dark"], "blurry"):
        extra = {"negative_prompt": negative}
        call = FAMILIES["sdxl"].call(3, False)
        stock = pipe(**copy.copy(call) | extra)[0]
        call = FAMILIES["sdxl"].call(3, False)
        assert equal(stock, pipe(**call | extra, guidance="cfg")[0])


def test_heun_has_two_evaluations_a_step():
    pipe = guided(FAMILIES["sd"].build())
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    latents(pipe, "sd", guidance="apg", num_inference_steps=4)
    assert [step.index for step in pipe.guidance_trace.steps] == list(range(7))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sd", "guidance_rescale", 0.7),
        ("sd3", "skip_guidance_layers", [0]),
        ("z_image", "cfg_normalization", True),
    ],
)
def test_options_that_need_the_pipelines_own_combination(name, option, value):
    pipe = guided(FAMILIES[name].build())
    half = AdaptiveGuidance(0.9, space="native", then="forecast")
    total = 4 if name == "sd" else 3  # PNDM evaluates once more
    scaled = Schedule(("both",) * total, (1.5,) * total)
    refused = ["apg", scaled]
    if option == "skip_guidance_layers":  # of which there are calls beside the branches
        refused += [forecast(space="native"), half]
    for guidance in refused:
        with pytest.raises(ValueError, match=f"{option} cannot be combined"):
            latents(pipe, name, guidance=guidance, num_inference_steps=3, **{option: value})
    stock = latents(pipe, name, num_inference_steps=3, **{option: value})
    for guidance in ("cfg", Schedule(("both",) * total)):
        found = latents(pipe, name, guidance=guidance, num_inference_steps=3, **{option: value})
        assert equal(stock, found)


def test_a_picture_in_a_tensor_is_refused_in_words_too():
    """Where a picture makes for calls that are no branch: it has no truth of its own."""
    pipe = guided(FAMILIES["glm_image_edit"].build())
    with pytest.raises(ValueError, match="image cannot be combined"):
        latents(pipe, "glm_image_edit", guidance="apg", image=torch.zeros(1, 3, 16, 16))


class Untold(Policy):
    """One decision for every step after the first, which nobody is told beforehand.

    The first `whole` samples are guided all the same.
    """

    name = "untold"

    def __init__(self, decision, whole=0):
        self.decision, self.whole = decision, whole

    def start(self, batch, total, on_cpu):
        return UntoldState(batch, self.decision, self.whole)


class UntoldState(PolicyState):
    def __init__(self, batch, decision, whole):
        self.batch, self.decision, self.whole = batch, decision, whole

    def decide(self, step):
        guided = self.whole if step.index else self.batch
        return [Decision()] * guided + [self.decision] * (self.batch - guided)

    def keep_until(self, kind, step):
        return step + 9 if kind == "guided" else -1


HELD = Decision((), reuse=Weights(guided={0: 1.0}))


class Mistold(Untold):
    """One that says beforehand that it never skips a step."""

    def decisions(self, total):
        return [Decision()]


def test_a_skip_that_decisions_does_not_list_is_made_all_the_same():
    pipe = guided(FAMILIES["sd"].build())
    assert equal(
        latents(pipe, "sd", guidance=Untold(HELD)), latents(pipe, "sd", guidance=Mistold(HELD))
    )


@pytest.mark.parametrize("decision", [Decision(factor=2.0), HELD])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_policy_that_tells_nothing_beforehand_is_refused_where_it_happens(name, decision):
    """Its author has nothing to remember: options are checked where the combination is replaced."""
    pipe = guided(FAMILIES[name].build())
    plain = latents(pipe, name, guidance=Untold(Decision()))
    assert equal(plain, latents(pipe, name, guidance="cfg"))
    assert not equal(plain, latents(pipe, name, guidance=Untold(decision)))
    if name == "sd":
        rescaled = {"guidance_rescale": 0.7}
        stock = latents(pipe, name, **rescaled)
        assert equal(stock, latents(pipe, name, guidance=Untold(Decision()), **rescaled))
        if not decision.skips:
            with pytest.raises(LayoutError, match="Leave out what changes it"):
                latents(pipe, name, guidance=Untold(decision), **rescaled)


@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sd", {"guidance_rescale": 0.7}),
        ("z_image", {"cfg_normalization": True}),
        *(("qwen_image", {}), ("lumina2", {}), ("joy_image_edit", {}), ("sd_pag", {})),
    ],
)
def test_skipped_steps_keep_what_the_pipeline_made(name, extra, whole):
    """Also beside samples that are guided, and whatever it does to its combination."""
    pipe = guided(FAMILIES[name].build())
    found = latents(pipe, name, guidance=Untold(HELD, whole), **extra)
    if not whole:  # as a policy says it beforehand
        told = Schedule(("both", *("forecast",) * (len(pipe.guidance_trace.steps) - 1)))
        assert equal(found, latents(pipe, name, guidance=told, **extra))
    stock, outputs = FAMILIES[name].build(), []
    step = stock.scheduler.step

    @functools.wraps(step)
    def held(output, *args, **kwargs):
        outputs.append(torch.cat([output[:whole], (outputs or [output])[0][whole:]]))
        return step(outputs[-1], *args, **kwargs)

    stock.scheduler.step = held
    expected = latents(stock, name, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, latents(pipe, name, guidance="cfg", **extra), atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "z_image", "flux", "qwen_image", "sd_pag", "lumina"])
def test_the_call_that_learns_is_as_every_other(name):
    """It evaluates all branches of its first step, to see how they are combined; the trace tells.

    Branches that are calls of their own always have to be evaluated once. Batches of another size
    round otherwise, hence a tolerance.
    """
    pipe, late = guided(FAMILIES[name].build()), Interval(start_step=1)
    found, traces = [], []
    for _ in range(2):
        with Rows(pipe, name) as rows:
            found.append(latents(pipe, name, guidance=late))
        traces.append(pipe.guidance_trace)
        assert sum(traces[-1].nfe) == sum(rows.calls)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    first, second = (trace.steps[0] for trace in traces)
    calls = FAMILIES[name].layout.startswith("calls")
    assert (first.unused, second.unused) == ([0, 1, 2], [0, 1, 2] if calls else [])
    assert first.rows == second.rows == []
    assert not torch.allclose(found[0], latents(pipe, name, guidance="cfg"), atol=1e-3)


def test_steps_after_the_pipeline_has_switched_guidance_off():
    """A forecast takes the last output that the pipeline went on with, guided or not."""
    off = {"cfg_trunc_ratio": 0.5, "cfg_normalization": False}
    for guidance in (
        AdaptiveGuidance(-1.0, space="native", then="forecast"),
        forecast(space="native"),
    ):
        pipe, outputs = guided(FAMILIES["lumina2"].build()), []
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda out, *a, step=step, seen=outputs, **k: (
            seen.append(out.clone()) or step(out, *a, **k)
        )
        latents(pipe, "lumina2", batch=1, num_inference_steps=12, guidance=guidance, **off)
        rests = [bool(record.skipped) for record in pipe.guidance_trace.steps]
        assert sum(rests[6:]) >= 2
        for i, (before, output) in enumerate(itertools.pairwise(outputs), 1):
            assert torch.allclose(before, output, rtol=1e-4, atol=1e-5) == rests[i]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_wrapped_denoisers(name):
    """Forwards that take anything: PEFT's wrapper, a function put in the place of another."""
    expected = latents(guided(FAMILIES[name].build()), name, guidance="apg")
    pipe = guided(FAMILIES[name].build())
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert equal(latents(pipe, name, guidance="apg"), expected)
    pipe = guided(FAMILIES[name].build())
    adapter = peft.LoraConfig(r=2, target_modules=["to_q"])  # its first product is zero
    pipe.transformer = peft.get_peft_model(pipe.transformer, adapter)
    assert equal(latents(pipe, name, guidance="apg"), expected)


def test_caches_in_the_denoiser():
    pipe = guided(FAMILIES["cogvideox"].build())
    expected = latents(pipe, "cogvideox", guidance="cfg")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    assert equal(latents(pipe, "cogvideox", guidance="cfg"), expected)
    with pytest.raises(LayoutError, match="cache is enabled"):
        latents(pipe, "cogvideox", guidance="hold")
    pipe.transformer.disable_cache()
    assert torch.isfinite(torch.as_tensor(latents(pipe, "cogvideox", guidance="hold"))).all()


def test_one_branch_cannot_be_guided():
    distilled = FAMILIES["sd"].build()
    distilled.unet = components.unet(in_channels=4, time_cond_proj_dim=8)
    for pipe, name, extra in (
        (distilled, "sd", {}),  # the scale is an input of the network
        (FAMILIES["kandinsky3"].build(), "kandinsky3", {"guidance_scale": 0.9}),
        (FAMILIES["lcm"].build(), "lcm", {}),
        (FAMILIES["flux_fill"].build(), "flux_fill", {}),
        (FAMILIES["visual_cloze"].build(), "visual_cloze", {}),
    ):
        for guidance in ("apg", "ag", "hold", Interval(1, 2)):
            with pytest.raises(LayoutError, match="evaluates one branch"):
                latents(guided(pipe), name, guidance=guidance, **extra)
            assert pipe.guidance_trace is None


@pytest.mark.parametrize("rule", [APG(space="native"), CFG() | hold(space="native")])
def test_one_branch_of_a_pipeline_that_says_it_guides(rule):
    pipe = guided(FAMILIES["sana_sprint"].build())
    with pytest.raises(LayoutError, match="evaluates one branch"):
        latents(pipe, "sana_sprint", guidance=rule)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sd", {"guidance_scale": 0.0}),
        ("z_image", {"guidance_scale": 0.0}),  # its scale is w - 1
        ("flux", {"negative": False}),
        ("lcm", {}),
        ("flux2", {}),
    ],
)
def test_steps_of_one_branch_can_be_skipped(name, extra):
    pipe = guided(FAMILIES[name].build())
    stock = latents(pipe, name, **extra)
    assert equal(stock, latents(pipe, name, guidance="cfg", **extra))
    with Rows(pipe, name) as rows:
        found = latents(pipe, name, guidance=forecast(first=0, space="native"), **extra)
    total = len(pipe.guidance_trace.steps)
    assert pipe.guidance_trace.nfe == [(total + 1) // 2] * 3
    assert sum(rows.calls) == sum(pipe.guidance_trace.nfe)
    assert not torch.allclose(stock, found, atol=1e-3)


def test_runs_of_pipelines_that_do_not_tell_their_length():
    base = FAMILIES["sdxl"].build()
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2
    )
    adapter.forward = lambda x: [torch.zeros(len(x), 8, 4, 4), torch.zeros(len(x), 16, 4, 4)]
    pipe = guided(diffusers.StableDiffusionXLAdapterPipeline(**base.components, adapter=adapter))
    pipe.set_progress_bar_config(disable=True)
    call = FAMILIES["sdxl"].call(1, False) | {"image": torch.rand(1, 3, 16, 16)}
    pipe(**call | {"num_inference_steps": 20, "denoising_end": 0.5, "guidance": "hold"})
    assert pipe.guidance_trace.nfe == [hold().nfe(10)]


def test_what_a_schedule_is_made_of_belongs_to_its_model():
    path = embedded_folder() / "guidance" / "linear-ag.json"
    schedule = Schedule(("both", "estimate") * 10, fill=load_guidance(path).policy.fill)
    with pytest.raises(ValueError, match="fitted on something else"):
        latents(guided(FAMILIES["sd"].build()), "sd", guidance=schedule, num_inference_steps=20)


def test_true_cfg_needs_a_negative_prompt():
    pipe = guided(FAMILIES["flux"].build())
    with pytest.raises(ValueError, match="without a negative prompt"):
        latents(pipe, "flux", negative=False, guidance="apg")


def test_zero_init_is_for_flow_models():
    with pytest.raises(ValueError, match="flow velocity"):
        latents(guided(FAMILIES["sd"].build()), "sd", guidance="cfg-zero*")
    pipe = guided(FAMILIES["sd3"].build())
    assert latents(pipe, "sd3", guidance=CFGZeroStar()).isfinite().all()
    late = Interval(start_step=2)  # the first steps of the run are over by then
    found = latents(pipe, "sd3", guidance=CFGZeroStar(2) | late, num_inference_steps=4)
    plain = latents(pipe, "sd3", guidance=CFGZeroStar(0) | late, num_inference_steps=4)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_no_noise_left():
    pipe = guided(FAMILIES["sd3"].build())
    sigmas = {"sigmas": [1.0, 0.7, 0.3, 0.0], "num_inference_steps": 4}
    assert latents(pipe, "sd3", guidance="forecast", **sigmas).isfinite().all()


def test_second_scale_of_wan():
    """Wan's second transformer has a scale of its own, seen by the rules as well."""
    pipe = guided(FAMILIES["wan2"].build())
    neutral = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)
    extra = {"guidance_scale": 3.0, "guidance_scale_2": 8.0}
    stock = latents(pipe, "wan2", **extra)
    torch.testing.assert_close(
        latents(pipe, "wan2", guidance=neutral, **extra), stock, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(stock, latents(pipe, "wan2", guidance_scale=3.0), atol=1e-3)
