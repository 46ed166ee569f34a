"""Branches in one call of the network, where a pipeline makes one a branch."""

import numpy as np
import pytest
import torch

from pilotage.guidance import APG, CFG, AdaptiveGuidance
from pilotage.pipelines import LayoutError, guided
from pilotage.pipelines.seam.batched import Unlike, merged
from pilotage.pipelines.seam.calls import Call

from ...families import FAMILIES
from ..checks import Rows
from .together import STEPS, call, pipeline

BOTH = [1, 1]


@pytest.mark.parametrize("name", ["wan", "flux", "lumina2", "hunyuan_video", "krea2", "wan_i2v"])
@pytest.mark.parametrize("guidance", ["cfg", APG()])
def test_equals_calls_in_turn_to_rounding(name, guidance):
    """The first step is evaluated branch by branch, the second both ways."""
    plain, nfe = call(pipeline(name), name, guidance, 1)
    pipe = pipeline(name)
    with Rows(pipe, name) as rows:
        together, counted = call(pipe, name, guidance, 1, batch_branches=True)
    assert rows.calls == [*BOTH, 2, *BOTH, *[2] * (STEPS - 2)] and counted == nfe
    torch.testing.assert_close(together, plain)


def test_texts_of_different_lengths_need_a_mask():
    """Lumina 2 has one; without, in Qwen-Image for one prompt, nothing makes them alike."""
    with pytest.raises(LayoutError, match="encoder_hidden_states have the shapes"):
        call(pipeline("qwen_image"), "qwen_image", "cfg", 1, batch_branches=True)
    call(pipeline("qwen_image"), "qwen_image", "cfg", 2, batch_branches=True)


def test_what_adaptive_guidance_leaves_is_one_branch():
    pipe = pipeline("wan")
    guidance = CFG() | AdaptiveGuidance(-1.0)
    with Rows(pipe, "wan") as rows:
        call(pipe, "wan", guidance, 1, batch_branches=True)
    assert rows.calls == [*BOTH, *[1] * (STEPS - 1)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cosmos2", "copies the prediction of one branch before it has evaluated the next"),
        ("ideogram4", "they are evaluated by different networks"),
        ("longcat_image", "only some of them are given guidance"),
        ("sd", "evaluates its branches in one call already"),
    ],
)
def test_refusals(name, reason):
    with pytest.raises(LayoutError, match=f"{reason}.*eave out batch_branches=True"):
        call(pipeline(name), name, APG(), 1, batch_branches=True)


def test_a_network_that_mixes_rows_is_found_out():
    """Here by its mean over the batch."""
    pipe = pipeline("wan")
    forward = pipe.transformer.forward

    def mixing(*args, **kwargs):
        (output,) = forward(*args, **kwargs)
        return (output + output.mean(0, keepdim=True),)

    pipe.transformer.forward = mixing
    with pytest.raises(LayoutError, match="give something else in one call than in several"):
        call(pipe, "wan", APG(), 1, batch_branches=True)


def test_one_process_or_several():
    pipe = guided(FAMILIES["wan"].build())
    with pytest.raises(ValueError, match="batch_branches=True is for one process"):
        call(pipe, "wan", APG(), 1, batch_branches=True, parallel="branches")


def network(sample, timestep, text, mask=None, sizes=None):
    """Nothing is computed."""


def test_merged_inputs():
    def made(value, **extra):
        text = torch.full((2, 3, 4), value)
        return Call(network, (torch.zeros(2, 5), torch.tensor(1.0), text), extra)

    both = merged([made(1.0), made(2.0)])
    assert both.args[0].shape == (4, 5) and both.args[1].ndim == 0
    assert both.args[2][:, 0, 0].tolist() == [1, 1, 2, 2]
    same = np.zeros(3)  # what is one object is not compared: arrays have no single answer
    assert merged([made(1.0, sizes=same), made(2.0, sizes=same)]).kwargs["sizes"] is same
    with pytest.raises(Unlike, match="their sizes differ"):
        merged([made(1.0, sizes=(1, 2)), made(2.0, sizes=(1, 3))])
    with pytest.raises(Unlike, match="only some of them are given mask"):
        merged([made(1.0, mask=torch.ones(2, 3)), made(2.0)])
    with pytest.raises(Unlike, match="their mask are of different types"):
        merged([made(1.0, mask=torch.ones(2, 3)), made(2.0, mask=None)])
