"""The study of the page's size, small; its figures are in ``eval/results/report.json``."""

import json
from pathlib import Path

import numpy as np

from examples.studies import page
from pilotage.eval.comparison.comparison import grid

RESULTS = Path(__file__).parents[2] / "eval/results/report.json"


def test_what_a_reader_gets_is_counted(tmp_path):
    """The page and its thumbnails, not the pictures behind the links."""
    pictures = page.noise(3, 512)
    path = page.page(pictures, grid(["cfg", "apg"], [3.0]), tmp_path)
    found = page.sizes(tmp_path)
    assert found["html"] == round(path.stat().st_size / 1e6, 3)
    thumbnails = list((tmp_path / "thumbnails").rglob("*.webp"))
    assert len(thumbnails) == 6 and found["linked"] > 2
    total = sum(small.stat().st_size for small in thumbnails) / 1e6
    assert found["thumbnails"] == round(total, 3)


def test_noise_has_the_spectrum_of_photographs():
    """Power falls with the square of the frequency: by 16 over two octaves."""
    (picture,) = page.noise(1, 256)
    power = np.abs(np.fft.fft2(np.asarray(picture.convert("L"), dtype=float))) ** 2
    rows, columns = np.meshgrid(*[np.fft.fftfreq(256)] * 2, indexing="ij")
    frequency = np.hypot(rows, columns)

    def mean(near):
        return power[np.abs(frequency / near - 1) < 0.1].mean()

    assert 12 < mean(0.05) / mean(0.2) < 20


def test_recorded_figures():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["page_megabytes"]
    assert max(found["photographs"], found["noise"]) <= 8
    assert [found[name] for name in ("settings", "prompts", "pixels")] == [18, 8, 1024]
