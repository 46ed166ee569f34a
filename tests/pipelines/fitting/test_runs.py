"""Run settings: checked once, and what calls they make."""

import math
from types import SimpleNamespace

import pytest
import torch

from pilotage.pipelines import StableDiffusionPipeline
from pilotage.pipelines.fitting.runs import Runs, check_fit, held_out


@pytest.fixture
def pipe():
    """A pipeline as far as calls are made for it."""
    pipe = object.__new__(StableDiffusionPipeline)
    pipe._internal_dict = SimpleNamespace(get=lambda name, default: default)
    return pipe


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"guidance_scale": 0.9}, "finite and >= 1, got 0.9"),
        ({"guidance_scale": math.nan}, "finite and >= 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"prompts": "a"}, "expected a list of prompts, got 'a'"),
    ],
)
def test_settings_out_of_their_range(pipe, changed, message):
    with pytest.raises(ValueError, match=message):
        Runs(**{"pipe": pipe, "prompts": ["a"]} | changed)


def test_every_prompt_has_its_own_noise_whatever_the_batches(pipe):
    prompts = ["a", "b", "c", "d", "e"]
    calls = Runs(pipe, prompts, 5.0, 7, "ugly", seed=3, batch_size=2).calls()
    assert [call["prompt"] for call in calls] == [["a", "b"], ["c", "d"], ["e"]]
    seeds = [generator.initial_seed() for call in calls for generator in call["generator"]]
    assert seeds == [3, 4, 5, 6, 7]
    assert calls[2]["negative_prompt"] == ["ugly"] and calls[0]["guidance_scale"] == 5.0
    assert calls[0]["num_inference_steps"] == 7
    some = Runs(pipe, prompts, seed=3).call([4, 0])
    assert some["prompt"] == ["e", "a"] and some["negative_prompt"] == ["", ""]
    own = torch.randn(2, generator=some["generator"][0])
    assert torch.equal(own, torch.randn(2, generator=calls[2]["generator"][0]))


def test_every_fifth_sample_is_held_out():
    assert held_out(11) == ([0, 1, 2, 3, 5, 6, 7, 8, 10], [4, 9])
    assert held_out(2) == ([0], [1])


def test_what_nothing_can_be_fitted_on():
    for prompts in ("a fox", ["a fox"]):
        with pytest.raises(ValueError, match="a list of at least 2 prompts"):
            check_fit(prompts, 0.0)
    for ridge in (-1.0, math.inf):
        with pytest.raises(ValueError, match="ridge must be finite and >= 0"):
            check_fit(["a", "b"], ridge)
