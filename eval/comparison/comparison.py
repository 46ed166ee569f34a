"""A comparison of guidance settings: same prompts, same noise, every metric, one report.

Beside the settings asked for, the folder holds two kinds of classifier-free guidance that make the
others comparable: one at every (scale, steps), the baseline; and one with fewer steps for every
method that needs fewer network evaluations, so that both cost the same.

Effective guidance. Methods change how much a nominal w does. The norm of (guided - conditional)
as denoised images, mean over steps and samples, is measured; a setting that moves the prediction
by a share q of what the baseline at the same w does has the effective guidance 1 + q (w - 1).
With ``matched`` every setting is compared once more, at the scale at which that is w (`matched`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ...guidance.files import atomic, write_json, write_text
from ...pipelines.processes import processes
from ..metrics.alignment import Alignment
from ..metrics.extractors import Extractor, load_extractor
from ..metrics.per_picture import NO_DISTANCES, NO_SCORERS, Distance
from ..pictures import Pictures, Reading
from ..record import figures_context
from .answer import answer
from .cost import steps_for_nfe
from .evaluation import evaluate, independent, paired_differences, preferences, rounded
from .lines import lines_to_copy
from .matched import at_equal_strength, matched_settings
from .plan import BASELINE, Plan, Samples, Setting
from .reference import Reference, check_reference, measure_reference
from .report import render
from .sampling import generate


def grid(
    guidances: Sequence[Any], scales: Sequence[float], steps: Sequence[int] = (20,)
) -> list[Setting]:
    """Every guidance at every scale with every number of steps.

    w = 1 is no guidance, the same for all: one setting, called ``cfg``.

    Raises:
        ValueError: a scale is below 1, or there is nothing to compare.
    """
    if not (guidances and scales and steps):
        raise ValueError("a comparison needs guidances, scales and steps")
    if low := [scale for scale in scales if not scale >= 1]:
        raise ValueError(f"scales to compare must be >= 1 (1 is no guidance), got {low}")
    return [
        Setting(guidance, float(scale), count)
        for count in steps
        for scale in scales
        for guidance in (guidances if scale > 1 else [BASELINE])
    ]


def compare(
    pipe: Any,
    plan: Plan,
    output: Path | str,
    reference: Reference | None = None,
    extractor: Extractor | None = None,
    scorers: Mapping[str, Alignment] = NO_SCORERS,
    distances: Mapping[str, Distance] = NO_DISTANCES,
    reading: Reading | None = None,
    equal_nfe: bool = True,
    report: bool = True,
    progress: bool = True,
    matched: bool = False,
    parallel: str = "samples",
    loading: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Generate, evaluate and report.

    Args:
        pipe: A guided pipeline, on its device.
        plan: What to compare; its settings e.g. from `grid`.
        output: Folder for ``cells.json``, ``cells.csv``, ``report.html`` and the pictures
            (``pictures/``, small ones for the page in ``thumbnails/``); an interrupted comparison
            goes on where it stopped, and one of other settings shares its pictures.
        reference: Real pictures, with shape (N, 3, H, W), in [0, 1], those of a folder, or a file
            of their features; without them the metrics that compare distributions are left out.
        extractor: Pictures to features; default: `load_extractor`'s. Used with `reference` only.
        scorers: What scores pictures by their prompts, by name: ``alignment``, or a kind of
            `preference`, of which the share of wins over the baseline is told as well.
        distances: ``lpips`` and ``dreamsim`` to the baseline, as far as their weights are there.
        reading: How the pictures made are read to be measured, resized like those of a folder.
        equal_nfe: Add classifier-free guidance with fewer steps at the cost of cheaper methods.
        report: Write ``report.html``.
        progress: Show bars.
        matched: Add every setting at the scale at which it is as strong as CFG at the one asked
            for; ``equal_strength.csv`` is the table of these.
        parallel: What several processes share out, see `generate`.
        loading: Options with which ``pilotage generate`` loads the same pipeline, for the command
            that the report shows; None leaves the command out.

    Returns:
        One dictionary a cell (the content of ``cells.json``); empty in all processes but the main
        one.

    Raises:
        ValueError: the plan makes no sense on this pipeline, or `output` holds another one.
    """
    output = Path(output)
    if reference is not None:
        check_reference(reference)
    if matched:
        found = matched_settings(pipe, plan, output / "matching.json", progress)
        plan = replace(plan, settings=[*plan.settings, *found])
    asked = plan.settings
    plan = with_baselines(plan)
    pictures = output / "pictures"
    made = generate(pipe, plan, pictures, progress, parallel)
    plain = [samples for samples in made if samples.setting.method == BASELINE]
    baselines = {(one.setting.scale, one.setting.steps): one for one in plain}
    matches = _equal_cost(pipe.scheduler, made, baselines) if equal_nfe else {}
    fewer = []
    if matches:
        fewer = generate(pipe, replace(plan, settings=[*matches]), pictures, progress, parallel)
    if not processes().is_main_process:
        return []

    gallery = real = shares = None
    if reference is not None:
        extractor = extractor or load_extractor(device=pipe.device)
        gallery, means, shares = measure_reference(reference, extractor, progress)
        real = {name: mean if name == "n" else rounded(mean) for name, mean in means.items()}
    rows, resampled = [], {}
    plain_scores: dict[Setting, dict[str, Tensor]] = {}
    everything = [*made, *fewer]
    for i, samples in enumerate(tqdm(everything, "metrics", unit="setting", disable=not progress)):
        same = matches.get(samples.setting, []) if i >= len(made) else []
        like = same[0] if same else samples.setting
        baseline = baselines[like.beside, like.steps]
        kind = "baseline" if i >= len(asked) else "matched" if like.matched else "grid"
        if baseline.setting not in plain_scores:
            plain_scores[baseline.setting] = preferences(baseline, scorers, reading)
        row, resampled[samples.setting.label] = evaluate(
            samples,
            None if baseline is samples else baseline,
            output,
            "equal nfe" if same else kind,
            [setting.label for setting in same],
            str(pipe.resolve_guidance(samples.setting.guidance)),
            extractor,
            gallery,
            scorers,
            plain_scores[baseline.setting],
            distances,
            shares,
            reading,
        )
        rows.append(row)
    texts = made[0].prompts
    count = len(set(independent(texts)))
    facts = {
        "comparisons": paired_differences(resampled, count),
        "resampled": {"unit": "prompts" if len(set(texts)) > 1 else "pictures", "count": count},
        "prompts": list(plan.prompts),
        "seeds": list(plan.seeds),
        "real": real,
        "reference": reference.summary() if isinstance(reference, Pictures) else None,
        "extractor": getattr(extractor, "name", None) if reference is not None else None,
        "alignment": getattr(scorers.get("alignment"), "name", None),
        "scores": {kind: one.name for kind, one in scorers.items()},
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "context": figures_context(),
    }
    chosen = answer(rows, facts)
    setting = next((s.setting for s in everything if s.setting.label == chosen["setting"]), None)
    facts["recommendation"] = chosen | lines_to_copy(pipe, setting, plan, loading)
    write_json(output / "cells.json", {"cells": rows, **facts})
    write_csv(output / "cells.csv", rows)
    if matched:
        write_csv(output / "equal_strength.csv", at_equal_strength(rows))
    if report:
        write_text(output / "report.html", render(rows, facts, everything, output, progress))
    return rows


