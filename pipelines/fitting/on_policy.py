"""Fitting the estimates of one schedule on runs of that very schedule.

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
from ..seam.patch import attached
from ..seam.support import denoisers_of, layout_of
from .fit import Fit
from .runs import Runs, check_fit, held_out


class ScheduleFitter:
    """Plain guidance on some prompts, and the fitting of schedules to it.

    Args:
        runs: A guided pipeline and at least 2 prompts; about 50 are enough. They all make one batch
            of it, but the denoiser is given both branches of `batch_size` prompts at most. Every
            fifth (at least one) is left out of the fits, to judge by.
        ridge: See `FitOnPolicy`.
        output_type: What the pipeline makes of the last state, for `pictures` and `fit`.

    Attributes:
        pictures: What plain guidance makes.
        states: x* after every step, T tensors of shape (B, \\*).

    Raises:
        ValueError: too few prompts, a ridge out of its range, or a pipeline that does not hand its
            scheduler the guided prediction.
    """

    def __init__(self, runs: Runs, *, ridge: float = 1e-4, output_type: str = "latent") -> None:
        check_fit(runs.prompts, ridge)
        self.runs, self.ridge, self.output_type = runs, ridge, output_type
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

    @property
    def total(self) -> int:
        """T, the number of steps of a run."""
        return len(self.states)

    def fit(self, choices: Sequence[Choice]) -> tuple[Fit, Any]:
        """Fit the estimates of one schedule.

        Args:
            choices: "both", "estimate", "cond" or "forecast" for every step, for instance
                ``hold().choices_for(20)``, the pattern of LinearAG.

        Returns:
            The coefficients, and the pictures they make of all prompts: `linear_ag` takes them if
            the choices have its pattern, otherwise ``Schedule(choices, fill=coefficients)``. Their
            figures are "distance", |x - x*|² / |x*|² after every step over the runs fitted on, x*
            being the state under plain guidance, and "distance_held_out" over those left out.

        Raises:
            ValueError: the choices cannot be followed, or the scheduler's steps are random or not
                affine in the network's output.
        """
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
        )
        pictures = self._run(policy, reached)
        figures = {
            name: tuple(_distance(x[of], y[of]) for x, y in zip(reached, self.states, strict=True))
            for name, of in (("distance", kept), ("distance_held_out", left_out))
        }
        coefficients = replace(found[0], identity=self.runs.identity())
        return Fit(coefficients, figures, len(kept), len(left_out)), pictures

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
                **extra,
                output_type=self.output_type,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents"],
                **call,
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
