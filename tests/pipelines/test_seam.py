"""The seam: stock results where guidance is plain, the paper's where it is not, nothing left behind."""

import threading

import diffusers
import numpy as np
import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Interval, NonFinitePredictionError
from pilotage.pipelines import LAYOUTS, guided

from ..families import FAMILIES
from ..guidance.oracles import PaperMomentum, paper_apg

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


def latents(pipe, name, batch=3, negative=False, **extra):
    return pipe(**(FAMILIES[name].call(batch, negative) | extra))[0]


def equal(a, b):
    return torch.equal(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


class Rows:
    """Counts the rows that reach a network."""

    def __init__(self, network):
        self.calls = []
        self.handle = network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.calls.append(len(args[0] if args else next(iter(kwargs.values()))))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


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


def test_apg_equals_algorithm_1_in_the_stock_loop():
    """SDXL with DDIM: the stock loop around a UNet whose output is the paper's, in float64."""
    pipe = FAMILIES["sdxl"].build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    rule = APG(eta=0.2, norm_threshold=2.0, momentum=-0.6, threshold_unit="l2")
    ours = latents(guided(pipe), "sdxl", guidance=rule, guidance_scale=8.0)
    averages = [PaperMomentum(-0.6) for _ in range(3)]

    def paper(module, args, output):
        x, t = args[0].double().numpy(), int(args[1])
        bar = float(pipe.scheduler.alphas_cumprod[t])
        x0 = (x - (1 - bar) ** 0.5 * output[0].double().numpy()) / bar**0.5
        u, c = x0[:3], x0[3:]
        rows = [paper_apg(c[i], u[i], 8.0, averages[i], 0.2, 2.0) for i in range(3)]
        eps = (x[:3] - bar**0.5 * np.stack(rows)) / (1 - bar) ** 0.5
        return (torch.tensor(np.concatenate([eps, eps]), dtype=torch.float32),)

    handle = pipe.unet.register_forward_hook(paper)
    expected = latents(pipe, "sdxl", guidance_scale=8.0)
    handle.remove()
    error = (ours - expected).norm() / expected.norm()
    assert error < 1e-4
    assert (ours - latents(pipe, "sdxl", guidance_scale=8.0)).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize("name", COVERED)
def test_ag_extremes(pipes, name):
    pipe = guided(pipes(name))
    never = latents(pipe, name, guidance=AdaptiveGuidance(1.5))
    assert equal(never, latents(pipe, name))
    steps = len(pipe.guidance_trace.steps)
    assert pipe.guidance_trace.nfe == [2 * steps] * 3
    with Rows(getattr(pipe, FAMILIES[name].denoisers[0])) as rows:
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
        with Rows(pipe.unet) as rows:
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