def with_baselines(plan: Plan) -> Plan:
    """The plan with classifier-free guidance at every scale and number of steps it has."""
    have = {(s.scale, s.steps) for s in plan.settings if s.method == BASELINE}
    wanted = dict.fromkeys((s.beside, s.steps) for s in plan.settings)
    added = [Setting(BASELINE, *pair) for pair in wanted if pair not in have]
    return replace(plan, settings=[*plan.settings, *added])


def _equal_cost(
    scheduler: Any, made: Sequence[Samples], baselines: dict[tuple[float, int], Samples]
) -> dict[Setting, list[Setting]]:
    """CFG with the steps that cost what a cheaper method costs -> the settings it matches."""
    matches: dict[Setting, list[Setting]] = {}
    for samples in made:
        setting = samples.setting
        if samples.mean_nfe < baselines[setting.beside, setting.steps].mean_nfe:
            steps = steps_for_nfe(scheduler, samples.mean_nfe, setting.steps)
            if (setting.beside, steps) not in baselines:
                fewer = Setting(BASELINE, setting.beside, steps)
                matches.setdefault(fewer, []).append(setting)
    return matches


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The cells as a table: intervals and ranges in two columns, lists joined by semicolons."""
    table: list[dict[str, Any]] = [{} for _ in rows]
    for row, flat in zip(rows, table, strict=True):
        for name, value in row.items():
            if name.endswith(("_interval", "_range")):
                stem = name.rpartition("_")[0]
                flat[f"{stem}_low"], flat[f"{stem}_high"] = value or (None, None)
            else:
                flat[name] = "; ".join(value) if isinstance(value, list) else value
    names = dict.fromkeys(name for flat in table for name in flat)
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names)  # None is written as nothing
        writer.writeheader()
        writer.writerows(table)
