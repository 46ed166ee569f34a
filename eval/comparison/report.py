"""The report of a comparison: one HTML page, with its pictures and curves inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .answer import Row, answer
from .plan import Samples

PROMPTS = 8  # rows of pictures
LARGEST = 384  # pixels; larger pictures are embedded at this size

# What the table tells, by its name in a row.
COLUMNS = {
    "w": "w",
    "matched_to": "As strong as CFG at",
    "steps": "Steps",
    "n": "N",
    "fd": "Fréchet distance",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "saturation": "Saturation",
    "contrast": "Contrast",
    "colourfulness": "Colourfulness",
    "chroma": "Chroma",
    "chroma_distance": "Chroma, distance",
    "clipped": "Clipped pixels",
    "alignment": "Alignment",
    "pickscore": "PickScore",
    "pickscore_wins": "PickScore, wins over CFG",
    "hpsv2": "HPS v2",
    "hpsv2_wins": "HPS v2, wins over CFG",
    "aesthetic": "Aesthetic",
    "aesthetic_wins": "Aesthetic, wins over CFG",
    "clip-iqa": "CLIP-IQA",
    "clip-iqa_wins": "CLIP-IQA, wins over CFG",
    "ssim": "SSIM to CFG",
    "psnr": "PSNR to CFG",
    "ms_ssim": "MS-SSIM to CFG",
    "lpips": "LPIPS to CFG",
    "n_equal": "Equal to CFG",
    "effective_guidance": "Effective guidance",
    "nfe": "Evaluations",
    "seconds": "Seconds",
}
# What is drawn over what.
CURVES = {
    "w": ("guidance scale w", ("fd", "precision", "recall", "saturation", "contrast", "alignment")),
    "effective_guidance": ("effective guidance", ("fd", "saturation", "contrast", "alignment")),
    "nfe": ("network evaluations a picture", ("fd", "alignment", "ssim")),
}
LINES = ("-", "--", ":", "-.")


def render(rows: Sequence[Row], facts: dict[str, Any], samples: Sequence[Samples]) -> str:
    """The page; its links lead to the files that lie beside it.

    Args:
        rows: The settings' figures.
        facts: What ``cells.json`` says beside them.
        samples: The pictures of each row.
    """
    import jinja2

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["number"] = lambda value: f"{value:.4g}" if value or value == 0 else "–"
    real = facts.get("real")
    curves = {CURVES[x][0]: draw_curves(rows, x, real) for x in CURVES}
    texts = samples[0].prompts
    first = {prompt: texts.index(prompt) for prompt in texts}
    return page.from_string(Path(__file__).with_suffix(".html").read_text("utf-8")).render(
        rows=rows,
        facts=facts,
        answer=answer(rows, facts),
        settings={row["method"]: row["guidance"] for row in rows},
        columns={k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in rows)},
        curves={label: _data_uri("svg+xml", svg) for label, svg in curves.items() if svg},
        pictures={
            prompt: [_embedded(one.paths[i]) for one in samples]
            for prompt, i in list(first.items())[:PROMPTS]
        },
    )


def draw_curves(rows: Sequence[Row], x: str, real: dict[str, float] | None = None) -> bytes:
    """Charts of metrics over `x` side by side, as SVG; empty if no row has both.

    Colours are methods, dashes numbers of steps, hollow markers classifier-free guidance with fewer
    steps; bars are intervals, and a horizontal line the real pictures.

    Args:
        rows: The settings' figures.
        x: A key of `CURVES`.
        real: Statistics of the real pictures.
    """
    import matplotlib
    from matplotlib.figure import Figure

    label, names = CURVES[x]
    rows = [row for row in rows if row.get(x) is not None]
    names = tuple(name for name in names if any(row.get(name) is not None for row in rows))
    if not names:
        return b""
    series: dict[tuple[str, bool, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        fewer = row["kind"] == "equal nfe"
        series.setdefault((row["method"], fewer, 0 if fewer else row["steps"]), []).append(row)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    counts = sorted({steps for _, fewer, steps in series if not fewer}, reverse=True)
    handles = {}
    # Names stay text (no formulas in dollars), and the same figures give the same bytes.
    with matplotlib.rc_context(
        {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "pilotage"}
    ):
        figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for (method, fewer, steps), members in series.items():
                known = [row for row in members if row.get(name) is not None]
                colour = f"C{methods.index(method)}"
                text = f"{method}, fewer steps" if fewer else f"{method}, {steps} steps"
                (handles[text],) = axes.plot(
                    [row[x] for row in known],
                    [row[name] for row in known],
                    color=colour,
                    marker="o",
                    fillstyle="none" if fewer else "full",
                    linestyle="" if fewer or x == "nfe" else LINES[counts.index(steps) % 4],
                )
                bars = [row for row in known if row.get(f"{name}_interval")]
                lows, highs = ([row[f"{name}_interval"][end] for row in bars] for end in (0, 1))
                axes.vlines([row[x] for row in bars], lows, highs, colour, linewidth=1)
            if real is not None and name in real:
                handles["real pictures"] = axes.axhline(real[name], color="gray", linestyle="--")
            axes.set(xlabel=label, ylabel=COLUMNS[name])
        columns = min(len(handles), 2 * len(names))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
        out = io.BytesIO()
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return out.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _embedded(path: Path) -> str:
    """A picture as a data URI; larger ones scaled down, so that the page stays loadable."""
    with Image.open(path) as image:
        if max(image.size) <= LARGEST:
            return _data_uri("png", path.read_bytes())
        small = image.convert("RGB")
        small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "WEBP", quality=85)
    return _data_uri("webp", out.getvalue())
