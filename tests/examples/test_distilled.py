"""The guidance-distilled network of the study of evaluations, tiny."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from examples.emoji import training
from examples.studies import distilled
from pilotage.pipelines import guided

from ..families import FAMILIES

CAPTIONS = ["a fox", "a red apple", "a cat", "a tree"]


@pytest.fixture
def pipe(monkeypatch):
    for name, less in {"CAPTIONS": 4, "AT_ONCE": 2, "STEPS": (2, 3), "BATCH": 4}.items():
        monkeypatch.setattr(distilled, name, less)
    pipe = guided(FAMILIES["sd"].build())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_states_are_those_of_guided_runs(pipe):
    """Every one again from its own inputs, one branch at a time."""
    x_t, t, rows, target, text = distilled.guided_states(pipe, CAPTIONS, 0)
    assert sorted(set(rows.tolist())) == [0, 1, 2, 3] and 8 <= len(x_t) <= 12
    prompts, negative = pipe.encode_prompt(CAPTIONS, "cpu", 1, True)
    torch.testing.assert_close(text, prompts)
    assert len(x_t.unique(dim=0)) == len(x_t)
    for i, row in enumerate(rows):
        cond, uncond = (
            pipe.unet(x_t[i : i + 1], t[i], encoder_hidden_states=one[row : row + 1]).sample
            for one in (prompts, negative)
        )
        expected = cond + 6.5 * (cond - uncond)
        torch.testing.assert_close(target[i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_it_learns_and_what_is_finished_stays(pipe, tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(step=0.1).__next__)
    monkeypatch.setattr(training, "time", clock)  # 60 steps, however fast the machine is
    monkeypatch.setattr(distilled, "RATE", 5e-3)
    teacher = pipe.unet
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = distilled.distil(pipe, CAPTIONS, CAPTIONS[:2], tmp_path, minutes=0.1)
    student = pipe.unet
    assert found["steps"] >= 59 and found["unexplained"] < 0.9
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    pipe.unet = teacher
    assert distilled.distil(pipe, CAPTIONS, CAPTIONS[:2], tmp_path, minutes=0.1) == found
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, student.state_dict()[key])
    with pytest.raises(ValueError, match="another network"):
        distilled.distil(pipe, CAPTIONS, CAPTIONS[:2], tmp_path, minutes=0.1)
