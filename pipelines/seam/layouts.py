"""What cannot be learned from a pipeline's first step, and what is known to be refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class LayoutError(RuntimeError):
    """A pipeline cannot be guided, or not in this way."""


class OptionError(ValueError):
    """An option of a call leaves a guided prediction no place."""


@dataclass(frozen=True)
class Layout:
    """What is known of a pipeline class beforehand; the defaults are those of most.

    Args:
        denoisers: Attributes of the pipeline that hold the networks of the loop; empty: those of
            `NETWORKS` that it has.
        inner: Attribute that holds the pipeline whose loop it is, of pipelines made of several.
        scale: Argument of the call for the guidance scale; empty: the first of `SCALE_ARGUMENTS`.
        scale_offset: What the pipeline's scale lacks to w (1 for ``c + s * (c - u)``).
        main: The conditional branch, counted over all calls of a step, where the weights of the
            branches do not tell.
        frames: Axis of the latents along which the guidance scale varies.
        doubled: The pipeline steps every latent twice, once for each branch.
        channels: Number of leading channels that it guides, of those that its scheduler steps.
        given: Axis of the latents along which places may be given, and are not guided: frames that
            a video begins with, or their tokens.
        conflicts: Options of the call by which the pipeline goes on from its own combination; they
            are refused beforehand where guided predictions take its place.
        preconditioned: What reaches the scheduler is a multiple of the network's output plus a
            multiple of its sample, both by the noise level.
        least_sigma: What the pipeline takes for noise levels below, where it makes a prediction of
            the scheduler's kind of its network's.
        whole: The network needs the rows of all samples (a cache holds them, or they are one
            sequence): a branch is evaluated for all of them or for none.
        others: The network predicts something else beside, which the pipeline guides on its own:
            no step can be skipped and no prediction estimated.
    """

    denoisers: tuple[str, ...] = ()
    inner: str = ""
    scale: str = ""
    scale_offset: float = 0.0
    main: int | None = None
    frames: int | None = None
    doubled: bool = False
    channels: int | None = None
    given: int | None = None
    conflicts: tuple[str, ...] = ("guidance_rescale",)
    preconditioned: bool = False
    least_sigma: float = 0.0
    whole: bool = False
    others: str = ""

    def check_options(self, options: dict[str, Any], asked: str) -> None:
        """Raise OptionError if one of `conflicts` is set where `asked` combines the branches."""
        for option in self.conflicts:
            if options.get(option):
                raise OptionError(f"{option} cannot be combined with '{asked}': leave it out")
