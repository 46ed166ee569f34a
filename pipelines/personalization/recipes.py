"""Recipes: all settings of a personalization run, and the search built from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...guidance.names import unknown
from ...guidance.zeroth_order import Descent, GradientSearch, WordSearch, candidate_words


@dataclass(frozen=True)
class Recipe(Descent):
    """Settings of a run: those of `Descent`, and more; the defaults are ZOODiP's.

    Args:
        steps: Steps of the search.
        batch: Pictures of a step, each with a timestep and a noise, B.
        timesteps_low, timesteps_high: Timesteps are drawn from low, ..., high - 1 (Partial Uniform
            Timestep Sampling), of the 1000 that models are usually trained with. Text controls
            colour and shape at middle to high noise; the rest adds variance to the loss and hardly
            any signal.
        pool: Size of the fixed, stratified pool of (image, timestep, noise); 0 draws afresh at
            every step.
        words: Known words that are compared with the class word as beginnings (`WordSearch`); 0
            begins at the class word.
        relative: mu and rate are in units of the class word's norm.

    Raises:
        ValueError: a setting out of range.
    """

    steps: int = 30_000
    batch: int = 1
    timesteps_low: int = 500
    timesteps_high: int = 900
    pool: int = 0
    words: int = 0
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("batch", 1), ("pool", 0), ("words", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pool % self.batch:
            raise ValueError(
                f"the pool ({self.pool}) must be a multiple of the batch ({self.batch})"
            )
        low, high = self.timesteps_low, self.timesteps_high
        if not 0 <= low < high:
            raise ValueError(f"timesteps must satisfy 0 <= low < high, got low={low}, high={high}")

    def build(self, initial: Tensor, tables: list[Tensor], seed: int) -> GradientSearch:
        """The search from the initial vectors.

        Args:
            initial: With shape (m, d); d is the sum of the tables' widths.
            tables: Embedding tables of the text encoders, with shapes (V, width).
            seed: Of all draws.
        """
        initial = initial.float().cpu()
        point, settings = initial.flatten(), self
        if self.relative:
            segments = [table.shape[1] for table in tables] * len(initial)
            unit = torch.stack([part.norm() for part in point.split(segments)]).mean().item()
            settings = dataclasses.replace(self, mu=self.mu * unit, rate=self.rate * unit)
        if not self.words:
            return GradientSearch(point, settings, seed)
        words = candidate_words(tables, initial[0], self.words, seed)
        return WordSearch(point, words.repeat(1, len(initial)), settings, seed)


ZOODIP = Recipe()
# Developed on concepts of the embedded model that are not among those reported (first tram, pig
# face, french fries, hot beverage, mountain; then 17 more of the held-out ones; then winking face,
# yellow heart, pouting cat, full moon face), in runs of at most 1200 forwards. With common random
# numbers a difference has hardly any noise of its own: n one-sided ones tell more per forward than
# n / 2 symmetric ones. Beginning at the mean of the class word and a few known words that do better
# helps where the class word fits badly; without warmup Adam's first steps move away from it again.
# At a rate above this the token leaves the class word's neighbourhood, and pictures lose its shape.
OURS = Recipe(
    steps=1000,
    directions=7,
    mu=3e-3,
    rate=0.015,
    betas=(0.9, 0.99),
    warmup=12,
    words=35,
    subspace_tau=0,
    pool=240,
    average=8.0,
    relative=True,
)
PRESETS: dict[str, Recipe] = {"zoodip": ZOODIP, "ours": OURS}


def recipe(preset: str | Recipe, **changes: Any) -> Recipe:
    """The recipe of a preset with some settings changed; None means unchanged.

    Raises:
        ValueError: unknown preset or setting (the message lists the known ones), a setting out of
            range or one that would have no effect beside the others.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        preset = PRESETS[preset]
    changes = {name: value for name, value in changes.items() if value is not None}
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in changes:
        if name not in known:
            raise unknown("setting", name, known)
    result = dataclasses.replace(preset, **changes)
    if "subspace_nu" in changes and not result.subspace_tau:
        raise ValueError("subspace_nu has no effect with subspace_tau=0")
    return result
