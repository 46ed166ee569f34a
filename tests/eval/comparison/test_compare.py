"""A comparison from the command line to the report, on the embedded model."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.cli import main
from pilotage.eval.comparison import evaluation, reference
from pilotage.eval.comparison.comparison import compare, grid
from pilotage.eval.comparison.evaluation import evaluate, paired_differences
from pilotage.eval.comparison.plan import Plan, Setting
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.images import saturation, to_tensor
from pilotage.eval.prompts import read_prompts

from ..test_cli import run as pilotage
from .comparisons import made_up

PROMPTS = ["noto style fox", "twemoji style red apple"]
BASICS = ["-p", PROMPTS[0], "-p", PROMPTS[1], "-g", "cfg", "-g", "apg", "-w", "6"]


def run(monkeypatch, *arguments):
    """Exit status of ``pilotage compare ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def pictures(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def figures(folder):
    """The cells without what differs from run to run."""
    cells = json.loads((folder / "cells.json").read_text())["cells"]
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


def test_from_prompts_to_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "DISTANCE_RESAMPLES", 10)
    real, output = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    for i, colour in enumerate(("red", "orange", "white", "gray", "black")):
        Image.new("RGB", (64, 64), colour).save(real / f"{i}.png")
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join([*PROMPTS, "", "flat style <b>key</b>"]), encoding="utf-8")
    options = ["-g", "cfg", "-g", "ag", "-w", 6, "--steps", 8, "--seeds", 2, "--batch-size", 3]
    assert run(monkeypatch, listed, *options, "--reference", real, "-o", output) == 0

    written = json.loads((output / "cells.json").read_text())
    cells = {cell["label"]: cell for cell in written["cells"]}
    plain, cheap = cells["cfg w=6, 8 steps"], cells["ag w=6, 8 steps"]
    (fewer,) = (cell for cell in cells.values() if cell["kind"] == "equal nfe")
    assert len(cells) == 3 and plain["nfe"] == 16 and cheap["nfe"] < 16
    assert fewer["matches"] == ["ag w=6, 8 steps"] and abs(fewer["nfe"] - cheap["nfe"]) <= 1
    assert plain["effective_guidance"] == 6 and 1 < cheap["effective_guidance"] < 7
    assert cheap["ssim"] < 1 and "ssim" not in plain
    for cell in cells.values():
        assert cell["n"] == 6 and len(list((output / cell["folder"]).glob("*.png"))) == 6
        images = to_tensor(Image.open(p) for p in sorted((output / cell["folder"]).glob("*.png")))
        assert cell["saturation"] == pytest.approx(saturation(images).mean().item(), rel=1e-5)
        for name in ("saturation", "fd", "kid", "precision", "recall"):
            low, high = cell[f"{name}_interval"]
            assert low <= cell[name] <= high
            assert low < high or name in ("precision", "recall")
        assert 0 <= cell["precision"] <= 1 and 0 <= cell["recall"] <= 1

    assert written["resampled"] == {"unit": "prompts", "count": 3}
    saturations = [c for c in written["comparisons"] if c["metric"] == "saturation"]
    assert len(saturations) == 3  # all pairs
    for one in saturations:
        a, b = (cells[one[end]]["saturation"] for end in ("setting", "other"))
        assert one["difference"] == pytest.approx(a - b, abs=2e-6)
    assert {c["metric"] for c in written["comparisons"]} >= {"fd", "kid", "recall", "contrast"}

    with (output / "cells.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == list(cells)
    for row in table:
        cell = cells[row["label"]]
        assert float(row["fd"]) == cell["fd"] and float(row["nfe"]) == cell["nfe"]
        assert float(row["saturation_low"]) == cell["saturation_interval"][0]

    page = (output / "report.html").read_text(encoding="utf-8")
    assert "flat style &lt;b&gt;key" in page and "<b>key" not in page
    for label, cell in cells.items():
        assert f'<a href="{cell["folder"]}">{label.removesuffix(", 8 steps")}</a>' in page
    assert page.count('<img loading="lazy" src="pictures/') == 18
    chosen = written["recommendation"]
    assert cells[chosen["setting"]]["kind"] == "grid" and chosen["headline"] in page
    name = cells[chosen["setting"]]["method"]
    assert chosen["command"] == f"pilotage generate -g {name} -w 6 --steps 8 'noto style fox'"
    assert chosen["python"] == (
        f'pipe(prompt, guidance="{name}", guidance_scale=6, num_inference_steps=8)'
    )


def test_without_a_reference_and_without_a_report(tmp_path):
    plan = Plan(PROMPTS, [Setting("apg", 4.0, 2)])
    rows = compare(load_embedded(), plan, tmp_path, report=False, progress=False)
    assert [(row["method"], row["kind"]) for row in rows] == [("apg", "grid"), ("cfg", "baseline")]
    assert "fd" not in rows[0] and rows[0]["ssim"] is not None
    assert not (tmp_path / "report.html").exists()


def test_two_processes_make_the_same_files(monkeypatch, tmp_path):
    """Over gloo, as ``accelerate launch`` starts them on GPUs; the single process runs here."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*BASICS, "--steps", "2", "--seeds", "2", "--batch-size", "2", "--no-report"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "pilotage.eval", "compare"]
    result = subprocess.run(
        [*launch, *options, "-o", str(two)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert run(monkeypatch, *options, "-o", one) == 0
    assert pictures(one) == pictures(two) and len(pictures(one)) == 8
    assert figures(one) == figures(two)
    records = [json.loads(p.read_text()) for p in sorted(two.rglob("chunk-*.json"))]
    assert sum(record["first"] for record in records) == 2  # both processes had a share


def test_two_processes_share_the_branches(monkeypatch, tmp_path):
    """Rows are grouped otherwise, which moves a few values by one level."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*BASICS, "--steps", "2", "--batch-size", "2", "--no-report"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "pilotage.eval", "compare", "--parallel", "branches"]
    result = subprocess.run(
        [*launch, *options, "-o", str(two)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert run(monkeypatch, *options, "-o", one) == 0
    assert pictures(one).keys() == pictures(two).keys() and len(pictures(one)) == 4
    for name in pictures(one):
        a, b = (to_tensor([Image.open(folder / name)]) for folder in (one, two))
        assert (a - b).abs().max() <= 1.5 / 255
    assert run(monkeypatch, *options, "-o", two) == 2  # which the folder was not made by


def test_a_comparison_can_be_extended(tmp_path):
    """Also by what was made for equal cost; pictures that are there are not made again."""
    pipe, out = load_embedded(), tmp_path / "out"

    def labels(*steps, **options):
        plan = Plan(PROMPTS, grid(["cfg", "ag"], [6.0], steps), **options)
        rows = compare(pipe, plan, out, progress=False)
        return {row["label"]: row["kind"] for row in rows}

    first = labels(8)
    (fewer,) = (label for label, kind in first.items() if kind == "equal nfe")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    steps = int(fewer.split()[2])
    assert labels(8, steps)[fewer] == "grid" and (out / "report.html").is_file()
    assert labels(8) == first
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert before.items() <= after.items()
    with pytest.raises(ValueError, match="pictures holds another plan: its seeds is"):
        labels(8, seeds=(1,))


def test_one_picture_and_a_reference(tmp_path):
    real = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plan = Plan(PROMPTS[:1], grid(["cfg", "apg"], [6.0], [2]))
    options = {"reference": real, "progress": False}
    rows = compare(load_embedded(), plan, tmp_path, **options)
    assert not {"fd", "kid", "precision"} & set(rows[0]) and rows[1]["ssim"] is not None
    assert (tmp_path / "report.html").is_file()


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of mixed sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        pixels = torch.rand(3, 70 + i % 3, 66, generator=generator).mul(255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return folder


def test_the_reference_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, photos, capsys):
    options = ["-p", "a", "--model", tmp_path / "none", "-o", tmp_path / "out"]
    torn, one = tmp_path / "torn.npz", tmp_path / "one"
    torn.write_bytes(b"PK")
    one.mkdir()
    shutil.copy(photos / "00.png", one)
    for given, message in (
        (photos, "01.png is 66x71, but 00.png is 66x70"),
        (torn, "torn.npz is damaged"),
        (one, "needs two pictures or more"),
        (tmp_path / "none.npz", "no folder or file"),
    ):
        assert run(monkeypatch, *options, "--reference", given) == 2
        assert message in capsys.readouterr().err
    assert run(monkeypatch, *options, "--recursive") == 2
    assert "need --reference" in capsys.readouterr().err


def test_a_file_of_features_says_what_its_pictures_say(monkeypatch, tmp_path, photos, capsys):
    """The folder, its features, and their mean and covariance alone as another tool writes them."""
    kept, plain = tmp_path / "kept.npz", tmp_path / "plain.npz"
    options = ["statistics", photos, "--resize", 64, "--features", "-o", kept]
    assert pilotage(monkeypatch, *options) == 0
    with np.load(kept) as file:
        np.savez(plain, mu=file["mu"], sigma=file["sigma"])
    prompts = [word for i in range(6) for word in ("-p", f"noto style fox {i}")]
    options = [*prompts, "-g", "cfg", "-w", 3, "--steps", 1, "--resize", 64]
    cells = []
    for given in (photos, kept, plain):
        by = ["--made-by", "efficientnet-lite0-native"] if given == plain else []
        output = tmp_path / "out"
        assert run(monkeypatch, *options, "--reference", given, *by, "-o", output) == 0
        written = json.loads((output / "cells.json").read_text())
        cells.append(written["cells"][0])
        assert (output / "report.html").is_file()
        assert written["real"]["n"] == (None if by else 12)
        read = written["reference"]
        assert (read is None) == (given != photos) and (read is None or read["read"] == 12)
        assert ("saturation" in written["real"]) == (given == photos)
    for name in ("fd", "kid", "precision", "coverage"):
        assert cells[1][name] == pytest.approx(cells[0][name], rel=1e-5)
    assert cells[2]["fd"] == pytest.approx(cells[0]["fd"], rel=1e-4)
    assert not {"kid", "precision", "coverage"} & set(cells[2])
    assert f"{photos}: 12 pictures" in capsys.readouterr().err


def test_a_reference_is_measured_in_batches(monkeypatch):
    monkeypatch.setattr(reference, "BATCH", 4)
    sizes = []

    def extractor(images):
        sizes.append(len(images))
        return images.mean((2, 3))

    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features, means, shares = reference.measure_reference(images, extractor)
    assert sizes == [4, 4, 2] and torch.equal(features, images.mean((2, 3)))
    assert means["saturation"] == pytest.approx(float(saturation(images).mean()))


def evaluated(tmp_path, prompts):
    """Row of a cell of made-up pictures, the first of which is that of its baseline."""
    _, _, (plain, other, *_) = made_up(tmp_path)
    shutil.copy(plain.paths[0], other.paths[0])
    return evaluate(replace(other, prompts=prompts), plain, tmp_path)[0]


def test_equal_pictures_do_not_hide_the_psnr_of_others(tmp_path):
    row = evaluated(tmp_path, ["a", "b", "c"])
    low, high = row["psnr_interval"]
    assert row["n_equal"] == 1 and low <= row["psnr"] <= high
    assert row["psnr"] == pytest.approx(20 * math.log10(255 / 40) + 10 * math.log10(3), rel=1e-5)


def test_intervals_are_over_prompts(tmp_path):
    """Here those of two prompts: the lowest and highest values are means of a prompt's pictures."""
    row = evaluated(tmp_path, ["a", "a", "b"])
    values = saturation(
        to_tensor(Image.open(tmp_path / row["folder"] / f"0-{i}.png") for i in range(3))
    )
    ends = sorted([values[:2].mean().item(), values[2].item()])
    assert row["saturation_interval"] == pytest.approx(ends, rel=1e-5)
    assert evaluated(tmp_path, ["a"] * 3)["saturation_interval"][0] < ends[0]  # of this prompt


def test_a_kernel_distance_of_so_few_that_a_draw_may_be_of_one_picture(tmp_path):
    _, _, (plain, other, *_) = made_up(tmp_path)
    gallery = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    cells = [
        evaluate(one, None, tmp_path, extractor=lambda x: x.mean((2, 3)), gallery=gallery)
        for one in (plain, other)
    ]
    for row, resampled in cells:
        assert math.isfinite(row["kid"]) and row["kid_interval"] is None
        assert "kid" not in resampled and row["fd_interval"] is not None
    table = paired_differences({str(i): found for i, (_, found) in enumerate(cells)}, 3)
    assert {one["metric"] for one in table} >= {"fd", "saturation"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no prompts"),
        (["-p", "a", "-g", "agp"], "unknown guidance 'agp'"),
        (["-p", "a", "-w", "nan"], "must be >= 1"),
        (["-p", "a", "-w", "0.5"], "must be >= 1"),
        (["-p", "a", "-w", "3", "-w", "3"], "occurs twice"),
        (["-p", "a", "--reference", "/nowhere"], "/nowhere"),
        (["-p", "a", "--clip", "x", "--ridge", "y"], "one of --clip and --ridge"),
        (["-p", "a", "--ridge", "/nowhere"], "/nowhere"),
        (["-p", "a", "--device", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, capsys, options, message):
    assert run(monkeypatch, *options, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ein Fuß\n\nkey\n", encoding="utf-8-sig")
    assert read_prompts(path) == ["ein Fuß", "key"]


def test_bad_prompt_files(monkeypatch, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    for content, message in ((b" \n\n", "no prompts"), (b"\xff\xfe\x00", "UTF-8")):
        path.write_bytes(content)
        assert run(monkeypatch, path, "-o", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "none.txt", "-o", tmp_path / "out") == 2
    assert "none.txt" in capsys.readouterr().err


def test_grid():
    settings = grid(["cfg", "apg"], [1.0, 3.0], [4, 8])
    assert [s.slug for s in settings] == [
        *("cfg-w1-s4", "cfg-w3-s4", "apg-w3-s4"),
        *("cfg-w1-s8", "cfg-w3-s8", "apg-w3-s8"),
    ]
    with pytest.raises(ValueError, match="needs guidances"):
        grid([], [3.0])
