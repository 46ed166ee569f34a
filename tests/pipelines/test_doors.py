"""Doors of diffusers that make one pipeline of another, or choose its class: none is deaf."""

import diffusers
import pytest
import torch

import pilotage.pipelines
from pilotage.pipelines import GuidedMixin, guided, guided_class

from ..families import FAMILIES
from .checks import equal, latents

AUTO = {
    "AutoPipelineForText2Image": ("sd", "StableDiffusionPipeline"),
    "AutoPipelineForImage2Image": ("sd_img2img", "StableDiffusionImg2ImgPipeline"),
    "AutoPipelineForInpainting": ("sd_inpaint", "StableDiffusionInpaintPipeline"),
}


def ours(name):
    return getattr(pilotage.pipelines, name)


def check_guides(pipe, name):
    """It takes guidance=, as stock for "cfg", and a name that is none is not passed over."""
    assert isinstance(pipe, GuidedMixin)
    pipe.set_progress_bar_config(disable=True)
    plain = latents(pipe, name)
    assert equal(plain, latents(pipe, name, guidance="cfg"))
    assert not equal(plain, latents(pipe, name, guidance="apg"))
    with pytest.raises(ValueError, match="nonsense"):
        latents(pipe, name, guidance="nonsense")


@pytest.fixture
def stock():
    return FAMILIES["sd"].build()


@pytest.mark.parametrize("auto", AUTO)
def test_auto_pipelines_load_guided(stock, auto, tmp_path):
    stock.save_pretrained(tmp_path)
    found = ours(auto).from_pretrained(tmp_path)
    family, cls = AUTO[auto]
    assert type(found).stock_class is getattr(diffusers, cls)
    expected = getattr(diffusers, auto).from_pretrained(tmp_path)
    assert type(expected) is getattr(diffusers, cls)  # diffusers' own is as it was
    assert list(found.config.items()) == list(expected.config.items())
    check_guides(found, family)


@pytest.mark.parametrize("auto", AUTO)
@pytest.mark.parametrize("source", [lambda pipe: pipe, guided], ids=["stock", "guided"])
def test_auto_pipelines_make_guided_ones_of_any(stock, auto, source):
    given = source(stock.to(torch.bfloat16))
    cls = type(given)
    found = ours(auto).from_pipe(given)
    assert type(found).stock_class is getattr(diffusers, AUTO[auto][1])
    assert found.unet is given.unet and found.unet.dtype == torch.bfloat16
    assert type(given) is cls
    check_guides(found.to(torch.float32), AUTO[auto][0])


def test_auto_pipelines_go_round(stock):
    text = ours("AutoPipelineForText2Image").from_pipe(stock)
    image = ours("AutoPipelineForImage2Image").from_pipe(text)
    again = ours("AutoPipelineForText2Image").from_pipe(image)
    assert type(again) is type(text) and again.components == text.components
    hidden = {"_name_or_path", "_requires_aesthetics_score", "_diffusers_version"}
    assert {k: v for k, v in again.config.items() if k not in hidden} == {
        k: v for k, v in stock.config.items() if k not in hidden
    }


def test_auto_pipelines_choose_further_classes():
    """As diffusers does: perturbed attention, other families."""
    pipe = ours("AutoPipelineForText2Image").from_pipe(FAMILIES["sdxl"].build(), enable_pag=True)
    assert type(pipe).stock_class is diffusers.StableDiffusionXLPAGPipeline
    flux = ours("AutoPipelineForText2Image").from_pipe(FAMILIES["flux"].build())
    assert type(flux).stock_class is diffusers.FluxPipeline
    with pytest.raises(EnvironmentError, match="from_pretrained"):
        ours("AutoPipelineForText2Image")()


def test_names_are_importable_and_listed():
    for name in AUTO:
        assert name in dir(pilotage.pipelines) and ours(name) is ours(name)
        assert ours(name).stock_class is getattr(diffusers, name)
    with pytest.raises(AttributeError, match="AutoPipelineForSmells"):
        ours("AutoPipelineForSmells")


