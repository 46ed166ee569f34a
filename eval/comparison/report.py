"""The report of a comparison: one HTML page; its pictures are files beside it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from tqdm import tqdm

from .curves import CURVES, METRICS, charts, draw_curve, legend
from .plan import Samples
from .thumbnails import LARGEST, thumbnail
from .verdicts import Row, number, short_labels

TRADED = {"nfe": "Evaluations", "seconds": "Seconds", "ssim": "Likeness (SSIM)"}


def render(
    rows: Sequence[Row],
    facts: dict[str, Any],
    samples: Sequence[Samples],
    output: Path,
    progress: bool = False,
) -> str:
    """The page, to be written into `output`; thumbnails of large pictures are made there.

    It needs nothing from elsewhere: styles, script and charts are inside, pictures and figures are
    files beside it. Its content security policy runs only the script that it came with.

    Args:
        rows: The settings' figures.
        facts: What ``cells.json`` says beside them, ``recommendation`` among it.
        samples: The pictures of each row.
        output: Folder of the comparison.
        progress: Show a bar.
    """
    import jinja2
    from markupsafe import Markup

    order = beside_what_they_match(rows)
    rows, samples = [rows[i] for i in order], [samples[i] for i in order]
    real = facts.get("real") or {}
    with Image.open(samples[0].paths[0]) as first:
        share = min(1, LARGEST / max(first.size))
        size = tuple(round(share * side) for side in first.size)
    script, style = (_beside(kind) for kind in ("js", "css"))
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["number"] = number
    return page.from_string(_beside("html")).render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        rows=rows,
        facts=facts,
        labels=[row["label"] for row in rows],
        pair=list(facts["recommendation"]["pictures"])[:2],
        names=short_labels(rows),
        chosen=facts["recommendation"],
        settings={row["method"]: row["guidance"] for row in rows},
        columns={k: v for k, v in METRICS.items() if any(row.get(k) is not None for row in rows)},
        metrics=METRICS | TRADED,
        legend=legend(rows),
        curves={
            CURVES[x][0]: {
                METRICS[name]: _data_uri(draw_curve(rows, x, name, real.get(name)))
                for name in names
            }
            for x, names in charts(rows).items()
        },
        size=size,
        samples=_pictures(samples, facts["seeds"], output, progress),
    )


def beside_what_they_match(rows: Sequence[Row]) -> list[int]:
    """Positions of the rows, every baseline of equal cost behind the first setting it matches."""
    place = {row["label"]: i for i, row in enumerate(rows)}
    keys = [
        (min((place[label] for label in row["matches"]), default=i), bool(row["matches"]), i)
        for i, row in enumerate(rows)
    ]
    return [i for *_, i in sorted(keys)]


def _pictures(
    samples: Sequence[Samples], seeds: Sequence[int], output: Path, progress: bool
) -> list[dict[str, Any]]:
    """One entry a prompt and seed, prompt by prompt: both, and links and sources by setting."""
    prompts = samples[0].prompts
    count = len(prompts) // len(seeds)  # seed by seed, see `Plan.samples`
    order = [(seed * count + i, seeds[seed]) for i in range(count) for seed in range(len(seeds))]
    bar: Iterable[tuple[int, int]] = tqdm(order, "thumbnails", disable=not progress)
    return [
        {
            "prompt": prompts[i],
            "seed": seed,
            "files": [
                (_link(one.paths[i], output), _link(thumbnail(one.paths[i], output), output))
                for one in samples
            ],
        }
        for i, seed in bar
    ]


def _beside(kind: str) -> str:
    return Path(__file__).with_suffix(f".{kind}").read_text("utf-8")


def _link(path: Path, output: Path) -> str:
    return quote(Path(os.path.relpath(path, output)).as_posix())


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
