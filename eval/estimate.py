"""How long runs of a pipeline will take, from a short one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..pipelines.fitting.runs import Runs
from ..pipelines.personalization.schedule import duration
from ..pipelines.processes import processes
from .terminal import go_on, note

FEW, MANY = 2, 4  # steps of the short runs
WORTH_TELLING = 10.0  # seconds
SHARE = 10  # they are made only if the work is so many times theirs


@dataclass(frozen=True)
class Speed:
    """How fast a pipeline is.

    Args:
        step: Seconds of a sampling step of a picture with both branches.
        picture: Seconds of a picture besides: its prompt, its decoding.
    """

    step: float
    picture: float

    def seconds(self, pictures: float, steps: float) -> float:
        """Of pictures that take so many steps in all."""
        return pictures * self.picture + steps * self.step


def measured(runs: Runs) -> Speed:
    """The speed of runs with plain guidance, in batches of theirs; the first run warms up."""
    prompts = runs.prompts[: runs.batch_size]
    seconds = {}
    for steps in (FEW, FEW, MANY):
        short = Runs(
            runs.pipe, prompts, runs.guidance_scale, steps, runs.negative_prompt, runs.seed
        )
        begin = time.perf_counter()
        runs.pipe(guidance="cfg", **short.call(range(len(prompts))))
        seconds[steps] = time.perf_counter() - begin
    step = max(seconds[MANY] - seconds[FEW], 0.0) / (MANY - FEW)
    rest = max(seconds[FEW] - FEW * step, 0.0)
    return Speed(step / len(prompts), rest / len(prompts))


def ask(runs: Runs, pictures: int, steps: int, yes: bool) -> None:
    """Say how long work will take, and ask whether it shall begin; see `terminal.go_on`.

    Args:
        runs: A pipeline with prompts, scale and batch size.
        pictures: How many will be made, at most.
        steps: How many sampling steps they take, all together.
        yes: Do not ask.

    Raises:
        typer.Exit: it shall not.
    """
    state = processes()
    batch = min(runs.batch_size, len(runs.prompts))
    if not state.is_main_process or steps < SHARE * (FEW + FEW + MANY) * batch:
        return
    seconds = measured(runs).seconds(pictures, steps) / state.num_processes
    if seconds >= WORTH_TELLING:
        work = f"{pictures:,} pictures, {steps:,} steps"
        note(f"about {duration(seconds)}: {work}")
    go_on(seconds, yes or state.num_processes > 1)
