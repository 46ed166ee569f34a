"""A word learned on both runtimes by the example, and the study of runtimes."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from examples.studies import runtimes
from pilotage.eval.cli import app
from pilotage.pipelines.runtimes import RUNTIMES

from ..structure import ROOT


@pytest.mark.parametrize("backend", list(RUNTIMES))
def test_the_example_learns(backend, tmp_path):
    command = [sys.executable, "examples/train_where_you_infer.py", "--backend", backend]
    command += ["--steps", "20", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    before, after = (float(x) for x in done.stdout.splitlines()[0].split()[-3::2])
    assert after < before
    assert {"graphs", "picture.png", "learned_embeds.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_commands_refuse_beforehand(tmp_path):
    for arguments, message in [
        (["export", "g", "--precision", "int8"], "int8 needs --images"),
        (["export", "g", "--precision", "int4"], "unknown precision 'int4'"),
        (["generate", "a cat", "--backend", "openvino"], "--graphs is for the backends"),
        (["generate", "a cat", "--graphs", "g"], "--graphs is for the backends"),
        (["generate", "a cat", "--backend", "no", "--graphs", "g"], "unknown runtime 'no'"),
        (["generate", "a cat", "--backend", "openvino", "--graphs", "g"], "is not there"),
    ]:
        result = CliRunner().invoke(app, arguments)
        assert message in str(result.exception), arguments


def test_the_figures_are_stored():
    stored = json.loads(runtimes.OUTPUT.read_text())
    assert set(runtimes.SETTINGS) <= set(stored)
    assert stored["torch"]["loss_difference"] == 0
    for name in ("onnxruntime_fp32", "openvino_fp32"):
        assert stored[name]["loss_difference"] < 1e-4


def test_the_study_measures(tmp_path):
    runtimes.graphs(tmp_path)
    found = runtimes.measure("onnxruntime", tmp_path, rounds=1)
    assert 0 < found["loss_difference"] < 0.1
    assert found["correlation_by_distance"]["0.3"] > 0.5
    assert runtimes.remember("onnxruntime", tmp_path)["peak_mb"] > 0
