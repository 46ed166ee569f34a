"""The command line on the embedded model."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import pilotage
from pilotage.eval.cli import app, main
from pilotage.eval.embedded import embedded_folder, load_embedded
from pilotage.pipelines import guided

from ..families import FAMILIES


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


def test_scale_one_is_no_guidance(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    prompt = "noto style cat face"
    assert run(monkeypatch, "generate", prompt, "-w", 1, "--steps", 2, "-o", path) == 0
    generator = torch.Generator().manual_seed(0)
    plain = load_embedded()(prompt, guidance_scale=1, num_inference_steps=2, generator=generator)
    image = Image.open(path)
    assert np.array_equal(np.asarray(image), np.asarray(plain.images[0]))
    made = json.loads(image.text["pilotage"])
    assert made["guidance"] is None and made["nfe"] == 2


def test_generate_guides_where_the_scale_has_another_name(monkeypatch, tmp_path):
    pipe = guided(FAMILIES["flux"].build())
    monkeypatch.setattr("pilotage.eval.embedded.load_pipeline", lambda *_: pipe)
    pixels = []
    for guidance, scale in (("cfg", 3), ("cfg", 30), ("apg", 3), ("apg", 30)):
        path = tmp_path / f"{guidance}-{scale}.png"
        options = ["--model", "flux", "-g", guidance, "-w", scale, "--steps", 1, "-o", path]
        assert run(monkeypatch, "generate", "a fox", *options) == 0
        image = Image.open(path)
        made = json.loads(image.text["pilotage"])
        assert (made["true_cfg_scale"], made["nfe"]) == (scale, 2)
        assert "guidance_scale" not in made
        pixels.append(np.asarray(image))
    assert not np.array_equal(*pixels[:2]) and not np.array_equal(*pixels[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "agp"], "unknown guidance 'agp'"),
        (["--scale", math.nan], "finite"),
        (["--device", "nothing"], "device 'nothing' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
    ],
)
def test_errors_are_one_line(monkeypatch, tmp_path, capsys, options, message):
    path = tmp_path / "x.png"
    assert run(monkeypatch, "generate", "noto style fox", *options, "-o", path) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "must end in .png") for name in ("x.jpg", "x", "x.xyz", "folder/")),
        ("folder.png/", "is a folder"),
        ("file/x.png", "is not a folder to write to"),
    ],
)
def test_names_that_cannot_be_written_fail_first(monkeypatch, tmp_path, capsys, name, message):
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    options = ["--model", tmp_path / "none", "-o", f"{tmp_path}/{name}"]
    assert run(monkeypatch, "generate", "noto style fox", *options) == 2
    assert message in capsys.readouterr().err


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
    assert run(monkeypatch, "info", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == pilotage.info()
    assert pilotage.info()["versions"]["pilotage"] == pilotage.__version__


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_options_of_the_program(monkeypatch, capsys, option):
    assert run(monkeypatch, option) == 0
    expected = pilotage.__version__ if option == "--version" else "precision-recall"
    assert expected in capsys.readouterr().out


def test_every_command_explains_itself():
    for command in app.registered_commands:
        assert command.callback.__doc__