class Renamed(diffusers.StableDiffusionPipeline):
    pass


class Wrapping(diffusers.StableDiffusionImg2ImgPipeline):
    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        return super().from_pipe(pipeline, **kwargs)


DEAF = [
    (diffusers.StableDiffusionImg2ImgPipeline, "pilotage.pipelines.StableDiffusionImg2ImgPipeline"),
    (diffusers.StableDiffusionPipeline, "pilotage.pipelines.StableDiffusionPipeline"),
    *((getattr(diffusers, name), f"pilotage.pipelines.{name}") for name in AUTO),
    (Renamed, r"guided_class\(Renamed\)"),
    (Wrapping, r"guided_class\(Wrapping\)"),
]


@pytest.mark.parametrize(("cls", "door"), DEAF)
def test_stock_classes_do_not_make_a_deaf_pipeline(stock, cls, door):
    pipe, config = guided(stock), dict(stock.config)
    with pytest.raises(ValueError, match=rf"guidance=.*\n.*use {door}\.from_pipe\(pipe\)"):
        cls.from_pipe(pipe)
    assert dict(pipe.config) == config and pipe.unet.dtype == torch.float32
    check_guides(pipe, "sd")


def test_what_the_message_names_works(stock):
    pipe = guided(stock)
    check_guides(ours("StableDiffusionImg2ImgPipeline").from_pipe(pipe), "sd_img2img")
    check_guides(guided_class(Wrapping).from_pipe(pipe), "sd_img2img")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline and other.unet is pipe.unet


def test_components_can_be_read_in_every_other_way(stock):
    pipe = guided(stock)
    assert {name: part for name, part in pipe.components.items()} == pipe.components

    def from_pipe(pipeline):  # anybody's function of that name
        return diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components)

    assert from_pipe(pipe).unet is pipe.unet


PAIRS = [
    ("sd", "StableDiffusionImg2ImgPipeline", "sd_img2img"),
    ("sd_img2img", "StableDiffusionInpaintPipeline", "sd_inpaint"),
    ("sdxl", "StableDiffusionXLImg2ImgPipeline", "sdxl_img2img"),
    ("sdxl_img2img", "StableDiffusionXLPipeline", "sdxl"),
    ("sd3", "StableDiffusion3Img2ImgPipeline", "sd3_img2img"),
    ("flux", "FluxImg2ImgPipeline", "flux_img2img"),
]


@pytest.mark.parametrize(("source", "cls", "target"), PAIRS)
def test_guided_classes_make_one_of_a_stock_pipeline(source, cls, target):
    given = FAMILIES[source].build()
    found = ours(cls).from_pipe(given)
    assert not isinstance(given, GuidedMixin)
    assert type(found).stock_class is getattr(diffusers, cls)
    stock = getattr(diffusers, cls).from_pipe(FAMILIES[source].build())
    stock.set_progress_bar_config(disable=True)
    found.set_progress_bar_config(disable=True)
    assert equal(latents(stock, target), latents(found, target, guidance="cfg"))
    assert not equal(latents(stock, target), latents(found, target, guidance="apg"))


@pytest.mark.parametrize("door", ["DiffusionPipeline", "StableDiffusionPipeline"])
def test_custom_pipelines_are_made_guided(stock, door, tmp_path):
    (tmp_path / "pipeline.py").write_text(
        "from diffusers import StableDiffusionPipeline\n\n\n"
        "class QuietPipeline(StableDiffusionPipeline):\n    pass\n"
    )
    options = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    for given in (stock.to(torch.bfloat16), guided(stock)):
        found = ours(door).from_pipe(given, **options)
        assert type(found).__name__ == "QuietPipeline"
        assert found.unet is given.unet and found.unet.dtype == torch.bfloat16
    check_guides(found.to(torch.float32), "sd")
    with pytest.raises(ValueError, match="ignore guidance="):
        diffusers.DiffusionPipeline.from_pipe(guided(stock), **options)
