"""Policy search: for every step, which branches to evaluate, what to estimate, and how strongly.

Two ways to the same kind of result, the Pareto front of quality over network evaluations:

* `search`: greedy removal of the evaluations that cost least, a few evenly spread ones, then
  evolution of the front, in which single steps may also be scaled to make up for others (the idea
  of OUSAC, https://arxiv.org/abs/2512.14096). No gradient is needed.
  With ``fitted=True`` every schedule tried gets forecasts or estimates of its own, fitted on runs
  of it (`pilotage.pipelines.fitting.on_policy`), and the search is for where to evaluate.
* `pilotage.eval.tuning.relaxed_search.relaxed_search`: the differentiable relaxation of the Adaptive
  Guidance paper (https://arxiv.org/abs/2312.12487).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ...guidance import Guidance, HoldDifference, Schedule, StandIn, resolve
from ...guidance.policies.linear_ag import Coefficients
from ...guidance.policies.schedule import CHOICES, NFE, Choice
from ...guidance.saved import save_guidance
from ...pipelines.fitting.fitted import check_identity, run_identity
from ...pipelines.fitting.on_policy import Steering
from ..metrics.images import to_tensor
from ..record import write_json
from .trials import Trials

FACTORS = (0.7, 0.85, 1.0, 1.15, 1.3)
Between = Literal["forecast", "estimate"]


@dataclass(frozen=True)
class Candidate:
    """A schedule and what it was found to do."""

    schedule: Schedule
    nfe: float
    quality: float


@dataclass(frozen=True)
class Search:
    """What a policy search found.

    Args:
        front: Candidates that no other beats in both cost and quality, cheapest first.
        tried: Number of schedules tried.
        guidance: The cheapest on the front that reaches the floor, ready for ``guidance=``.
        best: The same with its figures.
    """

    front: tuple[Candidate, ...]
    tried: int
    guidance: Guidance
    best: Candidate

    def save(self, path: Path | str, candidate: Candidate | None = None) -> None:
        """Write a schedule as JSON (see `save_guidance`).

        Args:
            path: File to write.
            candidate: A member of the front; default: `best`.
        """
        chosen = candidate or self.best
        measured = {
            "nfe": chosen.nfe,
            "quality": chosen.quality,
            "front": [[c.nfe, round(c.quality, 5), str(c.schedule)] for c in self.front],
        }
        save_guidance(Path(path), replace(self.guidance, policy=chosen.schedule), measured)


def pareto(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in both cost and quality, cheapest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nfe, -c.quality)):
        if not front or candidate.quality > front[-1].quality:
            front.append(candidate)
    return tuple(front)


class Trier:
    """Tries schedules, each once; with a file, across interruptions.

    A search that goes on runs from its beginning: it asks for the same schedules again, up to those
    not yet known.

    Args:
        trials: What they are tried on.
        stand_in: What their estimates are made with; None: fitted to each.
        bar: A tqdm bar to update.
        path: JSON file of what was tried.
        between: What the steps are that do not evaluate both branches; None: any choice.
        measure: Schedule -> its candidate; default: `trials` judge it as it is.

    Attributes:
        known: All that was ever measured.
        asked: What this search has asked for, the only thing that its course depends on.

    Raises:
        ValueError: the file is damaged, or of another search.
    """

    def __init__(
        self,
        trials: Trials,
        stand_in: StandIn | None,
        bar: Any,
        path: Path | None = None,
        between: Between | None = None,
        measure: Callable[[Schedule], Candidate] | None = None,
    ) -> None:
        self.trials, self.stand_in, self.bar, self.path = trials, stand_in, bar, path
        self.measure = measure or self._judged
        self.known: dict[tuple, Candidate] = {}
        self.asked: dict[tuple, Candidate] = {}
        self.plan = {
            "identity": identity_of(trials),
            "prompts": trials.prompts,
            "seed": trials.seed,
            "rule": str(trials.rule),
            "stand_in": _digest(stand_in),
            "between": between,
        }
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        damaged = ValueError(f"{path} is damaged: remove it and run again")
        try:
            content = json.loads(path.read_text())
            plan, tried = content["plan"], content["tried"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged from error
        for name, value in json.loads(json.dumps(self.plan)).items():
            if plan.get(name) != value:
                raise ValueError(f"{path} is of another search: its {name} differs; name another")
        try:
            for choices, factors, nfe, quality, *fitted in tried:
                stand_in = self.stand_in
                if stand_in is None:
                    cond, uncond, guided = fitted
                    identity = self.plan["identity"]
                    stand_in = Coefficients(cond, uncond, guided=guided, identity=identity)
                schedule = Schedule(tuple(choices), tuple(factors), stand_in)
                self.known[schedule.choices, schedule.factors] = Candidate(schedule, nfe, quality)
        except (ValueError, TypeError) as error:
            raise damaged from error

    def _write(self) -> None:
        tried = []
        for c in self.known.values():
            entry = [c.schedule.choices, c.schedule.factors, c.nfe, c.quality]
            if self.stand_in is None:
                fitted = c.schedule.stand_in
                entry += [fitted.cond, fitted.uncond, fitted.guided]
            tried.append(entry)
        write_json(self.path, {"plan": self.plan, "tried": tried})

    def __call__(self, schedule: Schedule) -> Candidate:
        """The schedule with its figures; measured only the first time."""
        key = (schedule.choices, schedule.factors)
        if key not in self.known:
            self.known[key] = self.measure(schedule)
            if self.path is not None:
                self._write()
            self.bar.update()
        self.asked[key] = self.known[key]
        return self.asked[key]

    def _judged(self, schedule: Schedule) -> Candidate:
        quality, nfe = self.trials.judge(self.trials.compose(schedule))
        return Candidate(schedule, nfe, quality)


def search(
    pipe: Any,
    prompts: Sequence[str],
    *,
    quality_floor: float = 0.9,
    stand_in: StandIn | None = None,
    fitted: bool = False,
    between: Between = "forecast",
    rounds: int = 60,
    checkpoint: Path | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Search:
    """Look for the cheapest schedule whose quality reaches a floor.

    Every step but the first may evaluate both branches, estimate the unconditional one, let the
    conditional one stand alone or forecast the guided prediction, as far as the stand-in can.
    Before the evolution about 6 T runs of the prompts are made; with `fitted`, in which a step
    evaluates both branches or does what `between` says, at most 2 T before the rounds. The full run
    is among those tried, so that any floor can be reached.

    Args:
        pipe: A guided pipeline.
        prompts: A few typical prompts; 16 give a usable order, more a finer one.
        quality_floor: Mean quality against plain guidance to be kept (SSIM unless `quality` says
            otherwise).
        stand_in: What estimates and forecasts; default: `HoldDifference`. `Fit.coefficients`
            estimate better, but do not forecast.
        fitted: Fit forecasts or estimates to every schedule tried, on these prompts (about 30 are
            needed): best.
        between: With `fitted`, what the steps between full evaluations are: "forecast" evaluates
            nothing, "estimate" the conditional branch.
        rounds: Schedules tried by evolution at the end; with `fitted`, by moving evaluations.
        checkpoint: JSON file for what was tried; an interrupted search goes on from there, one for
            another floor makes use of it.
        progress: Show a bar.
        settings: As of `Trials`.

    Raises:
        ValueError: the floor is not between 0 and 1, a setting out of its range, a checkpoint of
            another search, `fitted` together with a stand-in or a rule, unknown `between`, a
            stand-in fitted on something else, a run of a single evaluation, or (with a `quality`
            that is below the floor even for the full run) no schedule that reaches the floor.
    """
    from tqdm import tqdm

    check_floor(quality_floor)
    trials = Trials(pipe, prompts, **settings)
    path = None if checkpoint is None else Path(checkpoint)
    if fitted and (stand_in is not None or trials.rule is not None):
        raise ValueError("a fitted search makes estimates of its own, for classifier-free guidance")
    if between not in get_args(Between):
        raise ValueError(f"between is {' or '.join(get_args(Between))}, got {between!r}")
    if fitted:
        with tqdm(desc="searching", unit="schedule", disable=not progress) as bar:
            trier = Trier(trials, None, bar, path, between, _fitting(trials))
            _move(trier, evaluations(trials), quality_floor, rounds, between)
        return conclude(trials, trier, quality_floor)
    stand_in = stand_in or HoldDifference()
    if stand_in.identity is not None:
        check_identity(pipe, stand_in.identity, trials.batches()[0], trials.guidance_scale)
    full = Schedule(("both",) * evaluations(trials), stand_in=stand_in)
    with tqdm(desc="searching", unit="schedule", disable=not progress) as bar:
        trier = Trier(trials, stand_in, bar, path)
        trier(full)
        _remove_greedily(trier, full)
        total = len(full.choices)
        for kind in get_args(Between):
            for choices in spread(total, kind, total // 2):
                if schedule := _altered(full, choices):
                    trier(schedule)
        _evolve(trier, quality_floor, rounds)
    return conclude(trials, trier, quality_floor)


def _fitting(trials: Trials) -> Callable[[Schedule], Candidate]:
    """Fits a schedule to the prompts of some trials and judges its pictures of them."""
    steering: list[Steering] = []  # plain guidance runs only if there is something to fit

    def measure(schedule: Schedule) -> Candidate:
        if not steering:
            made = Steering(
                trials.pipe,
                trials.prompts,
                guidance_scale=trials.guidance_scale,
                num_inference_steps=trials.num_inference_steps,
                negative_prompt=trials.negative_prompt,
                seed=trials.seed,
                batch_size=2 * trials.batch_size,
                output_type="pil",
            )
            steering.append(made)
        fit, pictures = steering[0].fit(schedule.choices)
        reference = to_tensor(steering[0].pictures)
        quality = trials.quality(to_tensor(pictures), reference).mean().item()
        return Candidate(fit.schedule, float(schedule.nfe(len(schedule.choices))), quality)

    return measure


def _move(trier: Trier, total: int, floor: float, rounds: int, between: Between) -> None:
    """Evenly spread evaluations, more and more until the floor is reached; then move them.

    Fewer than that follow, as long as moving brings them to the floor; then more. Each number of
    evaluations gets a third of the rounds.
    """

    def tried(real: Iterable[int]) -> Candidate:
        chosen = set(real)
        choices = tuple("both" if i in chosen else between for i in range(total))
        return trier(Schedule(choices))

    best: dict[int, Candidate] = {}
    enough = total
    for choices in spread(total, between, total):
        count = choices.count("both")
        if count > enough + 1:
            break
        candidate = trier(Schedule(choices))
        if count not in best or candidate.quality > best[count].quality:
            best[count] = candidate
        if candidate.quality >= floor:
            enough = min(enough, count)
    order = [*range(enough, 1, -1), *(n for n in sorted(best) if n > enough)]
    limit = len(trier.asked) + rounds
    for count in order:
        if best[count].quality < floor and count < enough - 1 and best[count + 1].quality < floor:
            continue
        own = min(limit, len(trier.asked) + max(1, rounds // 3))
        improved = True
        while improved and len(trier.asked) < own:
            improved = False
            real = [i for i, c in enumerate(best[count].schedule.choices) if c == "both"]
            for k in range(1, count):
                for place in (real[k] - 1, real[k] + 1):
                    if place in real or not 0 < place < total or len(trier.asked) >= own:
                        continue
                    candidate = tried([*real[:k], place, *real[k + 1 :]])
                    if candidate.quality > best[count].quality:
                        best[count], improved = candidate, True
                        real = [*real[:k], place, *real[k + 1 :]]


def check_floor(floor: float) -> None:
    """Raise ValueError unless 0 < floor < 1."""
    if not 0 < floor < 1:
        raise ValueError(f"quality_floor must be between 0 and 1, got {floor}")


def evaluations(trials: Trials) -> int:
    """Network evaluations of one branch in a run (second-order schedulers make two a step).

    Raises:
        ValueError: it is a single one, of which nothing can be left out.
    """
    call = trials.batches()[0]
    call = {k: v[:1] if isinstance(v, list) else v for k, v in call.items()}
    trials.pipe(guidance="cfg", output_type="latent", **call)
    total = len(trials.pipe.guidance_trace.steps)
    if total < 2:
        raise ValueError(
            f"a search needs runs of at least 2 evaluations of each branch, {total} is what "
            f"num_inference_steps={trials.num_inference_steps} makes"
        )
    return total


def conclude(trials: Trials, trier: Trier, floor: float) -> Search:
    """The front of everything tried; its schedules know what they were found for.

    Raises:
        ValueError: nothing reaches the floor.
    """
    identity = identity_of(trials)
    front = tuple(
        replace(c, schedule=replace(c.schedule, identity=identity))
        for c in pareto(trier.known.values())
    )
    best = next((c for c in front if c.quality >= floor), None)
    if best is None:
        raise ValueError(
            f"no schedule reaches a quality of {floor:g}: the highest gives "
            f"{front[-1].quality:.6g} at {front[-1].nfe:g} evaluations"
        )
    return Search(front, len(trier.known), resolve(trials.compose(best.schedule)), best)


def _digest(stand_in: StandIn) -> str:
    """Hash of a stand-in, its numbers to six digits: fits on other threads differ in the last."""
    number = r"-?\d+\.\d+(e[-+]?\d+)?"
    text = re.sub(number, lambda match: f"{float(match[0]):.6g}", repr(stand_in))
    return hashlib.sha256(text.encode()).hexdigest()


def identity_of(trials: Trials) -> dict[str, Any]:
    """What schedules found in these trials belong to."""
    w = trials.guidance_scale
    steps, negative = trials.num_inference_steps, trials.negative_prompt
    return run_identity(trials.pipe, steps, (w, w), negative)


def _altered(
    schedule: Schedule, choices: Sequence[Choice], factors: Sequence[float] = ()
) -> Schedule | None:
    """The schedule with other choices and factors; None where its stand-in cannot follow them."""
    try:
        return replace(schedule, choices=tuple(choices), factors=tuple(factors))
    except ValueError:
        return None


def _changed(schedule: Schedule, index: int, choice: Choice) -> Schedule | None:
    choices = list(schedule.choices)
    choices[index] = choice
    return _altered(schedule, choices)


def _remove_greedily(trier: Trier, full: Schedule) -> None:
    """Take evaluations away, always where the loss alone for each saved was least."""
    alone: list[tuple[float, int, str]] = []
    for index in range(1, len(full.choices)):
        for choice in CHOICES[1:]:
            if changed := _changed(full, index, choice):
                loss = 1 - trier(changed).quality
                alone.append((loss / (NFE["both"] - NFE[choice]), index, choice))
    schedule, taken = full, set()
    for _, index, choice in sorted(alone):
        if index not in taken and (changed := _changed(schedule, index, choice)):
            taken.add(index)
            schedule = trier(changed).schedule


def spread(total: int, between: Between, most: int) -> list[tuple[str, ...]]:
    """Choices with 2 to `most` full evaluations, evenly spread or denser early.

    Taking away one by one does not find them: what a step is worth depends on its neighbours.
    """
    found: dict[tuple[str, ...], None] = {}
    for count in range(2, most + 1):
        evenly = {i * total // count for i in range(count)}
        for real in (evenly, {int(total * (i / count) ** 1.5) for i in range(count)}):
            found[tuple("both" if i in real else between for i in range(total))] = None
    return list(found)


def _evolve(trier: Trier, floor: float, rounds: int) -> None:
    """Vary members of the front, most often those near the floor."""
    for number in range(rounds):
        chance = random.Random(f"{trier.trials.seed} {number}")
        front = pareto(trier.asked.values())
        near = sorted(front, key=lambda c: abs(c.quality - floor))
        parent = near[min(int(chance.expovariate(0.7)), len(near) - 1)].schedule
        child = None
        while child is None:
            child = _mutated(parent, chance)
        trier(child)


def _mutated(schedule: Schedule, chance: random.Random) -> Schedule | None:
    """Swap two steps, change one, or scale one or all; None if the stand-in cannot follow that."""
    choices = list(schedule.choices)
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
    return _altered(schedule, choices, factors)
