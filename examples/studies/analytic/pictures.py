"""Pictures beside the figures: sheets of images, signed fields, and a plot of cost."""

from __future__ import annotations

import math
from pathlib import Path

from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from torch import Tensor

from pilotage.guidance.files import atomic

SIDE, MARGIN = 360, 56
COLOURS = ("#c0392b", "#2471a3", "#1e8449")


def save(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with atomic(path) as partial:
        image.save(partial)


def sheet(images: Tensor, path: Path, columns: int, size: int = 84) -> None:
    """Images (N, C, H, W) in [-1, 1] in rows of `columns`, which divides N."""
    pictures = VaeImageProcessor(vae_scale_factor=1).postprocess(images.float().clamp(-1, 1))
    save(make_image_grid(pictures, len(pictures) // columns, columns, resize=size), path)


def spread(fields: Tensor) -> Tensor:
    """Signed fields (N, C, H, W), each scaled to [-1, 1] with zero at grey."""
    return fields / fields.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def log_plot(
    lines: dict[str, list[tuple[float, float]]], x_label: str, y_label: str
) -> Image.Image:
    """Lines through points (x, y) > 0 on logarithmic axes, a tick at every power of ten."""
    image = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    spans = []
    for axis in (0, 1):
        values = [math.log10(point[axis]) for points in lines.values() for point in points]
        spans.append(
            (math.floor(min(values)), max(math.ceil(max(values)), 1 + math.floor(min(values))))
        )

    def place(x: float, y: float) -> tuple[float, float]:
        shares = [
            (math.log10(v) - low) / (high - low)
            for v, (low, high) in zip((x, y), spans, strict=True)
        ]
        return MARGIN + shares[0] * SIDE, MARGIN + (1 - shares[1]) * SIDE

    draw.rectangle((MARGIN, MARGIN, MARGIN + SIDE, MARGIN + SIDE), outline="black")
    for power in range(spans[0][0], spans[0][1] + 1):
        x, y = place(10.0**power, 10.0 ** spans[1][0])
        draw.text((x, y + 4), f"1e{power}", fill="black", anchor="ma")
    for power in range(spans[1][0], spans[1][1] + 1):
        x, y = place(10.0 ** spans[0][0], 10.0**power)
        draw.text((x - 4, y), f"1e{power}", fill="black", anchor="rm")
    draw.text((MARGIN + SIDE / 2, SIDE + 2 * MARGIN - 14), x_label, fill="black", anchor="ms")
    draw.text((MARGIN, MARGIN / 2), y_label, fill="black", anchor="lm")
    for i, (name, points) in enumerate(lines.items()):
        colour, path = COLOURS[i % len(COLOURS)], [place(x, y) for x, y in sorted(points)]
        draw.line(path, fill=colour, width=2)
        for x, y in path:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((MARGIN + SIDE - 6, MARGIN + 10 + 14 * i), name, fill=colour, anchor="rm")
    return image
