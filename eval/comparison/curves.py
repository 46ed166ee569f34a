"""Charts of a comparison: metrics over scale, effective guidance and network evaluations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .verdicts import Row

# Name -> what it is called in a chart and in the table.
METRICS = {
    "matched_to": "As strong as CFG at",
    "fd": "Fréchet distance",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "alignment": "Alignment",
    "pickscore": "PickScore",
    "pickscore_wins": "PickScore, wins over CFG",
    "hpsv2": "HPS v2",
    "hpsv2_wins": "HPS v2, wins over CFG",
    "aesthetic": "Aesthetic",
    "aesthetic_wins": "Aesthetic, wins over CFG",
    "clip-iqa": "CLIP-IQA",
    "clip-iqa_wins": "CLIP-IQA, wins over CFG",
    "saturation": "Saturation",
    "contrast": "Contrast",
    "colourfulness": "Colourfulness",
    "chroma": "Chroma",
    "chroma_distance": "Chroma, distance",
    "clipped": "Clipped pixels",
    "ssim": "SSIM to CFG",
    "psnr": "PSNR to CFG",
    "ms_ssim": "MS-SSIM to CFG",
    "lpips": "LPIPS to CFG",
    "dreamsim": "DreamSim to CFG",
    "n_equal": "Equal to CFG",
    "effective_guidance": "Effective guidance",
    "nfe": "Evaluations",
    "seconds": "Seconds",
}
# What is drawn over what.
CURVES = {
    "w": ("guidance scale w", ("fd", "precision", "recall", "alignment", "saturation", "contrast")),
    "effective_guidance": ("effective guidance", ("fd", "alignment", "saturation", "contrast")),
    "nfe": ("network evaluations a picture", ("fd", "alignment", "ssim")),
}
# Values that a metric cannot pass.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "ssim": (-1, 1),
    **dict.fromkeys(("precision", "recall", "coverage", "saturation"), (0, 1)),
    **dict.fromkeys(("fd", "density", "contrast", "colourfulness"), (0, None)),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f4f24", "#6c757d")
LINES = {"solid": "-", "dashed": "--", "dotted": ":"}  # in CSS: in Matplotlib
GREY = "#6b7280"


def charts(rows: Sequence[Row]) -> dict[str, list[str]]:
    """A key of `CURVES` -> the metrics for which some row has both."""
    found = {
        x: [
            name
            for name in names
            if any(row.get(name) is not None and row.get(x) is not None for row in rows)
        ]
        for x, (_, names) in CURVES.items()
    }
    return {x: names for x, names in found.items() if names}


def legend(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What the lines of all charts are: text, colour, and line (a style of CSS, or none)."""
    methods, counts = _methods(rows), _counts(rows)
    entries = []
    for method, fewer, steps in _series(rows):
        text = f"{method}, fewer steps" if fewer else f"{method}, {steps} steps"
        line = "none" if fewer else list(LINES)[counts.index(steps) % len(LINES)]
        colour = COLOURS[methods.index(method) % len(COLOURS)]
        entries.append({"text": text, "colour": colour, "line": line})
    return entries


def draw_curve(rows: Sequence[Row], x: str, name: str, real: float | None = None) -> bytes:
    """A chart of one metric over `x`, as SVG on a transparent ground.

    Colours are methods, dashes numbers of steps, hollow markers classifier-free guidance with fewer
    steps; bars are intervals. Where methods share x, they stand a little beside each other.

    Args:
        rows: The settings' figures.
        x: A key of `CURVES`.
        name: A metric.
        real: Its value for the real pictures, a horizontal line.
    """
    import matplotlib
    from matplotlib.figure import Figure

    methods, counts = _methods(rows), _counts(rows)
    places = [row[x] for row in rows if row.get(x) is not None]
    spread = (max(places) - min(places)) * 0.012 if x == "w" else 0.0
    # Names stay text (no formulas in dollars), and the same figures give the same bytes.
    style: Any = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "pilotage"}
    style |= {"font.family": "sans-serif", "font.size": 10, "axes.labelcolor": GREY}
    style |= {"xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": "#c4c9d1"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for (method, fewer, steps), members in _series(rows).items():
            known = [r for r in members if r.get(name) is not None and r.get(x) is not None]
            number = methods.index(method)
            colour = COLOURS[number % len(COLOURS)]
            shift = (number - (len(methods) - 1) / 2) * spread
            line = list(LINES.values())[0 if fewer else counts.index(steps) % len(LINES)]
            axes.plot(
                [row[x] + shift for row in known],
                [row[name] for row in known],
                color=colour,
                marker="o",
                markersize=5,
                fillstyle="none" if fewer else "full",
                linestyle="" if fewer or x == "nfe" else line,
                clip_on=False,
                zorder=3,
            )
            bars = [row for row in known if row.get(f"{name}_interval")]
            lows, highs = ([row[f"{name}_interval"][end] for row in bars] for end in (0, 1))
            axes.vlines([row[x] + shift for row in bars], lows, highs, colour, linewidth=1)
        if real is not None:
            axes.axhline(real, color=GREY, linestyle="--", linewidth=1)
        axes.set_title(METRICS[name], loc="left", fontsize=11, fontweight="bold", pad=10)
        axes.set_xlabel(CURVES[x][0])
        if x == "w" and len(set(places)) <= 6:
            axes.set_xticks(ticks := sorted(set(places)), [f"{tick:g}" for tick in ticks])
        axes.set_ylim(*value_range(rows, name, real))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def value_range(rows: Sequence[Row], name: str, real: float | None = None) -> tuple[float, float]:
    """Where the axis of a metric begins and ends: a little beyond the data, within `LIMITS`."""
    known = [row for row in rows if row.get(name) is not None]
    values = [row[name] for row in known] + ([] if real is None else [real])
    values += [end for row in known for end in row.get(f"{name}_interval") or ()]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    least, most = LIMITS.get(name, (None, None))
    begin = low - margin if least is None else max(low - margin, least)
    return begin, high + margin if most is None else min(high + margin, most)


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _counts(rows: Sequence[Row]) -> list[int]:
    """Numbers of steps of all but the baselines of equal cost, the largest first."""
    return sorted({row["steps"] for row in rows if row["kind"] != "equal nfe"}, reverse=True)


def _series(rows: Sequence[Row]) -> dict[tuple[str, bool, int], list[Row]]:
    """Method, whether CFG with fewer steps, steps (then 0) -> rows in order of the scale."""
    series: dict[tuple[str, bool, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["w"]):
        fewer = row["kind"] == "equal nfe"
        series.setdefault((row["method"], fewer, 0 if fewer else row["steps"]), []).append(row)
    return series
