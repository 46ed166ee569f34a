"""Where a pipeline keeps its branches: one layout per way of calling the denoiser.

A layout is asked to `run` every call of the denoiser. It evaluates the rows that the policy wants
and returns outputs for which the pipeline's own guidance line, whichever affine form it has, yields
the guided prediction: where both branches are given equal predictions, so is their combination.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...guidance import Guidance, NoiseLevel
from .calls import Call, prediction_of, with_prediction

if TYPE_CHECKING:
    from .seam import Seam


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
    """

    joins_branches: ClassVar[bool] = False  # in one call of the denoiser

    denoisers: tuple[str, ...] = ("unet", "transformer")
    listed: bool = False
    sign: int = 1
    channels: int | None = None
    scale_offset: float = 0.0
    conflicts: tuple[str, ...] = ("guidance_rescale",)

    def run(self, seam: Seam, call: Call) -> Any:
        """Stand in for one call of the denoiser."""
        raise NotImplementedError

    def norm_matched(self, options: dict[str, Any]) -> bool:
        """Whether a call gives its guided prediction the norm of the conditional one."""
        return False

    def check_options(self, options: dict[str, Any], guidance: Guidance) -> None:
        """Raise if the pipeline goes on from a combination that `guidance` takes the place of.

        Raises:
            ValueError: an option among `conflicts` is set.
        """
        for option in self.conflicts:
            if options.get(option):
                raise ValueError(f"{option} cannot be combined with '{guidance}': leave it out")

    def finish(self, seam: Seam) -> None:
        """The pipeline has made its last call."""


@dataclass(frozen=True)
class Batched(Layout):
    """Both branches in one batch.

    Args:
        cond_first: [cond, uncond] rather than [uncond, cond].
    """

    joins_branches: ClassVar[bool] = True

    cond_first: bool = False

    def run(self, seam: Seam, call: Call) -> Any:
        """Evaluate both branches of the wanted samples, else the conditional one alone."""
        if seam.run is None:
            seam.start(self._batch_of(call) if seam.guided else call.rows, call)
        batch = seam.run.batch
        if call.rows == batch:  # the pipeline itself has switched guidance off
            output = call()
            seam.run.begin_step()
            seam.leave(prediction_of(output, self.listed), call.sample, seam.noise_level(call))
            return output
        level = seam.noise_level(call)
        rows = seam.plan(level)
        cond_start, uncond_start = (0, batch) if self.cond_first else (batch, 0)
        x_t = call.sample[cond_start : cond_start + batch]
        if seam.run.all_rest:
            guided = seam.forecast(x_t, level)
            return with_prediction(seam.seen, torch.cat([guided, guided]), self.listed)
        every = len(rows) == batch
        cond_rows = [cond_start + row for row in range(batch) if row not in seam.run.resting]
        uncond_rows = [uncond_start + row for row in rows]
        order = [*cond_rows, *uncond_rows] if self.cond_first else [*uncond_rows, *cond_rows]
        output = call(None if every else order)
        seam.see(output)
        prediction = prediction_of(output, self.listed)
        if self.cond_first:
            cond, uncond = prediction[: len(cond_rows)], prediction[len(cond_rows) :]
        else:
            uncond, cond = prediction[: len(rows)], prediction[len(rows) :]
        cond = seam.filled(cond, x_t, level)
        pair = seam.combine(rows, cond, uncond if rows else None, x_t, level)
        if every and pair[0] is cond and pair[1] is uncond:
            return output
        halves = pair if self.cond_first else pair[::-1]
        return with_prediction(output, torch.cat(halves), self.listed)

    def _batch_of(self, call: Call) -> int:
        """Number of samples in a call that holds every latent twice."""
        sample = call.sample
        first, second = sample.chunk(2) if len(sample) % 2 == 0 else (sample, None)
        if second is None or not torch.equal(first, second):
            raise LayoutError(
                "expected every latent twice in one batch (unconditional and conditional), got an "
                f"input of shape {tuple(sample.shape)} that is not so: this pipeline, or an option "
                "of this call, arranges its branches in a way that is not known"
            )
        return len(sample) // 2


