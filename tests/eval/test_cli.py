"""The command line on the embedded model."""

import json
import math
import shutil

import pytest
from PIL import Image

from pilotage.eval.cli import app, main
from pilotage.eval.embedded import embedded_folder


def run(monkeypatch, *arguments):
    """Exit status of ``pilotage ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_generate_writes_a_picture_with_its_settings(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "apple.png"
    options = ["--guidance", "apg+ag", "--scale", 10, "--steps", 4, "--seed", 3, "-o", path]
    assert run(monkeypatch, "generate", "twemoji style red apple", *options) == 0
    image = Image.open(path)
    assert image.size == (64, 64)
    made = json.loads(image.text["pilotage"])
    assert made["prompt"] == "twemoji style red apple"
    assert made["guidance"].startswith("APG(") and "AdaptiveGuidance(" in made["guidance"]
    assert (made["guidance_scale"], made["steps"], made["seed"]) == (10, 4, 3)
    assert 4 < made["nfe"] <= 8
    assert str(path) in capsys.readouterr().out


def test_generate_several(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    options = ["-n", 2, "--steps", 2, "-o", path]
    assert run(monkeypatch, "generate", "noto style cat face", *options) == 0
    pictures = sorted(tmp_path.iterdir())
    assert [p.name for p in pictures] == ["a-0.png", "a-1.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "agp"], "unknown guidance 'agp'"),
        (["--scale", math.nan], "finite"),
        (["--scale", 1], "switches guidance off"),
    ],
)
def test_errors_are_one_line(monkeypatch, tmp_path, capsys, options, message):
    path = tmp_path / "x.png"
    assert run(monkeypatch, "generate", "noto style fox", *options, "-o", path) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not path.exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_truncated_weights(monkeypatch, tmp_path, capsys, part):
    model = tmp_path / "model"
    shutil.copytree(embedded_folder(), model)
    weights = max((model / part).glob("*.safetensors"), key=lambda f: f.stat().st_size)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    arguments = ["noto style fox", "--model", model, "-o", tmp_path / "x.png"]
    assert run(monkeypatch, "generate", *arguments) == 2
    assert "damaged or incomplete" in capsys.readouterr().err


def test_info_lists_names_and_presets(monkeypatch, capsys):
    assert run(monkeypatch, "info") == 0
    out = capsys.readouterr().out
    for word in ("apg", "sdxl", "torch"):
        assert word in out


def test_every_command_explains_itself():
    for command in app.registered_commands:
        assert command.callback.__doc__
