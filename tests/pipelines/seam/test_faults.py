"""Faults that were found, each with its kind, and what is right instead."""

import copy
import itertools
import threading

import diffusers as df
import pytest
import torch
from diffusers import hooks

from pilotage.guidance import APG, AdaptiveGuidance, Schedule
from pilotage.pipelines import LayoutError, guided
from pilotage.pipelines.seam.patch import StandIn

from ...families import FAMILIES
from ..checks import (
    Rows,
    apg_error,
    equal,
    forecast_error,
    latents,
    parting_policy,
)

NEUTRAL = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)


# What is guided is not "the channels in common"


@pytest.mark.parametrize(
    "name",
    [
        *("kandinsky22_inpaint", "kandinsky_inpaint", "sd_inpaint", "sd_upscale", "lumina"),
        *("if_upscale", "sd_latent_upscale", "bria_fibo_edit"),
    ],
)
def test_what_is_guided(name):
    """A network's output may hold more than what is guided, its input more or less than that."""
    pipe = guided(FAMILIES[name].build())
    stock, found = (torch.as_tensor(latents(pipe, name, guidance=g)) for g in ("cfg", NEUTRAL))
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    assert apg_error(name) <= 1e-4
    assert forecast_error(name) <= 1e-2


# Rows of nested inputs


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit", "longcat_image", "flux", "sd3"])
def test_three_pictures_of_one_prompt(name):
    """``img_shapes=[[(1, h, w)]]`` holds three numbers, and no three samples."""
    family = FAMILIES[name]
    pipe = guided(family.build())
    one = family.call(1, family.scale_name == "true_cfg_scale")
    del one["generator"]  # each picture has its own
    extra = one | {"num_images_per_prompt": 3, "num_inference_steps": 6}
    policy = parting_policy(pipe, name, **extra)
    with Rows(pipe, name) as rows:
        together = latents(pipe, name, guidance=policy, **extra)
    nfe = pipe.guidance_trace.nfe
    assert sum(rows.calls) == sum(nfe) and len(set(nfe)) > 1
    stock = latents(pipe, name, **extra)

    def alone(row, **settings):
        generator = [family.call(3, True)["generator"][row]]
        call = extra | {"num_images_per_prompt": 1, "generator": generator}
        return pipe(**call, **settings)[0]

    for row in range(3):
        noise = (alone(row) - stock[row : row + 1]).abs().max()
        single = alone(row, guidance=policy)
        assert pipe.guidance_trace.nfe == nfe[row : row + 1]
        difference = (single - together[row : row + 1]).abs().max()
        assert difference <= 10 * noise + 1e-5 * single.abs().max()


# Which argument is the scale


def test_an_argument_that_the_loop_does_not_read():
    """Chroma's inpainting takes a true_cfg_scale, and guides at guidance_scale."""
    pipe, name = guided(FAMILIES["chroma_inpaint"].build()), "chroma_inpaint"
    expected = latents(pipe, name, guidance="apg")
    assert not equal(expected, latents(pipe, name))
    for unused in (1.0, 9.0):
        assert equal(expected, latents(pipe, name, guidance="apg", true_cfg_scale=unused))
    assert not equal(expected, latents(pipe, name, guidance="apg", guidance_scale=3.0))
    with pytest.raises(ValueError, match="^guidance_scale=1.0 switches guidance off"):
        latents(pipe, name, guidance="apg", guidance_scale=1.0, true_cfg_scale=9.0)


# What is said


@pytest.mark.parametrize("asked", ["apg", "ag", "apg+ag", "cfg+ag", "interval"])
def test_refusals_say_what_was_typed(asked):
    """And not the settings that it stands for."""
    pipe = guided(FAMILIES["sdxl"].build())
    policies = asked.endswith(("interval",))
    with pytest.raises(ValueError) as error:
        latents(pipe, "sdxl", guidance=asked, guidance_scale=float("nan") if policies else 1.0)
    assert policies or f"'{asked}'" in str(error.value)
    assert "AdaptiveGuidance(" not in str(error.value) and "APG(" not in str(error.value)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "z_image", "wan", "svd", "pix2pix"])
