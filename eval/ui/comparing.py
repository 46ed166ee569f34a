"""What the second tab does: a small comparison."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..comparison.comparison import compare, grid
from ..comparison.plan import Plan
from . import lines
from .background import Emit, streamed
from .studio import Studio, whole

REPORTS = "reports"
MOST_PICTURES = 400  # of one comparison: more is work for the command


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    Args:
        page: ``report.html``, in its folder.
        command: A command line that makes the same comparison.
    """

    page: Path
    command: str


def comparison(
    studio: Studio,
    prompts: str,
    guidances: Sequence[str],
    scales: str,
    steps: int,
    seeds: int,
    negative: str = "",
) -> Generator[int, None, Report]:
    """Compare settings; yields how many pictures there are, now and then.

    Args:
        studio: The model.
        prompts: One a line.
        guidances: As text.
        scales: Numbers, separated by commas or spaces.
        steps: Sampling steps.
        seeds: Pictures of every prompt.
        negative: What the pictures shall not show.

    Raises:
        ValueError: there is nothing to compare, too much, or something unknown.
    """
    steps, seeds = whole("steps", steps), whole("seeds", seeds)
    texts = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not texts:
        raise ValueError("no prompts: write one a line")
    try:
        numbers = [float(text) for text in re.split(r"[,;\s]+", scales) if text]
    except ValueError:
        raise ValueError(f"scales must be numbers separated by commas, got {scales!r}") from None
    names = [name.strip() for name in guidances or () if name.strip()]
    settings = grid(names, numbers, (steps,))
    if (count := len(settings) * len(texts) * seeds) > MOST_PICTURES:
        raise ValueError(
            f"that would be {count} pictures, more than the {MOST_PICTURES} that the page makes at "
            "once: choose fewer, or use the command"
        )
    for name in names:
        studio.pipe.resolve_guidance(name)
    options = {"negative_prompt": negative or None}
    plan = Plan(texts, settings, range(seeds), options=options)
    folder = studio.fresh_folder(REPORTS)
    line = lines.command(
        "compare",
        "prompts.txt",
        {
            "-g": names,
            "-w": numbers,
            "--steps": steps,
            "--seeds": seeds,
            "--negative": negative or None,
            **studio.loading,
            "-o": "outputs/compare",
        },
    )

    def work(emit: Emit) -> Report:
        compare(studio.pipe, plan, folder, progress=False)
        return Report(folder / "report.html", line)

    with contextlib.closing(streamed(work, studio.lock)) as news:
        while True:
            try:
                next(news)
            except StopIteration as end:
                return end.value
            yield sum(1 for _ in folder.rglob("*.png"))
