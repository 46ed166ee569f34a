"""The seam: stock where guidance is plain, the paper's where it is not, nothing left behind."""

import threading

import pytest
import torch

from pilotage.guidance import APG, Interval, NonFinitePredictionError, forecast
from pilotage.pipelines import guided
from pilotage.pipelines.seam.layouts import LayoutError

from ...families import FAMILIES
from ..checks import (
    Rows,
    ag_rows_ok,
    apg_error,
    cfg_bit_equal,
    equal,
    forecast_error,
    guided_steps,
    latents,
    mates_error,
    resting_rows_ok,
    stopping_at,
)

# One family for every kind of loop; `python -m tests.seam_report` measures all of them.
KINDS = {
    "sd": "one batch, uncond before cond",
    "lumina": "cond before uncond; only some channels are guided",
    "z_image": "samples in lists, a scale of w - 1, the prediction negated",
    "hidream": "negated, and uncond first",
    "flux": "branch after branch",
    "qwen_image": "branch after branch; every token is given the norm of cond's",
    "longcat_image": "that norm at most",
    "sd_pag": "three branches, one of perturbed attention",
    "pix2pix": "three branches at two scales",
    "dreamlite_edit": "three branches in another order",
    "ltx2_all_guidances": "four branches in a batch and two calls; sound beside pictures",
    "ideogram4": "a network for each branch",
    "wan2": "a network after the other, each with a scale of its own",
    "cogvideox": "frames before channels",
    "svd": "a scale for every frame",
    "animatediff": "text for every frame",
    "flux_kontext": "reference tokens behind those that are guided",
    "ltx_image": "a frame that is given; tokens that are pictures to the scheduler",
    "dit": "latents stepped twice",
    "kandinsky22_inpaint": "more channels go in, and come out, than are guided",
    "kandinsky22_combined": "the loop is an inner pipeline's",
    "sd_latent_upscale": "a preconditioned network",
    "stable_audio": "sound",
    "wan_animate": "piece after piece",
}
WITH_SOUND = ["ltx2_all_guidances"]
ALONE = [name for name in KINDS if name not in WITH_SOUND]
# Where three samples may be called together.
BATCH_MATES = [name for name in ALONE if FAMILIES[name].max_batch == 3]


@pytest.fixture(scope="module")
def pipes():
    """Each family's pipeline, built once."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = FAMILIES[name].build()
        return built[name]

    return get


@pytest.mark.parametrize("name", KINDS)
def test_cfg_equals_stock_bit_for_bit(name):
    assert cfg_bit_equal(name)


@pytest.mark.parametrize("name", KINDS)
def test_neutral_apg_equals_cfg_to_rounding(pipes, name):
    pipe = guided(pipes(name))
    neutral = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)
    stock, ours = latents(pipe, name), latents(pipe, name, guidance=neutral)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_repeats_bit_for_bit(pipes, name):
    pipe = guided(pipes(name))
    learning = latents(pipe, name, guidance="apg+ag")  # its first step is evaluated whole
    first = latents(pipe, name, guidance="apg+ag")
    torch.testing.assert_close(torch.as_tensor(learning), torch.as_tensor(first))
    assert equal(first, latents(pipe, name, guidance="apg+ag"))
    assert not equal(first, latents(pipe, name)), "APG must change something"


@pytest.mark.parametrize("name", KINDS)
def test_apg_equals_algorithm_1_in_the_stock_loop(name):
    assert apg_error(name) <= 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_ag_rows(name):
    assert ag_rows_ok(name)


@pytest.mark.parametrize("name", ALONE)
def test_steps_that_evaluate_nothing(name):
    assert forecast_error(name) <= 1e-2
    assert resting_rows_ok(name)


@pytest.mark.parametrize("name", WITH_SOUND)
def test_what_is_made_beside_cannot_be_made_up(pipes, name):
    for guidance in (forecast(first=0), "hold"):
        with pytest.raises(LayoutError, match="also predicts sound"):
            latents(guided(pipes(name)), name, guidance=guidance)


@pytest.mark.parametrize("name", KINDS)
def test_ag_above_one_is_cfg(pipes, name):
    pipe = guided(pipes(name))
    assert equal(latents(pipe, name, guidance=stopping_at(name, 1.5)), latents(pipe, name))


@pytest.mark.parametrize(
    ("name", "then"),
    [(name, "cond") for name in BATCH_MATES]
    + [(name, "forecast") for name in ("sd", "flux", "qwen_image", "sd_pag")],
)
def test_samples_do_not_depend_on_batch_mates(name, then):
    assert mates_error(name, then) <= 1


def test_two_images_per_prompt_and_interval(pipes):
    pipe = guided(pipes("sd"))
    call = FAMILIES["sd"].call(2, True)
    call["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
    call |= {"num_images_per_prompt": 2, "num_inference_steps": 5}
    with Rows(pipe, "sd") as rows:
        pipe(**call, guidance=Interval(1, 3))
    assert guided_steps(pipe.guidance_trace) == [2] * 4
    assert pipe.guidance_trace.nfe == [sum(rows.calls) // 4] * 4


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
