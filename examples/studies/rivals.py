"""Methods of others that leave evaluations out, as rules, policies and fills of ours.

Re-implemented from their papers and code for `examples.studies.evaluations`, not part of the
library: where one of them were better, it would be there. Some need no more than a setting of the
library's own: gating (FastVideo, SGLang) is `gate`, Step AG (https://arxiv.org/abs/2506.08351)
`Interval`, first-order Taylor extrapolation `ExtrapolateDifference`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pilotage.guidance import Coefficients, Fill, Guidance, Policy, Rule, Schedule
from pilotage.guidance.base import BOTH, Decision, Kind, PolicyState, Predictions, Step, Weights
from pilotage.guidance.fitting.regression import ridge_regression
from pilotage.guidance.policies.schedule import Choice
from pilotage.guidance.prediction import accumulate


@dataclass(frozen=True)
class Taylor(Fill):
    r"""TaylorSeer: the last prediction is continued by finite differences (2503.06923).

    .. math:: F^{(0)} = g, \quad F^{(j+1)} = (F^{(j)} - F^{(j)}_{before}) / gap, \quad
        \hat g = \sum_j F^{(j)} k^j / j!

    at evaluated steps, k steps after the last of them.

    Args:
        order: Highest j.
    """

    name: ClassVar[str] = "taylor"

    order: int = 2

    def reused(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        k = step - evaluated[-1]
        total: dict[int, float] = {}
        for j, factor in enumerate(self._factors(evaluated)):
            for i, weight in factor.items():
                total[i] = total.get(i, 0.0) + weight * k**j / math.factorial(j)
        return Weights(guided=total)

    def _factors(self, evaluated: Sequence[int]) -> list[dict[int, float]]:
        """F of every order at the last evaluated step, as weights of predictions."""
        factors = [{evaluated[-1]: 1.0}]
        if len(evaluated) > 1:
            gap = evaluated[-1] - evaluated[-2]
            before = self._factors(evaluated[:-1])
            for j in range(min(self.order, len(before))):
                names = {**factors[j], **before[j]}
                factors.append(
                    {i: (factors[j].get(i, 0) - before[j].get(i, 0)) / gap for i in names}
                )
        return factors


@dataclass(frozen=True)
class AdamsBashforth(Fill):
    """The last two predictions, continued to the middle of the step that is skipped.

    That is what Adams and Bashforth's second order makes of a first-order solver.
    """

    name: ClassVar[str] = "adams-bashforth"

    def reused(self, step: int, evaluated: Sequence[int]) -> Weights:
        """See `Fill`."""
        last = evaluated[-1]
        if len(evaluated) < 2:
            return Weights(guided={last: 1.0})
        slope = (step - last + 0.5) / (last - evaluated[-2])
        return Weights(guided={last: 1 + slope, evaluated[-2]: -slope})


@dataclass(frozen=True)
class AdaptiveDiffusion(Policy):
    r"""Skips where the latents' third difference is small, per sample (2410.09873).

    With :math:`d_i` the mean of :math:`|x_{i+1} - x_i|`, the step after i is skipped if
    :math:`|(d_i + d_{i-2}) / 2 - d_{i-1}| \le \delta d_{i-1}`, at most `most` times running; the
    network's last (guided) output is used once more. The first four steps are evaluated.

    Args:
        delta, most: As above; the paper's are 0.01 and 4.
    """

    name: ClassVar[str] = "adaptive-diffusion"
    space: ClassVar[str] = "native"

    delta: float = 0.01
    most: int = 4

    def start(self, batch: int, total: int, on_cpu: bool) -> PolicyState:
        """A state that has seen no latents yet."""
        return _ThirdDifference(self, batch)


class _ThirdDifference(PolicyState):
    def __init__(self, policy: AdaptiveDiffusion, batch: int) -> None:
        self.policy = policy
        self.x: Tensor | None = None
        self.moved: list[list[float]] = []
        self.skipped = [0] * batch

    def decide(self, step: Step) -> Sequence[Decision]:
        assert step.x_t is not None
        if self.x is not None:
            self.moved.append((step.x_t - self.x).abs().flatten(1).mean(1).tolist())
        self.x = step.x_t.clone()
        skip = Decision((), reuse=Weights(guided={step.index - 1: 1.0}))
        found = []
        for row in range(len(self.skipped)):
            skips = step.index > 3 and self.skipped[row] < self.policy.most and self._small(row)
            self.skipped[row] = self.skipped[row] + 1 if skips else 0
            found.append(skip if skips else BOTH)
        return found

    def _small(self, row: int) -> bool:
        oldest, middle, newest = (moved[row] for moved in self.moved[-3:])
        return abs((newest + oldest) / 2 - middle) <= self.policy.delta * middle

    def keep_until(self, kind: Kind, step: int) -> int:
        return step + 1 if kind == "guided" else -1


@dataclass(frozen=True)
class SpectrumReuse(Rule):
    """FasterCache's reuse of the unconditional spectrum (2410.19355, as in diffusers).

    At every fifth step, and after 64 % of the noise, both branches are evaluated and the difference
    of their spectra is kept, low and high frequencies apart (a disc of a fifth of the side). Else
    the unconditional prediction is the conditional one's spectrum with that added; between, the
    part that matters at this time grows by a tenth at every use. It goes with `spectrum_reuse`.
    """

    name: ClassVar[str] = "spectrum-reuse"

    def combine(
        self, predictions: Predictions, step: Step, w: float | Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rule`; the state holds the low and the high part along the first axis of two."""
        cond, uncond = map(accumulate, predictions.pair("native"))
        if evaluates(step.index, step.total) or state is None:
            low = low_pass(uncond - cond)
            state = torch.stack([low, uncond - cond - low], 1)
        else:
            t = timestep(step.index, step.total)
            grown = [1.1 if 99 < t < 901 else 1.0, 1.1 if t < 301 else 1.0]
            state = state * state.new_tensor(grown).view(1, 2, *(1,) * (cond.ndim - 1))
        return cond + (w - 1) * -state.sum(1), state


