"""Personalization's figures: how they are counted, and how runs are shared."""

import json
import math
import zipfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from examples.emoji import data as emoji
from examples.studies.personalize import figures, subjects
from examples.studies.personalize.methods import script, together, zeroth_order
from pilotage.eval.embedded import load_embedded
from pilotage.eval.record import PACKAGES
from pilotage.guidance.zeroth_order import perturbations
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.personalization.recipes import recipe

STORED = Path(__file__).parents[2] / "eval/results/personalization.json"
RUN = [(0, 0, 0.5), (10, 40, 0.4), (20, 80, 0.45), (30, 120, 0.3)]


def test_forwards_to_reach_a_loss():
    assert [figures.reached(RUN, target) for target in (0.5, 0.42, 0.4, 0.3, 0.2)] == [
        *(0, 40, 40, 120, None)
    ]
    ours = {"evaluations": RUN}
    of = {"ours": ours, "zoodip": {"evaluations": [(0, 0, 0.5), (9, 400, 0.4)], "forwards": 400}}
    assert figures.ratio(of, "zoodip") == 0.1
    of["zoodip"]["evaluations"] = [(0, 0, 0.5), (9, 400, 0.1)]
    assert figures.ratio(of, "zoodip") is None


def test_a_subject_that_was_not_reached_counts_as_infinite():
    assert figures.median([0.1, None, 0.3]) == 0.3
    assert figures.median([None, None, 0.3]) is None
    assert figures.median([0.1, 0.2]) == 0.2
    assert figures.median([]) is None


def test_a_run_that_ends_above_the_known_word_has_not_improved():
    assert figures.improved({"evaluations": RUN})
    assert not figures.improved({"evaluations": [(0, 0, 0.3), (10, 30, 0.2), (20, 60, 0.3)]})


def test_one_comparison_has_the_paired_t_interval_and_more_have_wider_ones():
    values = [0.3, -0.1, 0.4, 0.2, 0.05, 0.6, -0.2, 0.15]
    found = figures.told({"a": values})["a"]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-4)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=0.01)
    assert found["needed"] is not None
    others = {"b": values[::-1], "c": [-value for value in values[3:] + values[:3]]}
    wider = figures.told({"a": values} | others)
    assert wider["a"]["low"] < found["low"] - 0.02
    assert figures.told({"a": [0.1, 0.11, 0.12]})["a"]["needed"] is None


def test_stored_intervals_are_those_of_the_subjects():
    content = json.loads(STORED.read_text())
    again = figures.recounted(content)
    assert again["subjects_in_reach"] == content["subjects_in_reach"]
    assert again["unseen_compared"] == content["unseen_compared"]


def test_gains_are_paired_picture_by_picture():
    known = {"similarity": [0.1, 0.9]}
    records = {
        "a": {"initial": known, "ours": {"similarity": [0.2, 0.7]}},
        "b": {"initial": known, "ours": {"similarity": [0.4, 0.9]}},
    }
    assert figures.gain(records["a"]["ours"], known, "similarity") == pytest.approx(-0.05)
    gained = figures.gains(records, ["ours"], "similarity")["ours"]
    assert gained == pytest.approx({"a": -0.05, "b": 0.15})
    with pytest.raises(ValueError):
        figures.gain({"similarity": [0.2]}, known, "similarity")


def test_kept_is_compared_with_kept_and_last_with_last():
    records = {
        "a": {
            "ours": {"unseen": {"kept": 0.9, "last": 2.0}},
            "other": {"unseen": {"kept": 1.0, "last": 1.0}},
        },
        "b": {
            "ours": {"unseen": {"kept": 2.2, "last": 1.0}},
            "other": {"unseen": {"kept": 2.0, "last": 1.0}},
        },
    }
    found = figures.compared(records, "ours", ["other"])["other"]
    assert found["kept"]["mean"] == 0 and found["kept"]["lower_on"] == 1
    assert found["kept"]["low"] == -found["kept"]["high"]
    assert found["last"]["mean"] == 50 and found["last"]["lower_on"] == 0


