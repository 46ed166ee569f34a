"""Guidance at matched strength: searches with a known end, and the embedded model."""

import csv
import functools
import json
import math

import pytest
import torch

from pilotage.eval.comparison.comparison import compare
from pilotage.eval.comparison.matched import (
    TOLERANCE,
    at_equal_strength,
    matched_scale,
    matched_settings,
)
from pilotage.eval.comparison.plan import Plan, Setting, sample_seed
from pilotage.eval.embedded import load_embedded
from pilotage.guidance import APG

PROMPTS = ["noto style fox", "flat style key"]
STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("target", [0.1, 1.0, 40.0])
@pytest.mark.parametrize(
    "strength",
    [
        lambda w: 3 * (w - 1),
        lambda w: 0.9 * (w - 1) ** 0.6,
        lambda w: 0.02 + 5 * (w - 1) ** 1.4,
        lambda w: 100 * math.tanh((w - 1) / 50),
    ],
)
def test_a_scale_has_the_wanted_strength(strength, target):
    calls = []

    def measured(w):
        calls.append(w)
        return strength(w)

    found = matched_scale(measured, target, 7.5)
    assert strength(found) == pytest.approx(target, rel=2 * TOLERANCE)
    assert len(calls) == len(set(calls)) <= 12


def test_a_strength_that_is_reached_at_no_scale():
    assert matched_scale(lambda w: min(w - 1, 5.0), 6.0, 3.0) is None
    assert matched_scale(lambda w: 2 + 0.1 * (w - 1), 1.0, 3.0) is None
    calls = []

    def just_below(w):
        calls.append(w)
        return 0.99 * (1 - math.exp(1 - w))

    assert matched_scale(just_below, 1.0, 3.0) is None
    assert len(calls) <= 12


def strength(pipe, guidance, scale):
    """Mean norm of what a rule on denoised images moves, from the trace."""
    generators = [torch.Generator().manual_seed(sample_seed(0, i)) for i in range(len(PROMPTS))]
    pipe(
        PROMPTS,
        guidance=guidance,
        guidance_scale=scale,
        generator=generators,
        num_inference_steps=STEPS,
        detailed_trace=True,
        output_type="latent",
    )
    return sum(float(step.update_norm.mean()) for step in pipe.guidance_trace.steps) / STEPS


def test_settings_are_as_strong_as_plain_guidance(pipe, tmp_path, monkeypatch):
    plan = Plan(
        PROMPTS,
        [
            *(Setting(g, w, STEPS) for g in ("cfg", "apg", "higs") for w in (3.0, 7.5)),
            Setting("searched", 7.5, 20),  # found for this scale
        ],
    )
    path = tmp_path / "matching.json"
    found = matched_settings(pipe, plan, path, progress=False)
    assert [(s.method, s.matched) for s in found][:2] == [("apg", 3.0), ("apg", 7.5)]
    plain = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)  # CFG, on denoised images
    for setting in found:
        target = strength(pipe, plain, setting.matched)
        moved = strength(pipe, setting.guidance, setting.scale)
        assert moved == pytest.approx(target, rel=2 * TOLERANCE)
    calls, call = [], type(pipe).__call__

    @functools.wraps(call)
    def counted(self, *args, **kwargs):
        calls.append(kwargs["guidance_scale"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    assert matched_settings(pipe, plan, path, progress=False) == found
    assert calls == []  # all of it was kept
    kept = json.loads(path.read_text())
    del kept["scales"]["apg w=7.5, 4 steps"]
    path.write_text(json.dumps(kept))  # as if interrupted before it was written
    assert matched_settings(pipe, plan, path, progress=False) == found
    assert calls == []  # the search goes the same way
    other = Plan(["a key"], plan.settings)
    with pytest.raises(ValueError, match="other prompts"):
        matched_settings(pipe, other, path, progress=False)


def test_a_comparison_at_both(pipe, tmp_path):
    plan = Plan(PROMPTS, [Setting("apg", 7.5, STEPS)])
    rows = compare(pipe, plan, tmp_path, report=False, progress=False, matched=True)
    asked, matched, plain = rows
    assert (asked["kind"], matched["kind"], plain["kind"]) == ("grid", "matched", "baseline")
    assert asked["matched_to"] is plain["matched_to"] is None
    assert matched["matched_to"] == plain["w"] == 7.5 and matched["w"] > 7.5
    assert matched["effective_guidance"] == pytest.approx(7.5, rel=2 * TOLERANCE)
    assert asked["effective_guidance"] < 7
    assert at_equal_strength(rows) == [plain, matched]
    with (tmp_path / "equal_strength.csv").open(newline="") as table:
        found = list(csv.DictReader(table))
    assert [row["label"] for row in found] == [plain["label"], matched["label"]]
    assert len(json.loads((tmp_path / "cells.json").read_text())["cells"]) == 3
