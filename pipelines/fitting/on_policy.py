"""Fitting the weights of one schedule on runs of that very schedule.

See `pilotage.guidance.fitting.on_policy` for what is fitted. It needs the pipeline's state after
every step (``callback_on_step_end``) and a scheduler whose steps are affine in the network's
output: then the output with which a step would end in a given state is known.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...guidance import Coefficients
from ...guidance.fitting.on_policy import FitOnPolicy
from ...guidance.policies.schedule import Choice
from ..guided import GuidanceLike
from ..seam.calls import Call, with_rows
from ..seam.noise_levels import knows_levels
from ..seam.patch import attached
from ..seam.support import denoisers_of, layout_of
from .fit import Fit
from .runs import Runs, check_fit, held_out


class ScheduleFitter:
    """Plain guidance on some prompts, and the fitting of schedules to it.

    What is fitted brings a run back to its reference: the run that evaluates every step, or one of
    `finer` times as many steps, which cheap schedules may then come nearer to than the former does.

    Args:
        runs: A guided pipeline and at least 2 prompts; about 50 are enough. They all make one batch
            of it, but the denoiser is given both branches of `batch_size` prompts at most. Every
            fifth (at least one) is left out of the fits, to judge by.
        ridge: See `FitOnPolicy`.
        output_type: What the pipeline makes of the last state, for `pictures` and `fit`.
        finer: How many times as many steps the reference has.

    Attributes:
        pictures: What the reference makes.
        states: Its x* after every step of the schedule, T tensors of shape (B, \\*).

    Raises:
        ValueError: too few prompts, a ridge or `finer` out of its range, a pipeline that does not
            hand its scheduler the guided prediction, or a scheduler whose finer runs do not pass
            through the timesteps of the others.
    """

    def __init__(
        self, runs: Runs, *, ridge: float = 1e-4, output_type: str = "latent", finer: int = 1
    ) -> None:
        check_fit(runs.prompts, ridge)
        if finer < 1:
            raise ValueError(f"finer is a whole number from 1 on, got {finer}")
        self.runs, self.ridge, self.output_type, self.finer = runs, ridge, output_type, finer
        pipeline = type(runs.pipe)
        if "callback_on_step_end" not in inspect.signature(pipeline.__call__).parameters:
            raise ValueError(f"{pipeline.__name__} does not tell its states on the way")
        self.denoisers = denoisers_of(runs.pipe, layout_of(pipeline))
        self.states: list[Tensor] = []
        self.pictures = self._run("cfg", self.states, detailed_trace=True)
        pattern = runs.pipe.guidance_pattern
        if pattern is None or pattern.norm or pattern.reason:
            raise ValueError(
                f"{pipeline.__name__} changes the guided prediction before its scheduler has it"
            )
        if finer > 1:
            self._refine(finer)

    def _refine(self, times: int) -> None:
        """Take a run of so many times as many steps for the reference."""
        coarse = self.runs.pipe.scheduler.timesteps.tolist()
        self._check_finer(coarse, times)
        states: list[Tensor] = []
        self.pictures = self._run(
            "cfg", states, num_inference_steps=times * self.runs.num_inference_steps
        )
        fine = self.runs.pipe.scheduler.timesteps.tolist()
        if len(states) != times * len(coarse):
            raise self._passes_by(coarse, times)
        self._check_passing(coarse, fine, times)
        after = dict(zip(fine[1:], states, strict=False))
        self.states = [*(after[t] for t in coarse[1:]), states[-1]]

    def _check_finer(self, coarse: list[float], times: int) -> None:
        """Refuse, before the long run, where the scheduler alone tells that it would be in vain."""
        scheduler = copy.deepcopy(self.runs.pipe.scheduler)
        try:
            scheduler.set_timesteps(len(coarse))
            if scheduler.timesteps.tolist() != coarse:
                return  # the pipeline has a say in them: the run will tell
            scheduler.set_timesteps(times * len(coarse))
        except (TypeError, ValueError):  # it needs more than a number of steps
            return
        self._check_passing(coarse, scheduler.timesteps.tolist(), times)

    def _check_passing(self, coarse: list[float], fine: list[float], times: int) -> None:
        if fine[0] != coarse[0] or not set(coarse) <= set(fine):
            raise self._passes_by(coarse, times)

    def _passes_by(self, coarse: list[float], times: int) -> ValueError:
        name = self.runs.pipe.scheduler.__class__.__name__
        return ValueError(
            f"a run of {times * len(coarse)} steps of {name} does not pass through the timesteps "
            f"of one of {len(coarse)} (with timestep_spacing='trailing' it does): fit without finer"
        )

    @property
    def total(self) -> int:
        """T, the number of steps of a run."""
        return len(self.states)

    def fit(self, choices: Sequence[Choice]) -> tuple[Fit, Any]:
        """Fit the weights of one schedule.

        Where it evaluates both branches or nothing at every step, evaluated steps are corrected
        as well (see `pilotage.guidance.fitting.on_policy`).

        Args:
            choices: "both", "estimate", "cond" or "forecast" for every step, for instance
                ``hold().choices_for(20)``, the pattern of LinearAG.

        Returns:
            The coefficients, and the pictures they make of all prompts: `linear_ag` takes them if
            the choices have its pattern, otherwise ``Schedule(choices, fill=coefficients)``. Their
            figures are "distance", |x - x*|² / |x*|² after every step over the runs fitted on, x*
            being the reference's state, and "distance_held_out" over those left out.

        Raises:
            ValueError: the choices cannot be followed, or the scheduler's steps are random or not
                affine in the network's output.
        """
        if "estimate" in choices:
            self.runs.check_guided()
        if len(choices) != self.total:
            raise ValueError(f"{len(choices)} choices for a run of {self.total} steps")
        kept, left_out = held_out(len(self.runs.prompts))
        found: list[Coefficients] = []
        reached: list[Tensor] = []
        policy = FitOnPolicy(
            tuple(choices),
            self.runs.guidance_scale,
            _Aim(self.runs.pipe, self.states, reached),
            found.append,
            rows=kept,
            ridge=self.ridge,
            **self._solver_like(choices),
        )
        pictures = self._run(policy, reached)
        figures = {
            name: tuple(_distance(x[of], y[of]) for x, y in zip(reached, self.states, strict=True))
            for name, of in (("distance", kept), ("distance_held_out", left_out))
        }
        coefficients = replace(found[0], identity=self.runs.identity())
        return Fit(coefficients, figures, len(kept), len(left_out)), pictures

    def _solver_like(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Of evaluated and skipped steps alone, all are made of guided (denoised) predictions."""
        if not set(choices) <= {"both", "forecast"}:
            return {}
        known = knows_levels(self.runs.pipe.scheduler)
        return {"correct": True, "space": "x0" if known else "native"}

    def _run(self, guidance: GuidanceLike, states: list[Tensor], **extra: Any) -> Any:
        """Pictures of all prompts; the state after every step is appended to `states`."""

        def callback(
            _pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            states.append(tensors["latents"].clone())
            return {}

        call = self.runs.call(range(len(self.runs.prompts)))
        with attached(self.runs.pipe, self.denoisers, self._in_parts):
            return self.runs.pipe(
                guidance=guidance,
                output_type=self.output_type,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents"],
                **call | extra,
            ).images

    def _in_parts(self, name: str, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The denoiser's output, made of some rows at a time."""
        call = Call(network, args, kwargs)
        rows, size = list(range(call.rows)), 2 * self.runs.batch_size
        if len(rows) <= size:
            return call()
        parts = [rows[i : i + size] for i in rows[::size]]
        return with_rows([call(part) for part in parts], torch.cat, [len(part) for part in parts])


@dataclass(frozen=True)
class _Aim:
    """Guided predictions with which the scheduler's steps end in given states."""

    pipe: Any
    states: list[Tensor]
    reached: list[Tensor]

    def __call__(self, index: int) -> Tensor:
        scheduler, x_t = self.pipe.scheduler, self.reached[index - 1]

        def end(output: float) -> Tensor:
            outputs = torch.full_like(x_t, output)
            step = copy.deepcopy(scheduler).step
            return step(outputs, scheduler.timesteps[index], x_t, return_dict=False)[0]

        base, slopes = end(0.0), end(1.0)
        slopes = slopes - base
        slope = slopes.mean()
        expected, got = base - 2 * slope, end(-2.0)
        scale = base.abs().amax() + slope.abs()
        if not (got - expected).abs().amax() <= 1e-3 * scale or slope == 0:
            raise ValueError(
                f"the steps of {scheduler.__class__.__name__} are random or clipped: this fit "
                "needs them to be affine in the network's output"
            )
        return (self.states[index] - base) / slope


def _distance(x: Tensor, reference: Tensor) -> float:
    x, reference = x.double(), reference.double()
    return ((x - reference).square().sum() / reference.square().sum()).item()