def spectrum_reuse(total: int) -> Guidance:
    """`SpectrumReuse` over so many steps."""
    choices: list[Choice] = ["both" if evaluates(i, total) else "estimate" for i in range(total)]
    return Guidance(SpectrumReuse(), Schedule(tuple(choices), fill=_Conditional()))


@dataclass(frozen=True)
class _Conditional(Fill):
    """What the rule does not read: the conditional prediction in the place of the other."""

    name: ClassVar[str] = "conditional"

    def estimate(self, step: int, evaluated: Sequence[int]) -> Weights:
        return Weights({step: 1.0})


def evaluates(index: int, total: int) -> bool:
    """Whether FasterCache evaluates both branches: it skips within the last 641 timesteps only."""
    return index % 5 == 0 or timestep(index, total) >= 641


def timestep(index: int, total: int) -> int:
    """Of 1000, with trailing spacing."""
    return round(1000 * (total - index) / total) - 1


def low_pass(images: Tensor) -> Tensor:
    """Frequencies within a disc of a fifth of the shorter side, with shape (B, C, H, W)."""
    height, width = images.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    rows = torch.arange(height).view(-1, 1) - height // 2
    columns = torch.arange(width) - width // 2
    inside = rows.square() + columns.square() <= (min(height, width) // 5) ** 2
    shifted = torch.fft.ifftshift(spectrum * inside, dim=(-2, -1))
    return torch.fft.ifft2(shifted).real


def linear_predictors(guided: Tensor, choices: Sequence[Choice], ridge: float = 1e-3) -> Fill:
    """L2P-like predictors (2604.26365): every skipped output, of all evaluated before it.

    Args:
        guided: Guided outputs along full runs, with shape (T, N, \\*).
        choices: "both" or "forecast" for every step.
        ridge: See `ridge_regression`.
    """
    steps, rows = len(choices), []
    for t, choice in enumerate(choices):
        weights = [0.0] * t
        if choice == "forecast":
            known = [i for i in range(t) if choices[i] == "both"]
            beta = ridge_regression(guided[known].flatten(1), guided[t].flatten(), ridge)
            for i, b in zip(known, beta.tolist(), strict=True):
                weights[i] = b
        rows.append(tuple(weights))
    cond = tuple((0.0,) * t + (1.0,) for t in range(steps))
    uncond = tuple((0.0,) * t for t in range(steps))
    return Coefficients(cond, uncond, tuple(rows))


def annealed(
    total: int,
    count: int,
    loss: Callable[[tuple[int, ...]], float],
    rounds: int,
    seed: int = 0,
) -> tuple[int, ...]:
    """BudCache's search for the steps to evaluate (2606.13496): annealing, then hill climbing.

    A prefix of max(1, count // 4) steps is always evaluated. Annealing begins at a random mask, at
    a temperature of 0.05 that falls to 1e-5; nine in ten moves relocate one step (70 % of these by
    three at most), the others two. Climbing takes the best relocation by three at most.

    Args:
        total, count: Steps, and how many of them are evaluated.
        loss: Steps evaluated -> loss, lower is better; each is asked for once.
        rounds: Masks tried at most; two thirds by annealing.
        seed: Of the search.
    """
    chance, known = random.Random(seed), {}
    prefix = max(1, count // 4)

    def measured(mask: Sequence[int]) -> float:
        key = tuple(sorted(mask))
        if key not in known:
            known[key] = loss(key)
        return known[key]

    def moved(mask: tuple[int, ...]) -> tuple[int, ...]:
        found = set(mask)
        for _ in range(1 if chance.random() < 0.9 else 2):
            place = chance.choice(sorted(found)[prefix:])
            near = [place + d for d in (-3, -2, -1, 1, 2, 3)]
            free = [i for i in range(prefix, total) if i not in found]
            close = [i for i in near if i in free]
            found.remove(place)
            found.add(chance.choice(close if close and chance.random() < 0.7 else free))
        return tuple(sorted(found))

    now = (*range(prefix), *sorted(chance.sample(range(prefix, total), count - prefix)))
    best, tries, most = now, 2 * rounds // 3, 20 * rounds
    measured(now)
    while len(known) < tries and most:
        most -= 1
        heat = 0.05 * (1e-5 / 0.05) ** (len(known) / tries)
        other = moved(now)
        gain = measured(now) - measured(other)
        if gain >= 0 or chance.random() < math.exp(gain / heat):
            now = other
        best = min((best, now), key=measured)
    improved = True
    while improved and len(known) < rounds:
        improved, start = False, best
        for place in start[prefix:]:
            for step in (-3, -2, -1, 1, 2, 3):
                other = {*start} - {place} | {place + step}
                if len(other) < count or not prefix <= place + step < total:
                    continue
                if len(known) < rounds and measured(tuple(other)) < measured(best):
                    best, improved = tuple(sorted(other)), True
    return best


def held_at(places: Sequence[int], total: int, fill: Fill) -> Schedule:
    """A schedule that evaluates at some steps and takes what `fill` says at the others."""
    chosen = set(places)
    choices = tuple("both" if i in chosen else "forecast" for i in range(total))
    return Schedule(choices, fill=fill)


SOLVERS: Mapping[str, tuple[str, dict]] = {
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
}
"""Other solvers for CFG with fewer steps: name -> scheduler of diffusers, settings."""
