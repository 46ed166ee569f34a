"""The study of guidance on Fashion-MNIST, tiny; the network it measures, and what it stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from examples.fashion_mnist import data as fashion_mnist
from examples.fashion_mnist import train
from examples.fashion_mnist.pipeline import ClassPipeline
from examples.studies import fashion_guidance as study
from pilotage.pipelines import guided

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "eval/results/fashion_guidance.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/results/fashion.md").read_text(encoding="utf-8")
SHORT = {"no guidance", "cfg 3", "apg as strong as cfg 3", "fitted 3", "ag 3"}


def tiny():
    torch.manual_seed(0)
    network = train._unet(14, 4, (8, 16), num_class_embeds=11).eval()
    return ClassPipeline(network, DDPMScheduler(**train.SCHEDULE))


def drawings(split):
    """Noisy stripes, each class its own."""
    count = 200 if split == "train" else 60
    labels = torch.arange(count) % 10
    generator = torch.Generator().manual_seed(count)
    noise = torch.randint(0, 60, (count, 1, 28, 28), generator=generator)
    stripes = 150 * (torch.arange(28)[None] // (2 + labels[:, None]) % 2)
    return (noise + stripes[:, None, None]).byte(), labels


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the study; returns what it wrote, but for time and place."""
    monkeypatch.setattr(study, "load_classes", tiny)
    monkeypatch.setattr(study, "load_images", drawings)
    for name, less in {
        "TUNED_ON": 10,
        "RESAMPLES": 20,
        "SIDE": 32,
        "FIT_ROUNDS": 2,
        "FIT_BATCH": 5,
    }.items():
        monkeypatch.setattr(study, name, less)

    def run(name):
        args = ["--work", str(tmp_path / name), "-o", str(tmp_path / f"{name}.json")]
        study.main(["--pictures", "20", "--batch-size", "10", *args])
        found = json.loads((tmp_path / f"{name}.json").read_text())
        return {k: v for k, v in found.items() if k not in ("context", "minutes")}

    return run


def test_an_interrupted_run_ends_as_one_that_was_not(call, tmp_path, monkeypatch):
    short = tuple(cell for cell in study.CELLS if cell.name in SHORT)
    monkeypatch.setattr(study, "CELLS", short)
    whole = call("whole")
    left, made = 5, study.Sampler.made

    def killed(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return made(*args)

    monkeypatch.setattr(study.Sampler, "made", killed)
    with pytest.raises(KeyboardInterrupt):
        call("killed")
    monkeypatch.setattr(study.Sampler, "made", made)
    assert call("killed") == whole
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    assert len(files) == 3 * len(short) + 4  # two chunks each
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert [row["name"] for row in whole["cells"]] == [cell.name for cell in short]
    check_distance(whole, tmp_path / "whole", short[1])


def check_distance(found, folder, cell):
    """Against the definition, in float64 and with the eigenvalues of the product itself."""
    pictures = study.load(folder, cell, 20, 10)["pictures"]
    components = study.Components(drawings("test")[0], folder / "components.safetensors")
    one, other = (components(some).numpy() for some in (drawings("test")[0], pictures))
    sigmas = np.cov(one.T), np.cov(other.T)
    roots = np.sqrt(np.clip(np.linalg.eigvals(sigmas[0] @ sigmas[1]).real, 0, None))
    expected = np.square(one.mean(0) - other.mean(0)).sum()
    expected += sum(np.trace(sigma) for sigma in sigmas) - 2 * roots.sum()
    row = next(row for row in found["cells"] if row["name"] == cell.name)
    assert row["fd"] == pytest.approx(expected, rel=1e-5)


def test_every_cell_has_the_same_noise_and_classes():
    pipe = guided(tiny())
    sampler = study.Sampler(pipe, study.statistics_of(drawings("train")[0]), torch.flatten)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].clone(), kwargs["class_labels"])),
        with_kwargs=True,
    )
    for cell in study.CELLS:
        if cell.sigma_skip or cell.guidance == study.FITTED:
            continue  # that moves the noise after it was drawn; this is another's schedule
        seen.clear()
        sampler.run(cell, range(10, 20))
        x_t, classes = seen[0]
        expected = torch.stack(
            [
                torch.randn(4, 14, 14, generator=torch.Generator().manual_seed(seed))
                for seed in (study.sample_seed(0, i) for i in range(10, 20))
            ]
        )
        assert torch.equal(x_t[-10:], expected)
        assert classes[-10:].tolist() == list(range(10))


def test_resamples_have_as_many_pictures_of_each_class():
    times = study.resamples_within_classes(40, 7).counts()
    assert (times.view(7, 4, 10).sum(1) == 4).all() and times.max() > 1


def test_pictures_of_other_settings_are_refused(call, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CELLS", study.CELLS[:1])
    monkeypatch.setattr(study, "report", lambda *_: [])
    (tmp_path / "one/no-guidance").mkdir(parents=True)
    (tmp_path / "one/no-guidance/plan.json").write_text("{}")
    with pytest.raises(ValueError, match="other settings"):
        call("one")


@pytest.mark.parametrize("sizes", [["25", "10"], ["30", "15"], ["0", "10"]])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(SystemExit, match="multiple"):
        study.main(["--pictures", sizes[0], "--batch-size", sizes[1]])


def test_the_shipped_network_is_small_and_was_trained_within_two_hours():
    pipe = fashion_mnist.load_classes()
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    training = json.loads((fashion_mnist.model_folder("classes") / "training.json").read_text())
    assert parameters == round(training["parameters"] * 1e6) <= 1e6 and training["minutes"] <= 120
    assert all(STORED["network"][name] == training[name] for name in STORED["network"])


def test_what_is_stored_is_of_this_code():
    assert [row["name"] for row in STORED["cells"]] == [cell.name for cell in study.CELLS]
    for row, cell in zip(STORED["cells"], study.CELLS, strict=True):
        assert row["n"] >= 5000 and row["fd_half_width"] <= 0.03 * row["fd"]
        assert row["steps"] == cell.steps and (cell.matched or row["w"] == cell.w)
        assert row["nfe"] <= cell.steps * (1 if cell.w == 1 else 2)
        paired = row["paired_to_cfg"]
        assert (paired and paired["cell"]) == cell.beside
        for pair in filter(None, (paired, row["paired_to_full_run"])):
            (other,) = (one for one in STORED["cells"] if one["name"] == pair["cell"])
            for metric in study.PAIRED:
                found, (low, high) = pair[metric]["difference"], pair[metric]["interval"]
                assert found == pytest.approx(row[metric] - other[metric], rel=1e-3, abs=1e-3)
                assert low <= found <= high
    full = {row["name"] for row in STORED["cells"] if row["paired_to_full_run"]}
    assert full == {"forecast 3", "fitted 3", "ag 3", "teleport, cfg 3"}


def test_the_page_has_what_is_stored():
    table = "\n".join(study.table_line(row) for row in STORED["cells"])
    assert table in PAGE
