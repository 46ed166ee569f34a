"""Scores and colour distances of a comparison's settings, on made-up pictures."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from pilotage.eval.comparison.comparison import compare
from pilotage.eval.comparison.evaluation import evaluate, paired_differences, preferences
from pilotage.eval.comparison.plan import Plan, Setting
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.chroma import chroma_distance, chroma_shares
from pilotage.eval.pictures import Pictures

from ..test_cli import run
from .comparisons import made_up


class Brightness:
    """A score that anyone can check: the mean of all values, times the prompt's length."""

    name = "brightness"

    def score(self, images, prompts):
        return images.flatten(1).mean(1) * torch.tensor([float(len(p)) for p in prompts])


SCORERS = {"pickscore": Brightness(), "alignment": Brightness()}
GREYS = {"plain": (100, 100, 100), "other": (90, 120, 100)}  # lower, higher, equal


@pytest.fixture
def pair(tmp_path):
    """Two settings with the pictures of `GREYS`, grey values a picture."""
    _, _, (plain, other, *_) = made_up(tmp_path)
    for samples, values in ((plain, GREYS["plain"]), (other, GREYS["other"])):
        for path, value in zip(samples.paths, values, strict=True):
            Image.new("RGB", (16, 16), (value,) * 3).save(path)
    prompts = ["a", "bb", "ccc"]
    return replace(plain, prompts=prompts), replace(other, prompts=prompts)


def test_scores_and_wins_over_the_baseline(tmp_path, pair):
    plain, other = pair
    known = preferences(plain, SCORERS)
    assert set(known) == {"pickscore"}  # an alignment has no wins
    row, resampled = evaluate(other, plain, tmp_path, scorers=SCORERS, plain=known)
    expected = (90 * 1 + 120 * 2 + 100 * 3) / 255 / 3
    assert row["pickscore"] == row["alignment"] == pytest.approx(expected, rel=1e-5)
    assert row["pickscore_wins"] == 0.5  # one lower, one higher, one equal
    low, high = row["pickscore_wins_interval"]
    assert low == 0 and high == 1
    assert "alignment_wins" not in row
    assert {"pickscore", "alignment"} <= set(resampled)
    assert "pickscore_wins" not in resampled  # a baseline has none to compare with
    first, own = evaluate(plain, None, tmp_path, scorers=SCORERS)
    assert "pickscore_wins" not in first
    found = paired_differences({"plain": own, "other": resampled}, 3)
    (one,) = (row for row in found if row["metric"] == "pickscore")
    assert one["difference"] == pytest.approx(first["pickscore"] - row["pickscore"], abs=1e-6)


def test_distance_of_chroma_to_the_reference(tmp_path, pair):
    plain, other = pair
    reference = torch.tensor([0.8, 0.3, 0.2]).view(1, 3, 1, 1).expand(4, 3, 8, 8)
    real = chroma_shares(reference).mean(0)
    row, resampled = evaluate(other, plain, tmp_path, chroma=real)
    (pictures,) = Pictures(other.paths).batches()
    expected = float(chroma_distance(real, chroma_shares(pictures).mean(0)))
    assert row["chroma_distance"] == pytest.approx(expected, rel=1e-5) and expected > 20
    # All pictures are grey: whatever is drawn, the distance is the same.
    assert row["chroma_distance_interval"] == pytest.approx([expected] * 2, rel=1e-5)
    draws = resampled["chroma_distance"].draws
    assert draws.shape == (2000,) and draws.std() < 1e-9
    assert "chroma_distance" not in evaluate(other, plain, tmp_path)[0]


def test_a_whole_comparison_tells_them(tmp_path):
    """Also of CFG with the same number of steps, which is added; and the page has a column each."""
    reference = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plan = Plan(["red apple", "penguin"], [Setting("apg", 9.0, 3)])
    options = {"reference": reference, "scorers": SCORERS, "progress": False}
    apg, cfg = compare(load_embedded(), plan, tmp_path, **options)
    assert cfg["fd_interval"] and cfg["kid"] is not None
    assert cfg["kid_interval"] is None  # a resample of two pictures may hold one only: no pairs
    assert apg["pickscore_wins"] in (0, 0.25, 0.5, 0.75, 1) and "pickscore_wins" not in cfg
    assert cfg["chroma_distance"] > 0 and cfg["chroma_distance_interval"] is not None
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for column in ("PickScore, wins over CFG", "Chroma, distance", "Clipped pixels"):
        assert column in page


def test_scores_are_checked_before_the_model_is_loaded(monkeypatch, tmp_path, capsys):
    for scores, message in (
        (["clip:x"], "unknown score 'clip:x'"),
        (["hpsv2:x", "hpsv2:y"], "name every kind of score once, got hpsv2:x, hpsv2:y"),
        (["aesthetic:x"], "aesthetic.safetensors: put it beside"),
    ):
        options = [word for name in scores for word in ("--score", name)]
        command = "compare", "-p", "a fox", "--model", tmp_path, "-o", tmp_path / "out", *options
        assert run(monkeypatch, *command) == 2
        assert message in capsys.readouterr().err
