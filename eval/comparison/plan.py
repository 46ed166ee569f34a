"""What a comparison generates: settings, a plan of prompts, seeds and settings, and its samples."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...pipelines.guided import GuidanceLike

BASELINE = "cfg"


@dataclass(frozen=True)
class Setting:
    """One column of a comparison.

    Args:
        guidance: A name or a guidance object.
        scale: w; 1 means no guidance.
        steps: Sampling steps.
        method: What to call the guidance; default: the name, or the settings written out.
        matched: w of the classifier-free guidance that `scale` was chosen to be as strong as; None:
            the scale was asked for.
    """

    guidance: GuidanceLike
    scale: float
    steps: int = 20
    method: str = ""
    matched: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not math.isfinite(self.scale) or self.scale <= 0:
            raise ValueError(f"the scale must be finite and > 0 (1 is none), got {self.scale}")
        if isinstance(self.steps, bool) or self.steps != int(self.steps) or self.steps < 1:
            raise ValueError(f"steps must be a whole number >= 1, got {self.steps}")
        if not self.method:
            object.__setattr__(self, "method", str(self.guidance))

    @property
    def beside(self) -> float:
        """w of the classifier-free guidance that it is compared with."""
        return self.scale if self.matched is None else self.matched

    @property
    def label(self) -> str:
        """Method, scale and steps, e.g. ``apg w=7.5, 20 steps``."""
        return f"{self.method} w={self.scale:g}, {self.steps} steps"

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        words = re.sub(r"[^a-z0-9.]+", "-", f"{self.method} w{self.scale:g} s{self.steps}".lower())
        digest = hashlib.sha256(self.method.encode()).hexdigest()[:6]
        plain = re.fullmatch(r"[a-z0-9+*]{1,24}", self.method)
        return words.strip("-.") if plain else f"{words[:40].strip('-.')}-{digest}"


@dataclass(frozen=True)
class Plan:
    """What to generate: every prompt with every seed under every setting.

    Args:
        prompts: Texts; their order is part of the plan.
        settings: Columns of the comparison, all different.
        seeds: Whole numbers; one sample of every prompt each.
        batch_size: Samples in one chunk, a call of the pipeline.
        options: Further arguments of the pipeline's call that JSON can hold.
    """

    prompts: Sequence[str]
    settings: Sequence[Setting]
    seeds: Sequence[int] = (0,)
    batch_size: int = 8
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompts", "settings", "seeds"):
            values = tuple(getattr(self, name))
            if not values:
                raise ValueError(f"a plan needs {name}, got none")
            object.__setattr__(self, name, values)
        if empty := [i for i, prompt in enumerate(self.prompts) if not str(prompt).strip()]:
            raise ValueError(f"prompts are empty at the positions {empty}, counted from 0")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed occurs twice: {list(self.seeds)}")
        slugs = [setting.slug for setting in self.settings]
        if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
            raise ValueError(f"a setting occurs twice: {', '.join(sorted(twice))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def samples(self) -> list[tuple[int, int]]:
        """(seed, index of the prompt) of every sample, seed by seed."""
        return [(seed, i) for seed in self.seeds for i in range(len(self.prompts))]

    @property
    def chunks(self) -> list[list[tuple[int, int]]]:
        """The samples in groups of `batch_size`."""
        samples = self.samples
        return [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]


@dataclass(frozen=True)
class Samples:
    """The finished samples of one setting, in the order of `Plan.samples`.

    Args:
        setting: How they were made.
        paths: PNG files.
        prompts: Text of each.
        nfe: Network evaluations of each.
        update: Norm of (guided - conditional) as denoised images of each, mean over all steps;
            None where the scheduler's noise levels are not known.
        seconds: Seconds a sample, mean over chunks; the first chunk of a process, in which
            libraries prepare themselves, counts only if there is no other.
    """

    setting: Setting
    paths: list[Path]
    prompts: list[str]
    nfe: list[int]
    update: list[float] | None
    seconds: float

    @property
    def mean_nfe(self) -> float:
        """Mean network evaluations a sample."""
        return statistics.fmean(self.nfe)


def sample_seed(seed: int, prompt_index: int) -> int:
    """Seed of the generator of one sample: 63 bits of SHA-256 of the two numbers."""
    digest = hashlib.sha256(f"pilotage {seed} {prompt_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
