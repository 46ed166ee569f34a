"""Fitting the estimates of one schedule on runs of that very schedule.

See `pilotage.guidance.fitting.on_policy` for what is fitted. It needs the pipeline's state after every step
(``callback_on_step_end``) and a scheduler whose steps are affine in the network's output: then the
output with which a step would end in a given state is known.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...guidance import CFG, Guidance, Schedule
from ...guidance.fitting.on_policy import Steer
from ...guidance.policies.linear_ag import Coefficients
from ...guidance.policies.schedule import Choice
from ..guided import scale_option
from ..seam.calls import Call, prediction_of, with_prediction
from ..seam.layouts import Layout
from ..seam.seam import attached
from ..seam.support import layout_of
from .fitted import negative_argument, run_identity

HELD_OUT_EVERY = 5
MIN_PROMPTS = 2


@dataclass(frozen=True)
class Steered:
    """A schedule with estimates fitted to it, and how far its runs stay from plain guidance.

    Args:
        schedule: Ready for ``guidance=``.
        distance: |x - x*|² / |x*|² after every step over the runs fitted on, x* being the state
            under plain guidance; with shape (T,).
        distance_held_out: The same over runs left out of the fit.
        trajectories: Number of runs fitted on.
        held_out: Number of runs left out.
    """

    schedule: Schedule
    distance: tuple[float, ...]
    distance_held_out: tuple[float, ...]
    trajectories: int
    held_out: int

    @property
    def coefficients(self) -> Coefficients:
        """The estimates; `LinearAG` takes them if the schedule has its pattern."""
        return self.schedule.stand_in

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance by this schedule."""
        return Guidance(CFG(), self.schedule)

    @property
    def measured(self) -> dict[str, Any]:
        """Figures to be saved with the schedule."""
        rounded = {
            name: [round(value, 6) for value in getattr(self, name)]
            for name in ("distance", "distance_held_out")
        }
        return rounded | {"trajectories": self.trajectories, "held_out": self.held_out}


