"""The seam: what stands in front of a pipeline's denoiser for the length of one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...guidance import Always, Guidance, NoiseLevel, Run
from ...guidance.device import row_index
from .calls import Call, prediction_of, with_prediction
from .layouts import Layout, LayoutError, Pending
from .noise_levels import noise_level, ratio


class Seam:
    """One call of one pipeline under one guidance.

    Args:
        pipe: The pipeline being called.
        guidance: Rule and policy.
        layout: Where the pipeline keeps its branches.
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
        self.run: Run | None = None
        self.pending: Pending | None = None
        self.may_forecast = False
        self.seen: Any = None  # an output of the network, one row; where steps may be forecast
        self.channels: int | None = None  # how many are guided
        self.rest: Tensor | None = None  # the others of the last output; likewise

    def __call__(self, name: str, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stand in for ``network(*args, **kwargs)``, the pipeline's denoiser `name`."""
        if kwargs.get("skip_layers") is not None:  # skip-layer guidance: not a branch of ours
            return network(*args, **kwargs)
        self.denoiser = name
        return self.layout.run(self, Call(network, args, kwargs, self.layout.listed))

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
        self.may_forecast = policy.may_forecast(total)
        if policy.replaces_combination(total):
            self.layout.check_options(self.options, self.guidance)
        drops_rows = self.layout.joins_branches or (batch > 1 and policy.needs_gamma)
        if (
            getattr(call.network, "is_cache_enabled", False)
            and drops_rows
            and not isinstance(policy, Always)
        ):
            raise LayoutError(
                f"a cache is enabled in the denoiser of {type(self.pipe).__name__}, which needs "
                f"every row at every step: disable it, or leave out '{policy}'"
            )
        if self.may_forecast and self.layout.norm_matched(self.options):
            raise LayoutError(
                f"{type(self.pipe).__name__} gives its guided prediction the norm of the "
                f"conditional one, which a forecast step does not evaluate: {self.guidance} cannot "
                "guide it"
            )
        self.run = Run(self.guidance, batch, total, on_cpu, self.detailed)

    def leave(self, prediction: Tensor, x_t: Tensor, level: NoiseLevel | None) -> None:
        """End a step that the pipeline does not guide."""
        channels = min(x_t.shape[1], prediction.shape[1], self.layout.channels or x_t.shape[1])
        self.run.leave(prediction[:, :channels], x_t[:, :channels], level)

    def finish(self) -> None:
        """Close the last step and raise what was still on its way from the device."""
        if self.run is not None:
            self.layout.finish(self)
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

    def noise_level(self, call: Call) -> NoiseLevel | None:
        """The noise level of this step, if the guidance or the trace needs it."""
        if not (self.guidance.needs_noise_level or self.detailed):
            return None
        level = noise_level(self.pipe.scheduler, call.timestep)
        return replace(level, sign=level.sign * self.layout.sign)

    def plan(self, level: NoiseLevel | None) -> list[int]:
        """The samples whose unconditional branch is to be evaluated at this step."""
        wants_noise = self.guidance.policy.needs_noise or self.detailed
        return self.run.plan(ratio(level) if wants_noise else None)

    def combine(
        self,
        rows: list[int],
        cond: Tensor,
        uncond: Tensor | None,
        x_t: Tensor,
        level: NoiseLevel | None,
    ) -> tuple[Tensor, Tensor]:
        """Predictions for which the pipeline's own guidance line yields the guided one.

        Only the channels that the pipeline guides take part: extra input channels (masks,
        reference images) are left out, extra output channels (a learned variance) go to the
        pipeline as the network made them.
        """
        channels = min(x_t.shape[1], cond.shape[1], self.layout.channels or cond.shape[1])
        self.channels, x_t = channels, x_t[:, :channels]
        if cond.shape[1] == channels:
            return self.run.combine(rows, cond, uncond, x_t, self.scale, level)
        head, rest = cond[:, :channels], cond[:, channels:]
        self.rest = rest if self.may_forecast else None
        uncond_head = uncond[:, :channels] if rows else None
        pair = self.run.combine(rows, head, uncond_head, x_t, self.scale, level)
        if pair[0] is head and pair[1] is uncond_head:
            return cond, uncond
        uncond_rest = rest
        if rows:
            index = row_index(rows, cond.device)
            uncond_rest = rest.index_copy(0, index, uncond[:, channels:])
        return torch.cat([pair[0], rest], 1), torch.cat([pair[1], uncond_rest], 1)

    def see(self, output: Any) -> None:
        """Remember what the network's outputs are like, if a step may be forecast."""
        if self.may_forecast and self.seen is None:
            listed = self.layout.listed
            one = prediction_of(output, listed)[:1].clone()  # the rest is not kept alive
            self.seen = with_prediction(output, one, listed)

    def filled(self, cond: Tensor, x_t: Tensor, level: NoiseLevel | None) -> Tensor:
        """Conditional predictions of the samples that do not rest, with the forecasts of others."""
        resting = self.run.resting
        if not resting:
            return cond
        active = [row for row in range(self.run.batch) if row not in resting]
        return self.forecast(x_t, level).index_copy(0, row_index(active, cond.device), cond)

    def forecast(self, x_t: Tensor, level: NoiseLevel | None) -> Tensor:
        """Guided predictions of the samples that rest, shape (B, \\*); the others are not read.

        Extra output channels are those of the last step that evaluated them.
        """
        guided = self.run.forecast(x_t[:, : self.channels], level)
        parts = [guided] if self.rest is None else [guided, self.rest]
        return torch.cat(parts, 1).to(prediction_of(self.seen, self.layout.listed).dtype)


def run_length(scheduler: Any, timestep: Tensor | float, options: dict[str, Any]) -> int:
    """Number of network calls from the first one, at `timestep`, where a pipeline does not tell."""
    timesteps = scheduler.timesteps
    places = (timesteps == torch.as_tensor(timestep).flatten()[0].to(timesteps)).nonzero()
    left = timesteps[int(places[0]) :] if len(places) else timesteps
    if options.get("denoising_end"):
        steps = scheduler.config.num_train_timesteps
        left = left[left >= round(steps - options["denoising_end"] * steps)]
    return len(left)


class GuidedDenoiser:
    """A denoiser seen through a seam: calls go to the seam, everything else to the network.

    It passes for the network it stands for (also to ``isinstance``), so that pipelines can read its
    configuration, dtype and device.
    """

    def __init__(self, name: str, network: Any, seam: Seam) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_seam", seam)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate through the seam; straight through once that is gone."""
        if self._seam is None:
            return self._network(*args, **kwargs)
        return self._seam(self._name, self._network, args, kwargs)

    @property
    def __class__(self) -> type:
        return type(self._network)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._network, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._network, name)


@contextlib.contextmanager
def attached(pipe: Any, seam: Seam) -> Iterator[None]:
    """Put `seam` in front of the denoisers of `pipe`; always taken away again.

    Only the pipeline's own reference is exchanged, past ``DiffusionPipeline.__setattr__`` (which
    would record it in the configuration): the network, and every other pipeline that shares it,
    never notices.
    """
    names = [name for name in seam.layout.denoisers if pipe.__dict__.get(name) is not None]
    networks = {name: pipe.__dict__[name] for name in names}
    stand_ins = {name: GuidedDenoiser(name, networks[name], seam) for name in names}
    pipe.__dict__.update(stand_ins)
    try:
        yield
    finally:
        pipe.__dict__.update(networks)
        for stand_in in stand_ins.values():  # offload hooks may keep a reference to it
            object.__setattr__(stand_in, "_seam", None)
