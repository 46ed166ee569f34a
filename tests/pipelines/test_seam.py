"""The seam: stock where guidance is plain, the paper's where it is not, nothing left behind."""

import threading

import numpy as np
import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Interval, NonFinitePredictionError
from pilotage.pipelines import LAYOUTS, guided

from ..families import FAMILIES
from ..guidance.oracles import PaperMomentum, paper_apg
from .x0_oracle import own_prediction, own_x0

COVERED = [name for name, family in FAMILIES.items() if family.cls in LAYOUTS]


@pytest.fixture(scope="module")
def pipes():
    """Each family's pipeline, built once."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = FAMILIES[name].build()
        return built[name]

    return get


def latents(pipe, name, batch=3, negative=None, **extra):
    if negative is None:  # true CFG means a second branch only where there is a negative prompt
        negative = FAMILIES[name].scale_name == "true_cfg_scale"
    return pipe(**(FAMILIES[name].call(batch, negative) | extra))[0]


def equal(a, b):
    return torch.equal(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


class Rows:
    """Counts the rows that reach a pipeline's denoisers."""

    def __init__(self, pipe, name):
        self.calls = []
        networks = [getattr(pipe, denoiser) for denoiser in FAMILIES[name].denoisers]
        self.handles = [
            network.register_forward_pre_hook(self._count, with_kwargs=True) for network in networks
        ]

    def _count(self, module, args, kwargs):
        self.calls.append(len(args[0] if args else next(iter(kwargs.values()))))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", COVERED)
def test_cfg_equals_stock_bit_for_bit(pipes, name):
    pipe = pipes(name)
    for batch in (1, 3):
        for negative in {False, FAMILIES[name].negative}:
            stock = latents(pipe, name, batch, negative)
            ours = latents(guided(pipe), name, batch, negative, guidance="cfg")
            assert equal(stock, ours)
            assert equal(stock, latents(pipe, name, batch, negative)), "guidance=None is stock"


@pytest.mark.parametrize("name", COVERED)
def test_neutral_apg_equals_cfg_to_rounding(pipes, name):
    pipe = guided(pipes(name))
    neutral = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)
    stock, ours = latents(pipe, name), latents(pipe, name, guidance=neutral)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COVERED)
def test_repeats_bit_for_bit(pipes, name):
    pipe = guided(pipes(name))
    first = latents(pipe, name, guidance="apg+ag")
    assert equal(first, latents(pipe, name, guidance="apg+ag"))
    assert not equal(first, latents(pipe, name)), "APG must change something"


# What the pipelines' sources say, read apart from Pilotage's layouts.
NEGATED = {"lumina", "lumina2", "z_image"}
COND_FIRST = {"dit", "lumina", "z_image", "stable_cascade"}
SCALE_IS_W_MINUS_1 = {"kandinsky3", "z_image"}
GUIDED_CHANNELS = {"lumina": 3}
FIRST_STEP = {"sd_img2img": 1, "sdxl_img2img": 1}


