"""The study of what metrics cost, small; its figures are in ``eval/results/report.json``."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.studies import metrics
from pilotage.eval.metrics.efficientnet import NETWORKS
from pilotage.eval.metrics.kid import kernel_distance
from pilotage.eval.options import DEFAULT_EXTRACTOR

RESULTS = Path(__file__).parents[2] / "eval/results/report.json"


def test_old_and_new_forms_agree():
    real, fake = metrics.features(400, 64)
    assert kernel_distance(real, fake).value == pytest.approx(metrics.old_kid(real, fake), rel=1e-6)
    old = metrics.old_neighbours(real, fake, 120)
    assert metrics.equal_counts(real, fake, old)
    old["fake"][7] *= 1 + 1e-15
    assert not metrics.equal_counts(real, fake, old)


def test_a_form_is_measured_in_its_own_process(tmp_path):
    real, fake = metrics.features(300, 32)
    save_file({"real": real, "fake": fake}, tmp_path / "x.safetensors")
    value, seconds, megabytes = metrics.in_own_process("kid", str(tmp_path / "x.safetensors"))
    # Sums of float64 in another order, where the process has other threads.
    assert value == pytest.approx(kernel_distance(real, fake).value, rel=1e-10)
    assert seconds > 0 and megabytes > 0


def test_recall():
    """Two styles that agree, a third that knows half of the pictures."""
    vectors = torch.eye(6).expand(2, -1, -1)
    assert metrics.recall(vectors) == 1
    other = torch.eye(6)[[0, 1, 2, 4, 5, 3]]
    assert metrics.recall(torch.stack([*vectors, other])) == pytest.approx((2 + 4 * 0.5) / 6)


def test_recorded_figures():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    costs = found["metrics"]
    assert (costs["count"], costs["dimension"]) == (10_000, 1280)
    assert costs["kid"]["relative_difference"] < 1e-6 and costs["neighbours"]["equal"]
    for name in ("kid", "neighbours"):
        assert costs[name]["seconds"] < costs[name]["seconds_old"]
    networks = {name: found["extractors"][name]["recall"] for name in NETWORKS}
    assert max(networks, key=networks.get) == DEFAULT_EXTRACTOR