class Steering:
    """Plain guidance on some prompts, and the fitting of schedules to it.

    Args:
        pipe: A guided pipeline. All prompts make one batch of it, but the denoiser sees no more
            than `batch_size` rows at once.
        prompts: Prompts, at least 2. Every fifth (at least one) is left out of the fits, to judge
            by.
        guidance_scale: w.
        num_inference_steps: Steps of the runs that are to be guided.
        negative_prompt: Prompt of the unconditional branch; None: as of a call without one.
        seed: Seed of the first run; the others follow.
        batch_size: Rows that the denoiser sees at once.
        ridge: See `Steer`.
        output_type: What the pipeline makes of the last state, for `pictures` and `fit`.

    Attributes:
        pictures: What plain guidance makes.
        states: x* after every step, T tensors of shape (B, \\*).

    Raises:
        ValueError: too few prompts, a setting out of its range, or a pipeline that does not hand
            its scheduler the guided prediction.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 20,
        negative_prompt: str | None = None,
        seed: int = 0,
        batch_size: int = 16,
        ridge: float = 1e-4,
        output_type: str = "latent",
    ) -> None:
        if isinstance(prompts, str) or len(prompts) < MIN_PROMPTS:
            raise ValueError(f"expected a list of at least {MIN_PROMPTS} prompts, got {prompts!r}")
        if not (math.isfinite(guidance_scale) and guidance_scale > 1):
            raise ValueError(f"guidance_scale must be finite and > 1, got {guidance_scale}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge must be finite and >= 0, got {ridge}")
        self.pipe, self.prompts = pipe, list(prompts)
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        self.negative_prompt, self.seed, self.ridge = negative_prompt, seed, ridge
        if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(f"{type(pipe).__name__} does not tell its states on the way")
        layout = layout_of(type(pipe))
        if layout.sign < 0 or layout.channels or getattr(layout, "matches_norm", False):
            raise ValueError(
                f"{type(pipe).__name__} changes the guided prediction before its scheduler sees it"
            )
        self.chunks = _Chunks(layout, batch_size)
        pipe.set_progress_bar_config(disable=True)
        self.states: list[Tensor] = []
        self.pictures = self._call("cfg", self.states, output_type)
        self.output_type = output_type

    @property
    def total(self) -> int:
        """T, the number of steps of a run."""
        return len(self.states)

    def fit(self, choices: Sequence[Choice]) -> tuple[Steered, Any]:
        """Fit the estimates of one schedule.

        Returns:
            The schedule, and the pictures it makes of all prompts.

        Raises:
            ValueError: the choices cannot be followed, or the scheduler's steps are random or not
                affine in the network's output.
        """
        if len(choices) != self.total:
            raise ValueError(f"{len(choices)} choices for a run of {self.total} steps")
        count = len(self.prompts)
        held = list(range(count))[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or [count - 1]
        kept = [i for i in range(count) if i not in set(held)]
        found: list[Coefficients] = []
        reached: list[Tensor] = []
        aim = _Aim(self.pipe, self.states, reached)
        policy = Steer(
            tuple(choices), self.guidance_scale, aim, found.append, rows=kept, ridge=self.ridge
        )
        pictures = self._call(policy, reached, self.output_type)
        w = self.guidance_scale
        identity = run_identity(self.pipe, self.num_inference_steps, (w, w), self.negative_prompt)
        schedule = Schedule(
            tuple(choices), stand_in=replace(found[0], identity=identity), identity=identity
        )
        distances = [
            tuple(_distance(x[rows], y[rows]) for x, y in zip(reached, self.states, strict=True))
            for rows in (kept, held)
        ]
        return Steered(schedule, *distances, len(kept), len(held)), pictures

    def _call(self, guidance: Any, states: list[Tensor], output_type: str) -> Any:
        """Pictures of all prompts; the state after every step is appended to `states`."""

        def callback(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict:
            states.append(tensors["latents"].clone())
            return {}

        seeds = range(self.seed, self.seed + len(self.prompts))
        with attached(self.pipe, self.chunks):
            return self.pipe(
                prompt=self.prompts,
                guidance=guidance,
                num_inference_steps=self.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type=output_type,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents"],
                **negative_argument(self.pipe, self.negative_prompt, len(self.prompts)),
                **scale_option(self.pipe, self.guidance_scale),
            ).images


class _Aim:
    """Guided predictions with which the scheduler's steps end in given states."""

    def __init__(self, pipe: Any, states: list[Tensor], reached: list[Tensor]) -> None:
        self.pipe, self.states, self.reached = pipe, states, reached

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
                f"the steps of {type(scheduler).__name__} are random or clipped: this fit needs "
                "them to be affine in the network's output"
            )
        return (self.states[index] - base) / slope


@dataclass(frozen=True)
class _Chunks:
    """Stands in front of a denoiser and shows it some rows at a time."""

    layout: Layout
    batch_size: int

    def __call__(self, name: str, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = Call(network, args, kwargs, self.layout.listed)
        rows = list(range(call.rows))
        if len(rows) <= self.batch_size:
            return call()
        outputs = [
            call(rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        ]
        parts = [prediction_of(output, self.layout.listed) for output in outputs]
        return with_prediction(outputs[0], torch.cat(parts), self.layout.listed)


def _distance(x: Tensor, reference: Tensor) -> float:
    x, reference = x.double(), reference.double()
    return ((x - reference).square().sum() / reference.square().sum()).item()


def fit_schedule(
    pipe: Any, prompts: Sequence[str], choices: Sequence[Choice], **settings: Any
) -> Steered:
    """Fit the estimates of one schedule on runs of that schedule.

    Args:
        pipe: A guided pipeline.
        prompts: Prompts; about 50 are enough.
        choices: "both", "estimate", "cond" or "forecast" for every step, e.g. ``LinearAG``'s by
            `pilotage.guidance.policies.alternating.alternating`.
        settings: As of `Steering`.

    Raises:
        ValueError: see `Steering`.
    """
    return Steering(pipe, prompts, **settings).fit(choices)[0]
