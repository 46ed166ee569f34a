"""What a sampler is going to ask of the network, found by letting it run on a single pixel.

ComfyUI's samplers evaluate the network once, twice or three times a step, at noise levels of their
own, and none says so beforehand. Which evaluations they make depends on the noise schedule alone
(but for those that choose their steps by their errors), so a rehearsal tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POST = "sampler_post_cfg_function"


@dataclass(frozen=True)
class Rehearsal:
    """What a sampler did in a rehearsal.

    Args:
        sigmas: ComfyUI's noise level of every evaluation, in order.
        last: That at which the sampler ends.
        total: How many evaluations there are; where that is not known, the most there may be of a
            sampler that keeps to the schedule.
        unknown: Why the evaluations of the real run are not known by this; "": they are.
        is_euler: Whether every step was an Euler step from one evaluation to the next, without
            added noise.
        reads_uncond: Whether the sampler looks at the unconditional prediction itself.
    """

    sigmas: tuple[float, ...]
    last: float
    total: int
    unknown: str = ""
    is_euler: bool = False
    reads_uncond: bool = False


class _Longer(Exception):
    """The sampler makes more evaluations than any that keeps to the schedule."""


class _Answers:
    """Stands where a sampler expects ComfyUI's guider; its pictures depend on nothing."""

    def __init__(self, guider: Any, known: int, limit: int) -> None:
        self.guider, self.known, self.limit = guider, known, limit
        self.sigmas: list[float] = []
        self.inputs: list[float] = []
        self.reads_uncond = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guider, name)

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """A picture of one value, another one at every evaluation."""
        if len(self.sigmas) >= self.limit:
            raise _Longer
        self.sigmas.append(float(timestep.flatten()[0]))
        self.inputs.append(float(x.flatten()[0]))
        denoised = torch.full_like(x, self.answer(len(self.sigmas) - 1))
        for listener in (model_options or {}).get(POST, [])[self.known :]:
            self.reads_uncond = True
            names = ("denoised", "cond_denoised", "uncond_denoised")
            args: dict[str, Any] = {"input": x, "sigma": timestep, "model_options": model_options}
            denoised = listener(args | dict.fromkeys(names, denoised))
        return denoised

    @staticmethod
    def answer(index: int) -> float:
        return math.sin(3 * index + 1)

    def is_euler(self, last: float, result: Tensor) -> bool:
        """Whether every input was an Euler step from the one before."""
        sigmas = [*self.sigmas, last]
        inputs = [*self.inputs, float(result.flatten()[0]) if last == 0 else None]
        for i, x in enumerate(self.inputs):
            if sigmas[i] == 0 or (after := inputs[i + 1]) is None:
                continue
            denoised = self.answer(i)
            expected = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]
            if abs(after - expected) > 1e-4 * (abs(x) + abs(denoised)):
                return False
        return True


def rehearse(
    sampler: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: Mapping[str, Any],
    noise: Tensor,
    latent_image: Tensor | None,
) -> Rehearsal:
    """Let a sampler run on one pixel of one sample.

    Args:
        sampler: ComfyUI's sampler object.
        guider: What it calls for denoised images; here only its attributes are read.
        sigmas: The noise schedule.
        extra_args: What the sampler gives the guider besides.
        noise, latent_image: Of the real run, with shape (B, C, \\*).

    The state of torch's random numbers is left as it was.
    """
    options = dict(extra_args.get("model_options") or {})
    answers = _Answers(guider, len(options.get(POST, [])), limit=8 * len(sigmas) + 16)
    last, unknown, result = float(sigmas[-1]), "", None
    devices = [noise.device] if noise.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            pixel, image = _pixel(noise), None if latent_image is None else _pixel(latent_image)
            own = {**extra_args, "model_options": options}
            result = sampler.sample(answers, sigmas.clone(), own, None, pixel, image, None, True)
        except _Longer:
            unknown = "it chooses its steps as it goes"
        except Exception as error:  # a sampler of somebody else's may want more than one pixel
            unknown = f"it does not run on a single pixel ({error})"
    is_euler = result is not None and answers.is_euler(last, result)
    total = answers.limit if unknown else len(answers.sigmas)
    return Rehearsal(tuple(answers.sigmas), last, total, unknown, is_euler, answers.reads_uncond)


def _pixel(latents: Tensor) -> Tensor:
    """The first pixel of the first sample, of size 1 along every axis but that of channels."""
    return latents[(slice(1), slice(None), *[slice(1)] * (latents.ndim - 2))].clone()
