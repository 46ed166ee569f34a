"""Drivers: what stands in front of a pipeline's denoiser for the length of one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...guidance import Always, Guidance, NoiseLevel, Run
from ...guidance.device import row_index
from .calls import Call, prediction_of, with_prediction
from .layouts import Batched, Layout, LayoutError
from .noise_levels import check_falling_noise, next_noise_level, noise_level


class Driver:
    """One call of one pipeline under one guidance; it owns the run, made at the first call.

    Subclasses say how the pipeline calls its denoiser. They evaluate the rows that the policy wants
    and return outputs for which the pipeline's own guidance line, whichever affine form it has,
    yields the guided prediction: where both branches are given equal predictions, so is their
    combination.

    Args:
        pipe, guidance, layout: The pipeline, the rule and policy, where the branches are.
        scales: Denoiser -> the pipeline's own guidance scale as given to the call. A pipeline that
            exposes its current scale (and may change it on the way) is asked at every step.
        options: All arguments of the call, by name.
        detailed: Record cosines and norms at every step.
    """

    def __init__(
        self,
        pipe: Any,
        guidance: Guidance,
        layout: Layout,
        scales: dict[str, float],
        options: dict[str, Any],
        detailed: bool = False,
    ) -> None:
        self.pipe, self.guidance, self.layout = pipe, guidance, layout
        self.scales, self.options, self.detailed = scales, options, detailed
        self.denoiser = layout.denoisers[0]
        self.begun = False
        self.example: Any = None  # one row of an output of the network, for skipped steps
        self.channels: int | None = None  # how many are guided
        self.rest: Tensor | None = None  # the others of the last output; likewise

    def __call__(self, name: str, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the place of ``network(*args, **kwargs)``, the pipeline's denoiser `name`."""
        if kwargs.get("skip_layers") is not None:  # skip-layer guidance: not a branch of ours
            return network(*args, **kwargs)
        self.denoiser = name
        return self.evaluate(Call(network, args, kwargs, self.layout.listed))

    def evaluate(self, call: Call) -> Any:
        """Take the place of one call of the denoiser."""
        raise NotImplementedError

    def close_step(self) -> None:
        """The pipeline has made its last call."""

    def start(self, batch: int, call: Call) -> None:
        """Begin the run at the first call."""
        if not (self.guided or self.guidance.is_plain):
            raise LayoutError(
                f"{type(self.pipe).__name__} evaluates one branch, so that '{self.guidance}' has "
                "nothing to act on: its guidance is off at this scale, or built into the network "
                "(a distilled model)"
            )
        total = getattr(self.pipe, "num_timesteps", None)
        total = total or run_length(self.pipe.scheduler, call.timestep, self.options)
        on_cpu = call.sample.device.type == "cpu"
        policy = self.guidance.policy
        if self.guidance.rule.needs_next_level:
            check_falling_noise(self.pipe.scheduler)
        if self.guidance.changes_combination(total):
            self.layout.check_options(self.options, self.guidance)
        drops_rows = isinstance(self.layout, Batched) or (batch > 1 and policy.needs_gamma)
        if (
            getattr(call.network, "is_cache_enabled", False)
            and drops_rows
            and not isinstance(policy, Always)
        ):
            raise LayoutError(
                f"a cache is enabled in the denoiser of {type(self.pipe).__name__}, which needs "
                f"every row at every step: disable it, or leave out '{policy}'"
            )
        if any(d.skips for d in policy.decisions(total) or ()):
            self.check_skipping()
        self.run = Run(self.guidance, batch, total, on_cpu, self.detailed)
        self.begun = True

    def unguided(self, call: Call, prediction: Tensor) -> None:
        """End a step that the pipeline does not guide."""
        x_t = call.sample
        channels = min(x_t.shape[1], prediction.shape[1], self.layout.channels or x_t.shape[1])
        self.run.unguided(prediction[:, :channels], x_t[:, :channels])

    def finish(self) -> None:
        """Close the last step and raise what was still on its way from the device."""
        if self.begun:
            self.close_step()
            self.run.finish()

    @property
    def guided(self) -> bool:
        """Whether the pipeline evaluates both branches."""
        return bool(getattr(self.pipe, "do_classifier_free_guidance", self.scale > 1))

    @property
    def scale(self) -> float:
        """w at this step; 1 means no guidance."""
        scale = self.scales[self.denoiser]
        if "guidance_scale" in self.scales:  # the pipeline's argument of that name is w
            current = getattr(self.pipe, "guidance_scale", None)
            scale = scale if current is None else float(current)
        return scale + self.layout.scale_offset

    def levels(self, call: Call) -> tuple[NoiseLevel | None, NoiseLevel | None]:
        """Noise levels now and next, as far as the guidance or the trace needs them."""
        if not (self.guidance.needs_level or self.detailed):
            return None, None
        level = noise_level(self.pipe.scheduler, call.timestep)
        level = replace(level, sign=level.sign * self.layout.sign)
        if not self.guidance.rule.needs_next_level:
            return level, None
        return level, next_noise_level(self.pipe.scheduler, call.timestep)

    def plan(self, call: Call, x_t: Tensor) -> list[int]:
        """The samples whose unconditional branch is to be evaluated at this step."""
        rows = self.run.plan(x_t, *self.levels(call))
        # Most is refused before the first step, but not every policy tells its decisions then.
        if self.run.skipped:
            self.layout.check_options(self.options, self.guidance)
            self.check_skipping()
        return rows

    def check_skipping(self) -> None:
        """Raise LayoutError if the pipeline needs the conditional prediction of every step."""
        if self.layout.norm_matched(self.options):
            raise LayoutError(
                f"{type(self.pipe).__name__} gives its guided prediction the norm of the "
                f"conditional one, which a skipped step does not evaluate: {self.guidance} cannot "
                "guide it"
            )

    def combine(
        self, rows: list[int], cond: Tensor, uncond: Tensor | None, x_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predictions for which the pipeline's own guidance line yields the guided one.

        Only the channels that the pipeline guides take part: extra input channels (masks,
        reference images) are left out, extra output channels (a learned variance) go to the
        pipeline as the network made them.
        """
        channels = min(x_t.shape[1], cond.shape[1], self.layout.channels or cond.shape[1])
        self.channels, x_t = channels, x_t[:, :channels]
        first, rest = cond[:, :channels], cond[:, channels:]
        first_uncond = uncond[:, :channels] if uncond is not None else None
        if cond.shape[1] == channels:
            first, first_uncond = cond, uncond
        pair = self.run.combine(first, first_uncond, self.scale, x_t)
        if pair[0] is not first:
            self.layout.check_options(self.options, self.guidance)
        if cond.shape[1] == channels:
            return pair
        self.rest = rest
        if uncond is not None and pair[0] is first and pair[1] is first_uncond:
            return cond, uncond
        uncond_rest = rest
        if uncond is not None:
            index = row_index(rows, cond.device)
            uncond_rest = rest.index_copy(0, index, uncond[:, channels:])
        return torch.cat([pair[0], rest], 1), torch.cat([pair[1], uncond_rest], 1)

    def remember(self, output: Any) -> None:
        """Remember what the network's outputs are like, for steps that are skipped."""
        if self.example is None:
            listed = self.layout.listed
            one = prediction_of(output, listed)[:1].clone()  # the rest is not kept alive
            self.example = with_prediction(output, one, listed)

    def with_skipped(self, cond: Tensor, x_t: Tensor) -> Tensor:
        """Conditional predictions of the samples evaluated, and what the others reuse."""
        skipped = self.run.skipped
        if not skipped:
            return cond
        active = [row for row in range(self.run.batch) if row not in skipped]
        return self.reused(x_t).index_copy(0, row_index(active, cond.device), cond)

    def reused(self, x_t: Tensor) -> Tensor:
        """Guided predictions of skipped samples, shape (B, \\*); the others are not read.

        Extra output channels are those of the last step that evaluated them.
        """
        guided = self.run.reused(x_t[:, : self.channels])
        parts = [guided] if self.rest is None else [guided, self.rest]
        return torch.cat(parts, 1).to(prediction_of(self.example, self.layout.listed).dtype)


def run_length(scheduler: Any, timestep: Tensor | float, options: dict[str, Any]) -> int:
    """Number of network calls from the first one, at `timestep`, where a pipeline does not tell."""
    timesteps = scheduler.timesteps
    places = (timesteps == torch.as_tensor(timestep).flatten()[0].to(timesteps)).nonzero()
    left = timesteps[int(places[0]) :] if len(places) else timesteps
    if options.get("denoising_end"):
        steps = scheduler.config.num_train_timesteps
        left = left[left >= round(steps - options["denoising_end"] * steps)]
    return len(left)
