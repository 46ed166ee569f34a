"""Recipes: all settings of a personalization run, and the search built from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...guidance.zeroth_order import (
    AdamStep,
    Estimator,
    FromWords,
    GradientSearch,
    IterateAverage,
    PartialUniformTimesteps,
    Search,
    SubspaceGradient,
    WordSearch,
    candidate_words,
)


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; the defaults are ZOODiP's.

    Args:
        steps: Steps of the search.
        batch: Pictures of a step, each with a timestep and a noise, B.
        directions, mu: See `Estimator`.
        rate: Learning rate.
        betas, warmup: See `AdamStep`.
        subspace_tau: Tokens that Subspace Gradient keeps; 0 switches it off.
        subspace_nu: Share of the variance that Subspace Gradient takes for noise.
        timesteps_low, timesteps_high: Window of the timesteps (PUTS), of the 1000 that
            models are usually trained with.
        pool: Size of the fixed, stratified pool of (image, timestep, noise); 0 draws afresh at
            every step.
        words: Known words that are compared with the class word as beginnings (`WordSearch`); 0
            begins at the class word.
        average: eta of `IterateAverage`; negative is off.
        relative: mu and rate are in units of the class word's norm.

    Raises:
        ValueError: a setting out of range.
    """

    steps: int = 30_000
    batch: int = 1
    directions: int = 2
    mu: float = 1e-3
    rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    subspace_tau: int = 128
    subspace_nu: float = 1e-3
    timesteps_low: int = 500
    timesteps_high: int = 900
    pool: int = 0
    words: int = 0
    average: float = -1.0
    relative: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("pool", 0), ("words", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pool % self.batch:
            raise ValueError(
                f"the pool ({self.pool}) must be a multiple of the batch ({self.batch})"
            )
        # The parts check what is theirs.
        self.timesteps(), self._descent(torch.zeros(1), 1.0, 0)

    def timesteps(self) -> PartialUniformTimesteps:
        """The window of timesteps."""
        return PartialUniformTimesteps(self.timesteps_low, self.timesteps_high)

    def estimator(self, unit: float) -> Estimator:
        """The gradient estimator, its mu in units of `unit`."""
        return Estimator(self.directions, self.mu * unit)

    def _descent(self, point: Tensor, unit: float, seed: int) -> GradientSearch:
        tau, eta = self.subspace_tau, self.average
        return GradientSearch(
            point,
            self.estimator(unit),
            AdamStep(self.rate * unit, self.betas, self.warmup),
            seed,
            subspace=SubspaceGradient(tau, self.subspace_nu) if tau else None,
            average=IterateAverage(eta) if eta >= 0 else None,
        )

    def build(self, initial: Tensor, tables: list[Tensor], seed: int) -> Search:
        """The search from the initial vectors.

        Args:
            initial: With shape (m, d); d is the sum of the tables' widths.
            tables: Embedding tables of the text encoders, with shapes (V, width).
            seed: Seed of the search.
        """
        point = initial.float().cpu().flatten()
        segments = [table.shape[1] for table in tables] * len(initial)
        norms = torch.stack([part.norm() for part in point.split(segments)])
        descent = self._descent(point, norms.mean().item() if self.relative else 1.0, seed)
        if not self.words:
            return descent
        count = min(self.words, min(len(table) for table in tables) - 1)
        words = candidate_words(tables, initial.float().cpu()[0], count, seed)
        # As many points a step as the descent has.
        return FromWords(WordSearch(point, words.repeat(1, len(initial)), self.directions), descent)


ZOODIP = Recipe()
# Developed on concepts of the embedded model that are not among those reported (first tram, pig
# face, french fries, hot beverage, mountain; then 17 more of the held-out ones), in runs of at
# most 1200 forwards. With common random numbers a difference has hardly any noise of its own: n
# one-sided ones tell more per forward than n / 2 symmetric ones. Beginning at the mean of a few
# known words that do better than the class word helps where that fits badly; without warmup Adam's
# first steps move away from it again.
OURS = Recipe(
    steps=1000,
    directions=7,
    mu=3e-3,
    rate=0.025,
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
            raise ValueError(f"unknown preset {preset!r}: known are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    changes = {name: value for name, value in changes.items() if value is not None}
    known = [field.name for field in dataclasses.fields(Recipe)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}: known are {', '.join(known)}")
    result = dataclasses.replace(preset, **changes)
    if "subspace_nu" in changes and not result.subspace_tau:
        raise ValueError("subspace_nu has no effect with subspace_tau=0")
    return result