def test_subjects_are_apart_and_were_not_trained_on():
    groups = [
        subjects.HELD_OUT_SUBJECTS,
        subjects.IN_REACH_SUBJECTS,
        subjects.DEVELOPMENT_HELD_OUT,
        subjects.DEVELOPMENT_IN_REACH,
    ]
    names = [subject.concept for group in groups for subject in group]
    assert len(names) == len(set(names))
    everyday = {line.lower() for line in (emoji.HERE / "everyday.txt").read_text().splitlines()}
    split = set(json.loads((emoji.HERE / "splits.json").read_text())["concepts"])
    for reach, held_out in ((groups[1], groups[0]), (groups[3], groups[2])):
        assert not everyday & {subject.concept for subject in reach}
        assert split >= {subject.concept for subject in held_out}
    assert everyday >= set(subjects.FAMILIES.values())
    assert {subject.word for subject in groups[1]} == set(subjects.FAMILIES)


def test_script_is_the_published_scripts_adam():
    """Sum of estimates over n sqrt((d + n - 1) / n), torch's Adam with an epsilon of 1e-3."""
    width, count, table = 12, 2, torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    plan = script(1e-2, 15, width)
    search = plan.build(table[:1], [table], seed=3)
    token = torch.nn.Parameter(table[0].clone())
    adam = torch.optim.Adam([token], lr=1e-2, eps=1e-3)
    for step in range(15):
        points = search.ask()
        losses = 1e-2 * (points - table[7]).square().sum(1)
        search.tell(losses)
        directions = perturbations(width, 3, step, count)
        estimates = ((losses[1:] - losses[0]) / plan.mu)[:, None] * directions
        token.grad = estimates.sum(0) / (count * math.sqrt((width + count - 1) / count))
        adam.step()
        torch.testing.assert_close(search.value, token.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def archive(tmp_path):
    """Four drawings of one concept."""
    path, draw = tmp_path / "drawings.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as out:
        lines = []
        for style in ("noto", "blob", "fluent", "flat"):
            drawing = emoji.Drawing(f"{style}.webp", style, "thing", "0", 0, "concept")
            pixels = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            buffer = BytesIO()
            Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
            out.writestr(drawing.file_name, buffer.getvalue())
            lines.append(json.dumps(asdict(drawing)))
        out.writestr("metadata.jsonl", "\n".join(lines))
    return path


def test_recipes_that_share_calls_learn_what_each_learns_alone(archive):
    subject = subjects.Subject("thing", "star", archive)
    personalizer = Personalizer(load_embedded())
    plans = [recipe(plan, mu=0.05) for plan in (recipe("zoodip", steps=3), script(2e-2, 3, 192))]
    for plan, shared in zip(plans, together(personalizer, subject, plans), strict=True):
        alone = zeroth_order(personalizer, subject, plan)
        for mine, other in zip(shared[:2], alone[:2], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
        steps, forwards, losses = zip(*shared[2]["evaluations"], strict=True)
        assert [steps, forwards] == list(zip(*alone[2]["evaluations"], strict=True))[:2]
        assert losses == pytest.approx([loss for *_, loss in alone[2]["evaluations"]], rel=1e-3)


def test_the_file_has_what_is_quoted_and_says_how_it_was_made():
    stored = json.loads(STORED.read_text())
    assert set(PACKAGES) <= set(stored["context"]["versions"])
    assert stored["context"]["command"] and stored["context"]["date"]
    sweep = stored["rate_sweep"]
    kept = {rate: losses["kept"] for rate, losses in sweep["unseen_loss_by_rate"].items()}
    assert kept[f"{sweep['best']:g}"] == min(kept.values()) and len(kept) == 4
    evaluated = {*stored["subjects"], *stored["subjects_in_reach"]["subjects"]}
    assert not evaluated & set(sweep["subjects"])
    for name in ("ours", "zoodip", "zoodip_swept"):
        assert set(stored["unseen"][name]) == {"kept", "last"}
    reach = stored["subjects_in_reach"]
    assert set(reach["subjects"]) == {s.concept for s in subjects.IN_REACH_SUBJECTS}
    for name in ("ours", "zoodip", "zoodip_swept", "backprop"):
        for gain in (reach[name]["similarity_gain"], reach[name]["alignment_gain"]):
            assert gain["low"] <= gain["mean"] <= gain["high"]
    share = reach["ours"]["similarity_gain"]["mean"] / reach["backprop"]["similarity_gain"]["mean"]
    assert reach["share_of_backprop"]["ours"] == pytest.approx(share, abs=0.01)
