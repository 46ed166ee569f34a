"""Fitting LinearAG's coefficients on trajectories of ordinary guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ...guidance import (
    CFG,
    Coefficients,
    Gram,
    Guidance,
    Policy,
    fit_coefficients,
    r_squared,
    save_guidance,
)
from ...guidance.fitting.record import Record
from ...guidance.fitting.regression import Target
from ..processes import processes
from .fitted import run_identity
from .runs import Runs, check_fit, held_out, read_tried, write_tried


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients, and how well they do.

    Args:
        coefficients: To be used as ``linear_ag(coefficients)``, or in the schedule fitted to.
        figures: What was measured by name, a value for every step; see what returns this.
        trajectories: Number of runs fitted on.
        held_out: Number of runs left out.
    """

    coefficients: Coefficients
    figures: Mapping[str, tuple[float, ...]]
    trajectories: int
    held_out: int

    def save(self, path: Path | str, policy: Policy) -> None:
        """Write classifier-free guidance as JSON (see `save_guidance`).

        Args:
            path: File to write.
            policy: Uses the coefficients, for instance ``linear_ag(coefficients)``.
        """
        measured: dict[str, Any] = {
            name: [round(value, 6) for value in values] for name, values in self.figures.items()
        }
        measured |= {"trajectories": self.trajectories, "held_out": self.held_out}
        save_guidance(path, Guidance(CFG(), policy), measured)


def fit(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float | Sequence[float] = 7.5,
    target: Target = "difference",
    ridge: float = 1e-3,
    checkpoint: Path | str | None = None,
    **settings: Any,
) -> Fit:
    """Fit LinearAG's coefficients for one pipeline.

    Every prompt makes one trajectory of classifier-free guidance, every fifth of them is left out
    of the fit to judge by (about 200 prompts are enough). Only inner products are kept: memory
    does not grow with the number of prompts. Under ``accelerate launch`` the trajectories are
    shared out; the result does not depend on the number of processes.

    Args:
        pipe: A guided pipeline.
        prompts: Prompts, at least 2.
        guidance_scale: w, or several, which take turns: the coefficients then hold in between.
        target: What is regressed, see `fit_coefficients`. By default the difference, so that the
            ridge draws estimates towards it being 0 and not away from the conditional prediction.
        ridge: See `fit_coefficients`. Estimates are fed back, so that large coefficients of both
            signs, which explain single steps best, may be worse over a run.
        checkpoint: Folder for what is done; a fit interrupted and run again goes on from there.
            Removed by no one.
        settings: The others of `Runs`.

    Returns:
        Coefficients and three figures: "r2", the share of the square of each step's unconditional
        prediction explained on the trajectories fitted on; "r2_held_out", the same on those left
        out; "r2_difference", the share of the square of the difference of the two predictions
        explained there, which tells more, since the two are close to each other.

    Raises:
        ValueError: too few prompts, a setting out of its range, or a checkpoint of another fit.
        TypeError: an unknown setting.
    """
    from accelerate.utils import gather_object

    check_fit(prompts, ridge)
    if target not in get_args(Target):
        raise ValueError(f"target is {' or '.join(get_args(Target))}, got {target!r}")
    scales = list(guidance_scale) if isinstance(guidance_scale, Sequence) else [guidance_scale]
    runs = [Runs(pipe, prompts, float(w), **settings) for w in scales]
    if not runs:
        raise ValueError("a fit needs a guidance scale, got none")
    steps, negative = runs[0].num_inference_steps, runs[0].negative_prompt
    identity = run_identity(pipe, steps, (float(min(scales)), float(max(scales))), negative)
    plan = {
        "identity": identity,
        "prompts": runs[0].prompts,
        "scales": scales,
        "seed": runs[0].seed,
        "batch_size": runs[0].batch_size,
    }
    # The scales take turns.
    calls = [
        (is_held_out, call)
        for is_held_out, samples in enumerate(held_out(len(prompts)))
        for position, run in enumerate(runs)
        for call in run.calls(samples[position :: len(runs)])
    ]
    state = processes()
    done: dict[int, Gram] = {}
    own = range(state.process_index, len(calls), state.num_processes)
    with runs[0].bar("trajectories", "batch", len(own)) as bar:
        for number in own:
            path = None if checkpoint is None else Path(checkpoint) / f"batch-{number:05d}.json"
            done[number] = _inner_products(pipe, calls[number][1], path, plan)
            bar.update()
    if state.num_processes > 1:
        done = dict(pair for part in gather_object([list(done.items())]) for pair in part)
    # Summed in a fixed order, so that nothing depends on who computed what.
    kept, left_out = (
        sum((done[n] for n, (of, _) in enumerate(calls) if of == which), Gram.empty(done[0].steps))
        for which in (False, True)
    )
    coefficients = fit_coefficients(kept, target=target, ridge=ridge, identity=identity)
    figures = {
        "r2": r_squared(kept, coefficients),
        "r2_held_out": r_squared(left_out, coefficients),
        "r2_difference": r_squared(left_out, coefficients, "difference"),
    }
    by_step = {name: tuple(values.tolist()) for name, values in figures.items()}
    return Fit(coefficients, by_step, kept.trajectories, left_out.trajectories)


def _inner_products(
    pipe: Any, call: Mapping[str, Any], path: Path | None, plan: Mapping[str, Any]
) -> Gram:
    """Inner products of one batch of trajectories, kept in a file if one is named."""
    grams = [] if path is None else read_tried(path, plan, _gram)
    if grams:
        return grams[0]
    record = Record(lambda cond, uncond: grams.append(Gram.of(cond, uncond)))
    pipe(guidance=record, output_type="latent", **call)
    (gram,) = grams
    if path is not None:
        write_tried(path, plan, [[gram.products.tolist(), gram.trajectories]])
    return gram


def _gram(kept: Any) -> Gram:
    products, trajectories = kept
    return Gram(torch.tensor(products, dtype=torch.float64), int(trajectories))
