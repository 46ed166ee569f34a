"""The benchmark of the operations: refuses on red, columns, figures."""

import csv
import json
import platform
import subprocess
import sys

import pytest
import torch

from examples.studies import bench_network, bench_ops
from examples.studies.apg_providers import ETA, MOMENTUM, RADIUS, SCALE, our_apg

from ..oracles.apg import PaperMomentum, paper_apg

TINY = {"tiny": (4, 8, 8), "sdxl": (4, 16, 16)}  # what stands under the sizes' names here
UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


@pytest.fixture
def green(monkeypatch, tmp_path):
    path = tmp_path / "test_green.py"
    path.write_text("def test_green():\n    assert True\n")
    monkeypatch.setattr(bench_ops, "TESTS", (str(path),))


def test_red_tests_leave_no_figures(monkeypatch, tmp_path, capsys):
    path = tmp_path / "test_red.py"
    path.write_text("def test_red():\n    assert False\n")
    out = tmp_path / "out"
    for tests, message in (((str(path),), "nothing was measured"), (("none",), "none not found")):
        monkeypatch.setattr(bench_ops, "TESTS", tests)
        assert bench_ops.main(["--device", "cpu", "--quick", "--out", str(out)]) == 1
        printed = capsys.readouterr()
        assert message in printed.err and "speedup" not in printed.out
        assert not out.exists()


def test_files(green, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_ops, "QUICK", TINY)
    assert bench_ops.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "ops.json").read_text())
    assert set(figures) == {"cpu", "context"}  # nothing of a GPU that was not there
    with (tmp_path / "ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(bench_ops.COLUMNS)
    speed = {(r["x_label"], r["kernel_provider"]): r for r in rows if r["metric_name"] == "speed"}
    names = ("diffusers", "comfyui", "reference")
    assert set(speed) == {(size, name) for size in TINY for name in names}
    for row in speed.values():
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert 0 < low <= median <= high
        assert row["metric_unit"] == "ms" and row["extra_benchmark_config_str"]
    assert speed["tiny", "reference"]["x_value"] == "256"
    slow, fast = (float(speed["sdxl", name]["y_value_50"]) for name in ("diffusers", "reference"))
    assert figures["cpu"]["speedup_vs_diffusers_sdxl"] == pytest.approx(slow / fast)
    assert "cpu.speedup_vs_diffusers_sdxl" in capsys.readouterr().out


def test_what_is_timed_is_the_papers_apg():
    cond, uncond, last = (
        torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    )
    average = PaperMomentum(MOMENTUM)
    average.update(last[0].double().numpy())
    rows = [t[0].double().numpy() for t in (cond, uncond)]
    exact = torch.from_numpy(paper_apg(*rows, SCALE, average, ETA, RADIUS))
    guided, buffer = our_apg(cond, uncond, last, "reference")
    torch.testing.assert_close(guided[0].double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffer, cond - uncond + MOMENTUM * last)


def test_figures_of_the_loop():
    figures = bench_network.loop_figures(UNET, torch.device("cpu"), torch.float32, budget=0.05)
    assert set(figures) == {
        "share_of_unet_forward",
        "unet_forward_ms",
        "guidance_and_solver_ms",
        "overhead_per_step_ms",
    }
    assert figures["share_of_unet_forward"] > 0
    ratio = figures["guidance_and_solver_ms"] / figures["unet_forward_ms"]
    assert figures["share_of_unet_forward"] == pytest.approx(ratio)


def test_figures_of_a_gpu_are_those_measured(tmp_path):
    table = bench_ops.Table(torch.device("cpu"))
    assert set(bench_ops.gpu_figures(table)) == {"name"}
    for provider, took in (("diffusers", 3.0), ("fused", 0.2)):
        table.add("sdxl", 65536, "float16", provider, "speed", "ms", took)
        table.add("sdxl", 65536, "float16", provider, "launches", "1", 1)
    table.add("hunyuan", 1, "float16", "fused", "copy_bandwidth_share", "1", 0.9)
    figures = bench_ops.gpu_figures(table)
    assert figures["launches_sdxl"] == 1
    assert figures["speedup_vs_diffusers_sdxl"] == pytest.approx(15.0)
    assert figures["copy_bandwidth_share_video"] == 0.9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    code = """
import resource, torch
from examples.studies.timing import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        torch.empty(2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert keep_freed_memory()
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 2**20 // 4096 / 10
