"""The comparison of a network with analytic denoisers: each measure on something known."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from typer.testing import CliRunner

from examples.fashion_mnist.data import load_images, read_idx
from examples.studies.analytic import golden
from examples.studies.analytic.agreement import ddim, explain, held_out, scores, trajectory
from examples.studies.analytic.jacobian import jacobian, mass_radius, reading, wiener_matrix
from examples.studies.analytic.study import PARTS, UNITS, merged, selected
from examples.studies.analytic.teleport import measure, settings, verdict
from pilotage.eval.cli import app
from pilotage.guidance.analytic import DatasetStatistics, decode, floats
from pilotage.pipelines import AnalyticDenoiserModel

ROOT = Path(__file__).parents[2]
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(80, 1, 3, 3, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (6, 6), mode="bilinear")
    return (fine * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def statistics(data):
    return DatasetStatistics.from_images(data)


def no_interval(values):
    return float(values.min()), float(values.max())


def test_a_model_explains_itself_and_the_protocol_is_the_papers(data):
    scheduler = ddim(DDIMScheduler(**LINEAR), 10)
    sigmas = (1 / scheduler.alphas_cumprod[scheduler.timesteps].double() - 1).sqrt()
    assert sigmas[0] == pytest.approx(60.8, rel=0.1) and sigmas[-1] == pytest.approx(0.01, rel=0.01)
    models = {
        name: AnalyticDenoiserModel.from_images(data, method=name, scheduler=scheduler)
        for name in ("optimal", "wiener")
    }
    noise = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = explain(models["optimal"], models, scheduler, noise, 2, no_interval)
    same, other = found["optimal"], found["wiener"]
    assert same["r2"] == pytest.approx(1, abs=1e-6) and same["mse"] < 1e-9
    assert same["network_path"][4]["cosine"] == pytest.approx(1, abs=1e-6)
    assert other["r2"] < 0.99 and other["mse_interval"][0] <= other["mse"]
    # At the highest noise level both know nothing but the mean.
    assert other["own_path"][0]["r2"] > 0.999 > other["own_path"][-1]["r2"]
    _, images = trajectory(models["optimal"], scheduler, noise)
    nearest = (images[-1][:, None] - (data / 127.5 - 1)).abs().flatten(2).amax(2).min(1).values
    assert nearest.max() < 1e-3


def test_the_timed_run_is_the_models(data):
    """DDIM with the denoiser, as a pipeline runs it with the model."""
    scheduler = ddim(DDIMScheduler(**LINEAR), 10)
    model = AnalyticDenoiserModel.from_images(data, method="optimal", scheduler=scheduler)
    noise = golden.noisy(torch.zeros(2, 1, 6, 6), 1.0)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    found = golden.sample(model.denoiser(), noise)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)


def test_what_is_timed_agrees_with_the_transcription(data, statistics, monkeypatch):
    monkeypatch.setattr(golden, "SIGMAS", (0.1, 8.0))
    clean = decode(data[:4])
    many = data.repeat(20, 1, 1, 1)
    found = golden.measure("optimal", many, clean, statistics)["golden_subset"]
    assert list(found["optimal"]) == ["0.1", "8"] and found["images"] == 1600
    rows = found["details"]["optimal"]
    assert rows["0.1"]["compared"] < 800 and rows["0.1"]["whole_set"] == 0
    assert rows["8"]["compared"] == 1600 and rows["8"]["whole_set"] == 1
    assert all(row["largest_difference"] < 1e-3 for row in rows.values())


@pytest.mark.skipif(bool(floats.missing()), reason=floats.missing())
def test_the_local_denoiser_is_timed_in_float32(data, statistics, monkeypatch):
    monkeypatch.setattr(golden, "SIGMAS", (0.1, 8.0))
    found = golden.measure("local", data, decode(data[:2]), statistics)["golden_subset"]
    rows = found["details"]["local"]
    assert list(found["local"]) == list(rows) == ["0.1", "8"]
    assert all(row["largest_difference"] < 1e-3 for row in rows.values())


def test_ratios_by_hand():
    spent = {
        "ours": {"seconds": 2.0, "cpu_seconds": 4.0},
        "plain": {"seconds": 6.0, "cpu_seconds": 2.0},
    }
    row = golden.figures(spent, 2)
    assert row["ours"] == {"seconds": 1.0, "cpu_seconds": 2.0}
    assert (row["ratio_plain"], row["ratio_plain_cpu"]) == (3.0, 0.5)


def test_scores_by_hand():
    truth = torch.tensor([[1.0, 3.0]]).view(1, 1, 1, 2)
    found = torch.tensor([[1.0, 2.0]]).view(1, 1, 1, 2)
    result = {name: float(value) for name, value in scores(found, truth).items()}
    assert result == pytest.approx({"r2": 0.5, "mse": 0.5, "cosine": 7 / 50**0.5})


def test_on_the_training_images_nothing_beats_the_optimum(data):
    scheduler = ddim(DDIMScheduler(**LINEAR), 10)
    models = {
        name: AnalyticDenoiserModel.from_images(data, method=name, scheduler=scheduler)
        for name in ("wiener", "optimal")
    }
    images = (data / 127.5 - 1).float()
    found = held_out(models, scheduler, images, no_interval)
    wiener = [row["mse"] for row in found["wiener"]]
    optimal = [row["mse"] for row in found["optimal"]]
    # These are the training images themselves: nothing is better than the optimum.
    assert sum(optimal) < sum(wiener)
    assert wiener == sorted(wiener, reverse=True)


def test_the_jacobian_of_a_wiener_filter_is_its_matrix(statistics):
    y = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = 0.4
    matrix = wiener_matrix(statistics, sigma)
    found = jacobian(lambda x: statistics.wiener(x, sigma), y, batch_size=10)
    torch.testing.assert_close(found, matrix, rtol=1e-9, atol=1e-12)
    result = reading(lambda x: statistics.wiener(x, sigma), statistics, y, sigma)
    assert result["effective_dimension"]["network"] == pytest.approx(float(matrix.trace()))
    shrinkage = statistics.eigenvalues / (statistics.eigenvalues + sigma**2)
    leading = torch.tensor(result["eigenvalues"]["network"][:5], dtype=torch.float64)
    torch.testing.assert_close(leading, shrinkage[:5].double(), rtol=1e-6, atol=1e-9)
    assert result["row_cosine_median"] == pytest.approx(1)
    assert result["pictures"]["eigenvectors"].shape == (8, 1, 6, 6)


def test_radius_of_mass():
    rows = torch.zeros(2, 3, 3)
    rows[0, 0, 0] = 1.0  # all at the pixel itself
    rows[1, 0, 1], rows[1, 2, 1] = 0.5, -0.5  # half of it two pixels below
    full = torch.eye(9)
    full[:2] = rows.view(2, 9)
    assert mass_radius(full, (1, 3, 3))[:2].tolist() == [0.0, 2.0]


def test_verdict_takes_the_largest_saving_that_is_not_clearly_worse(statistics):
    rows = settings(DDIMScheduler(**LINEAR), statistics, (20, 15), (10.0,))
    assert [steps for _, _, steps in rows] == [20, 15, 20]
    stock = {"name": "", "pictures": None, "nfe": 20, "fd": 10.0, "sigma_skip": None}
    mild = stock | {"nfe": 16, "fd": 10.5, "sigma_skip": 10.0}
    mild |= {"minus": {"": {"fd": 0.5, "interval": (-0.1, 1.1)}}}
    bold = mild | {"nfe": 10, "fd": 12.0, "minus": {"": {"fd": 2.0, "interval": (1.4, 2.6)}}}
    found = verdict([stock, mild, bold])
    assert not found["clearly_worse"] and found["nfe_saved"] == pytest.approx(0.2)
    assert found["fd_with"] == 10.5 and found["fd_without"] == 10.0
    assert verdict([stock, bold])["clearly_worse"]


def test_distances_of_settings_are_compared_by_pairs():
    """What pictures have in common is far more than what settings make of them."""
    noise = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real, common = noise[0], 10 * noise[1]
    moved = {"stock": 0.0, "fewer": 0.5, "same": 0.0, "far": 2.0}

    def sampler(scheduler, steps, first, count):
        return common[first : first + count] + moved[steps]

    skips = {name: DDIMScheduler() for name in moved}
    skips["same"].sigma_skip = skips["far"].sigma_skip = 1.0
    rows = [(name, skips[name], name) for name in moved]
    groups = [i % 20 for i in range(40)]
    stock, fewer, same, far = measure(sampler, rows, lambda x: x, real, groups, batch=16)
    assert "minus" not in stock and same["fd"] == stock["fd"]
    assert fewer["minus"].keys() == {"stock"} and far["minus"].keys() == {"stock", "fewer"}
    assert same["minus"]["stock"]["fd"] == 0 and same["minus"]["stock"]["interval"] == (0, 0)
    mean = common.mean(0) - real.mean(0)  # the covariance is the same
    for other in (stock, fewer):
        found, by = far["minus"][other["name"]], moved["far"] - moved[other["name"]]
        assert found["fd"] == pytest.approx(far["fd"] - other["fd"])
        # (mean + 2)^2 - (mean + d)^2, summed
        both = moved["far"] + moved[other["name"]]
        assert found["fd"] == pytest.approx(float((by * (2 * mean + both)).sum()))
        low, high = found["interval"]
        assert low < found["fd"] < high


@pytest.mark.parametrize("network", ["fashion_mnist", "emoji"])
def test_stored_distances_of_teleportation_are_paired(network):
    found = json.loads((ROOT / "eval/results/analytic.json").read_text())["teleport"][network]
    by_name = {row["name"]: row for row in found["settings"]}
    page = (ROOT / "docs/results/analytic.md").read_text(encoding="utf-8")
    assert sum(len(row.get("minus", {})) for row in found["settings"]) == 11
    for row in found["settings"]:
        assert f"| {row['nfe']} | {row['fd']:.2f} |" in page
        for other, one in row.get("minus", {}).items():
            assert one["fd"] == pytest.approx(row["fd"] - by_name[other]["fd"])
            low, high = one["interval"]
            assert low <= one["fd"] <= high


def write_idx(path, array):
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_idx_files(tmp_path):
    images = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_images("train", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    loaded, labels = load_images("train", tmp_path)
    assert torch.equal(loaded[:, 0], torch.from_numpy(images)) and labels.tolist() == [*range(5)]
    with pytest.raises(ValueError, match="unknown split"):
        load_images("validation", tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09abc"))
    with pytest.raises(ValueError, match="truncated"):
        read_idx(path)


def test_denoise_command(data, tmp_path):
    for i, image in enumerate(data[:40]):
        folder = tmp_path / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i:02}.png")
    out = tmp_path / "made" / "x.png"
    call = ["denoise", str(tmp_path / "pictures"), "-m", "optimal", "-n", "2", "-o", str(out)]
    result = CliRunner().invoke(app, [*call, "--label", "1", "-g", "apg", "-w", "2"])
    assert result.exit_code == 0, result.output
    picture = Image.open(tmp_path / "made" / "x-1.png")
    assert picture.size == (6, 6) and json.loads(picture.text["pilotage"])["label"] == 1
    for extra in (["-m", "magic"], ["--tau", "0.1"], ["--label", "7"], ["-w", "2"]):
        assert isinstance(CliRunner().invoke(app, [*call, *extra]).exception, ValueError)


def test_parts_are_chosen_by_name_and_figures_merged():
    assert selected(["agreement.ls", "teleport"]) == [
        "agreement.ls",
        "teleport.fashion_mnist",
        "teleport.emoji",
    ]
    assert selected(list(PARTS)) == list(UNITS)
    with pytest.raises(ValueError, match="unknown part 'agreement.lss'.*agreement.ls"):
        selected(["agreement.lss"])
    old = {"a": {"x": 1, "y": [1]}, "b": 2}
    assert merged(old, {"a": {"y": [2]}, "c": {"z": 3}}) == {
        "a": {"x": 1, "y": [2]},
        "b": 2,
        "c": {"z": 3},
    }
    assert old == {"a": {"x": 1, "y": [1]}, "b": 2}
