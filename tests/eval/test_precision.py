"""One ``--device`` and one ``--dtype`` for every command."""

import inspect
import json

import pytest
import torch

from pilotage.eval.cli import COMMANDS
from pilotage.eval.embedded import precision_of

from .test_cli import run


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_choose_a_device_by_themselves(name):
    """And every command that samples from a pipeline lets its precision be chosen."""
    options = inspect.signature(COMMANDS[name]).parameters
    if "device" in options:
        assert options["device"].default == "auto"
        assert ("dtype" in options) == ("model" in options)
    if "dtype" in options:
        assert options["dtype"].default == "auto"


def test_auto_follows_device_and_network(tmp_path):
    for name in ("transformer", "unet"):
        (tmp_path / name).mkdir()
        index = {"_class_name": "X", "_diffusers_version": "0", name: ["diffusers", "Y"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    transformer, unet = str(tmp_path / "transformer"), str(tmp_path / "unet")
    assert precision_of("auto", True, transformer) == torch.float32
    assert precision_of("auto", False, transformer) == torch.bfloat16
    assert precision_of("auto", False, unet) == torch.float16
    assert precision_of("auto", False, None) == torch.float16  # the embedded model
    for on_cpu in (True, False):
        assert precision_of("bf16", on_cpu, unet) == torch.bfloat16


@pytest.mark.parametrize("command", ["generate", "personalize"])
def test_unknown_precisions_are_refused(monkeypatch, capsys, command):
    arguments = {"generate": ["x"], "personalize": ["x", "--token", "a", "--initializer", "b"]}
    assert run(monkeypatch, command, *arguments[command], "--dtype", "half") == 2
    assert "dtype is one of auto, fp32, bf16, fp16, got 'half'" in capsys.readouterr().err
