"""Fitting LinearAG's coefficients on trajectories of ordinary guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    runs: Runs,
    *,
    scales: Sequence[float] = (),
    ridge: float = 1e-3,
    checkpoint: Path | str | None = None,
) -> Fit:
    """Fit LinearAG's coefficients for one pipeline.

    What is regressed is the difference of the two predictions: the ridge then draws estimates
    towards it being 0, and not away from the conditional prediction.

    Every prompt makes one trajectory of classifier-free guidance, every fifth of them is left out
    of the fit to judge by (about 200 prompts are enough). Only inner products are kept: memory
    does not grow with the number of prompts. Under ``accelerate launch`` the trajectories are
    shared out; the result does not depend on the number of processes.

    Args:
        runs: A guided pipeline and at least 2 prompts.
        scales: Several w, which take turns: the coefficients then hold in between. Default: that
            of `runs`.
        ridge: See `fit_coefficients`. Estimates are fed back, so that large coefficients of both
            signs, which explain single steps best, may be worse over a run.
        checkpoint: Folder for what is done; a fit interrupted and run again goes on from there.
            Removed by no one.

    Returns:
        Coefficients and three figures: "r2", the share of the square of each step's unconditional
        prediction explained on the trajectories fitted on; "r2_held_out", the same on those left
        out; "r2_difference", the share of the square of the difference of the two predictions
        explained there, which tells more, since the two are close to each other.

    Raises:
        ValueError: too few prompts, a setting out of its range, or a checkpoint of another fit.
    """
    from accelerate.utils import gather_object

    check_fit(runs.prompts, ridge)
    turns = [replace(runs, guidance_scale=float(w)) for w in scales or [runs.guidance_scale]]
    for turn in turns:
        turn.check_guided()
    listed = [turn.guidance_scale for turn in turns]
    span = min(listed), max(listed)
    identity = run_identity(runs.pipe, runs.num_inference_steps, span, runs.negative_prompt)
    plan = {
        "identity": identity,
        "prompts": runs.prompts,
        "scales": listed,
        "seed": runs.seed,
        "batch_size": runs.batch_size,
    }
    # The scales take turns.
    calls = [
        (is_held_out, call)
        for is_held_out, samples in enumerate(held_out(len(runs.prompts)))
        for position, turn in enumerate(turns)
        for call in turn.calls(samples[position :: len(turns)])
    ]
    state = processes()
    done: dict[int, Gram] = {}
    own = range(state.process_index, len(calls), state.num_processes)
    with runs.bar("trajectories", "batch", len(own)) as bar:
        for number in own:
            path = None if checkpoint is None else Path(checkpoint) / f"batch-{number:05d}.json"
            done[number] = _inner_products(runs.pipe, calls[number][1], path, plan)
            bar.update()
    if state.num_processes > 1:
        done = dict(pair for part in gather_object([list(done.items())]) for pair in part)
    # Summed in a fixed order, so that nothing depends on who computed what.
    kept, left_out = (
        sum((done[n] for n, (of, _) in enumerate(calls) if of == which), Gram.empty(done[0].steps))
        for which in (False, True)
    )
    coefficients = fit_coefficients(kept, target="difference", ridge=ridge, identity=identity)
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
