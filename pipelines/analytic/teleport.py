r"""Gaussian teleportation: the first steps of a sampler in closed form, for any stock scheduler.

For data with mean :math:`\mu` and covariance :math:`\sum_k \lambda_k u_k u_k^\top`, and samples
:math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon`, the probability flow from one level to another is

.. math::
    x_t = \alpha_t \mu + \sum_k \sqrt{\frac{\sigma_t^2 + \alpha_t^2 \lambda_k}
          {\sigma_T^2 + \alpha_T^2 \lambda_k}} \; u_k u_k^\top (x_T - \alpha_T \mu),

whatever the convention (variance preserving, exploding, flow), and also where :math:`\alpha_T = 0`.
At high noise a trained network computes little else, so those steps need no network.

References:
    Wang & Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion
    Models and its Applications", TMLR 2024, https://arxiv.org/abs/2412.09726
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ...guidance.analytic import DatasetStatistics

EXPLAINED = 0.999  # share of the score that the Gaussian explains at sigma_skip="auto"

# Scheduler -> what its samples are: alpha_t^2 = alphas_cumprod[t]; unit variance with sigma / alpha
# in `sigmas`; data plus sigma times noise; (1 - sigma) data plus sigma times noise.
TIMESTEP, PRESERVING, EXPLODING, FLOW = "timestep", "preserving", "exploding", "flow"
SCHEDULERS = {
    "CogVideoXDDIMScheduler": TIMESTEP,
    "DDIMParallelScheduler": TIMESTEP,
    "DDIMScheduler": TIMESTEP,
    "DDPMParallelScheduler": TIMESTEP,
    "DDPMScheduler": TIMESTEP,
    "DEISMultistepScheduler": PRESERVING,
    "DPMSolverMultistepScheduler": PRESERVING,
    "DPMSolverSinglestepScheduler": PRESERVING,
    "EulerAncestralDiscreteScheduler": EXPLODING,
    "EulerDiscreteScheduler": EXPLODING,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "HeunDiscreteScheduler": EXPLODING,
    "KDPM2AncestralDiscreteScheduler": EXPLODING,
    "KDPM2DiscreteScheduler": EXPLODING,
    "LMSDiscreteScheduler": EXPLODING,
    "SASolverScheduler": PRESERVING,
    "UniPCMultistepScheduler": PRESERVING,
}
JUMPS = ("auto", "input", "step")
TABLES = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "order_list")
Level = tuple[float, float]


def levels(scheduler: Any) -> list[Level]:
    """(alpha, sigma) of the pipeline's samples at every entry of ``scheduler.timesteps``."""
    kind = SCHEDULERS[type(scheduler).__name__]
    if kind == TIMESTEP:
        squares = scheduler.alphas_cumprod.cpu().double()[scheduler.timesteps.cpu().long()]
        return [(math.sqrt(square), math.sqrt(1 - square)) for square in squares.tolist()]
    sigmas = torch.as_tensor(scheduler.sigmas).double().tolist()[: len(scheduler.timesteps)]
    if kind == FLOW or scheduler.config.get("use_flow_sigmas", False):
        return [(1 - sigma, sigma) for sigma in sigmas]
    if kind == EXPLODING:
        return [(1.0, sigma) for sigma in sigmas]
    return [((1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5) for s in sigmas]


def teleport(statistics: DatasetStatistics, x: Tensor, source: Level, target: Level) -> Tensor:
    """The closed form above: x (B, C, H, W) at level `source` moved to level `target`."""
    (a, s), (b, t) = source, target
    mean = statistics.mean.to(x.device, x.dtype if x.dtype.itemsize >= 4 else torch.float32)
    moved = statistics.apply(
        x - a * mean, lambda v: ((t * t + b * b * v) / (s * s + a * a * v)).sqrt()
    )
    return (b * mean + moved).to(x.dtype)


def trusted_sigma(statistics: DatasetStatistics, share: float = EXPLAINED) -> float:
    """The noise level sigma / alpha from which on the Gaussian explains `share` of the score."""
    low, high = 1e-4, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if statistics.explained(middle) >= share else (middle, high)
    return high


class GaussianTeleport(SchedulerMixin):
    """A copy of a stock scheduler that leaves out the steps above a noise level.

        pipe.scheduler = GaussianTeleport(pipe.scheduler, statistics)

    The noise the pipeline starts from is moved in closed form to the last noise level of the
    scheduler's own grid that is not below `sigma_skip`; from there the grid runs as before. The
    object is an instance of the stock class, too, and saves as it.

    Args:
        scheduler: A stock scheduler, one of `SCHEDULERS`; left as it is.
        statistics: Of what the network denoises: pixels in [-1, 1], or scaled latents.
        sigma_skip: sigma / alpha down to which the closed form is trusted; "auto" for the level at
            which it explains 99.9 % of the score; infinity for the stock scheduler.
        jump: When the sample is moved. "input": before the network first sees it, which takes a
            pipeline that hands it to ``scale_model_input`` first. "step": in the first ``step``,
            after an evaluation of no use; works everywhere. "auto": "input" or "step" where the
            scheduler leaves no choice (samples of exploding variance, no ``scale_model_input``),
            else a start one evaluation early, which becomes the one of no use in pipelines that
            do not call it.

    After ``set_timesteps``, `skipped` is the number of network evaluations saved (in pipelines
    with two branches a pair counts once).

    Raises:
        ValueError: an unknown scheduler or option.
    """

    def __new__(cls, scheduler: Any, *args: Any, **kwargs: Any) -> GaussianTeleport:
        """A shallow copy of `scheduler` with the class that does both."""
        name = type(scheduler).__name__
        if isinstance(scheduler, GaussianTeleport):
            raise ValueError(f"this {name} teleports already: wrap the stock scheduler")
        if name not in SCHEDULERS:
            raise ValueError(
                f"{name} cannot start in the middle of its grid, or its noise levels are not "
                f"known: use one of {', '.join(sorted(SCHEDULERS))}"
            )
        if scheduler.config.get("invert_sigmas", False):
            raise ValueError(f"{name} with invert_sigmas is not supported")
        self = object.__new__(_teleporting_class(type(scheduler)))
        self.__dict__.update(copy.copy(scheduler).__dict__)
        return self

    def __init__(
        self,
        scheduler: Any,
        statistics: DatasetStatistics,
        sigma_skip: float | str = "auto",
        jump: str = "auto",
    ) -> None:
        if jump not in JUMPS:
            raise ValueError(f"unknown jump {jump!r}: expected one of {JUMPS}")
        if jump == "input" and not hasattr(scheduler, "scale_model_input"):
            raise ValueError(f"{type(scheduler).__name__} has no scale_model_input: jump='step'")
        if sigma_skip == "auto":
            sigma_skip = trusted_sigma(statistics)
        elif isinstance(sigma_skip, str) or not sigma_skip > 0:
            raise ValueError(f"sigma_skip must be 'auto' or a number > 0, got {sigma_skip!r}")
        if jump == "auto" and not hasattr(scheduler, "scale_model_input"):
            jump = "step"
        if jump == "auto" and SCHEDULERS[type(scheduler).__name__] == EXPLODING:
            jump = "input"  # no pipeline can use them without scale_model_input
        self.statistics, self.sigma_skip, self.jump = statistics, float(sigma_skip), jump
        self.skipped = 0
        self._source: Level | None = None  # set while the jump is still to come
        self._served = False
        self._initial: Any = None  # what the pipeline scales its noise by, of the whole grid

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.stock_class, self.__dict__.copy())

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A stock scheduler: configurations do not hold statistics."""
        return cls.stock_class.from_config(*args, **kwargs)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """See the stock scheduler; the grid begins where the jump ends."""
        self._initial = None
        super().set_timesteps(*args, **kwargs)
        self._source, self._served, self.skipped = None, False, 0
        self._initial = getattr(self, "init_noise_sigma", 1.0)
        grid = levels(self)
        start = 0
        for index in range(0, len(grid), self.order):
            alpha, sigma = grid[index]
            if sigma >= self.sigma_skip * alpha and sigma > 0:
                start = index
        wasted = 0 if self.jump == "input" else 1
        if start <= wasted:
            return
        self.skipped = start - wasted
        self._source, self._after = grid[0], grid[start]
        if self.jump == "auto":
            start -= 1
        self._target = grid[start]
        self._keep([*([0] if self.jump == "step" else []), *range(start, len(grid))])

    def _keep(self, indices: list[int]) -> None:
        """Restrict every table of the grid to some steps."""
        count = len(self.timesteps)
        # Schedulers of the "timestep" kind have one table; what else they hold is of training.
        by_timestep = SCHEDULERS[type(self).__name__] == TIMESTEP
        for name in TABLES[:1] if by_timestep else TABLES:
            table = getattr(self, name, None)
            if table is None:
                continue
            kept = indices + list(range(count, len(table)))
            picked = [table[i] for i in kept] if isinstance(table, list) else table[kept]
            setattr(self, name, picked)

    def teleported(self, sample: Tensor, target: Level) -> Tensor:
        """The pipeline's initial noise, moved to `target`."""
        return teleport(self.statistics, sample, self._source, target)

    def scale_model_input(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
        """See the stock scheduler; what the network sees first is the teleported sample."""
        if self._source is not None and self.jump != "step":
            self._check_first(timestep)
            self._served = True
            sample = self.teleported(sample, self._target)
        return super().scale_model_input(sample, timestep, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """See the stock scheduler."""
        if self._source is None:
            return super().step(*args, **kwargs)
        bound = inspect.signature(self.stock_class.step).bind(self, *args, **kwargs)
        self._check_first(bound.arguments["timestep"])
        sample = bound.arguments["sample"]
        if self._served:
            bound.arguments["sample"] = self.teleported(sample, self._target)
            self._source = None
            return super().step(*bound.args[1:], **bound.kwargs)
        if self.jump == "input":
            raise ValueError(
                "this pipeline does not hand its first sample to scale_model_input, so the network "
                "has seen it where it was: use jump='step' or 'auto'"
            )
        moved = self.teleported(sample, self._after)
        self._source = None
        self._keep(list(range(1, len(self.timesteps))))
        if hasattr(self, "_step_index"):
            self._step_index, self._begin_index = None, 0
        if not bound.arguments.get("return_dict", True):
            return (moved,)
        return SchedulerOutput(prev_sample=moved)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """See the stock scheduler; a run that teleports begins at its beginning."""
        if begin_index and self._source is not None:
            raise ValueError(
                f"a teleported run cannot begin at step {begin_index} (from a given picture)"
            )
        super().set_begin_index(begin_index)

    def add_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """See the stock scheduler; refused where a run would begin from a given picture."""
        if self._source is not None:
            raise ValueError("a teleported run begins from pure noise, not from a given picture")
        return super().add_noise(*args, **kwargs)

    def _check_first(self, timestep: Any) -> None:
        first = float(torch.as_tensor(timestep).reshape(-1)[0])
        if first != float(self.timesteps[0]):
            raise ValueError(
                f"the run begins at timestep {first:g}, expected {float(self.timesteps[0]):g}: "
                "a teleported run begins from pure noise"
            )


@functools.cache
def _teleporting_class(stock: type) -> type:
    """The subclass of a scheduler class and of `GaussianTeleport`, of the stock class' name."""
    members = {"stock_class": stock, "__module__": stock.__module__, "__doc__": stock.__doc__}
    for name in ("set_timesteps", "scale_model_input", "step", "add_noise"):
        # Pipelines read the signatures (eta, timesteps, ...).
        if hasattr(stock, name):
            members[name] = _with_signature(getattr(GaussianTeleport, name), getattr(stock, name))
        else:
            members[name] = _Absent(name)
    if not hasattr(stock, "set_begin_index"):
        members["set_begin_index"] = _Absent("set_begin_index")
    if isinstance(getattr(stock, "init_noise_sigma", None), property):
        # Computed from the table of sigmas, which no longer begins at the beginning.
        members["init_noise_sigma"] = property(
            lambda self: (
                stock.init_noise_sigma.fget(self) if self._initial is None else self._initial
            )
        )
    return type(stock.__name__, (GaussianTeleport, stock), members)


def _restored(stock: type, state: dict[str, Any]) -> GaussianTeleport:
    """A copied or unpickled scheduler."""
    made = object.__new__(_teleporting_class(stock))
    made.__dict__.update(state)
    return made


def _with_signature(method: Any, stock: Any) -> Any:
    @functools.wraps(stock)
    def call(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return call


class _Absent:
    """A method of `GaussianTeleport` that the stock class has no counterpart of."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self.name!r}")
