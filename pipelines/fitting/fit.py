"""Fitting LinearAG's coefficients on trajectories of ordinary guidance."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...guidance import CFG, Gram, Guidance, LinearAG, Space, fit_coefficients, r_squared
from ...guidance.fitting.record import Gather
from ...guidance.policies.linear_ag import Coefficients, Target
from ...guidance.saved import save_guidance
from ..guided import scale_option
from ..processes import processes
from .fitted import negative_argument, run_identity

HELD_OUT_EVERY = 5
MIN_PROMPTS = 2


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients, and how well they predict.

    Args:
        coefficients: To be used as ``LinearAG(coefficients=...)``.
        r2: Share of the square of each step's unconditional prediction explained on the
            trajectories fitted on, with shape (T,).
        r2_held_out: The same on trajectories left out.
        r2_difference: Share of the square of the difference of the two predictions explained on
            the trajectories left out; it tells more, since the two are close to each other.
        trajectories: Number of trajectories fitted on.
        held_out: Number of trajectories left out.
    """

    coefficients: Coefficients
    r2: tuple[float, ...]
    r2_held_out: tuple[float, ...]
    r2_difference: tuple[float, ...]
    trajectories: int
    held_out: int

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance with these coefficients, the tail estimated too."""
        return Guidance(CFG(), LinearAG(tail="linear", coefficients=self.coefficients))

    def save(self, path: Path | str, guidance: Guidance | None = None) -> None:
        """Write guidance with these coefficients as JSON (see `save_guidance`).

        Args:
            path: File to write.
            guidance: What to save; default: `guidance`.
        """
        measured = {
            name: [round(value, 6) for value in getattr(self, name)]
            for name in ("r2", "r2_held_out", "r2_difference")
        }
        measured |= {"trajectories": self.trajectories, "held_out": self.held_out}
        save_guidance(Path(path), guidance or self.guidance, measured)


def fit(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float | Sequence[float] = 7.5,
    num_inference_steps: int = 20,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    target: Target = "difference",
    space: Space = "native",
    intercept: bool = False,
    ridge: float = 1e-3,
    checkpoint: Path | str | None = None,
    progress: bool = True,
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
        num_inference_steps: Steps of the runs that are to be guided.
        negative_prompt: Prompt of the unconditional branch; None: as of a call without one.
        seed: Seed of the first trajectory; the others follow.
        batch_size: Trajectories at a time.
        target: What is regressed, see `fit_coefficients`. By default the difference, so that the
            ridge draws estimates towards it being 0 and not away from the conditional prediction.
        space: "native" (network outputs, the paper) or "x0".
        intercept: Fit a constant for every step, too.
        ridge: See `fit_coefficients`. Estimates are fed back, so that large coefficients of both
            signs, which explain single steps best, may be worse over a run.
        checkpoint: Folder for what is done; a fit interrupted and run again goes on from there.
            Removed by no one.
        progress: Show a bar.

    Raises:
        ValueError: too few prompts, a setting out of its range, or a checkpoint of another fit.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    scales = [float(w) for w in _listed(guidance_scale)]
    _check(prompts, scales, batch_size, ridge, target)
    identity = run_identity(pipe, num_inference_steps, (min(scales), max(scales)), negative_prompt)
    plan = {"prompts": list(prompts), "scales": scales, "seed": seed, "batch_size": batch_size}
    digest = hashlib.sha256(
        json.dumps([identity, plan, space], sort_keys=True).encode()
    ).hexdigest()
    store = None if checkpoint is None else _Store(Path(checkpoint), digest)
    state = processes()
    batches = _batches(len(prompts), scales, batch_size)
    mine = [n for n in range(len(batches)) if n % state.num_processes == state.process_index]
    done: dict[int, Gram] = {}
    bar = tqdm(
        mine, unit="batch", desc="trajectories", disable=not (progress and state.is_main_process)
    )
    for number in bar:
        gram = store.read(number) if store else None
        if gram is None:
            batch = batches[number]
            gram = _trajectories(
                pipe,
                [prompts[i] for i in batch.samples],
                [seed + i for i in batch.samples],
                batch.scale,
                num_inference_steps,
                negative_prompt,
                space,
            )
            if store:
                store.write(number, gram)
        done[number] = gram
    if state.num_processes > 1:
        done = dict(pair for part in gather_object([list(done.items())]) for pair in part)
    kept, left_out = (
        _total(done, [n for n, batch in enumerate(batches) if batch.held_out is held])
        for held in (False, True)
    )
    coefficients = fit_coefficients(
        kept, target=target, intercept=intercept, ridge=ridge, space=space, identity=identity
    )
    return Fit(
        coefficients,
        tuple(r_squared(kept, coefficients).tolist()),
        tuple(r_squared(left_out, coefficients).tolist()),
        tuple(r_squared(left_out, coefficients, "difference").tolist()),
        kept.trajectories,
        left_out.trajectories,
    )


def _check(
    prompts: Sequence[str], scales: list[float], batch_size: int, ridge: float, target: str
) -> None:
    if isinstance(prompts, str) or len(prompts) < MIN_PROMPTS:
        raise ValueError(f"a fit needs a list of at least {MIN_PROMPTS} prompts, got {prompts!r}")
    if not scales or not all(math.isfinite(w) and w > 1 for w in scales):
        raise ValueError(f"guidance scales must be finite and > 1, got {scales}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and >= 0, got {ridge}")
    if target not in get_args(Target):
        raise ValueError(f"target is {' or '.join(get_args(Target))}, got {target!r}")


@dataclass(frozen=True)
class _Batch:
    """Samples made together, with one scale, either all fitted on or all left out."""

    samples: list[int]
    scale: float
    held_out: bool


def _batches(count: int, scales: list[float], batch_size: int) -> list[_Batch]:
    """The samples in batches; every fifth, but at least one, is left out."""
    held = list(range(count))[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or [count - 1]
    kept = [i for i in range(count) if i not in set(held)]
    batches = []
    for samples in (kept, held):
        for position, scale in enumerate(scales):
            turn = samples[position :: len(scales)]
            parts = [turn[i : i + batch_size] for i in range(0, len(turn), batch_size)]
            batches += [_Batch(part, scale, samples is held) for part in parts]
    return batches


def _trajectories(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    scale: float,
    steps: int,
    negative_prompt: str | None,
    space: Space,
) -> Gram:
    """Inner products of one batch of trajectories."""
    grams: list[Gram] = []
    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompt=prompts,
        guidance=Gather(lambda cond, uncond: grams.append(Gram.of(cond, uncond)), space),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **negative_argument(pipe, negative_prompt, len(prompts)),
        **scale_option(pipe, scale),
    )
    (gram,) = grams
    return gram


def _total(grams: dict[int, Gram], numbers: list[int]) -> Gram:
    """The sum in a fixed order, so that it does not depend on who computed what."""
    total = Gram.empty(next(iter(grams.values())).steps)
    for number in numbers:
        total = total + grams[number]
    return total


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


class _Store:
    """Finished batches of one fit: a small safetensors file each."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, number: int) -> Gram | None:
        """A finished batch; None if it is not there.

        Raises:
            ValueError: the file is damaged, or belongs to another fit.
        """
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                products, sums = file.get_tensor("products"), file.get_tensor("sums")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and run again") from error
        if about.get("fit") != self.digest:
            raise ValueError(
                f"{self.folder} holds another fit (other model, prompts or settings): name another "
                "folder, or remove this one"
            )
        return Gram(products, sums, int(about["elements"]), int(about["trajectories"]))

    def write(self, number: int, gram: Gram) -> None:
        """Keep a finished batch, under a temporary name first."""
        path = self._path(number)
        partial = path.with_name(path.name + ".partial")
        about = {"fit": self.digest, "elements": gram.elements, "trajectories": gram.trajectories}
        tensors = {"products": gram.products, "sums": gram.sums}
        save_file(tensors, partial, {key: str(value) for key, value in about.items()})
        os.replace(partial, path)

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number:05d}.safetensors"
