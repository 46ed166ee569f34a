"""How large is a report? ``page_megabytes`` in ``eval/results/report.json``.

    apt-get install mate-backgrounds
    OMP_NUM_THREADS=1 python -m examples.studies.page

18 settings x 8 prompts at 1024 px go through the code of `pilotage compare`; counted is what a
reader gets: ``report.html`` and the thumbnails, not the pictures that it links to. The pictures are
photographs of Debian's package ``mate-backgrounds``, more or less saturated and contrasted from
setting to setting, as guidance does; and, as a case harder than photographs, noise with their
spectrum (amplitude 1 / f), which has no even areas. SSIM and PSNR are left out: two columns of
numbers that take minutes at this size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

from pilotage.eval.comparison.answer import answer
from pilotage.eval.comparison.comparison import grid
from pilotage.eval.comparison.evaluation import evaluate, paired_differences
from pilotage.eval.comparison.plan import Samples, Setting
from pilotage.eval.comparison.report import render
from pilotage.eval.comparison.thumbnails import thumbnail
from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import add_figures, figures_context

PHOTOGRAPHS = Path("/usr/share/backgrounds/mate/nature")
METHODS, SCALES = ("cfg", "apg", "rescale", "ag", "forecast", "apg+ag"), (3.0, 7.5, 15.0)
PROMPTS, SIDE = 8, 1024
MEGABYTE = 1e6


def photographs(folder: Path, count: int, side: int) -> list[Image.Image]:
    """The first JPEG files of a folder that are large enough, cropped to squares."""
    found = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            if min(image.size) >= side and len(found) < count:
                found.append(ImageOps.fit(image.convert("RGB"), (side, side)))
    if len(found) < count:
        raise ValueError(f"{folder} holds {len(found)} pictures of {side} px, not {count}")
    return found


def noise(count: int, side: int) -> list[Image.Image]:
    """Pictures of random colours whose amplitude is that of photographs, 1 / frequency."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(side).square()
    frequency = (frequency[:, None] + frequency[None]).sqrt()
    frequency[0, 0] = 1.0
    pictures = []
    for _ in range(count):
        white = torch.randn(3, side, side, generator=generator)
        shaped = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real
        shaped = 0.5 + 0.2 * (shaped - shaped.mean()) / shaped.std()
        levels = (255 * shaped.clamp(0, 1)).round().byte().permute(1, 2, 0)
        pictures.append(Image.fromarray(levels.numpy()))
    return pictures


def under_settings(
    pictures: Sequence[Image.Image], settings: Sequence[Setting], folder: Path
) -> Iterator[Samples]:
    """Files of the pictures for every setting, more saturated from one to the next."""
    prompts = [f"photograph {i}" for i in range(len(pictures))]
    for number, setting in enumerate(tqdm(settings, "pictures", leave=False)):
        strength = 0.8 + 0.6 * number / len(settings)
        paths = []
        for i, picture in enumerate(pictures):
            image = ImageEnhance.Color(picture).enhance(strength)
            image = ImageEnhance.Contrast(image).enhance(strength)
            paths.append(folder / "pictures" / setting.slug / f"000000-{i:05d}.png")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            image.save(paths[-1], compress_level=1)
        evaluations = 40 - number
        yield Samples(setting, paths, prompts, [evaluations] * len(paths), None, 1.0)


def page(pictures: Sequence[Image.Image], settings: Sequence[Setting], folder: Path) -> Path:
    """The report of pictures that are given, as `compare` writes it."""
    extractor = load_extractor()
    gallery = torch.cat([extractor(to_tensor([picture])) for picture in pictures])
    samples = list(under_settings(pictures, settings, folder))
    rows, resampled = [], {}
    for one in tqdm(samples, "metrics", leave=False):
        row, resampled[one.setting.label] = evaluate(
            one, None, folder, extractor=extractor, gallery=gallery
        )
        rows.append(row)
    facts = {
        "comparisons": paired_differences(resampled, len(pictures)),
        "resampled": {"unit": "prompts", "count": len(pictures)},
        "prompts": samples[0].prompts,
        "seeds": [0],
        "real": {"n": len(pictures)},
        "extractor": extractor.name,
        "alignment": None,
        "pipeline": "photographs",
        "scheduler": "none",
        "context": figures_context(),
    }
    facts["recommendation"] = answer(rows, facts) | {"command": None, "python": None}
    path = folder / "report.html"
    path.write_text(render(rows, facts, samples, folder), encoding="utf-8")
    return path


def sizes(folder: Path) -> dict[str, float]:
    """Megabytes of a report's page, its thumbnails and the pictures that it links to."""

    def total(pattern: str) -> float:
        return sum(path.stat().st_size for path in folder.glob(pattern)) / MEGABYTE

    found = {
        "html": total("report.html"),
        "thumbnails": total("thumbnails/*/*"),
        "linked": total("pictures/*/*"),
    }
    return {name: round(size, 3) for name, size in found.items()}


def measure(
    photos: Sequence[Image.Image], drawn: Sequence[Image.Image], settings: Sequence[Setting]
) -> dict[str, float]:
    """Megabytes of the report of photographs, and of the same with thumbnails of drawn pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page(photos, settings, folder)
        found = sizes(folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for samples in under_settings(drawn, settings, folder):
            for path in samples.paths:
                thumbnail(path, folder)
        noisy = sizes(folder)["thumbnails"]
    return {
        "photographs": round(found["html"] + found["thumbnails"], 3),
        "noise": round(found["html"] + noisy, 3),
        **found,
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Photographs.")] = PHOTOGRAPHS,
    output: Annotated[Path, typer.Option()] = Path("eval/results/report.json"),
) -> None:
    """Measure, and write ``page_megabytes`` beside what else the file holds."""
    settings = grid(METHODS, SCALES)
    found = measure(photographs(folder, PROMPTS, SIDE), noise(PROMPTS, SIDE), settings)
    shape = {"settings": len(settings), "prompts": PROMPTS, "pixels": SIDE}
    add_figures(output, "page_megabytes", found | shape)


if __name__ == "__main__":
    typer.run(main)
