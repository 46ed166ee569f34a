"""Are verdicts of paired differences right? ``paired`` in ``eval/results/report.json``.

    OMP_NUM_THREADS=1 python -m examples.studies.paired

Drawn figures whose truth is known go through the code of `pilotage compare`: prompts that differ
far more than settings do, two seeds each, the same prompts and noise under every setting.

- ``power``: share of draws in which the better setting is called so, by the size of the true
  difference in standard errors of the paired mean; alone, and among 18 comparisons (18 settings
  with CFG, one of them better). ``marginal_overlap``: share of draws in which the two settings'
  own intervals overlap, so that nothing could be said by them.
- ``false_positives``: share of draws in which two equal settings are called different: by means,
  by every metric of (small) feature sets, and at least one of 18.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from pilotage.eval.comparison.evaluation import (
    DISTANCE_RESAMPLES,
    RESAMPLES,
    distribution_metrics,
)
from pilotage.eval.comparison.paired import Difference, differences
from pilotage.eval.metrics.bootstrap import Resamples, interval
from pilotage.eval.record import add_figures

PROMPTS, SEEDS = 32, 2
GROUPS = [prompt for prompt in range(PROMPTS) for _ in range(SEEDS)]
SIZES = (2, 3, 4)  # true differences, in standard errors of the paired mean
FAMILY = 18  # comparisons
POWER_DRAWS, MEAN_DRAWS, SET_DRAWS = 200, 1000, 400
DIMENSION, REAL = 8, 200


def figures(settings: int, seed: int) -> Tensor:
    """A figure of every picture of settings without any difference, with shape (settings, N).

    Standard deviations: 10 over prompts, 3 over seeds, 1 of a setting's own noise. So the standard
    error of a paired mean is sqrt(2 / N).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, SEEDS)
    prompts = 10 * torch.randn(PROMPTS, 1, generator=generator, dtype=torch.float64)
    seeds = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    own = torch.randn(settings, *shape, generator=generator, dtype=torch.float64)
    return (prompts + seeds + own).flatten(1)


def of_means(values: Tensor, seed: int) -> list[Difference]:
    """Every later setting's mean minus the first's; values with shape (settings, N)."""
    drawn = Resamples.of(GROUPS, RESAMPLES, seed)
    draws = [drawn.means(row) for row in values]
    pairs = [(i, 0) for i in range(1, len(values))]
    return differences(values.mean(1).tolist(), draws, pairs, PROMPTS)


def of_sets(seed: int) -> dict[str, Difference]:
    """Differences of two feature sets of one distribution, by every metric of sets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    real = normal(REAL, DIMENSION)
    shared = normal(PROMPTS, 1, DIMENSION) + 0.5 * normal(PROMPTS, SEEDS, DIMENSION) + 0.5
    fakes = [(shared + 0.5 * normal(*shared.shape)).flatten(0, 1) for _ in range(2)]
    drawn = Resamples.of(GROUPS, DISTANCE_RESAMPLES, seed)
    one, other = (distribution_metrics(real, fake, drawn) for fake in fakes)
    return {
        name: differences(
            [one[name].value, other[name].value],
            [one[name].draws, other[name].draws],
            [(0, 1)],
            PROMPTS,
        )[0]
        for name in one
    }


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the intervals of two settings' means overlap."""
    (low_a, high_a), (low_b, high_b) = interval(a, groups=GROUPS), interval(b, groups=GROUPS)
    return low_a <= high_b and low_b <= high_a


def power(size: float, family: int, draws: int) -> tuple[float, float]:
    """Share of draws called right, and share of draws whose own intervals overlap."""
    right = overlapping = 0
    for seed in tqdm(range(draws), f"{size:g} standard errors, {family}", leave=False):
        values = figures(family + 1, seed)
        values[1] += size * (2 / len(GROUPS)) ** 0.5
        first = of_means(values, seed)[0]
        right += first.clear and first.value > 0
        overlapping += overlap(values[0], values[1])
    return right / draws, overlapping / draws


def measure(
    power_draws: int = POWER_DRAWS,
    mean_draws: int = MEAN_DRAWS,
    set_draws: int = SET_DRAWS,
) -> dict[str, object]:
    """All figures of the study, by how many drawn comparisons each."""
    alone = {size: power(size, 1, power_draws) for size in SIZES}
    among = {size: power(size, FAMILY, power_draws) for size in SIZES}
    sets = [of_sets(seed) for seed in tqdm(range(set_draws), "feature sets", leave=False)]
    return {
        "power": {f"{size} standard errors": right for size, (right, _) in alone.items()},
        "power_among_18": {f"{size} standard errors": right for size, (right, _) in among.items()},
        "marginal_overlap": min(share for _, share in alone.values()),
        "false_positives": {
            "means": _share(of_means(figures(2, s), s)[0].clear for s in range(mean_draws)),
            **{name: _share(found[name].clear for found in sets) for name in sets[0]},
            "any_of_18": _share(
                any(one.clear for one in of_means(figures(FAMILY + 1, s), s))
                for s in range(power_draws)
            ),
        },
        "draws": {
            "power": power_draws,
            "any_of_18": power_draws,
            "means": mean_draws,
            "sets": set_draws,
        },
        "prompts": PROMPTS,
        "seeds": SEEDS,
    }


def _share(calls: Iterable[bool]) -> float:
    found = list(calls)
    return sum(found) / len(found)


def main(output: Annotated[Path, typer.Option()] = Path("eval/results/report.json")) -> None:
    """Measure, and write ``paired`` beside what else the file holds."""
    found = measure()
    add_figures(output, "paired", found)
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
