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
        last: Axis of the latents of which only the last place is guided: what lies before it, the
            pictures that are edited, the pipeline puts back at every step.
        conflicts: Options of the call by which the pipeline goes on from its own combination; they
            are refused beforehand where guided predictions take its place.
        unlike: Options of the call under which some calls of the network are no branch of a step;
            they are refused beforehand where a step is skipped, too.
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
    last: int | None = None
    conflicts: tuple[str, ...] = ("guidance_rescale",)
    unlike: tuple[str, ...] = ()
    preconditioned: bool = False
    least_sigma: float = 0.0
    whole: bool = False
    others: str = ""

    def check_options(self, options: dict[str, Any], asked: str, combines: bool) -> None:
        """Raise OptionError if one of `conflicts` or `unlike` is set.

        Args:
            options: All arguments of the call, by name.
            asked: What the user wrote for `guidance`.
            combines: Whether that combines the branches; if not, it skips steps.
        """
        for option in (*self.conflicts, *self.unlike) if combines else self.unlike:
            value = options.get(option)
            plain = isinstance(value, (bool, int, float, str, list, tuple, dict))
            if value is not None and (not plain or value):
                raise OptionError(f"{option} cannot be combined with '{asked}': leave it out")
