"""Fitting LinearAG's coefficients on trajectories of ordinary guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...guidance import (
    CFG,
    Coefficients,
    Gram,
    Guidance,
    Space,
    fit_coefficients,
    linear_ag,
    r_squared,
    save_guidance,
)
from ...guidance.files import atomic, fingerprint
from ...guidance.fitting.record import Record
from ...guidance.fitting.regression import Target
from ..processes import processes
from .fitted import run_identity
from .runs import RunSettings, check_fit, held_out


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients, and how well they predict.

    Args:
        coefficients: To be used as ``linear_ag(coefficients)``.
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
        """Classifier-free guidance with these coefficients, estimated in the second half, too."""
        return Guidance(CFG(), linear_ag(self.coefficients, then="estimate"))

    def save(self, path: Path | str, guidance: Guidance | None = None) -> None:
        """Write guidance with these coefficients as JSON (see `save_guidance`).

        Args:
            path: File to write.
            guidance: What to save; default: `guidance`.
        """
        measured: dict[str, Any] = {
            name: [round(value, 6) for value in getattr(self, name)]
            for name in ("r2", "r2_held_out", "r2_difference")
        }
        measured |= {"trajectories": self.trajectories, "held_out": self.held_out}
        save_guidance(path, guidance or self.guidance, measured)


def fit(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float | Sequence[float] = 7.5,
    target: Target = "difference",
    space: Space = "native",
    ridge: float = 1e-3,
    checkpoint: Path | str | None = None,
    progress: bool = True,
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
        space: "native" (network outputs, the paper) or "x0".
        ridge: See `fit_coefficients`. Estimates are fed back, so that large coefficients of both
            signs, which explain single steps best, may be worse over a run.
        checkpoint: Folder for what is done; a fit interrupted and run again goes on from there.
            Removed by no one.
        progress: Show a bar.
        settings: The others of `RunSettings`.

    Raises:
        ValueError: too few prompts, a setting out of its range, or a checkpoint of another fit.
        TypeError: an unknown setting.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    check_fit(prompts, ridge)
    if target not in get_args(Target):
        raise ValueError(f"target is {' or '.join(get_args(Target))}, got {target!r}")
    listed = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale]
    runs = [RunSettings(float(w), **settings) for w in listed]
    if not runs:
        raise ValueError("a fit needs a guidance scale, got none")
    scales, first = [run.guidance_scale for run in runs], runs[0]
    identity = run_identity(
        pipe, first.num_inference_steps, (min(scales), max(scales)), first.negative_prompt
    )
    plan = {"prompts": list(prompts), "scales": scales}
    plan |= {name: asdict(first)[name] for name in ("seed", "batch_size")}
    # Files of version 0.1 belong to the identity with that version in it: they still go on.
    digest = fingerprint([identity | {"pilotage": "0.1"}, plan, space])
    store = None if checkpoint is None else _Store(Path(checkpoint), digest)
    state = processes()
    batches = _batches(len(prompts), runs)
    done: dict[int, Gram] = {}
    pipe.set_progress_bar_config(disable=True)
    bar = tqdm(
        range(state.process_index, len(batches), state.num_processes),
        unit="batch",
        desc="trajectories",
        disable=not (progress and state.is_main_process),
    )
    for number in bar:
        gram = store.read(number) if store else None
        if gram is None:
            gram = _inner_products(pipe, prompts, batches[number], space)
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
        kept, target=target, ridge=ridge, space=space, identity=identity
    )
    return Fit(
        coefficients,
        tuple(r_squared(kept, coefficients).tolist()),
        tuple(r_squared(left_out, coefficients).tolist()),
        tuple(r_squared(left_out, coefficients, "difference").tolist()),
        kept.trajectories,
        left_out.trajectories,
    )


@dataclass(frozen=True)
class _Batch:
    """Samples made together, with one scale, either all fitted on or all left out."""

    samples: list[int]
    run: RunSettings
    held_out: bool


def _batches(count: int, runs: Sequence[RunSettings]) -> list[_Batch]:
    """The samples in batches; the scales take turns."""
    kept, left_out = held_out(count)
    batches = []
    for samples in (kept, left_out):
        for position, run in enumerate(runs):
            turn, size = samples[position :: len(runs)], run.batch_size
            parts = [turn[i : i + size] for i in range(0, len(turn), size)]
            batches += [_Batch(part, run, samples is left_out) for part in parts]
    return batches


def _inner_products(pipe: Any, prompts: Sequence[str], batch: _Batch, space: Space) -> Gram:
    """Inner products of one batch of trajectories."""
    grams: list[Gram] = []
    record = Record(lambda cond, uncond: grams.append(Gram.of(cond, uncond)), space)
    call = batch.run.call(pipe, prompts, batch.samples)
    pipe(guidance=record, output_type="latent", **call)
    (gram,) = grams
    return gram


def _total(grams: dict[int, Gram], numbers: list[int]) -> Gram:
    """The sum in a fixed order, so that it does not depend on who computed what."""
    return sum((grams[n] for n in numbers), Gram.empty(next(iter(grams.values())).steps))


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
                about, products = file.metadata() or {}, file.get_tensor("products")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and run again") from error
        if about.get("fit") != self.digest:
            raise ValueError(
                f"{self.folder} holds another fit (other model, prompts or settings): name another "
                "folder, or remove this one"
            )
        return Gram(products, int(about["trajectories"]))

    def write(self, number: int, gram: Gram) -> None:
        """Keep a finished batch."""
        about = {"fit": self.digest, "trajectories": str(gram.trajectories)}
        with atomic(self._path(number)) as partial:
            save_file({"products": gram.products}, partial, about)

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number:05d}.safetensors"
