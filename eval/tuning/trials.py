"""The same few pictures under one guidance after another, judged against plain guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...guidance import Policy, Rule
from ...pipelines.fitting.fitted import negative_argument
from ...pipelines.guided import GuidanceLike, scale_option
from ..metrics.images import ssim, to_tensor

Quality = Callable[[Tensor, Tensor], Tensor]


class Trials:
    """Runs of one pipeline on fixed prompts and noise.

    Args:
        pipe: A guided pipeline.
        prompts: Prompts, one picture each.
        guidance_scale: w.
        num_inference_steps: Sampling steps.
        negative_prompt: Prompt of the unconditional branch; None: as of a call without one.
        seed: Seed of the first picture; the others follow.
        batch_size: Pictures at a time.
        rule: How predictions combine, in the reference as well; None: classifier-free guidance.
        quality: Pictures and reference pictures, both (N, 3, H, W) in [0, 1] -> (N,), higher is
            better and at most 1; default: `ssim`.

    Raises:
        ValueError: no prompts, or a setting out of its range.
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
        batch_size: int = 8,
        rule: Rule | None = None,
        quality: Quality = ssim,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"expected a list of prompts, got {prompts!r}")
        if not (math.isfinite(guidance_scale) and guidance_scale > 1):
            raise ValueError(f"guidance_scale must be finite and > 1, got {guidance_scale}")
        if num_inference_steps < 1 or batch_size < 1:
            raise ValueError("num_inference_steps and batch_size must be at least 1")
        self.pipe, self.prompts, self.rule = pipe, list(prompts), rule
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        self.negative_prompt, self.seed, self.batch_size = negative_prompt, seed, batch_size
        self.quality = quality
        self.reference: Tensor | None = None
        pipe.set_progress_bar_config(disable=True)

    def compose(self, policy: Policy) -> GuidanceLike:
        """The rule of these trials with a policy."""
        return policy if self.rule is None else self.rule | policy

    @property
    def plain(self) -> GuidanceLike:
        """What they are judged against: the rule at every step."""
        return "cfg" if self.rule is None else self.rule

    def batches(self) -> list[dict[str, Any]]:
        """The arguments of every call but its guidance."""
        calls = []
        for start in range(0, len(self.prompts), self.batch_size):
            part = self.prompts[start : start + self.batch_size]
            seeds = range(self.seed + start, self.seed + start + len(part))
            calls.append(
                {
                    "prompt": part,
                    "num_inference_steps": self.num_inference_steps,
                    "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
                }
                | scale_option(self.pipe, self.guidance_scale)
                | negative_argument(self.pipe, self.negative_prompt, len(part))
            )
        return calls

    def run(self, guidance: GuidanceLike) -> tuple[Tensor, list[int]]:
        """Pictures (N, 3, H, W) in [0, 1] and the network evaluations of each."""
        images, nfe = [], []
        for call in self.batches():
            images += self.pipe(guidance=guidance, **call).images
            nfe += self.pipe.guidance_trace.nfe
        return to_tensor(images), nfe

    def judge(self, guidance: GuidanceLike) -> tuple[float, float]:
        """(quality against plain guidance, network evaluations), means over the pictures."""
        if self.reference is None:
            self.reference, _ = self.run(self.plain)
        images, nfe = self.run(guidance)
        return self.quality(images, self.reference).mean().item(), sum(nfe) / len(nfe)
