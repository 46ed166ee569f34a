"""Every test that asks for `comfy` runs on the stand-in, and on ComfyUI where it is given."""

import pytest
import torch

from .backends import ComfyUI, StandIn


class Recorder:
    """A node after all others: what every evaluation had and what was made of it."""

    def __init__(self):
        self.steps = []

    def __call__(self, model):
        """A clone of the model that is recorded."""

        def record(args):
            names = ("cond_denoised", "uncond_denoised", "denoised", "input", "sigma")
            self.steps.append({name: args[name].clone() for name in names})
            self.steps[-1]["w"] = args["cond_scale"]
            return args["denoised"]

        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(record)
        return clone

    def pairs(self):
        """The branches of every evaluation, in float64."""
        return [(s["cond_denoised"].double(), s["uncond_denoised"].double()) for s in self.steps]

    def results(self):
        return [step["denoised"] for step in self.steps]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture(params=["standin", pytest.param("comfyui", marks=pytest.mark.comfyui)])
def comfy(request, monkeypatch):
    return StandIn(monkeypatch) if request.param == "standin" else ComfyUI()


@pytest.fixture(params=[pytest.param("comfyui", marks=pytest.mark.comfyui)])
def real():
    return ComfyUI()


@pytest.fixture
def standin(monkeypatch):
    return StandIn(monkeypatch)


@pytest.fixture
def close():
    """Whether results agree with an oracle in float64 to 1e-5 of its largest value."""

    def check(results, expected):
        assert len(results) == len(expected) > 0
        for result, oracle in zip(results, expected, strict=True):
            size = torch.as_tensor(oracle).abs().max()
            assert (result.double() - torch.as_tensor(oracle)).abs().max() <= 1e-5 * size

    return check
