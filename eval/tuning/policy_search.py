"""Policy search: for every step, which branches to evaluate, what to estimate, and how strongly.

Greedy removal of the evaluations that cost least, a few evenly spread ones, then evolution of the
front, in which single steps may also be scaled to make up for others. With ``fitted=True`` every
schedule tried gets weights of its own for its skipped or estimated steps, fitted on runs of it, and
the search is for where to evaluate. `place` looks for the best place of a given number.

References:
    OUSAC, https://arxiv.org/abs/2512.14096 (scales that make up for steps without guidance)
    BudCache, https://arxiv.org/abs/2606.13496 (schedules searched at a fixed number of evaluations)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import get_args

from ...guidance import Schedule
from ...guidance.policies.schedule import NFE, Choice
from ...pipelines.fitting.on_policy import ScheduleFitter
from ..metrics.images import to_tensor
from .store import Between, Candidate, Search, TrialLog, check_floor, choices_of, pareto
from .trials import Trials

CHOICES: tuple[Choice, ...] = get_args(Choice)
FACTORS = (0.7, 0.85, 1.0, 1.15, 1.3)
POWERS = (1.0, 1.3, 1.6)  # of the first places tried: k/K to such a power


def search(
    trials: Trials,
    *,
    quality_floor: float = 0.9,
    fitted: bool = False,
    between: Between = "forecast",
    rounds: int = 60,
    checkpoint: Path | str | None = None,
) -> Search:
    """Look for the cheapest schedule whose quality reaches a floor.

    Every step but the first may evaluate both branches, estimate the unconditional one, let the
    conditional one stand alone or be skipped; estimates and skipped steps hold what was evaluated
    last. Before the evolution about 6 T runs of the prompts are made; with `fitted`, in which a
    step evaluates both branches or does what `between` says, at most 2 T before the rounds. The
    full run is among those tried, so that any floor can be reached.

    Args:
        trials: Runs of a few typical prompts; 16 give a usable order, more a finer one.
        quality_floor: Mean quality against plain guidance to be kept (SSIM unless `quality` says
            otherwise).
        fitted: Fit the weights of estimated or skipped steps to every schedule tried, on these
            prompts (about 30 are needed): best.
        between: With `fitted`, what the steps between full evaluations are: "forecast" evaluates
            nothing, "estimate" the conditional branch.
        rounds: Schedules tried by evolution at the end; with `fitted`, by moving evaluations.
        checkpoint: JSON file for what was tried; an interrupted search goes on from there, one for
            another floor makes use of it.

    Raises:
        ValueError: the floor is not between 0 and 1, a setting out of its range, a checkpoint of
            another search, `fitted` together with a rule, unknown `between`, a run of a single
            evaluation, or (with a `quality` that is below the floor even for the full run) no
            schedule that reaches the floor.
    """
    check_floor(quality_floor)
    trials.check_guided()
    path = None if checkpoint is None else Path(checkpoint)
    if fitted and trials.rule is not None:
        raise ValueError(f"a fitted search is for classifier-free guidance, got {trials.rule}")
    if between not in get_args(Between):
        raise ValueError(f"between is {' or '.join(get_args(Between))}, got {between!r}")
    if fitted:
        with trials.bar("searching", "schedule") as bar:
            # Plain guidance runs only if there is something to fit.
            fitter = cache(lambda: ScheduleFitter(trials, output_type="pil"))
            log = TrialLog(trials, bar, path, between, partial(_fitted, trials, fitter))
            _move(log, trials.evaluations(), quality_floor, rounds, between)
        return log.conclude(quality_floor)
    total = trials.evaluations()
    with trials.bar("searching", "schedule") as bar:
        log = TrialLog(trials, bar, path)
        _remove_greedily(log, total)
        for kind in get_args(Between):
            for choices in spread(total, kind, total // 2):
                log(Schedule(choices))
        _evolve(log, quality_floor, rounds)
    return log.conclude(quality_floor)


def place(
    trials: Trials,
    nfe: int,
    fitter: ScheduleFitter,
    *,
    rounds: int = 30,
    checkpoint: Path | str | None = None,
) -> Search:
    """Look for the best schedule of so many network evaluations, fitted to these prompts.

    Every step evaluates both branches or is skipped. Evaluations that are evenly spread, or denser
    and denser early, are tried; of the best, evaluations are then moved by a step each, as long as
    that helps.

    Args:
        trials: Runs of about 30 typical prompts or more.
        nfe: Network evaluations of a run; odd ones are rounded down.
        fitter: Fits to the same runs; its pictures are what is judged by.
        rounds: Schedules tried at most.
        checkpoint: See `search`.

    Raises:
        ValueError: a rule, a setting out of its range, or a checkpoint of another search; see
            `ScheduleFitter`.
    """
    total, count = check_nfe(trials, nfe)
    path = None if checkpoint is None else Path(checkpoint)
    with trials.bar("placing", "schedule", rounds) as bar:
        measure = partial(_fitted, trials, lambda: fitter)
        log = TrialLog(trials, bar, path, "forecast", measure, fitter.finer)
        quality, _ = climb(
            total, count, rounds, lambda at: log(Schedule(_both_at(at, total, "forecast"))).quality
        )
    return log.conclude(quality)


def check_nfe(trials: Trials, nfe: int) -> tuple[int, int]:
    """The steps of a run, and how many of them `place` evaluates; asked before the long work.

    Raises:
        ValueError: a rule, or a number of evaluations that no schedule has.
    """
    if trials.rule is not None:
        raise ValueError(f"a fitted search is for classifier-free guidance, got {trials.rule}")
    total, branches = trials.evaluations(), trials.branches
    count = nfe // branches
    if not 2 <= count <= total:
        least, most = 2 * branches, branches * total
        raise ValueError(f"a run of {total} steps has {least} to {most} evaluations, got {nfe}")
    return total, count


def climb(
    total: int, count: int, rounds: int, judge: Callable[[tuple[int, ...]], float]
) -> tuple[float, tuple[int, ...]]:
    """The best places found for some evaluations among all steps, with their quality.

    Evenly spread ones are tried, and some denser early; of the best, one after another is then
    moved by a step, as long as that helps.

    Args:
        total: Number of steps.
        count: Number of evaluations, the first step's among them.
        rounds: Places tried at most.
        judge: Steps that are evaluated -> quality, higher is better.
    """
    starts = dict.fromkeys(tuple(_denser(total, count, power)) for power in POWERS)
    known = {places: judge(places) for places in list(starts)[:rounds]}
    best = max(known, key=lambda places: known[places])
    improved = True
    while improved:
        improved = False
        for k, step in itertools.product(range(1, count), (-1, 1)):
            moved = (*best[:k], best[k] + step, *best[k + 1 :])
            if not 0 < moved[k] < total or moved[k] in best or moved in known:
                continue
            if len(known) >= rounds:
                return known[best], best
            known[moved] = judge(moved)
            if known[moved] > known[best]:
                best, improved = moved, True
    return known[best], best


def _denser(total: int, count: int, power: float) -> list[int]:
    """Some of the steps, the first among them: evenly spread (1), or denser early (above 1)."""
    found = sorted({int(total * (k / count) ** power) for k in range(count)})
    rest = (step for step in range(total) if step not in found)
    return sorted([*found, *itertools.islice(rest, count - len(found))])


def _fitted(trials: Trials, fitter: Callable[[], ScheduleFitter], schedule: Schedule) -> Candidate:
    """A schedule fitted to the prompts of some trials, judged by its pictures of them."""
    choices = choices_of(schedule)
    found, pictures = fitter().fit(choices)
    quality = trials.quality(to_tensor(pictures), to_tensor(fitter().pictures)).mean().item()
    fill = found.coefficients
    fitted = Schedule(choices, fill=fill, identity=fill.identity)
    nfe = schedule.nfe(len(choices)) * trials.branches / NFE["both"]
    return Candidate(fitted, nfe, quality)


def _move(log: TrialLog, total: int, floor: float, rounds: int, between: Between) -> None:
    """Evenly spread evaluations, more and more until the floor is reached; then move them.

    Fewer than that follow, as long as moving brings them to the floor; then more. Each number of
    evaluations gets a third of the rounds.
    """
    best: dict[int, Candidate] = {}
    enough = total
    for choices in spread(total, between, total):
        count = choices.count("both")
        if count > enough + 1:
            break
        candidate = log(Schedule(choices))
        if count not in best or candidate.quality > best[count].quality:
            best[count] = candidate
        if candidate.quality >= floor:
            enough = min(enough, count)
    order = [*range(enough, 1, -1), *(n for n in sorted(best) if n > enough)]
    limit = len(log.asked) + rounds
    for count in order:
        if best[count].quality < floor and count < enough - 1 and best[count + 1].quality < floor:
            continue
        own = min(limit, len(log.asked) + max(1, rounds // 3))
        improved = True
        while improved and len(log.asked) < own:
            improved = False
            real = [i for i, c in enumerate(choices_of(best[count].schedule)) if c == "both"]
            for k in range(1, count):
                for place in (real[k] - 1, real[k] + 1):
                    if place in real or not 0 < place < total or len(log.asked) >= own:
                        continue
                    moved = [*real[:k], place, *real[k + 1 :]]
                    candidate = log(Schedule(_both_at(moved, total, between)))
                    if candidate.quality > best[count].quality:
                        best[count], improved, real = candidate, True, moved


def _both_at(real: Iterable[int], total: int, between: Choice) -> tuple[Choice, ...]:
    """Both branches at some steps, the others as `between` says."""
    chosen = set(real)
    return tuple("both" if i in chosen else between for i in range(total))


def _remove_greedily(log: TrialLog, total: int) -> None:
    """Take evaluations off the full run, always where the loss alone for each saved was least."""
    choices: list[Choice] = ["both"] * total
    log(Schedule(tuple(choices)))
    alone: list[tuple[float, int, Choice]] = []
    for index in range(1, total):
        for choice in CHOICES[1:]:
            loss = 1 - log(Schedule((*choices[:index], choice, *choices[index + 1 :]))).quality
            alone.append((loss / (NFE["both"] - NFE[choice]), index, choice))
    for _, index, choice in sorted(alone):
        if choices[index] == "both":
            choices[index] = choice
            log(Schedule(tuple(choices)))


def spread(total: int, between: Between, most: int) -> list[tuple[Choice, ...]]:
    """Choices with 2 to `most` full evaluations, evenly spread or denser early.

    Taking away one by one does not find them: what a step is worth depends on its neighbours.
    """
    found: dict[tuple[Choice, ...], None] = {}
    for count in range(2, most + 1):
        evenly = {i * total // count for i in range(count)}
        for real in (evenly, {int(total * (i / count) ** 1.5) for i in range(count)}):
            found[_both_at(real, total, between)] = None
    return list(found)


def _evolve(log: TrialLog, floor: float, rounds: int) -> None:
    """Vary members of the front, most often those near the floor."""
    for number in range(rounds):
        chance = random.Random(f"{log.trials.seed} {number}")
        front = pareto(log.asked.values())
        near = sorted(front, key=lambda c: abs(c.quality - floor))
        parent = near[min(int(chance.expovariate(0.7)), len(near) - 1)].schedule
        log(_mutated(parent, chance))


def _mutated(schedule: Schedule, chance: random.Random) -> Schedule:
    """Swap two steps, change one, or scale one or all."""
    choices = list(choices_of(schedule))
    factors = list(schedule.factors or (1.0,) * len(choices))
    kind = chance.choice(("swap", "change", "scale", "scale all"))
    real = [i for i, choice in enumerate(choices) if choice == "both" and i]
    other = [i for i, choice in enumerate(choices) if choice != "both"]
    if kind == "swap" and real and other:
        i, j = chance.choice(real), chance.choice(other)
        choices[i], choices[j] = choices[j], choices[i]
    elif kind == "change":
        i = chance.randrange(1, len(choices))
        choices[i] = chance.choice([c for c in CHOICES if c != choices[i]])
    elif kind == "scale":
        i = chance.choice([i for i, c in enumerate(choices) if c in ("both", "estimate")])
        factors[i] = chance.choice(FACTORS)
    else:
        times = chance.choice((0.9, 0.95, 1.05, 1.1))
        factors = [round(factor * times, 4) for factor in factors]
    return Schedule(tuple(choices), tuple(factors))
