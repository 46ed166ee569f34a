"""The settings that runs share which are compared or fitted on, and the calls they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..guided import scale_option
from .fitted import negative_argument, run_identity

HELD_OUT_EVERY = 5
MIN_PROMPTS = 2


@dataclass(frozen=True)
class RunSettings:
    """How the pictures of some prompts are made, whatever the guidance.

    Args:
        guidance_scale: w, finite and above 1.
        num_inference_steps: Sampling steps.
        negative_prompt: Prompt of the unconditional branch; None: as of a call without one.
        seed: Seed of the first prompt's noise; the others follow.
        batch_size: Prompts at a time.

    Raises:
        ValueError: a setting is out of its range.
    """

    guidance_scale: float = 7.5
    num_inference_steps: int = 20
    negative_prompt: str | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale > 1):
            raise ValueError(f"guidance_scale must be finite and > 1, got {self.guidance_scale}")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def call(self, pipe: Any, prompts: Sequence[str], samples: Sequence[int]) -> dict[str, Any]:
        """The arguments, but for the guidance, of the call that makes some of the prompts.

        Args:
            pipe: A guided pipeline.
            prompts: All prompts.
            samples: Which of them; the noise of each has a seed of its own, `seed` + its number.
        """
        return {
            "prompt": [prompts[i] for i in samples],
            "num_inference_steps": self.num_inference_steps,
            "generator": [torch.Generator().manual_seed(self.seed + i) for i in samples],
            **scale_option(pipe, self.guidance_scale),
            **negative_argument(pipe, self.negative_prompt, len(samples)),
        }

    def calls(self, pipe: Any, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """The arguments of every call, `batch_size` prompts each; see `call`."""
        numbers, size = range(len(prompts)), self.batch_size
        return [self.call(pipe, prompts, numbers[i : i + size]) for i in numbers[::size]]

    def identity(self, pipe: Any) -> dict[str, Any]:
        """What settings fitted on these runs belong to; see `run_identity`."""
        w = self.guidance_scale
        return run_identity(pipe, self.num_inference_steps, (w, w), self.negative_prompt)


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