def test_plain_guidance_at_any_scale_is_stock(name):
    """Recipes of distilled models say guidance_scale=0.0."""
    family = FAMILIES[name]
    pipe = guided(family.build())
    argument = "max_guidance_scale" if name == "svd" else family.scale_name
    for scale in (0.0, 1.0, 0.5):
        extra = {argument: scale}
        stock = latents(pipe, name, **extra)
        assert equal(stock, latents(pipe, name, guidance="cfg", **extra))
        assert pipe.guidance_trace.nfe


def test_what_cannot_be_guided_says_so_in_two_lines():
    unet = df.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    for pipe in (
        df.DDPMPipeline(unet, df.DDPMScheduler()),
        FAMILIES["cosmos"].build(),
        FAMILIES["skyreels_df"].build(),
    ):
        with pytest.raises(LayoutError) as error:
            guided(pipe)
        lines = str(error.value).splitlines()
        assert len(lines) <= 2 and all(len(line) < 200 for line in lines)
        assert type(pipe).__name__ in lines[0]


# Networks that are exchanged on the way


def other_network(name, attribute):
    """A second network for a family's pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = getattr(FAMILIES[name].build(), attribute)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("guidance", ["apg", "apg+ag", "forecast", Schedule(("both", "cond") * 2)])
@pytest.mark.parametrize(("name", "attribute"), [("sdxl", "unet"), ("flux", "transformer")])
def test_a_network_exchanged_by_a_callback(name, attribute, guidance):
    """Guidance does not end silently, and what somebody has put there stays there."""
    pipe, new = guided(FAMILIES[name].build()), other_network(name, attribute)

    def exchange(pipe, step, timestep, tensors):
        if step == 1:
            setattr(pipe, attribute, new)
        return tensors

    extra = {"callback_on_step_end": exchange, "num_inference_steps": 4}
    with pytest.raises(LayoutError, match="its network was exchanged on the way"):
        latents(pipe, name, guidance=guidance, **extra)
    assert getattr(pipe, attribute) is new
    again = guided(FAMILIES[name].build())
    stock = latents(again, name, **extra)
    setattr(again, attribute, getattr(FAMILIES[name].build(), attribute))
    assert equal(stock, latents(again, name, guidance="cfg", **extra))
    assert getattr(again, attribute) is new


def test_a_network_exchanged_after_the_last_step_stays():
    pipe, new = guided(FAMILIES["sdxl"].build()), other_network("sdxl", "unet")
    old = pipe.unet

    def exchange(pipe, step, timestep, tensors):
        if step == 2:
            pipe.unet = new
        return tensors

    found = latents(pipe, "sdxl", guidance="apg", callback_on_step_end=exchange)
    assert pipe.unet is new
    pipe.unet = old
    assert equal(found, latents(pipe, "sdxl", guidance="apg"))


def test_a_scheduler_exchanged_on_the_way():
    """The loops of diffusers go on with what the pipeline holds then."""
    pipe = guided(FAMILIES["sdxl"].build())
    new = type(pipe.scheduler).from_config(pipe.scheduler.config)

    def exchange(pipe, step, timestep, tensors):
        if step == 0:
            new.set_timesteps(3)
            pipe.scheduler = new
        return tensors

    with pytest.raises(LayoutError, match="its scheduler was exchanged on the way"):
        latents(pipe, "sdxl", guidance="apg", callback_on_step_end=exchange)
    assert pipe.scheduler is new


# Calls within calls, beside calls, and what is left behind


def left_behind(pipe):
    """Whatever of ours is still in a pipeline."""
    return [name for name, value in vars(pipe).items() if issubclass(type(value), StandIn)]


@pytest.mark.parametrize("inner", [None, "cfg", "apg", "apg+ag", "hold"])
@pytest.mark.parametrize("outer", ["cfg", "apg", "apg+ag", "forecast"])
@pytest.mark.parametrize("name", ["sd", "flux", "sd_pag", "kandinsky22_combined"])
def test_a_preview_from_a_callback(name, outer, inner):
    """A call of the same pipeline from within its loop: neither disturbs the other."""
    pipe, previews = guided(FAMILIES[name].build()), []
    steps = {"num_inference_steps": 5}
    expected = latents(pipe, name, guidance=outer, **steps)
    nfe, preview = pipe.guidance_trace.nfe, latents(pipe, name, 1, guidance=inner)

    def look(loop, step, timestep, tensors):
        if step in (1, 2):
            previews.append(latents(pipe, name, 1, guidance=inner))
        return tensors

    found = latents(pipe, name, guidance=outer, callback_on_step_end=look, **steps)
    assert equal(found, expected)
    assert len(previews) == 2 and all(equal(preview, p) for p in previews)
    assert pipe.guidance_trace.nfe == nfe
    assert not left_behind(pipe)


def test_two_calls_at_once_are_refused_by_name():
    pipe, started, go = guided(FAMILIES["sd"].build()), threading.Event(), threading.Event()
    expected, results = latents(pipe, "sd", guidance="apg"), []

    def wait(pipe, step, timestep, tensors):
        if step == 0:
            started.set()
            assert go.wait(60)
        return tensors

    thread = threading.Thread(
        target=lambda: results.append(
            latents(pipe, "sd", guidance="apg", callback_on_step_end=wait)
        )
    )
    thread.start()
    assert started.wait(60)
    for guidance in ("apg", "cfg", None):
        with pytest.raises(RuntimeError, match="StableDiffusionPipeline.*in another thread"):
            latents(pipe, "sd", guidance=guidance)
    go.set()
    thread.join()
    assert equal(results[0], expected) and not left_behind(pipe)
    assert equal(latents(pipe, "sd", guidance="apg"), expected)


def test_copies_and_components_within_a_loop():
    """They are of the pipeline, and show nothing of ours."""
    pipe, copies, seen = guided(FAMILIES["sd"].build()), [], []
    unet, scheduler = pipe.unet, pipe.scheduler
    expected = latents(pipe, "sd", guidance="apg")

    def look(pipe, step, timestep, tensors):
        if step == 1:
            copies.extend([copy.deepcopy(pipe), copy.copy(pipe)])
            seen.append(pipe.components)
        return tensors

    assert equal(latents(pipe, "sd", guidance="apg", callback_on_step_end=look), expected)
    assert seen[0]["unet"] is unet and seen[0]["scheduler"] is scheduler
    assert type(copies[0].unet) is type(unet) and copies[0].unet is not unet
    assert copies[1].unet is unet
    for made in copies:
        assert not left_behind(made)
        assert equal(latents(made, "sd", guidance="apg"), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
@pytest.mark.parametrize("name", ["sd", "flux", "sd_pag"])
def test_nothing_is_left_behind(name, error):
    pipe = guided(FAMILIES[name].build())
    expected = latents(pipe, name, guidance="apg")
    before = {n: v for n, v in vars(pipe).items() if isinstance(v, torch.nn.Module)}

    def fail(pipe, step, timestep, tensors):
        raise error

    for guidance in ("cfg", "apg", "ag"):
        with pytest.raises(error):
            latents(pipe, name, guidance=guidance, callback_on_step_end=fail)
        assert not left_behind(pipe)
    after = {n: v for n, v in vars(pipe).items() if isinstance(v, torch.nn.Module)}
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert equal(latents(pipe, name, guidance="apg"), expected)


# Networks that hold state over the batch, or over the steps

STEPS = 6
CACHES = {
    "FirstBlockCache": (
        lambda: hooks.FirstBlockCacheConfig(threshold=0.3),
        hooks.apply_first_block_cache,
    ),
    "TextKVCache": (hooks.TextKVCacheConfig, hooks.apply_text_kv_cache),
    "MagCache": (
        lambda: hooks.MagCacheConfig(
            num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.5
        ),
        hooks.apply_mag_cache,
    ),
    "TaylorSeerCache": (
        lambda: hooks.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
        ),
        hooks.apply_taylorseer_cache,
    ),
    "PyramidAttentionBroadcast": (
        lambda: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
        ),
        hooks.apply_pyramid_attention_broadcast,
    ),
}


def cached_pipe(name, cache, enabled):
    """A family's stock pipeline with a cache, put on by the model's method or by a function."""
    pipe, (config, put_on) = FAMILIES[name].build(), CACHES[cache]
    if enabled:
        pipe.transformer.enable_cache(config())
    else:
        put_on(pipe.transformer, config())
    return pipe


def replay(network, choices, calls):
    """Do what a policy does, by hand, to the network of a stock pipeline, cond first."""
    stock, counted, now, both = network.forward, itertools.count(), [], []

    def forward(*args, **kwargs):
        step, branch = divmod(next(counted), calls)
        choice = choices[step]
        if choice == "forecast":
            return (both[branch],)
        if branch and choice == "cond":
            return (now[0],)
        if branch and choice == "estimate":
            return (now[0] - (both[0] - both[1]),)
        now[branch:] = stock(*args, **kwargs)
        if choice == "both":
            both[:] = now
        return (now[-1],)

    network.forward = forward


CHOICES = {
    "ag": ("both",) + ("cond",) * 5,
    "hold": ("both", "estimate") * 3,
    "forecast": ("both", "forecast", "forecast", "both", "forecast", "both"),
    "interval": ("cond", "cond", "both", "both", "cond", "cond"),
}
RIGHT = [  # (cache, what): not refused on pipelines with two calls
    *(("FirstBlockCache", what) for what in CHOICES),
    *(("TextKVCache", what) for what in CHOICES),
    *((cache, "ag") for cache in CACHES),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize("cache", CACHES)
def test_caches_on_pipelines_with_two_calls(cache, what, batch):
    """Right, or refused by name, whether put on by the model's method or by a function."""
    name, enabled = "flux", batch == 1
    pipe, choices = guided(cached_pipe(name, cache, enabled)), CHOICES[what]
    extra = {"num_inference_steps": STEPS}
    guidance = AdaptiveGuidance(-1.0) if what == "ag" else Schedule(choices)
    assert latents(pipe, name, batch, guidance="apg", **extra).isfinite().all()
    if (cache, what) not in RIGHT or (what == "ag" and batch > 1):
        with pytest.raises(LayoutError, match=f"{cache}.*disable it, or leave out"):
            latents(pipe, name, batch, guidance=guidance, **extra)
        return
    found = latents(pipe, name, batch, guidance=guidance, **extra)
    stock = cached_pipe(name, cache, enabled)
    replay(stock.transformer, choices, 2)
    torch.testing.assert_close(found, latents(stock, name, batch, **extra), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize(
    "cache", sorted(set(CACHES) - {"TaylorSeerCache"})
)  # finds no layer in LTX
def test_caches_on_pipelines_with_one_call(cache, what, batch):
    """A cache of whole batches: steps may be left out, rows may not."""
    name, extra = "ltx", {"num_inference_steps": STEPS}
    pipe, choices = guided(cached_pipe(name, cache, False)), CHOICES[what]
    guidance = AdaptiveGuidance(-1.0) if what == "ag" else Schedule(choices)
    if what != "forecast" or cache not in ("FirstBlockCache", "TextKVCache"):
        with pytest.raises(LayoutError, match=f"{cache}.*disable it, or leave out"):
            latents(pipe, name, batch, guidance=guidance, **extra)
        return
    found = latents(pipe, name, batch, guidance=guidance, **extra)
    stock = cached_pipe(name, cache, False)
    replay(stock.transformer, choices, 1)
    torch.testing.assert_close(found, latents(stock, name, batch, **extra), rtol=1e-4, atol=1e-4)
