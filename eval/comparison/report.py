"""The report of a comparison: one HTML file without external resources."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ...guidance.files import write_text
from .answer import answer
from .charts import Point, Series, chart
from .evaluation import Cell

ROWS = 8  # prompts shown
LARGEST = 384  # pixels; larger pictures are embedded at this size
HERE = Path(__file__).parent

NAMES = {
    "fd": "Fréchet distance",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "saturation": "Saturation",
    "contrast": "Contrast",
    "colourfulness": "Colourfulness",
    "alignment": "Alignment",
    "ssim": "SSIM to CFG",
    "psnr": "PSNR to CFG",
    "n_equal": "Equal to CFG",
    "effective_guidance": "Effective guidance",
    "nfe": "Evaluations",
    "seconds": "Seconds",
}
OVER_SCALE = ("fd", "precision", "recall", "saturation", "contrast", "alignment")
OVER_COST = ("fd", "alignment", "ssim")
OVER_EFFECTIVE = ("fd", "saturation", "alignment", "contrast")

Row = dict[str, Any]


def write_report(
    path: Path, rows: Sequence[Row], facts: dict[str, Any], cells: Sequence[Cell]
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: Where.
        rows: The cells' figures.
        facts: What ``cells.json`` says beside them.
        cells: The cells, for their pictures.
    """
    write_text(path, render(rows, facts, cells))


