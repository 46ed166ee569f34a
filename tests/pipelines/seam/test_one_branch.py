"""Pipelines that evaluate one branch: steps can be skipped, and what needs two branches says so."""

import pytest
import torch

from pilotage.guidance import APG, Schedule
from pilotage.pipelines import LayoutError, guided

from ...families import FAMILIES
from ..checks import Rows, equal, held_outputs, latents, one_branch_ok


@pytest.mark.parametrize("name", ["flux_control", "flux2", "lcm", "sana_sprint"])
def test_distilled_networks_skip_steps(name):
    assert one_branch_ok(name)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sd", {"guidance_scale": 1.0}),
        ("flux", {"negative": False}),  # true_cfg_scale without a negative prompt
        ("flux", {"true_cfg_scale": 1.0}),
    ],
)
def test_guidance_that_is_off(name, extra):
    choices = ("both", "both", "forecast", "both")
    extra = {"num_inference_steps": 4} | extra
    if name == "sd":
        choices = (*choices, "forecast")  # PNDM evaluates one more
    pipe = guided(FAMILIES[name].build())
    with Rows(pipe, name) as rows:
        ours = latents(pipe, name, guidance=Schedule(choices), **extra)
    assert sum(rows.calls) == sum(pipe.guidance_trace.nfe) == 9
    stock = FAMILIES[name].build()
    held_outputs(stock, name, choices)
    assert equal(ours, latents(stock, name, **extra))
    with pytest.raises((LayoutError, ValueError), match=r"nothing\s+to act on") as refusal:
        latents(pipe, name, guidance="apg", **extra)
    assert "'apg'" in str(refusal.value)


def test_is_refused_before_the_second_step():
    pipe, calls = guided(FAMILIES["flux_control"].build()), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(LayoutError, match="evaluates one branch"):
        latents(pipe, "flux_control", guidance=APG())
    assert len(calls) == 1


def test_forecast_by_name():
    pipe = guided(FAMILIES["flux_control"].build())
    plain = latents(pipe, "flux_control", num_inference_steps=10)
    skipped = latents(pipe, "flux_control", guidance="forecast", num_inference_steps=10)
    assert pipe.guidance_trace.nfe == [6] * 3
    assert torch.isfinite(skipped).all() and not equal(skipped, plain)
