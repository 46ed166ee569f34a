"""Where a pipeline keeps its branches: one layout per way of calling the denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...guidance import Guidance


class LayoutError(RuntimeError):
    """A pipeline cannot be guided, or calls its denoiser otherwise than its layout says."""


@dataclass(frozen=True)
class Layout:
    """What the layouts have in common.

    Args:
        denoisers: Attributes of the pipeline that hold the networks of the loop.
        listed: Samples come as items of lists, not as rows of tensors.
        sign: -1 if the pipeline negates what the network returns.
        channels: Number of leading channels that the pipeline guides; None: all that it denoises.
        scale_offset: What the pipeline's scale lacks to w (1 for ``c + s * (c - u)``).
        conflicts: Options of the call by which the pipeline goes on from its own combination; they
            are refused where guided predictions take its place.
        matches_norm: The pipeline gives every token (last dimension) of its combination the norm
            of the conditional prediction. With both branches equal that would be lost, so it is
            done here (in layouts of two calls).
        norm_option: Option of the call that switches this on; empty: always on.
    """

    denoisers: tuple[str, ...] = ("unet", "transformer")
    listed: bool = False
    sign: int = 1
    channels: int | None = None
    scale_offset: float = 0.0
    conflicts: tuple[str, ...] = ("guidance_rescale",)
    matches_norm: bool = False
    norm_option: str = ""

    def norm_matched(self, options: dict[str, Any]) -> bool:
        """Whether a call gives its guided prediction the norm of the conditional one."""
        return self.matches_norm and (not self.norm_option or bool(options[self.norm_option]))

    def check_options(self, options: dict[str, Any], guidance: Guidance) -> None:
        """Raise ValueError if one of `conflicts` is set where `guidance` combines the branches."""
        for option in self.conflicts:
            if options.get(option):
                raise ValueError(f"{option} cannot be combined with '{guidance}': leave it out")


@dataclass(frozen=True)
class Batched(Layout):
    """Both branches in one batch.

    Args:
        cond_first: [cond, uncond] rather than [uncond, cond].
    """

    cond_first: bool = False


@dataclass(frozen=True)
class TwoCalls(Layout):
    """The conditional branch in one call, the unconditional in the next, on the same input.

    The conditional prediction is handed out before the guided one is known. Where that differs, it
    is written into the tensor the pipeline holds, so that both branches equal the guided one.
    """
