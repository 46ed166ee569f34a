"""The same few pictures under one guidance after another, judged against plain guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...guidance import CFG, Guidance, Rule
from ...pipelines.fitting.runs import Runs
from ...pipelines.guided import GuidanceLike
from ..metrics.images import ssim, to_tensor

Quality = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Trials(Runs):
    """Runs of one pipeline that are judged against plain guidance.

    Args:
        pipe, prompts, guidance_scale, num_inference_steps, negative_prompt, seed, batch_size: See
            `Runs`.
        rule: How predictions combine, in the reference as well; None: classifier-free guidance.
        quality: Pictures and reference pictures, both (N, 3, H, W) in [0, 1] -> (N,), higher is
            better and at most 1; default: `ssim`.

    Raises:
        ValueError: no prompts, or a setting out of its range.
        TypeError: an unknown setting.
    """

    rule: Rule | None = None
    quality: Quality = ssim
    reference: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def branches(self) -> int:
        """How many branches a step evaluates."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def plain(self) -> Guidance:
        """What they are judged against: the rule at every step."""
        return Guidance(self.rule or CFG())

    def evaluations(self) -> int:
        """Network evaluations of one branch in a run (second-order schedulers make two a step).

        Raises:
            ValueError: it is a single one, of which nothing can be left out.
        """
        self.pipe(guidance="cfg", output_type="latent", **self.call([0]))
        total = len(self.pipe.guidance_trace.steps)
        if total < 2:
            raise ValueError(
                f"a search needs runs of at least 2 evaluations of each branch, {total} is what "
                f"num_inference_steps={self.num_inference_steps} makes"
            )
        return total

    def run(self, guidance: GuidanceLike) -> tuple[Tensor, list[int]]:
        """Pictures (N, 3, H, W) in [0, 1] and the network evaluations of each."""
        images: list[Any] = []
        nfe: list[int] = []
        for call in self.calls():
            images += self.pipe(guidance=guidance, **call).images
            nfe += self.pipe.guidance_trace.nfe
        return to_tensor(images), nfe

    def judge(self, guidance: GuidanceLike) -> tuple[float, float]:
        """(quality against plain guidance, network evaluations), means over the pictures."""
        if self.reference is None:
            self.reference, _ = self.run(self.plain)
        images, nfe = self.run(guidance)
        return self.quality(images, self.reference).mean().item(), sum(nfe) / len(nfe)
