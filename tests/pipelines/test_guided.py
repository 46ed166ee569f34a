"""Guided classes and instances: errors before any work, saving, pickling, signatures."""

import inspect
import json
import math
import pickle

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import pilotage.pipelines
from pilotage.guidance import APG
from pilotage.pipelines import (
    GuidedMixin,
    LayoutError,
    UnknownSchedulerError,
    guided,
    model_family,
)

from ..families import FAMILIES


@pytest.fixture(scope="module")
def pipe():
    return guided(FAMILIES["sd"].build())


@pytest.fixture
def no_work(pipe, monkeypatch):
    """Fails the test if the text encoder or the UNet is evaluated."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("work was done before the error")

    for network in (pipe.text_encoder, pipe.unet):
        monkeypatch.setattr(network, "forward", refuse)
    return pipe


def test_guided_returns_the_same_object():
    stock = FAMILIES["sd"].build()
    pipe = guided(stock)
    assert pipe is stock
    assert guided(pipe) is pipe
    assert type(pipe) is pilotage.pipelines.StableDiffusionPipeline
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)


def test_names_are_importable_and_listed():
    assert "StableDiffusionXLPipeline" in dir(pilotage.pipelines)
    from pilotage.pipelines import StableDiffusionXLPipeline

    assert issubclass(StableDiffusionXLPipeline, diffusers.StableDiffusionXLPipeline)
    assert pickle.loads(pickle.dumps(StableDiffusionXLPipeline)) is StableDiffusionXLPipeline
    with pytest.raises(ImportError, match="NoSuchPipeline"):
        from pilotage.pipelines import NoSuchPipeline  # noqa: F401


def test_signature_and_documentation():
    call = pilotage.pipelines.StableDiffusionPipeline.__call__
    parameters = inspect.signature(call).parameters
    assert {"prompt", "guidance_scale", "guidance", "detailed_trace"} <= set(parameters)
    assert "guidance (`str`, rule, policy" in call.__doc__


def test_saves_as_the_stock_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(stock) is diffusers.StableDiffusionPipeline
    again = pilotage.pipelines.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again, GuidedMixin)
    call = FAMILIES["sd"].call
    again.set_progress_bar_config(disable=True)
    expected = pipe(**call(2, False), guidance="apg")[0]
    assert torch.equal(again(**call(2, False), guidance="apg")[0], expected)


def test_loads_whatever_class_a_folder_names(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = pilotage.pipelines.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is pilotage.pipelines.StableDiffusionPipeline


def test_configuration_is_untouched_by_a_call(pipe):
    before = dict(pipe.config)
    pipe(**FAMILIES["sd"].call(1, False), guidance="apg+ag")
    assert dict(pipe.config) == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"guidance": "agp"}, "unknown guidance 'agp'.*apg, cfg"),
        ({"guidance": "apg", "guidance_scale": math.nan}, "finite"),
        ({"guidance": "forecast", "guidance_scale": math.inf}, "finite"),
        ({"guidance": "ag", "guidance_scale": 0}, "> 0"),
        ({"guidance": "apg", "guidance_scale": -2.0}, "> 0"),
        ({"guidance": "apg", "guidance_scale": "7"}, "a finite number, got '7'"),
        ({"guidance": "apg", "guidance_scale": 1.0}, "switches guidance off"),
        ({"guidance": "ag", "guidance_scale": 0.5}, "switches guidance off"),
        ({"guidance": "interval"}, "no known window"),
        ({"guidance": "apg", "prompt": 3}, "`prompt` has to be of type"),
    ],
)
def test_errors_come_before_any_work(no_work, extra, message):
    with pytest.raises(ValueError, match=message):
        no_work(**(FAMILIES["sd"].call(2, False) | extra))


@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0, 1.0])
def test_plain_guidance_takes_the_scales_that_the_stock_pipeline_takes(pipe, scale):
    stock, ours = (
        pipe(**FAMILIES["sd"].call(2, False) | {"guidance": guidance, "guidance_scale": scale})[0]
        for guidance in (None, "cfg")
    )
    assert torch.equal(stock, ours)


def test_wrong_guidance_type(no_work):
    with pytest.raises(TypeError, match="guidance must be a name"):
        no_work(**FAMILIES["sd"].call(1, False), guidance=7)


def test_pipeline_without_guidance_is_refused():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(LayoutError, match="no classifier-free guidance"):
        guided(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))


def test_unknown_scheduler_is_refused_for_x0_rules_only():
    pipe = guided(FAMILIES["sd"].build())

    # A copy of the code is of no known class; a subclass would be.
    members = {k: v for k, v in vars(diffusers.DDIMScheduler).items() if "dict" not in k}
    home_made = type("HomeMadeScheduler", (SchedulerMixin, ConfigMixin), members)
    pipe.scheduler = home_made.from_config(pipe.scheduler.config)
    call = FAMILIES["sd"].call(1, False)
    with pytest.raises(UnknownSchedulerError, match="HomeMadeScheduler are not known.*\n.*DDIM"):
        pipe(**call, guidance="apg")
    pipe(**FAMILIES["sd"].call(1, False), guidance=APG(space="native"))


def test_a_subclass_of_a_known_scheduler_guides_as_that():
    results = []
    for cls in (diffusers.DDIMScheduler, type("Mine", (diffusers.DDIMScheduler,), {})):
        pipe = guided(FAMILIES["sd"].build())
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        results.append(pipe(**FAMILIES["sd"].call(2, False), guidance="apg")[0])
    assert torch.equal(*results)


def test_model_families():
    assert model_family(FAMILIES["sdxl"].build()) == "sdxl"
    assert model_family(FAMILIES["sd"].build()) is None
