"""The metric commands on folders of pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.cli import COMMANDS
from pilotage.eval.metrics import extractors, ridge
from pilotage.eval.metrics.cmmd import cmmd
from pilotage.eval.metrics.features import folder_features
from pilotage.eval.metrics.frechet import frechet_distance
from pilotage.eval.metrics.images import psnr, saturation, ssim
from pilotage.eval.metrics.kid import kernel_distance
from pilotage.eval.metrics.precision_recall import precision_recall
from pilotage.eval.pictures import load_pictures

from ..test_cli import run


class Coarse(torch.nn.Module):
    """Pictures of 4 x 4 pixels as features, in the place of a network."""

    name, preprocessing = "efficientnet-lite0", "none"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def network():
    return Coarse()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of eight pictures."""
    for module in (extractors, ridge):
        monkeypatch.setattr(module, "EfficientNetLite0", Coarse)
    generator = np.random.default_rng(0)
    for name, high in (("real", 256), ("fake", 128)):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = generator.integers(0, high, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path / "real", tmp_path / "fake"


def values(monkeypatch, tmp_path, *arguments):
    """What a command writes as JSON."""
    path = tmp_path / "out.json"
    assert run(monkeypatch, *arguments, "--json", path) == 0
    return json.loads(path.read_text())


@pytest.fixture(params=["folders", "files"])
def sources(request, monkeypatch, tmp_path, folders):
    """The folders, or files of their features made by ``pilotage statistics``."""
    if request.param == "folders":
        return folders
    files = [tmp_path / f"{folder.name}.npz" for folder in folders]
    for folder, file in zip(folders, files, strict=True):
        assert run(monkeypatch, "statistics", folder, "-o", file, "--features") == 0
    return files


@pytest.fixture
def features(folders, network):
    return [network(load_pictures(folder)) for folder in folders]


def test_fid(monkeypatch, tmp_path, sources, features):
    expected = pytest.approx(frechet_distance(*features), rel=1e-6)
    found = values(monkeypatch, tmp_path, "fid", *sources, "--batch-size", 3, "--resamples", 5)
    low, high = found["interval"]
    assert low <= found["fd"] <= high and found["fd"] == expected
    assert (found["n_real"], found["n_fake"], found["extractor"]) == (8, 8, Coarse.name)


def test_kid(monkeypatch, tmp_path, sources, features):
    found = values(monkeypatch, tmp_path, "kid", *sources)
    assert found["kid"] == pytest.approx(kernel_distance(*features).value, rel=1e-6)
    found = values(monkeypatch, tmp_path, "kid", *sources, "--subsets", 3, "--subset-size", 5)
    assert found["std"] > 0


def test_precision_recall(monkeypatch, tmp_path, sources, features):
    found = values(monkeypatch, tmp_path, "precision-recall", *sources)
    assert (found["precision"], found["recall"]) == precision_recall(*features)
    assert {"density", "coverage"} <= set(found)


def test_cmmd(monkeypatch, tmp_path, sources, features):
    found = values(monkeypatch, tmp_path, "cmmd", *sources, "-e", Coarse.name)
    assert found["cmmd"] == pytest.approx(cmmd(*features), rel=1e-6)


def test_values_are_printed_as_json(monkeypatch, folders, capsys):
    assert run(monkeypatch, "saturation", folders[0], "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["n"] == 8


def test_similarity_and_saturation(monkeypatch, tmp_path, folders):
    real, fake = folders
    a, b = load_pictures(real), load_pictures(fake)
    found = values(monkeypatch, tmp_path, "similarity", fake, real, "--batch-size", 3)
    assert found["ssim"] == pytest.approx(float(ssim(b, a).mean()), rel=1e-5)
    assert found["psnr"] == pytest.approx(float(psnr(b, a).mean()), rel=1e-5)
    assert (found["n"], found["n_equal"]) == (8, 0)
    found = values(monkeypatch, tmp_path, "similarity", real, real)
    assert (found["psnr"], found["n_equal"]) == (None, 8) and found["ssim"] == pytest.approx(1)
    found = values(monkeypatch, tmp_path, "saturation", real)
    low, high = found["saturation_interval"]
    assert low < found["saturation"] < high
    assert found["saturation"] == pytest.approx(float(saturation(a).mean()), rel=1e-6)


def test_alignment(monkeypatch, tmp_path, folders):
    real, fake = folders
    prompts, path = tmp_path / "prompts.txt", tmp_path / "map.safetensors"
    prompts.write_text("\n".join(["fox", "key", "apple", "car", "moon", "tree", "shoe", "ship"]))
    options = ["--prompts", prompts]
    assert run(monkeypatch, "alignment", real, *options, "--fit", path) == 0
    seen = values(monkeypatch, tmp_path, "alignment", real, *options, "--ridge", path)
    other = values(monkeypatch, tmp_path, "alignment", fake, *options, "--ridge", path)
    assert seen["alignment"] > 0.5 > other["alignment"] and seen["by"] == "ridge"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fid", "{real}", "{tmp}/none"], "no folder or file"),
        (["fid", "{real}", "{tmp}"], "holds no pictures"),
        (["fid", "{real}", "{fake}", "-e", "resnet"], "unknown extractor 'resnet'"),
        (["fid", "{real}", "{tmp}/bad.npz"], "bad.npz is damaged"),
        (["saturation", "{tmp}/deep"], "a.png: mode 'I;16': convert it to 8 bits a channel first"),
        (["kid", "{real}", "{tmp}/torn"], "b.png is damaged"),
        (["saturation", "{tmp}/mixed"], "b.png is 4x5, but a.png is 4x4"),
        (["similarity", "{real}", "{tmp}/one"], "has no 1.png"),
        (["statistics", "{real}", "-o", "x.txt"], "must end in .npz"),
        (["alignment", "{real}"], "name one of --clip, --ridge and --fit"),
        (["alignment", "{real}", "--fit", "x"], "0.png does not carry its prompt"),
        (["alignment", "{real}", "--fit", "x", "--prompts", "{tmp}/bad.npz"], "in UTF-8"),
    ],
)
def test_errors_are_one_line(monkeypatch, tmp_path, folders, capsys, arguments, message):
    for name in ("one", "torn", "mixed", "deep"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "0.png")
    for name, size in (("a", (4, 4)), ("b", (4, 5))):
        Image.new("RGB", size).save(tmp_path / "mixed" / f"{name}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "torn" / "a.png")
    (tmp_path / "torn" / "b.png").write_bytes(b"\x89PNG\r\n")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep" / "a.png")
    (tmp_path / "bad.npz").write_bytes(b"PK\xff")
    real, fake = folders
    places = {"real": real, "fake": fake, "tmp": tmp_path}
    assert run(monkeypatch, *(a.format(**places) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fid", "{real}", "{tmp}/bad.npz"], "bad.npz is damaged"),
        (["fid", "{real}", "{tmp}/one"], "at least 2 pictures are needed, {tmp}/one has 1"),
        (["fid", "{real}", "{fake}", "--resamples", "1"], "at least 2 resamples"),
        (["fid", "{real}", "{tmp}/plain.npz", "--resamples", "5"], "statistics only"),
        (["kid", "{real}", "{tmp}/plain.npz"], "statistics only"),
        (["kid", "{real}", "{fake}", "--subsets", "3"], "at least 1000 pictures are needed"),
        (["precision-recall", "{real}", "{fake}", "--k", "8"], "at least 9 pictures are needed"),
        (["fid", "{real}", "{fake}", "--json", "{tmp}/bad.npz/x.json"], "bad.npz is not a folder"),
        (["fid", "{real}", "{fake}", "--json", "{tmp}"], "{tmp} is a folder"),
        (["fid", "{real}", "{fake}", "--device", "nothing"], "device 'nothing' cannot be used"),
        (["statistics", "{real}", "-o", "{tmp}/bad.npz/x.npz"], "bad.npz is not a folder"),
        (["saturation", "{real}", "--json", "{tmp}/bad.npz/x.json"], "bad.npz is not a folder"),
    ],
)
def test_mistakes_are_found_before_the_work(
    monkeypatch, tmp_path, folders, network, capsys, arguments, message
):
    real, fake = folders
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "0.png")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    folder_features(fake, network, keep=False, progress=False).save(tmp_path / "plain.npz")
    places = {"real": real, "fake": fake, "tmp": tmp_path}
    assert run(monkeypatch, *(a.format(**places) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and "Traceback" not in error
    assert "picture/s" not in error  # the bar of an extraction


def test_statistics_do_for_real_pictures(monkeypatch, tmp_path, folders, features):
    real, fake = folders
    assert run(monkeypatch, "statistics", real, "-o", tmp_path / "plain.npz") == 0
    found = values(monkeypatch, tmp_path, "fid", tmp_path / "plain.npz", fake, "--resamples", 5)
    assert found["interval"][0] <= found["fd"] <= found["interval"][1]
    assert found["fd"] == pytest.approx(frechet_distance(*features), rel=1e-6)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(monkeypatch, capsys, name):
    assert run(monkeypatch, name, "--help") == 0
    assert f"pilotage {name}" in capsys.readouterr().out


def test_help_and_version_import_no_torch():
    for option in ("--help", "--version"):
        code = f"""
import sys, pilotage.eval.cli
sys.argv = ["pilotage", "{option}"]
try: pilotage.eval.cli.main()
except SystemExit as end: assert end.code == 0
assert "torch" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True)