@dataclass
class Pending:
    """A conditional prediction that waits for the unconditional call of the same step."""

    sample: Tensor
    level: NoiseLevel | None
    rows: list[int]
    cond: Tensor
    returned: weakref.ref | None  # None: all samples rest, `cond` is the guided prediction


@dataclass(frozen=True)
class TwoCalls(Layout):
    """The conditional branch in one call, the unconditional in the next, on the same input.

    The conditional prediction is handed out before the guided one is known. Where that differs, it
    is written into the tensor the pipeline holds, so that both branches equal the guided one.

    Args:
        matches_norm: The pipeline gives every token (last dimension) of its combination the norm
            of the conditional prediction. With both branches equal that would be lost, so it is
            done here.
        norm_option: Option of the call that switches this on; empty: always on.
    """

    matches_norm: bool = False
    norm_option: str = ""

    def norm_matched(self, options: dict[str, Any]) -> bool:
        """See `Layout`."""
        return self.matches_norm and (not self.norm_option or bool(options[self.norm_option]))

    def run(self, seam: Seam, call: Call) -> Any:
        """Evaluate the conditional call; of the unconditional one only the wanted samples."""
        if seam.run is None:
            seam.start(call.rows, call)
        pending = seam.pending
        if pending is not None and _same(call.sample, pending.sample):
            seam.pending = None
            return self._unconditional(seam, call, pending)
        self.finish(seam)
        level = seam.noise_level(call)
        rows = seam.plan(level)
        if seam.run.all_rest:
            guided = seam.forecast(call.sample, level)
            seam.pending = Pending(call.sample, level, rows, guided, None)
            return with_prediction(seam.seen, guided)
        resting = seam.run.resting
        output = call([i for i in range(call.rows) if i not in resting] if resting else None)
        if not isinstance(output, tuple):
            raise LayoutError(f"expected a tuple from the denoiser, got {type(output).__name__}")
        seam.see(output)
        if resting:
            guided = seam.filled(prediction_of(output), call.sample, level)
            output = with_prediction(output, guided)
        returned = prediction_of(output)
        # A copy: the pipeline, or a cache in the network, may go on using the tensor itself.
        seam.pending = Pending(call.sample, level, rows, returned.clone(), weakref.ref(returned))
        return output

    def _unconditional(self, seam: Seam, call: Call, pending: Pending) -> Any:
        if pending.returned is None:
            return with_prediction(seam.seen, pending.cond)
        returned, rows, cond = pending.returned(), pending.rows, pending.cond
        uncond = None
        if rows:
            uncond = prediction_of(call(None if len(rows) == seam.run.batch else rows))
        pair = seam.combine(rows, cond, uncond, pending.sample, pending.level)
        if pair[0] is not cond:
            if returned is None:
                raise LayoutError(
                    "the pipeline no longer holds the conditional prediction it was given, so the "
                    "guided one cannot be put in its place"
                )
            guided = pair[0]
            if self.norm_matched(seam.options):
                lengths = [torch.norm(pred, dim=-1, keepdim=True) for pred in (cond, guided)]
                guided = guided * (lengths[0] / lengths[1])
            returned.copy_(guided)
            return (guided,)
        return (pair[1],)

    def finish(self, seam: Seam) -> None:
        """Close a step whose unconditional call never came: it was not guided."""
        if seam.pending is not None:
            pending, seam.pending = seam.pending, None
            if pending.returned is not None:
                seam.leave(pending.cond, pending.sample, pending.level)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs belong to one step: one tensor as a rule, else equal ones."""
    if a.shape != b.shape:
        return False
    # Both are alive, so equal addresses mean one tensor; values are compared only where not.
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
