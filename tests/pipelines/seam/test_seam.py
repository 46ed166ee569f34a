"""The seam: stock where guidance is plain, the paper's where it is not, nothing left behind."""

import threading
from dataclasses import replace

import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Interval, NonFinitePredictionError, forecast
from pilotage.pipelines import guided
from pilotage.pipelines.seam.layouts import LayoutError

from ...families import FAMILIES
from ..checks import (
    COVERED,
    NORM_MATCHED,
    ag_rows_ok,
    apg_error,
    cfg_bit_equal,
    equal,
    forecast_error,
    latents,
    parting_policy,
    resting_rows_ok,
)

BATCH_MATES = ["sd", "sdxl", "sdxl_controlnet", "sd3", "flux", "wan", "qwen_image", "dit"]


@pytest.fixture(scope="module")
def pipes():
    """Each family's pipeline, built once."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = FAMILIES[name].build()
        return built[name]

    return get


@pytest.mark.parametrize("name", COVERED)
def test_cfg_equals_stock_bit_for_bit(name):
    assert cfg_bit_equal(name)


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


@pytest.mark.parametrize("name", COVERED)
def test_apg_equals_algorithm_1_in_the_stock_loop(name):
    assert apg_error(name) <= 1e-4


@pytest.mark.parametrize("name", COVERED)
def test_ag_rows(name):
    assert ag_rows_ok(name)


@pytest.mark.parametrize("name", [name for name in COVERED if name not in NORM_MATCHED])
def test_steps_that_evaluate_nothing(name):
    assert forecast_error(name) <= 1e-2
    assert resting_rows_ok(name)


@pytest.mark.parametrize("name", NORM_MATCHED)
def test_norms_of_what_is_not_evaluated_cannot_be_matched(pipes, name):
    with pytest.raises(LayoutError, match="the norm of the conditional one"):
        latents(guided(pipes(name)), name, guidance=forecast(first=0))


@pytest.mark.parametrize("name", COVERED)
def test_ag_above_one_is_cfg(pipes, name):
    pipe = guided(pipes(name))
    assert equal(latents(pipe, name, guidance=AdaptiveGuidance(1.5)), latents(pipe, name))


@pytest.mark.parametrize(
    ("name", "then"),
    [
        *((name, "cond") for name in BATCH_MATES),
        *((name, "forecast") for name in BATCH_MATES if name not in NORM_MATCHED),
    ],
)
def test_samples_do_not_depend_on_batch_mates(pipes, name, then):
    """Prompts that stop at different steps give what each gives alone.

    The tolerance is the network's own: ten times by how much a stock picture changes between batch
    1 and batch 3 (matrix products of other shapes round otherwise).
    """
    pipe = guided(pipes(name))
    extra = {"num_inference_steps": 6}
    policy = replace(parting_policy(pipe, name, **extra), then=then)
    together = latents(pipe, name, guidance=policy, **extra)
    nfe, stock = pipe.guidance_trace.nfe, latents(pipe, name, **extra)
    negative = FAMILIES[name].scale_name == "true_cfg_scale"
    for row in range(3):

        def call():
            call = FAMILIES[name].call(3, negative).items()
            pick = slice(row, row + 1)  # noqa: B023
            return {k: v[pick] if isinstance(v, (list, torch.Tensor)) else v for k, v in call}

        noise = (pipe(**call() | extra)[0] - stock[row : row + 1]).abs().max()
        alone = pipe(**call() | extra, guidance=policy)[0]
        assert pipe.guidance_trace.nfe == nfe[row : row + 1]
        difference = (alone - together[row : row + 1]).abs().max()
        assert difference <= 10 * noise + 1e-5 * alone.abs().max()


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
    before, network = latents(pipe, "sd"), pipe.unet
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = step == 0
        return tensors

    latents(pipe, "sd", guidance="apg", callback_on_step_end=stop, num_inference_steps=4)
    assert seen == [0]
    assert len(pipe.guidance_trace.steps) == 1
    assert pipe.unet is network
    assert equal(latents(pipe, "sd"), before)


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
    assert equal(stock, latents(pipe, "sd", guidance=Interval(noise_low=1e-3), **options))
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