class PaperGuidance:
    """Makes a stock pipeline follow Algorithm 1, by hooks that replace what its denoisers return.

    Denoised images come from the scheduler's own code, the algorithm runs in float64.
    """

    eta, r, beta = 0.2, 2.0, -0.6

    def __init__(self, pipe, name, scale):
        self.pipe, self.name = pipe, name
        self.w = scale + (name in SCALE_IS_W_MINUS_1)
        self.sign = -1 if name in NEGATED else 1
        self.index, self.first, self.averages = FIRST_STEP.get(name, 0), None, None
        two_calls = FAMILIES[name].layout.startswith("two_calls")
        hook = self.two_calls if two_calls else self.batched
        for denoiser in FAMILIES[name].denoisers:
            getattr(pipe, denoiser).register_forward_hook(hook, with_kwargs=True)

    def guide(self, x, cond, uncond):
        """The guided network output of one step; channels that are not guided stay cond's."""
        channels = min(x.shape[1], cond.shape[1], GUIDED_CHANNELS.get(self.name, x.shape[1]))
        x, rest = x[:, :channels].double(), cond[:, channels:].double()
        self.averages = self.averages or [PaperMomentum(self.beta) for _ in x]
        c, u = (
            own_x0(self.pipe.scheduler, self.index, self.sign * pred[:, :channels], x).numpy()
            for pred in (cond, uncond)
        )
        rows = [
            paper_apg(c[i], u[i], self.w, average, self.eta, self.r)
            for i, average in enumerate(self.averages)
        ]
        guided = torch.from_numpy(np.stack(rows))
        pred = self.sign * own_prediction(self.pipe.scheduler, self.index, guided, x)
        self.index += 1
        return torch.cat([pred, rest], 1)

    def batched(self, module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        out = output if isinstance(output, torch.Tensor) else output[0]
        listed = isinstance(x, list)
        x, out = (torch.stack(list(v)) if listed else v for v in (x, out))
        cond, uncond = out.chunk(2)[:: 1 if self.name in COND_FIRST else -1]
        guided = self.guide(x.chunk(2)[0], cond, uncond).to(out.dtype)
        both = torch.cat([guided, guided])
        both = list(both) if listed else both
        if isinstance(output, torch.Tensor):
            return both
        return (both,) if isinstance(output, tuple) else type(output)(sample=both)

    def two_calls(self, module, args, kwargs, output):
        if self.first is None:
            self.first = (next(iter(kwargs.values())), output[0])
            return output
        x, cond = self.first
        self.first = None
        guided = self.guide(x, cond, output[0])
        # The unconditional prediction u for which u + w (c - u) is the guided one.
        return (((guided - self.w * cond.double()) / (1 - self.w)).to(cond.dtype),)


def apg_error(name):
    """Relative difference between the guided pipeline and the stock one led by the paper."""
    family, scale = FAMILIES[name], 6.0
    extra = {family.scale_name: scale}
    rule = APG(
        eta=PaperGuidance.eta,
        norm_threshold=PaperGuidance.r,
        momentum=PaperGuidance.beta,
        threshold_unit="l2",
    )
    ours = latents(guided(family.build()), name, guidance=rule, **extra)
    stock = family.build()
    PaperGuidance(stock, name, scale)
    expected = latents(stock, name, **extra)
    ours, expected, plain = (
        torch.as_tensor(np.asarray(v)).double()
        for v in (ours, expected, latents(family.build(), name, **extra))
    )
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", COVERED)
def test_apg_equals_algorithm_1_in_the_stock_loop(name):
    assert apg_error(name) <= 1e-4


@pytest.mark.parametrize("name", COVERED)
def test_ag_extremes(pipes, name):
    pipe = guided(pipes(name))
    never = latents(pipe, name, guidance=AdaptiveGuidance(1.5))
    assert equal(never, latents(pipe, name))
    steps = len(pipe.guidance_trace.steps)
    assert pipe.guidance_trace.nfe == [2 * steps] * 3
    with Rows(pipe, name) as rows:
        latents(pipe, name, guidance=AdaptiveGuidance(-1.0))
    assert pipe.guidance_trace.nfe == [steps + 1] * 3
    assert sum(rows.calls) == 3 * (steps + 1)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl_controlnet"])
def test_ag_rows_and_batch_mates(pipes, name):
    """Prompts that stop at different steps: counted at the network, equal to each alone."""
    pipe = guided(pipes(name))
    latents(pipe, name, guidance=AdaptiveGuidance(1.5), num_inference_steps=6)
    gammas = sorted(g for step in pipe.guidance_trace.steps for g in step.gamma.tolist())
    for low, high in zip(gammas, gammas[1:], strict=False):  # until the samples part
        policy = AdaptiveGuidance((low + high) / 2)
        with Rows(pipe, name) as rows:
            together = latents(pipe, name, guidance=policy, num_inference_steps=6)
        nfe = pipe.guidance_trace.nfe
        if len(set(nfe)) > 1:
            break
    assert len(set(nfe)) > 1
    assert sum(rows.calls) == sum(nfe)
    for row in range(3):
        single = {
            key: value[row : row + 1] if isinstance(value, (list, torch.Tensor)) else value
            for key, value in FAMILIES[name].call(3, False).items()
        }
        alone = pipe(**(single | {"guidance": policy, "num_inference_steps": 6}))[0]
        assert pipe.guidance_trace.nfe == nfe[row : row + 1]
        # Batched and single matrix products differ in rounding only.
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_two_images_per_prompt_and_interval(pipes):
    pipe = guided(pipes("sd"))
    call = FAMILIES["sd"].call(2, True)
    call["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
    call |= {"num_images_per_prompt": 2, "num_inference_steps": 5}
    pipe(**call, guidance=Interval(1, 3))
    steps = len(pipe.guidance_trace.steps)
    assert pipe.guidance_trace.nfe == [steps + 2] * 4


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_exception_leaves_the_stock_pipeline(pipes, name):
    pipe = guided(pipes(name))
    before, network = latents(pipe, name), pipe.unet

    def fail(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, name, guidance="apg", callback_on_step_end=fail)
    assert pipe.unet is network
    assert type(pipe.unet) is type(network)
    assert equal(latents(pipe, name), before)


def test_interrupt_and_callback(pipes):
    pipe = guided(pipes("sd"))
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = step == 0
        return tensors

    latents(pipe, "sd", guidance="apg", callback_on_step_end=stop, num_inference_steps=4)
    assert seen == [0]
    assert len(pipe.guidance_trace.steps) == 1


def test_guidance_switched_off_on_the_way(pipes):
    """A callback that ends guidance, as diffusers' cutoff callbacks do."""
    pipe = guided(pipes("sd"))

    def cut(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    options = {
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "num_inference_steps": 5,
    }
    stock = latents(pipe, "sd", **options)
    assert equal(stock, latents(pipe, "sd", guidance="cfg", **options))
    steps = len(pipe.guidance_trace.steps)
    assert pipe.guidance_trace.nfe == [steps + 2] * 3


def test_two_threads_share_one_unet():
    first, second = FAMILIES["sd"].build(), FAMILIES["sd"].build()
    second.unet = first.unet
    guided(first)
    alone = [latents(first, "sd", guidance="apg"), latents(second, "sd")]
    results = [None, None]

    def work(slot, pipe, extra):
        for _ in range(3):
            results[slot] = latents(pipe, "sd", **extra)

    threads = [
        threading.Thread(target=work, args=(0, first, {"guidance": "apg"})),
        threading.Thread(target=work, args=(1, second, {})),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, expected in zip(results, alone, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert "forward" not in first.unet.__dict__


def test_nan_prediction_names_the_step():
    pipe = guided(FAMILIES["sd"].build())
    calls = []

    def poison(module, args, output):
        calls.append(1)
        return (output[0] * float("nan"),) if len(calls) == 3 else output

    pipe.unet.register_forward_hook(poison)
    with pytest.raises(NonFinitePredictionError, match="step 2 of"):
        latents(pipe, "sd", guidance="apg", num_inference_steps=5)
    assert len(calls) == 3
