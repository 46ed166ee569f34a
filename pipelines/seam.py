"""The seam: what stands in front of a pipeline's denoiser for the length of one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..guidance import Guidance, NoiseLevel, Run
from .layouts import Batched, Call
from .noise_levels import noise_level, ratio


class Seam:
    """One call of one pipeline under one guidance.

    Args:
        pipe: The pipeline being called.
        guidance: Rule and policy.
        layout: Where the pipeline keeps its branches.
        guidance_scale: w as given to the call; a pipeline that exposes its current scale (and may
            change it on the way) is asked at every step.
        detailed: Record cosines and norms at every step.
    """

    def __init__(
        self,
        pipe: Any,
        guidance: Guidance,
        layout: Batched,
        guidance_scale: float,
        detailed: bool = False,
    ) -> None:
        self.pipe, self.guidance, self.layout = pipe, guidance, layout
        self.given_scale, self.detailed = guidance_scale, detailed
        self.run: Run | None = None

    def __call__(self, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stand in for ``network(*args, **kwargs)``."""
        call = Call(network, args, kwargs)
        if not getattr(self.pipe, "do_classifier_free_guidance", True):
            return self._unguided(call)
        if self.run is None:
            self._begin(self.layout.batch_of(call), call)
        return self.layout.run(self, call)

    def _begin(self, batch: int, call: Call) -> None:
        scheduler = self.pipe.scheduler
        total = getattr(self.pipe, "num_timesteps", None) or len(scheduler.timesteps)
        on_cpu = call.sample.device.type == "cpu"
        self.run = Run(self.guidance, batch, total, on_cpu, self.detailed)

    def _unguided(self, call: Call) -> Any:
        """A step at which the pipeline itself has switched guidance off."""
        if self.run is None:
            self._begin(call.sample.shape[0], call)
        self.run.plan()
        output = call()
        prediction = output[0] if not isinstance(output, Tensor) else output
        self.run.combine([], prediction, None, call.sample, 1.0, None)
        return output

    def noise_level(self, timestep: Tensor) -> NoiseLevel | None:
        """The noise level of this step, if the guidance or the trace needs it."""
        if not (self.guidance.needs_noise_level or self.detailed):
            return None
        return noise_level(self.pipe.scheduler, timestep)

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

        Only the channels that are denoised are guided: extra input channels (masks, reference
        images) are left out, extra output channels (a learned variance) go to the pipeline as the
        network made them.
        """
        channels = min(x_t.shape[1], cond.shape[1])
        x_t = x_t[:, :channels]
        if cond.shape[1] == channels:
            return self.run.combine(rows, cond, uncond, x_t, self.scale, level)
        head = uncond[:, :channels] if rows else None
        pair = self.run.combine(rows, cond[:, :channels], head, x_t, self.scale, level)
        rest = cond[:, channels:]
        uncond_rest = rest
        if rows:
            index = torch.tensor(rows, device=cond.device)
            uncond_rest = rest.index_copy(0, index, uncond[:, channels:])
        return torch.cat([pair[0], rest], 1), torch.cat([pair[1], uncond_rest], 1)

    @property
    def scale(self) -> float:
        """w at this step."""
        scale = getattr(self.pipe, "guidance_scale", self.given_scale)
        return self.given_scale if scale is None else float(scale)


class GuidedDenoiser:
    """A denoiser seen through a seam: calls go to the seam, everything else to the network.

    It passes for the network it stands for (also to ``isinstance``), so that pipelines can read its
    configuration, dtype and device.
    """

    def __init__(self, network: Any, seam: Seam) -> None:
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_seam", seam)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._seam is None:
            return self._network(*args, **kwargs)
        return self._seam(self._network, args, kwargs)

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
def attached(pipe: Any, names: tuple[str, ...], seam: Seam) -> Iterator[None]:
    """Put `seam` in front of the denoisers `names` of `pipe`; always taken away again.

    Only the pipeline's own reference is exchanged, past ``DiffusionPipeline.__setattr__`` (which
    would record it in the configuration): the network, and every other pipeline that shares it,
    never notices.
    """
    networks = {name: pipe.__dict__[name] for name in names if pipe.__dict__.get(name) is not None}
    stand_ins = {name: GuidedDenoiser(network, seam) for name, network in networks.items()}
    pipe.__dict__.update(stand_ins)
    try:
        yield
    finally:
        pipe.__dict__.update(networks)
        for stand_in in stand_ins.values():  # offload hooks may keep a reference to it
            object.__setattr__(stand_in, "_seam", None)
