"""The metric commands on folders of pictures."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.cli import COMMANDS
from pilotage.eval.metrics import extractors
from pilotage.eval.metrics.chroma import chroma, chroma_distance, chroma_shares
from pilotage.eval.metrics.clipping import clipped
from pilotage.eval.metrics.cmmd import cmmd
from pilotage.eval.metrics.fd_infinity import fd_infinity
from pilotage.eval.metrics.features import folder_features
from pilotage.eval.metrics.frechet import frechet_distance
from pilotage.eval.metrics.images import psnr, saturation, ssim
from pilotage.eval.metrics.kid import kernel_distance
from pilotage.eval.metrics.precision_recall import precision_recall
from pilotage.eval.metrics.preference import load_preference
from pilotage.eval.metrics.vendi import vendi_score
from pilotage.eval.options import report
from pilotage.eval.pictures import Pictures, load_pictures

from ..test_cli import run


class Coarse(torch.nn.Module):
    """Pictures of 4 x 4 pixels as features, in the place of a network."""

    name, preprocessing = "efficientnet-lite0-native", "none"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def network():
    return Coarse()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of eight pictures."""
    monkeypatch.setattr(extractors, "EfficientNetLite", lambda name: Coarse())
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["fid", "{real}", "{fake}"],
        ["kid", "{real}", "{fake}"],
        ["cmmd", "{real}", "{fake}", "-e", Coarse.name],
        ["precision-recall", "{real}", "{fake}"],
        ["saturation", "{real}"],
        ["similarity", "{real}", "{fake}"],
        ["alignment", "{real}", "--prompts", "{tmp}/prompts.txt", "--fit", "{tmp}/map"],
        ["statistics", "{real}", "-o", "{tmp}/real.npz"],
    ],
)
def test_nothing_but_json_is_printed(monkeypatch, tmp_path, folders, capsys, arguments):
    """And the JSON says what was read of each folder."""
    places = {"real": folders[0], "fake": folders[1], "tmp": tmp_path}
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefgh"))
    (folders[0] / "notes.txt").touch()
    given = [a.format(**places) for a in arguments]
    assert run(monkeypatch, *given, "--json", "-") == 0
    out, err = capsys.readouterr()
    read = json.loads(out)["pictures"]
    assert [entry["folder"] for entry in read] == [a for a in given if a in map(str, folders)]
    assert read[0]["read"] == 8 and read[0]["others"] == {"count": 1, "first": ["notes.txt"]}
    assert f"{folders[0]}: 8 pictures; not read: other files: 1 (notes.txt)" in err


