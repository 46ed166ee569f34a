"""The same few pictures under one guidance after another, judged against plain guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...guidance import Policy, Rule
from ...pipelines.fitting.runs import RunSettings
from ...pipelines.guided import GuidanceLike
from ..metrics.images import ssim, to_tensor

Quality = Callable[[Tensor, Tensor], Tensor]


class Trials:
    """Runs of one pipeline on fixed prompts and noise.

    Args:
        pipe: A guided pipeline.
        prompts: Prompts, one picture each.
        rule: How predictions combine, in the reference as well; None: classifier-free guidance.
        quality: Pictures and reference pictures, both (N, 3, H, W) in [0, 1] -> (N,), higher is
            better and at most 1; default: `ssim`.
        settings: As of `RunSettings`.

    Raises:
        ValueError: no prompts, or a setting out of its range.
        TypeError: an unknown setting.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        rule: Rule | None = None,
        quality: Quality = ssim,
        **settings: Any,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"expected a list of prompts, got {prompts!r}")
        self.pipe, self.prompts, self.rule = pipe, list(prompts), rule
        self.settings, self.quality = RunSettings(**settings), quality
        self.reference: Tensor | None = None
        pipe.set_progress_bar_config(disable=True)

    def compose(self, policy: Policy) -> GuidanceLike:
        """The rule of these trials with a policy."""
        return policy if self.rule is None else self.rule | policy

    @property
    def plain(self) -> GuidanceLike:
        """What they are judged against: the rule at every step."""
        return "cfg" if self.rule is None else self.rule

    def calls(self) -> list[dict[str, Any]]:
        """The arguments of every call but its guidance."""
        return self.settings.calls(self.pipe, self.prompts)

    def identity(self) -> dict[str, Any]:
        """What settings found in these trials belong to."""
        return self.settings.identity(self.pipe)

    def evaluations(self) -> int:
        """Network evaluations of one branch in a run (second-order schedulers make two a step).

        Raises:
            ValueError: it is a single one, of which nothing can be left out.
        """
        call = self.settings.call(self.pipe, self.prompts, [0])
        self.pipe(guidance="cfg", output_type="latent", **call)
        total = len(self.pipe.guidance_trace.steps)
        if total < 2:
            raise ValueError(
                f"a search needs runs of at least 2 evaluations of each branch, {total} is what "
                f"num_inference_steps={self.settings.num_inference_steps} makes"
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