def render(rows: Sequence[Row], facts: dict[str, Any], cells: Sequence[Cell]) -> str:
    """The page."""
    style = (HERE / "report.css").read_text()
    script = (HERE / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'"
    sections = [
        _answer(rows, facts),
        _pictures(cells),
        _charts(rows, facts.get("real")),
        _table(rows, facts.get("real")),
        _context(rows, facts),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>Guidance compared: {escape(', '.join(_methods(rows)))}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>Guidance compared</h1><p>{_summary(rows, facts)}</p></header>\n<main>\n"
        + "\n".join(sections)
        + '\n</main>\n<dialog id="large" aria-label="Picture, enlarged"><form method="dialog">'
        '<button class="close" aria-label="Close">×</button></form><img alt=""><p></p></dialog>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _summary(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    prompts, seeds = len(facts["prompts"]), len(facts["seeds"])
    counts = f"{prompts} prompt{'s' * (prompts != 1)}, {seeds} seed{'s' * (seeds != 1)} each"
    return (
        f"{escape(', '.join(_methods(rows)))} on {escape(facts['pipeline'])} with "
        f"{escape(facts['scheduler'])}: {len(rows)} settings, {counts}; "
        f"{rows[0]['n']} pictures a setting, the same noise for every setting."
    )


def _answer(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    first, *rest = (escape(text) for text in answer(rows, facts.get("real")))
    items = "".join(f"<li>{text}</li>" for text in rest)
    more = f"<ul>{items}</ul>" if items else ""
    return (
        '<section class="answer"><h2>Which guidance should I use?</h2>'
        f"<p><strong>{first}</strong></p>{more}</section>"
    )


def _pictures(cells: Sequence[Cell]) -> str:
    """Rows are prompts (first seed), columns settings."""
    prompts = list(dict.fromkeys(cells[0].samples.prompts))[:ROWS]
    head = "".join(
        f'<th scope="col">{escape(c.setting.method)}<br>w={c.setting.scale:g}'
        f"<br><small>{c.setting.steps} steps</small></th>"
        for c in cells
    )
    body = []
    for number, prompt in enumerate(prompts):
        index = cells[0].samples.prompts.index(prompt)
        pictures = "".join(
            f'<td><button class="picture" data-row="{number}" data-title="{escape(title)}">'
            f'<img src="{data_uri(cell.samples.paths[index])}" alt="{escape(title)}"></button></td>'
            for cell in cells
            for title in (f"{prompt}: {cell.setting.label}",)
        )
        body.append(f'<tr><th scope="row">{escape(prompt)}</th>{pictures}</tr>')
    total = len(dict.fromkeys(cells[0].samples.prompts))
    shown = (
        f"The first {len(prompts)} of {total} prompts" if total > len(prompts) else "All prompts"
    )
    return (
        '<section><h2>Pictures</h2><div class="scroll" tabindex="0" role="region" '
        'aria-label="Pictures"><table class="pictures"><caption>'
        f"{shown}, first seed, the same noise along a row. Click a picture, or press Enter on "
        "it, to enlarge it; the arrow keys then move along the row.</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "</section>"
    )


def data_uri(path: Path) -> str:
    """A picture as a data URI; larger ones scaled down, so that the page stays loadable."""
    with Image.open(path) as image:
        if max(image.size) <= LARGEST:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        small = image.convert("RGB")
        small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _series(rows: Sequence[Row], x: str, y: str, joined: bool = True) -> list[Series]:
    """One series a method (and number of steps), one for CFG with fewer steps.

    Colours are methods. Shapes are methods, too, or the numbers of steps if there are several,
    which then have their own dashes.
    """
    methods = _methods(rows)
    counts = sorted({row["steps"] for row in rows if row["kind"] != "equal nfe"}, reverse=True)
    several = len(counts) > 1
    found: dict[tuple[str, bool, int], list[Row]] = {}
    for row in rows:
        if row.get(x) is None or row.get(y) is None:
            continue
        fewer = row["kind"] == "equal nfe"
        key = (row["method"], fewer, row["steps"] if several and not fewer else 0)
        found.setdefault(key, []).append(row)
    series = []
    for (method, fewer, steps), members in found.items():
        name = f"{method}, fewer steps" if fewer else method + (f", {steps} steps" if steps else "")
        points = []
        for row in members:
            low, high = row.get(f"{y}_interval") or (None, None)
            interval = "" if low is None else f" ({low:.4g} to {high:.4g})"
            title = (
                f"{row['label']}: {NAMES[y]} {row[y]:.4g}{interval}, "
                f"{row['nfe']:.4g} evaluations, n={row['n']}"
            )
            points.append(Point(row[x], row[y], title, low, high))
        colour, dash = methods.index(method), counts.index(steps) if steps else 0
        shape = dash if several else colour
        series.append(Series(name, points, colour, shape, dash, joined and not fewer, fewer))
    return series


def _charts(rows: Sequence[Row], real: dict[str, float] | None) -> str:
    groups = [
        ("Over the guidance scale", "w", "guidance scale w", OVER_SCALE, True, ""),
        (
            "Over effective guidance",
            "effective_guidance",
            "effective guidance",
            OVER_EFFECTIVE,
            True,
            "Methods differ in how much a nominal w moves the prediction. Here each setting stands "
            "where the measured norm of its update, as denoised images, relative to CFG at the "
            "same w puts it: CFG stands at its w.",
        ),
        (
            "Over cost",
            "nfe",
            "network evaluations a picture",
            OVER_COST,
            False,
            "Hollow markers are classifier-free guidance with fewer steps, at the cost of the "
            "methods that need fewer evaluations. A setting is beaten by one that lies further "
            "left and is better at the same time.",
        ),
    ]
    parts = []
    for heading, x, x_label, metrics, joined, text in groups:
        figures = "".join(_figure(rows, x, x_label, metric, joined, real) for metric in metrics)
        if figures:
            note = f"<p>{escape(text)}</p>" if text else ""
            parts.append(
                f'<section><h2>{heading}</h2>{note}<div class="charts">{figures}</div></section>'
            )
    return "\n".join(parts)


def _figure(
    rows: Sequence[Row],
    x: str,
    x_label: str,
    metric: str,
    joined: bool,
    real: dict[str, float] | None,
) -> str:
    series = _series(rows, x, metric, joined)
    level = None
    if real is not None and metric in real:
        level = (real[metric], "real pictures")
    description = f"{NAMES[metric]} over {x_label}; the values are in the table of all settings."
    drawn = chart(series, x_label, NAMES[metric], description, level, dodge=x == "w")
    if not drawn:
        return ""
    count = sum(len(s.points) for s in series)
    bars = " Bars are 95 % intervals." if any(row.get(f"{metric}_interval") for row in rows) else ""
    return (
        f'<figure data-metric="{metric}" data-over="{x}" data-points="{count}">'
        f"<figcaption>{NAMES[metric]} over {x_label}.{bars}</figcaption>{drawn}</figure>"
    )


def _table(rows: Sequence[Row], real: dict[str, float] | None) -> str:
    columns = [name for name in NAMES if any(row.get(name) is not None for row in rows)]
    head = [("setting", "Setting"), ("w", "w"), ("steps", "Steps"), ("n", "N")]
    head += [(name, NAMES[name]) for name in columns]
    titles = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(text)}</button></th>'
        for _, text in head
    )
    body = "".join(_table_row(row, columns) for row in rows)
    foot = ""
    if real is not None:
        cells = "".join(
            f"<td>{_number(real[name])}</td>" if name in real else "<td></td>" for name in columns
        )
        foot = (
            '<tfoot><tr><th scope="row">real pictures</th><td></td><td></td>'
            f"<td>{real['n']}</td>{cells}</tr></tfoot>"
        )
    return (
        '<section><h2>All settings</h2><div class="scroll" tabindex="0" role="region" '
        'aria-label="All settings"><table class="cells"><caption>Means over the pictures of a '
        "setting, with 95 % bootstrap intervals below; of several prompts, whole prompts are "
        "resampled, with all their seeds. The mean PSNR leaves out pictures equal to CFG's, which "
        "have none. Click a heading to sort.</caption>"
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>{foot}</table></div></section>"
    )


def _table_row(row: Row, columns: Sequence[str]) -> str:
    note = ""
    if row["kind"] == "equal nfe":
        note = f"<small>at the cost of {escape(', '.join(row['matches']))}</small>"
    elif row["kind"] == "baseline":
        note = "<small>baseline, added</small>"
    guidance = escape(shortened(row["guidance"]))
    cells = [
        f'<th scope="row" data-value="{escape(row["label"])}" title="{guidance}">'
        f"{escape(row['label'])}{note}</th>"
    ]
    cells += [f'<td data-value="{row[k]}">{row[k]:g}</td>' for k in ("w", "steps", "n")]
    for name in columns:
        value = row.get(name)
        if value is None:
            cells.append('<td data-value="">–</td>')
            continue
        interval = row.get(f"{name}_interval") or row.get(f"{name}_range")
        extent = ""
        if interval:
            extent = f"<small>{_number(interval[0])} to {_number(interval[1])}</small>"
        cells.append(f'<td data-value="{value}">{_number(value)}{extent}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def shortened(text: str, length: int = 400) -> str:
    """The text, cut if it is long (fitted coefficients are)."""
    return text if len(text) <= length else f"{text[:length]}…"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _context(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    context = facts["context"]
    machine = context["machine"]
    pairs = [
        ("Command", f"<code>{escape(context['command'])}</code>"),
        ("Date", escape(context["date"])),
        (
            "Machine",
            escape(
                f"{machine['processor']}, {machine['cores']} cores, "
                f"accelerator: {machine['accelerator'] or 'none'}, Python {machine['python']}"
            ),
        ),
        ("Versions", escape(", ".join(f"{k} {v}" for k, v in context["versions"].items()))),
        ("Pictures a setting", f"{rows[0]['n']}"),
    ]
    if facts.get("extractor"):
        pairs.append(
            (
                "Features",
                f"{escape(facts['extractor'])}, against {facts['real']['n']} real pictures. "
                "Distances from few pictures are biased upwards and comparable only at the same N "
                "and with the same features; they are not the FID of papers unless those are "
                "Inception's.",
            )
        )
    if facts.get("alignment"):
        pairs.append(("Alignment", escape(facts["alignment"])))
    settings = {row["method"]: shortened(row["guidance"]) for row in rows}
    pairs += [
        (f"Settings of {escape(m)}", f"<code>{escape(g)}</code>") for m, g in settings.items()
    ]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs)
    return f"<section><h2>How it was measured</h2><dl>{items}</dl></section>"