def test_what_a_folder_holds_is_told(monkeypatch, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for name in ("a", "b", "c", "more/d"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    Image.new("RGBA", (8, 8), (0, 255, 0, 0)).save(tmp_path / "c.png")
    Image.new("L", (8, 8)).save(
        tmp_path / "g.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    )
    for name in ("notes.txt", "._a.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    path = tmp_path.parent / "out.json"
    assert run(monkeypatch, "saturation", tmp_path, "--json", path) == 0
    out, err = capsys.readouterr()
    assert "saturation: 0.5" in out and "pictures" not in out
    assert err.splitlines() == [
        f"{tmp_path}: 4 pictures; not read: hidden: 1 (._a.png); other files: 1 (notes.txt); "
        "subfolders (--recursive): 1 (more)",
        f"{tmp_path}: transparent, on white: 1 (c.png)",
        f"{tmp_path}: several pictures, the first is read: 1 (g.gif)",
    ]

    def one(name):
        return {"count": 1, "first": [name]}

    assert json.loads(path.read_text())["pictures"] == [
        {
            "folder": str(tmp_path),
            "read": 4,
            "hidden": one("._a.png"),
            "others": one("notes.txt"),
            "folders": one("more"),
            "transparent": one("c.png"),
            "first_only": one("g.gif"),
        }
    ]
    assert run(monkeypatch, "saturation", tmp_path, "--recursive", "--background", "red") == 0
    out, err = capsys.readouterr()
    assert "n: 5" in out and "saturation: 0.8" in out and "5 pictures; not read: hidden" in err


def test_json_goes_into_a_pipe(monkeypatch, tmp_path, folders):
    path, read = tmp_path / "pipe.json", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    assert run(monkeypatch, "saturation", folders[0], "--json", path) == 0
    reader.join()
    assert json.loads(read[0])["n"] == 8 and path.is_fifo()


def test_what_json_does_not_know_is_no_json():
    with pytest.raises(ValueError, match="JSON"):
        report({"value": float("nan")}, Path("-"))


def test_mean_and_covariance_of_another_tool(monkeypatch, tmp_path, folders, features):
    real, fake = folders
    rows = features[0].double().numpy()
    np.savez(tmp_path / "theirs.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    options = [tmp_path / "theirs.npz", fake, "--made-by", Coarse.name]
    found = values(monkeypatch, tmp_path, "fid", *options)
    assert found["fd"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    assert found["n_real"] is None and found["preprocessing"] == [f"that of {Coarse.name}", "none"]


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


def test_saturation_beside_real_pictures(monkeypatch, tmp_path, folders):
    real, fake = folders
    a, b = load_pictures(real), load_pictures(fake)
    found = values(monkeypatch, tmp_path, "saturation", fake, "--reference", real)
    assert found["chroma"] == pytest.approx(float(chroma(b).mean()), rel=1e-5)
    assert found["chroma_of_reference"] == pytest.approx(float(chroma(a).mean()), rel=1e-5)
    assert found["clipped"] == pytest.approx(float(clipped(b).mean()), rel=1e-5)
    shares = chroma_shares(a).mean(0), chroma_shares(b).mean(0)
    assert found["chroma_distance"] == pytest.approx(float(chroma_distance(*shares)), rel=1e-6)


def test_fd_infinity(monkeypatch, tmp_path, sources, features, capsys):
    found = values(monkeypatch, tmp_path, "fd-infinity", *sources, "--points", 3)
    expected = fd_infinity(*features, points=3)
    assert found["fd_infinity"] == pytest.approx(expected.value, rel=1e-5)
    assert found["fd"] == pytest.approx(frechet_distance(*features), rel=1e-5)
    assert "the smallest part has 2 pictures for 48 features" in capsys.readouterr().err


def test_vendi(monkeypatch, tmp_path, sources, features):
    found = values(monkeypatch, tmp_path, "vendi", sources[1])
    assert found["vendi"] == pytest.approx(vendi_score(features[1]), rel=1e-5) and found["n"] == 8


def test_nearest_names_the_pairs(monkeypatch, tmp_path, folders, capsys):
    real, fake = folders
    copied = fake / "copied.png"
    copied.write_bytes((real / "5.png").read_bytes())
    found = values(monkeypatch, tmp_path, "nearest", real, fake, "--held-out", fake)
    assert found["closest"][0] == {"picture": "copied.png", "training": "5.png", "distance": 0}
    assert len(found["closest"]) == 9 and found["nearest_smallest"] == 0
    distances = [pair["distance"] for pair in found["closest"]]
    assert distances == sorted(distances)
    assert found["nearest_median"] == found["held_out_median"] == distances[4]
    assert (found["n_train"], found["n"], found["n_held_out"]) == (8, 9, 9)
    assert "copied.png  5.png  0" in capsys.readouterr().out


def test_nearest_of_files_gives_rows(monkeypatch, tmp_path, folders):
    real, fake = folders
    for folder, name in ((real, "real.npz"), (fake, "fake.npz")):
        command = "statistics", folder, "-o", tmp_path / name, "--features"
        assert run(monkeypatch, *command) == 0
    by_name = values(monkeypatch, tmp_path, "nearest", real, fake)
    files = tmp_path / "real.npz", tmp_path / "fake.npz"
    by_row = values(monkeypatch, tmp_path, "nearest", *files, "--closest", 3)
    for row, named in zip(by_row["closest"], by_name["closest"], strict=False):
        assert (f"{row['picture']}.png", f"{row['training']}.png") == (
            named["picture"],
            named["training"],
        )
    assert len(by_row["closest"]) == 3


def test_score_and_wins(monkeypatch, tmp_path, folders, clip):
    real, fake = folders
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("abcdefgh"))
    options = ["--score", f"pickscore:{clip}", "--prompts", prompts, "--baseline", real]
    found = values(monkeypatch, tmp_path, "score", fake, *options, "--batch-size", 3)
    scorer = load_preference(f"pickscore:{clip}")
    own, other = (scorer.score(load_pictures(x), list("abcdefgh")) for x in (fake, real))
    assert found["pickscore"] == pytest.approx(float(own.mean()), rel=1e-4)
    assert found["pickscore_wins"] == pytest.approx(float((own > other).double().mean()))
    assert found["n"] == 8
    same = values(monkeypatch, tmp_path, "score", real, *options)
    assert same["pickscore_wins"] == 0.5  # as often higher as lower


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
        (["saturation", "{tmp}/deep"], "a.png cannot be read: mode 'I;16': convert"),
        (["kid", "{real}", "{tmp}/torn"], "b.png cannot be read: damaged"),
        (["saturation", "{tmp}/mixed"], "b.png is 4x5, but a.png is 4x4"),
        (["similarity", "{tmp}/one", "{tmp}/one"], "SSIM needs pictures of 11x11 pixels or more"),
        (["fid", "{real}", "{fake}", "--resize", "12x12"], "a side in pixels or clean:SIDE"),
        (["fid", "{real}", "{fake}", "--background", "whitish"], "unknown color specifier"),
        (["similarity", "{real}", "{tmp}/one"], "has no 1.png"),
        (["statistics", "{real}", "-o", "x.txt"], "must end in .npz"),
        (["similarity", "{real}", "{real}", "--lpips", "{tmp}/x"], "no LPIPS weights at {tmp}/x"),
        (
            ["similarity", "{real}", "{real}", "--dreamsim", "{tmp}/x"],
            "no DreamSim weights at {tmp}/x",
        ),
        (["score", "{real}", "--score", "clip:x"], "unknown score 'clip:x'; there are: pickscore"),
        (["score", "{real}", "--score", "hpsv2:x"], "0.png does not carry its prompt"),
        (["score", "{real}", "--score", "aesthetic:x"], "aesthetic.safetensors: put it beside"),
        (["score", "{real}", "--score", "hpsv2:x", "--score", "hpsv2:y"], "every kind of score"),
        (["score", "{real}", "--score", "hpsv2:x", "--baseline", "{tmp}/one"], "has no 1.png"),
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
    assert message.format(**places) in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fid", "{real}", "{tmp}/bad.npz"], "bad.npz is damaged"),
        (["fid", "{real}", "{tmp}/one"], "at least 2 pictures are needed, {tmp}/one has 1"),
        (["fid", "{real}", "{fake}", "--resamples", "1"], "at least 2 resamples"),
        (["fd-infinity", "{real}", "{fake}"], "at least 30 pictures are needed"),
        (["vendi", "{tmp}/plain.npz"], "statistics only"),
        (["fid", "{real}", "{tmp}/plain.npz", "--resamples", "5"], "statistics only"),
        (["kid", "{real}", "{tmp}/plain.npz"], "statistics only"),
        (["kid", "{real}", "{fake}", "--subsets", "3"], "at least 1000 pictures are needed"),
        (["precision-recall", "{real}", "{fake}", "--k", "8"], "at least 9 pictures are needed"),
        (["fid", "{real}", "{fake}", "--json", "{tmp}/bad.npz/x.json"], "bad.npz is not a folder"),
        (["fid", "{real}", "{fake}", "--json", "{tmp}"], "{tmp} is a folder"),
        (["fid", "{real}", "{tmp}/mixed"], "b.png is 4x5, but a.png is 4x4"),
        (["fid", "{real}", "{tmp}/theirs.npz"], "theirs.npz: its mu and sigma do not say"),
        (["fid", "{real}", "{fake}", "--json", "{tmp}/bad.npz/x/y.json"], "is not a folder"),
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
    (tmp_path / "mixed").mkdir()
    for name, size in (("a", (4, 4)), ("b", (4, 5))):
        Image.new("RGB", size).save(tmp_path / "mixed" / f"{name}.png")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(48), sigma=np.eye(48))
    pictures = Pictures.of(fake)
    folder_features(pictures, network, keep=False, progress=False).save(tmp_path / "plain.npz")
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
