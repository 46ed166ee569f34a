"""Quickstart: CFG beside APG and Adaptive Guidance on the embedded model, in one picture.

    python examples/quickstart.py

Rows are prompts; columns are CFG and APG at rising guidance scales, and Adaptive Guidance (AG) at
7.5, all from the same noise. Prints what each cost and how saturated it came out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.images import contrast, saturation, to_tensor

PROMPTS = [
    "twemoji style red apple",
    "noto style penguin",
    "fluent style cactus",
    "blob style cat face",
    "flat style police car",
    "emojione style birthday cake",
]
SETTINGS = [
    *(("cfg", w) for w in (3, 7.5, 15)),
    *(("apg", w) for w in (3, 7.5, 15)),
    ("ag", 7.5),
]
STEPS = 20
CELL = 128
MARGIN = 190


def picture(images: list[list[Image.Image]], titles: list[str]) -> Image.Image:
    """A labelled grid; `images` is a list of columns."""
    font = ImageFont.load_default(16)
    size = (MARGIN + len(images) * (CELL + 4), 28 + len(PROMPTS) * (CELL + 4))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = MARGIN + column * (CELL + 4)
        draw.text((x + CELL // 2, 14), title, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images[column]):
            enlarged = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(enlarged, (x, 28 + row * (CELL + 4)))
    for row, prompt in enumerate(PROMPTS):
        text = prompt.replace(" style ", " style\n")
        draw.text((8, 28 + row * (CELL + 4) + CELL // 2), text, "black", font, anchor="lm")
    return sheet


def main() -> None:
    """Generate, save the picture, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/quickstart.png"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    pipe = load_embedded().to(args.device)
    pipe.set_progress_bar_config(disable=True)
    table = Table("guidance", "scale", "NFE / image", "saturation", "contrast", "seconds")
    columns, titles = [], []

    def generate(name: str, scale: float) -> list[Image.Image]:
        return pipe(
            PROMPTS,
            guidance=name,
            guidance_scale=scale,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        ).images

    for name, scale in (SETTINGS[0], SETTINGS[-1]):
        generate(name, scale)  # not timed: the first use of a batch size costs extra
    for name, scale in SETTINGS:
        start = time.perf_counter()
        images = generate(name, scale)
        seconds = time.perf_counter() - start
        nfe = pipe.guidance_trace.nfe
        pixels = to_tensor(images)
        table.add_row(
            name.upper(),
            f"{scale:g}",
            f"{sum(nfe) / len(nfe):.1f}",
            f"{saturation(pixels).mean():.3f}",
            f"{contrast(pixels).mean():.3f}",
            f"{seconds:.1f}",
        )
        columns.append(images)
        titles.append(f"{name.upper()} {scale:g}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture(columns, titles).save(args.output)
    Console().print(table)
    print(f"{len(PROMPTS)} prompts, {STEPS} steps each: {args.output}")


if __name__ == "__main__":
    main()
