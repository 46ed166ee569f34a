"""The driver: what stands in front of a pipeline's denoiser and scheduler for one call."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...guidance import Always, Guidance, NoiseLevel, Run
from ...guidance.device import LaggedReads, on_host, row_index
from .calls import Call
from .filling import Made, Wanted, made_of, own_attention
from .hooks import check_caches
from .layouts import Layout, LayoutError
from .learning import by_token, learn
from .noise_levels import Levels, check_falling_noise, next_noise_level
from .patch import GuidedScheduler, isinstance_of, unwrapped
from .patterns import (
    NORM_AXES,
    Pattern,
    branches_of,
    effective,
    inside,
    normed,
    scale_of,
    scale_of_normed,
    view,
    weights_of,
)
from .support import denoisers_of

# What is left of a combination that its branches do not explain, in units of rounding.
ROUNDING = 16.0
# Calls of a network without a step of the scheduler, after which none is expected any more.
MANY_CALLS = 64

# Pipeline -> (its networks, a call's options) -> pattern: for the first step of a later call, which
# may then leave branches out already.
_LEARNED: weakref.WeakKeyDictionary[Any, dict[Any, Pattern]] = weakref.WeakKeyDictionary()


class Driver:
    """One call of one pipeline under one guidance.

    The pipeline evaluates its branches as it always does; of each call of the network only the
    rows that the policy wants are evaluated. It combines what it is given, and where its scheduler
    is to step, the guided prediction takes the place of that combination.

    Which branch is which, and what the pipeline makes of them, is learned at the first step at
    which the branches differ, and looked at again at every step: see `patterns`. The guidance scale
    is measured, not read.

    Args:
        pipe, guidance, layout: The pipeline, the rule and policy, what is known of the pipeline.
        asked: What the user wrote for `guidance`.
        options: All arguments of the call, by name.
        detailed: Record cosines and norms at every step.
    """

    def __init__(
        self,
        pipe: Any,
        guidance: Guidance,
        layout: Layout,
        asked: str,
        options: dict[str, Any],
        detailed: bool = False,
    ) -> None:
        self.pipe, self.guidance, self.layout = pipe, guidance, layout
        self.asked, self.options, self.detailed = asked, options, detailed
        self.wish = f"'{asked}'"  # what leaves rows out
        self.scheduler = pipe.scheduler
        self.run: Run | None = None
        self.known = _LEARNED.setdefault(pipe, {})
        self.denoisers = denoisers_of(pipe, layout)
        self.key = _key(pipe, self.denoisers, options)
        self.pattern: Pattern | None = self.known.get(self.key)
        self.patterns: dict[tuple[int, ...], Pattern] = {}
        self.made: list[Made] = []  # of this step
        self.last: list[Made] = []  # of the step before
        self.most_branches = 0  # of any step
        self.wanted: Wanted | None = None  # of this step, if it was planned beforehand
        self.plans: Wanted | None = None  # of the step planned last
        self.checked: Any = None  # decisions and pattern of the step checked last
        self.scheduler_timestep: Any = None
        self.token_times: Tensor | None = None  # where the scheduler is told one for every token
        self.sample: Tensor = torch.empty(0)  # what the scheduler steps now
        self.first_call: Call | None = None
        self.looks = LaggedReads(0)
        self.scale: float | None = None  # measured last
        self.device = torch.device("cpu")
        self.where = _positions(self.scheduler)
        self.attention = own_attention(pipe, self.denoisers)

    @functools.cached_property
    def noise(self) -> Levels:
        """The noise levels of the scheduler."""
        return Levels(self.scheduler)

    # Calls of the network

    def __call__(self, name: str, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the place of ``network(*args, **kwargs)``, the pipeline's denoiser `name`."""
        call = self.new_call(network, args, kwargs)
        if not self.made:
            self.begin_step(call)
        made = self.evaluate(name, call)
        self.made.append(made)
        return made.output

    def new_call(self, network: Any, args: tuple, kwargs: dict[str, Any]) -> Call:
        """A call of the network, as this driver evaluates its rows."""
        return Call(network, args, kwargs)

    def begin_step(self, call: Call) -> None:
        """Choose the pattern by the first call of a step, and plan what is to be evaluated."""
        self.first_call, self.wanted = call, None
        run, pattern = self.run, self.pattern
        if run is None:
            if pattern is None or call.rows % pattern.calls[0]:
                self.pattern = None
                return
            run = self.start(call.rows // pattern.calls[0], pattern)
        elif self.is_over(run):
            run = self.next_run(run, call.timestep)
        if pattern is None or pattern.calls[0] * run.batch != call.rows:
            known = [p for c, p in self.patterns.items() if c[0] * run.batch == call.rows]
            self.pattern = pattern = known[0] if known else None
        if pattern is not None and (pattern.branches > 1 or run.one_branch):
            self.wanted = self.plan(run, pattern, call)

    def plan(self, run: Run, pattern: Pattern, call: Call) -> Wanted:
        """Ask the policy what this step is to evaluate."""
        read = isinstance(call.first, Tensor) and not isinstance(self.guidance.policy, Always)
        run.plan(call.first[: run.batch] if read else None, *self.levels(call.timestep))
        if self.plans is not None and self.plans.of(run.decisions, pattern):
            return self.plans
        estimates = any(d.estimates for d in run.decisions)
        if run.skipped or estimates:
            self.check_others()
        every = list(range(run.batch))
        cond, others = [row for row in every if row not in run.skipped], run.rows
        if self.layout.whole:
            if run.skipped and cond:
                raise LayoutError(
                    f"the network of {type(self.pipe).__name__} needs the rows of all samples, so "
                    f"that '{self.asked}' cannot skip steps of some: give it one at a time"
                )
            others = every if others else []
        if pattern.alike:
            others = cond
        self.plans = Wanted(pattern, run.batch, cond, others, estimates, run.decisions)
        return self.plans

    def evaluate(self, name: str, call: Call) -> Made:
        """Evaluate the wanted rows of a call; the others get what does no harm."""
        wanted, place = self.wanted, len(self.made)
        if self.made and not isinstance_of(self.pipe.scheduler, GuidedScheduler):
            raise LayoutError(self.exchanged("scheduler"))
        if place >= MANY_CALLS:
            raise LayoutError(
                f"{type(self.pipe).__name__} has evaluated its network {place} times without a "
                f"step of its scheduler: '{self.asked}' has no place to act"
            )
        if wanted is None:
            return made_of(call.rows, call())
        counts = wanted.pattern.calls
        if place >= len(counts) or call.rows != counts[place] * wanted.batch:
            if len(wanted.others) < wanted.batch:
                raise LayoutError(self.irregular(f"evaluates {call.rows} rows in call {place + 1}"))
            return made_of(call.rows, call())
        if wanted.whole:
            return self.evaluate_whole(call)
        last = self.last[place] if place < len(self.last) else None
        try:
            return wanted.make(call, self.made, last, self.attention.get(name))
        except (RuntimeError, ValueError) as error:
            raise LayoutError(self.indivisible(call, error)) from error

    def evaluate_whole(self, call: Call) -> Made:
        """Evaluate all rows of a call."""
        return made_of(call.rows, call())

    # Steps of the scheduler

    def step(self, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the place of ``scheduler.step(*args, **kwargs)``."""
        made, self.made = self.made, []
        at, sample_at = self.where
        mixed = args[at] if len(args) > at else kwargs["model_output"]
        if not made:
            self.without_calls()
            return stock(*args, **kwargs)
        sample = args[sample_at] if len(args) > sample_at else kwargs["sample"]
        self.sample = sample
        self.scheduler_timestep = args[at + 1] if len(args) > at + 1 else kwargs.get("timestep")
        self.token_times = kwargs.get("per_token_timesteps")
        guided = self.end_step(made, mixed, sample)
        self.last = made
        if guided is not mixed:
            if len(args) > at:
                args = (*args[:at], guided, *args[at + 1 :])
            else:
                kwargs = kwargs | {"model_output": guided}
        return stock(*args, **kwargs)

    def without_calls(self) -> None:
        """The scheduler steps, and the network was not asked."""
        if self.run is None or self.layout.others:
            return
        raise LayoutError(self.exchanged("network"))

    def exchanged(self, what: str) -> str:
        """The message of a loop that has left the seam."""
        step = 0 if self.run is None else self.run.step.index + 1
        return (
            f"step {step} of {type(self.pipe).__name__} went past '{self.asked}': its {what} was "
            "exchanged on the way. Exchange it before the call"
        )

    def end_step(self, made: list[Made], mixed: Tensor, sample: Tensor) -> Tensor:
        """What the scheduler is to step instead of `mixed`."""
        part = self.part_of(mixed, sample)
        batch = part.shape[0]
        calls = tuple(m.rows // batch for m in made)
        branches = sum(calls)
        self.most_branches = max(self.most_branches, branches)
        if any(m.rows % batch for m in made) or (self.run and self.run.batch != batch):
            raise LayoutError(self.irregular(f"steps {batch} samples"))
        pattern = self.pattern
        if pattern is not None and pattern.calls != calls:
            pattern = self.changed_pattern(pattern, calls)
        fresh = pattern is None or pattern.alike
        if pattern is None or (pattern.alike and self.run and not self.run.skipped):
            pattern = self.learned(made, calls, part, sample)
        run = self.run or self.start(batch, pattern)
        run.branches = pattern.branches
        whole, kept = part, pattern.kept
        part, x_t = inside(part, kept), inside(self.network_input(sample, part), kept)
        if self.wanted is None:
            assert self.first_call is not None
            guides = pattern.branches > 1 or run.one_branch
            (run.plan if guides else run.begin)(x_t, *self.levels(self.first_call.timestep))
        if pattern.branches > 1 and not pattern.alike:
            self.check_pattern(run, pattern)
            guided = self.end_guided(run, pattern, made, whole, part, x_t)
        else:
            guided = self.end_unguided(run, part, x_t)
        record = run.trace.steps[-1]
        more = fresh or self.layout.whole and record.rows or any(m.more for m in made)
        if more and branches > 1:
            counted = {*record.rows, *record.skipped}
            record.unused = [row for row in range(batch) if row not in counted]
        if guided is part:
            return mixed
        if kept is not None:
            axis, places = kept
            index = row_index(places, whole.device)
            guided = whole.index_copy(axis, index, guided.to(whole.dtype))
        return self.put(guided, mixed)

    def part_of(self, mixed: Tensor, sample: Tensor) -> Tensor:
        """What is guided of what the scheduler steps, with shape (B, \\*)."""
        if mixed.shape == sample.shape and not (self.layout.doubled or self.layout.channels):
            return mixed
        sizes = list(mixed.shape)
        if mixed.ndim == sample.ndim:
            sizes = [min(pair) for pair in zip(mixed.shape, sample.shape, strict=True)]
        if self.layout.doubled:
            sizes[0] //= 2
        if self.layout.channels:
            sizes[1] = self.layout.channels
        return mixed if sizes == list(mixed.shape) else mixed[tuple(slice(n) for n in sizes)]

    def put(self, guided: Tensor, mixed: Tensor) -> Tensor:
        """What the scheduler steps, with the guided part in its place."""
        guided = guided.to(mixed.dtype)
        if guided.shape == mixed.shape:
            return guided
        whole, batch = mixed.clone(), len(guided)
        block = tuple(slice(n) for n in guided.shape[1:])
        for start in range(0, batch * (2 if self.layout.doubled else 1), batch):
            whole[(slice(start, start + batch), *block)] = guided
        return whole

    def learned(
        self, made: list[Made], calls: tuple[int, ...], part: Tensor, sample: Tensor
    ) -> Pattern:
        """The pattern of a step that was evaluated whole."""
        known = self.patterns.get(calls)
        if known is None:
            assert self.first_call is not None
            seen = None if self.first_call.listed else self.first_call.first
            x_t, predictions = self.network_input(sample, part), [m.prediction for m in made]
            known = learn(predictions, part, calls, self.layout, x_t, seen)
            if known is not None and self.token_times is not None:
                known = by_token(known, self.token_times)
            if known is None:
                known = Pattern(calls, None, alike=True)
            else:
                self.patterns[calls] = known
                if self.run is None:
                    self.known[self.key] = known
        self.pattern = known
        return known

    def changed_pattern(self, planned: Pattern, calls: tuple[int, ...]) -> Pattern | None:
        """What to make of a step that was planned as one pattern and went as another."""
        run = self.run
        assert run is not None
        whole = self.wanted is None or (len(run.rows) == run.batch and not run.skipped)
        stopped = len(calls) < len(planned.calls) and planned.calls[: len(calls)] == calls
        if whole and not (stopped and sum(calls) == 1):
            return None
        if stopped and planned.main is not None and planned.main < sum(calls) == 1:
            return Pattern(calls)  # the pipeline itself went without guidance
        raise LayoutError(self.irregular(f"evaluates {calls} branches, not {planned.calls}"))

    def check_pattern(self, run: Run, pattern: Pattern) -> None:
        """Refuse what a pattern has no place for."""
        done = self.checked
        if done is not None and done[0] is run.decisions and done[1] is pattern:
            return
        self.checked = run.decisions, pattern
        guidance, name = self.guidance, type(self.pipe).__name__
        decisions = [*run.decisions, *(guidance.policy.decisions(run.total) or ())]
        alone = any(d.evaluate == ("cond",) for d in decisions)
        if pattern.aside and (alone or (run.skipped and not run.all_skipped)):
            raise LayoutError(
                f"'{self.asked}' cannot leave rows out of this call of {name}, which evaluates its "
                "network in a pass that takes no part in guidance (for a reference, for instance)"
            )
        alone = alone or guidance.rule.one_branch  # of several it takes the conditional one, too
        if pattern.main is None and (alone or not guidance.policy_alone):
            why = pattern.reason or "which of its branches is the conditional one cannot be told"
            raise LayoutError(f"'{self.asked}' cannot guide this call of {name}: {why}")
        if pattern.reason and guidance.combines(decisions):
            raise LayoutError(
                f"'{self.asked}' cannot guide this call of {name}: {pattern.reason}. Leave out "
                "what changes it (guidance_rescale, for instance), or use guidance='cfg'"
            )

    def end_guided(
        self,
        run: Run,
        pattern: Pattern,
        made: list[Made],
        whole: Tensor,
        part: Tensor,
        x_t: Tensor,
    ) -> Tensor:
        """The guided prediction of a step with several branches, with shape (B, \\*)."""
        if run.all_skipped:
            return run.reused(x_t)
        estimates = any(d.estimates for d in run.decisions)
        filled = self.wanted is not None and not any(m.stale for m in made)
        if not run.rows and not estimates and not run.skipped and filled:
            return run.combine(part, None, 1.0, x_t)  # what all samples have is their cond
        if pattern.main is None:  # whole samples are evaluated or skipped, nothing between
            return self.end_unguided(run, part, x_t)
        branches = branches_of([m.prediction for m in made], pattern, whole)
        if branches is None:  # guidance is the pipeline's own, and what it steps of another shape
            branches = [part] * pattern.branches
        if pattern.sign < 0 and not self.layout.preconditioned:
            branches = [-branch for branch in branches]
        cond, uncond, w = self.pair(run, pattern, branches, part)
        handed = cond
        if run.skipped:
            cond = self.with_skipped(run, cond, x_t)
        evaluated: Tensor | None = uncond
        own: Tensor | None = part
        if not run.rows:
            evaluated = own = None
        elif len(run.rows) < run.batch:
            index = row_index(run.rows, part.device)
            evaluated, own = uncond[index], cond.index_copy(0, index, part[index])
        norm = pattern.norm
        after = (lambda guided: normed(guided, handed, norm)) if norm else None
        return run.combine(cond, evaluated, w, x_t, own=own, after=after)

    def pair(
        self, run: Run, pattern: Pattern, branches: list[Tensor], part: Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """The conditional and the effective unconditional prediction, and the scale measured.

        Both with shape (B, \\*), as the scheduler steps them. Where nothing asks for the scale, it
        is not measured: 1.
        """
        assert pattern.main is not None
        cond = branches[pattern.main]
        others = [branch for k, branch in enumerate(branches) if k != pattern.main]
        uncond, decisions = others[0], run.decisions
        measures = self.detailed or self.guidance.combines(decisions)
        if self.layout.preconditioned:
            sample = inside(self.sample, pattern.kept)
            *weights, added = weights_of([cond, *others, sample], part)
            scale = sum(weights[1:], weights[0])
            self.look(run, weights[0] / scale, 0.0)
            return (
                scale * cond + added * sample,
                scale * uncond + added * sample,
                weights[0] / scale,
            )
        if len(others) > 1:
            away, w, unexplained = effective(cond, others, part)
            if measures:
                self.look(run, w, unexplained)
            return cond, away, w
        if not measures or pattern.reason:
            return cond, uncond, 1.0
        if pattern.norm:
            c, u, m = (t.double() for t in (cond, uncond, part))
            w = scale_of_normed(c, u, m, NORM_AXES[pattern.norm]).abs().to(part.dtype)
            self.look(run, w, 0.0)
            return cond, uncond, w
        measured, left = scale_of(cond, uncond, part, self.layout.frames, self.scale)
        self.look(run, measured, left)
        self.scale = None if isinstance(measured, Tensor) else float(f"{measured:.6g}")
        return cond, uncond, measured

    def end_unguided(self, run: Run, part: Tensor, x_t: Tensor) -> Tensor:
        """What is stepped where the pipeline evaluates one branch, or branches that are equal."""
        if run.skipped and run.all_skipped:
            return run.reused(x_t)
        if run.skipped:
            cond = self.with_skipped(run, part, x_t)
            same = cond[row_index(run.rows, cond.device)] if run.rows else None  # as the branches
            return run.combine(cond, same, 1.0, x_t, own=cond)
        return run.unguided(part, x_t)

    def with_skipped(self, run: Run, cond: Tensor, x_t: Tensor) -> Tensor:
        """Conditional predictions, with shape (B, \\*), and what skipped samples reuse."""
        active = [row for row in range(run.batch) if row not in run.skipped]
        index = row_index(active, cond.device)
        return run.reused(x_t).to(cond.dtype).index_copy(0, index, cond[index])

    # The run

    def start(self, batch: int, pattern: Pattern | None) -> Run:
        """Begin the run: its length, and what can be refused by now."""
        assert self.first_call is not None
        total = self.total(self.first_call.timestep)
        decisions = self.guidance.policy.decisions(total)
        one_branch = pattern is not None and pattern.branches == 1
        skips = decisions is None or any(d.skips for d in decisions)
        acts = skips or self.guidance.is_plain or self.guidance.rule.one_branch
        if one_branch and not (self.guidance.policy_alone and acts):
            if not getattr(self.pipe, "do_classifier_free_guidance", False):
                raise LayoutError(self.nothing_to_act_on())
            one_branch = False
        if self.guidance.rule.needs_next_level:
            check_falling_noise(self.scheduler)
        combines = self.guidance.combines(decisions or ())
        left_out = any(d.skips or d.estimates for d in decisions or ())
        if combines or left_out:
            self.layout.check_options(self.options, self.asked, combines)
        if left_out:
            self.check_others()
        call = self.first_call
        networks = [unwrapped(getattr(self.pipe, name)) for name in self.denoisers]
        check_caches(networks, self.guidance, self.asked, pattern, batch, decisions)
        first = call.first
        while not isinstance(first, Tensor):
            first = first[0]
        self.run = self.new_run(batch, total, first.device, one_branch)
        return self.run

    def is_over(self, run: Run) -> bool:
        """Whether the scheduler stands before its first step again."""
        if not hasattr(self.scheduler, "step_index"):
            return run.step.index + 1 >= run.total
        index = self.scheduler.step_index
        return index is None or index == (getattr(self.scheduler, "begin_index", None) or 0)

    def next_run(self, run: Run, timestep: Tensor | float) -> Run:
        """The run of the next piece of a video, in the same trace."""
        self.run = self.new_run(run.batch, self.total(timestep), self.device, run.one_branch)
        self.run.trace = run.trace
        return self.run

    def new_run(
        self, batch: int, total: int, device: torch.device, one_branch: bool = False
    ) -> Run:
        """A run on `device`; what is measured arrives a step later if that is not the CPU."""
        self.device, on_cpu = device, on_host(device)
        self.looks = LaggedReads(0 if on_cpu else 1)
        return Run(self.guidance, batch, total, on_cpu, self.detailed, one_branch)

    def total(self, timestep: Tensor | float) -> int:
        """Number of evaluations of the run."""
        known = getattr(self.pipe, "num_timesteps", None)
        return known or run_length(self.scheduler, timestep, self.options)

    def look(self, run: Run, w: float | Tensor, left: float | Tensor) -> None:
        """Look at the scale and at what is left over, on the CPU at once, else a step later."""
        index = run.step.index
        if isinstance(w, Tensor) or isinstance(left, Tensor):
            like = w if isinstance(w, Tensor) else left
            assert isinstance(like, Tensor)
            low = w.amin() if isinstance(w, Tensor) else like.new_tensor(w)
            values = torch.stack([low, torch.as_tensor(left).to(low)])
            self.looks.push(index, index, values)
        else:
            self.judge(index, w, left)
        for step, (low, rest) in self.looks.due(index + 1):
            self.judge(step, low, rest)

    def judge(self, step: int, w: float, left: float) -> None:
        """Raise LayoutError if the pipeline combined its branches otherwise than was learned."""
        name = type(self.pipe).__name__
        if left > ROUNDING:
            raise LayoutError(
                f"{name} changed the way it combines its branches at step {step}, under "
                f"'{self.asked}': at the scale {w:.3g} is left {left:.3g} times more than rounding"
            )
        if w < 1 - 1e-2 and not self.guidance.keeps_combination:
            raise LayoutError(
                f"{name} used the guidance scale {w:.3g} at step {step}; below 1, '{self.asked}' "
                "would guide towards the unconditional prediction"
            )

    def levels(self, timestep: Tensor) -> tuple[NoiseLevel | None, NoiseLevel | None]:
        """Noise levels now and next, as far as the guidance or the trace needs them."""
        if not (self.guidance.needs_level or self.detailed):
            return None, None
        level = self.noise(timestep)
        if self.pattern is not None and self.pattern.upward:
            level = replace(level, sign=-level.sign)
        if least := self.layout.least_sigma:
            level = replace(level, sigma=torch.as_tensor(level.sigma).clamp(min=least))
        if not self.guidance.rule.needs_next_level:
            return level, None
        return level, replace(next_noise_level(self.scheduler, timestep), sign=level.sign)

    def network_input(self, sample: Tensor, part: Tensor) -> Tensor:
        """x_t as far as it is guided, scaled as the network has it."""
        if self.guidance.needs_level or self.detailed:
            level = None if self.wanted is None or self.run is None else self.run.step.level
            sample = self.noise.network_input(sample, self.scheduler_timestep, level)
        if sample.shape == part.shape:
            return sample
        seen = view(sample[: len(part)], part)
        return part if seen is None else seen

    def check_others(self) -> None:
        """Raise LayoutError if the network predicts something beside that cannot be made up."""
        if self.layout.others:
            raise LayoutError(
                f"the network of {type(self.pipe).__name__} also predicts {self.layout.others}, "
                f"which '{self.asked}' cannot make up for where it evaluates nothing"
            )

    def indivisible(self, call: Call, error: Exception) -> str:
        """The message of a network that fails on some of its rows."""
        return (
            f"the network of {type(self.pipe).__name__} cannot evaluate some of its {call.rows} "
            f"rows alone ({error}): something in it holds state over the batch, such as a cache or "
            f"shared attention. Disable it, or leave out {self.wish}"
        )

    def irregular(self, what: str) -> str:
        """The message of a step that does not go as those before."""
        step = 0 if self.run is None else self.run.step.index
        return (
            f"{type(self.pipe).__name__} {what} at step {step}, otherwise than before, so that "
            f"'{self.asked}' cannot go on"
        )

    def nothing_to_act_on(self) -> str:
        """The message of a pipeline that evaluates one branch."""
        return (
            f"{type(self.pipe).__name__} evaluates one branch, so that '{self.asked}' has nothing "
            "to act on: its guidance is off at this scale or without a negative prompt, or built "
            "into the network (a distilled model). What works there: policies that skip steps "
            "('forecast'), rules for one branch ('momentum', 'higs', 'tag')"
        )

    def finish(self) -> None:
        """Raise what was still on its way from the device, or if nothing was guided."""
        run = self.run
        if run is not None:
            for step, (low, rest) in self.looks.rest():
                self.judge(step, low, rest)
            run.finish()
        if run is None:
            raise LayoutError(
                f"'{self.asked}' found nothing to guide: {type(self.pipe).__name__} has stepped "
                "its scheduler without a call of its networks in between, or not at all"
            )
        if self.most_branches == 1 and not run.one_branch:
            raise LayoutError(self.nothing_to_act_on())


def run_length(scheduler: Any, timestep: Tensor | float, options: dict[str, Any]) -> int:
    """Number of network calls from the first one, at `timestep`, where a pipeline does not tell."""
    timesteps = scheduler.timesteps
    places = (timesteps == torch.as_tensor(timestep).flatten()[0].to(timesteps)).nonzero()
    left = timesteps[int(places[0]) :] if len(places) else timesteps
    if options.get("denoising_end"):
        steps = scheduler.config.num_train_timesteps
        left = left[left >= round(steps - options["denoising_end"] * steps)]
    return len(left)


def _positions(scheduler: Any) -> tuple[int, int]:
    """Where `step` of a scheduler takes the network's output, and the sample.

    A function put in the place of the method may take anything: then its class says.
    """
    for step in (scheduler.step, type(scheduler).step):
        names = [name for name in inspect.signature(step).parameters if name != "self"]
        if "model_output" in names and "sample" in names:
            return names.index("model_output"), names.index("sample")
    raise LayoutError(f"step of {type(scheduler).__name__} takes no model_output and sample")


def _key(pipe: Any, denoisers: tuple[str, ...], options: dict[str, Any]) -> Any:
    """What decides how a call guides: its networks, and options as far as they are plain values."""
    plain = (bool, int, float, type(None))
    listed = sorted(options.items(), key=lambda item: item[0])
    values = tuple((n, v if isinstance(v, plain) else type(v)) for n, v in listed if n != "self")
    return (*(id(getattr(pipe, name)) for name in denoisers), type(pipe.scheduler)), values
