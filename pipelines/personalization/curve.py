"""A curve of held-out losses as a picture, drawn by PIL: matplotlib is no dependency."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont


def curve(points: list[tuple[int, float]], size: tuple[int, int] = (640, 400)) -> Image.Image:
    """A picture of held-out losses over steps: a line, the best one marked, the first one dashed.

    Args:
        points: (step, loss), at least one; those that are not finite are left out.
        size: Width and height in pixels.
    """
    points = [point for point in points if math.isfinite(point[1])]
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    left, top, right, bottom = 70, 30, size[0] - 20, size[1] - 40
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    low, high, last = min(losses), max(losses), max(*steps, 1)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / last
        return x, bottom - (bottom - top) * (loss - low) / (high - low)

    for i in range(5):
        loss, step = low + (high - low) * i / 4, round(last * i / 4)
        (_, y), (x, _) = place(0, loss), place(step, low)
        draw.line([(left, y), (right, y)], "#dddddd")
        draw.text((left - 8, y), f"{loss:.4f}", "#444444", font, anchor="rm")
        draw.text((x, bottom + 6), str(step), "#444444", font, anchor="mt")
    draw.text((left, 8), "held-out loss over steps", "black", font)
    first = place(0, losses[0])[1]
    for x in range(left, right, 8):
        draw.line([(x, first), (x + 4, first)], "#999999")
    path = [place(*point) for point in points]
    draw.line(path, "#1f77b4", 2)
    x, y = path[losses.index(min(losses))]
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], "#d62728")
    label = f"best {min(losses):.4f}, step {steps[losses.index(min(losses))]}"
    draw.text((right, 8), label, "#d62728", font, anchor="ra")
    return image
