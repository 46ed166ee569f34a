"""Runs that are compared or fitted on: their settings, the calls they make, and what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from ...guidance.files import write_json
from ..guided import scale_option
from ..processes import processes
from .fitted import negative_argument, run_identity

HELD_OUT_EVERY = 5
MIN_PROMPTS = 2

Found = TypeVar("Found")


@dataclass(eq=False)
class Runs:
    """Runs of one pipeline on fixed prompts and noise, whatever the guidance.

    Args:
        pipe: A guided pipeline; its progress bar is switched off.
        prompts: Prompts, one picture each.
        guidance_scale: w, finite and at least 1. At 1 the pipelines evaluate one branch, of which
            only skipped steps can be found and fitted.
        num_inference_steps: Sampling steps.
        negative_prompt: Prompt of the unconditional branch; None: as of a call without one.
        seed: Seed of the first prompt's noise; the others follow.
        batch_size: Prompts at a time.
        progress: Show bars, in the first process.

    Raises:
        ValueError: no prompts, or a setting out of its range.
        TypeError: an unknown setting.
    """

    pipe: Any = field(repr=False)
    prompts: Sequence[str]
    guidance_scale: float = 7.5
    num_inference_steps: int = 20
    negative_prompt: str | None = None
    seed: int = 0
    batch_size: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"expected a list of prompts, got {self.prompts!r}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise ValueError(f"guidance_scale must be finite and >= 1, got {self.guidance_scale}")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.prompts = list(self.prompts)
        self.pipe.set_progress_bar_config(disable=True)

    def check_guided(self) -> None:
        """Refuse w = 1, for what needs two branches.

        Raises:
            ValueError: so it is.
        """
        if self.guidance_scale == 1:
            raise ValueError("this needs a guidance_scale > 1: at 1 there is no guidance")

    def call(self, samples: Sequence[int]) -> dict[str, Any]:
        """The arguments, but for the guidance, of the call that makes some of the prompts.

        The noise of each has a seed of its own, `seed` + its number.
        """
        return {
            "prompt": [self.prompts[i] for i in samples],
            "num_inference_steps": self.num_inference_steps,
            "generator": [torch.Generator().manual_seed(self.seed + i) for i in samples],
            **scale_option(self.pipe, self.guidance_scale),
            **negative_argument(self.pipe, self.negative_prompt, len(samples)),
        }

    def calls(self, samples: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The arguments of calls of `batch_size` prompts, for some samples or all; see `call`."""
        numbers = range(len(self.prompts)) if samples is None else samples
        size = self.batch_size
        return [self.call(numbers[i : i + size]) for i in range(0, len(numbers), size)]

    def bar(self, doing: str, unit: str, total: int | None = None) -> tqdm[NoReturn]:
        """A progress bar, to be updated by hand."""
        hidden = not (self.progress and processes().is_main_process)
        return tqdm(desc=doing, unit=unit, total=total, disable=hidden)

    def identity(self) -> dict[str, Any]:
        """What settings fitted on these runs belong to; see `run_identity`."""
        w = self.guidance_scale
        return run_identity(self.pipe, self.num_inference_steps, (w, w), self.negative_prompt)


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the samples to fit on, and of those left out: every fifth, but at least one."""
    left_out = list(range(count))[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or [count - 1]
    return [i for i in range(count) if i not in set(left_out)], left_out


def check_fit(prompts: Sequence[str], ridge: float) -> None:
    """Refuse what nothing can be fitted on.

    Raises:
        ValueError: fewer than two prompts, or a ridge that is not finite and at least 0.
    """
    if isinstance(prompts, str) or len(prompts) < MIN_PROMPTS:
        raise ValueError(f"a fit needs a list of at least {MIN_PROMPTS} prompts, got {prompts!r}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and >= 0, got {ridge}")


def read_tried(path: Path, plan: Mapping[str, Any], of: Callable[[Any], Found]) -> list[Found]:
    """Finished work that `write_tried` kept; nothing if there is no such file.

    Args:
        path: The file.
        plan: What the work is, ready for JSON; its "identity" is that of `run_identity`.
        of: Makes a result of what JSON keeps of it.

    Raises:
        ValueError: the file is damaged, or belongs to other work; the message says what differs.
    """
    if not path.is_file():
        return []
    damaged = ValueError(f"{path} is damaged: remove it and run again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        old, tried = content["plan"], content["tried"]
        # Version 0.1 kept its number, and had another word.
        old["identity"].pop("pilotage", None)
        old.setdefault("fill", old.get("stand_in"))
        old.setdefault("finer", 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    for name, value in json.loads(json.dumps(plan)).items():
        if old.get(name) != value:
            raise ValueError(
                f"{path} is of other work: its {name} differs; name another place, or remove it"
            )
    try:
        return [of(entry) for entry in tried]
    except (ValueError, TypeError) as error:
        raise damaged from error


def write_tried(path: Path, plan: Mapping[str, Any], tried: Sequence[Any]) -> None:
    """Keep finished work, whole or not at all, for `read_tried`."""
    write_json(path, {"plan": plan, "tried": tried})
