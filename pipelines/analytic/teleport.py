"""Gaussian teleportation: the first steps of a sampler in closed form, for any stock scheduler.

At high noise a trained network computes little but the Wiener filter of its data, and for Gaussian
data the probability flow from one noise level to another is known (see
`pilotage.guidance.analytic.statistics`). So those steps need no network.

References:
    Wang & Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion
    Models and its Applications", TMLR 2024, https://arxiv.org/abs/2412.09726
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...guidance.analytic import DatasetStatistics, Level
from ..seam.noise_levels import (
    BY_STEP,
    BY_TIMESTEP,
    EDM,
    EXPLODING,
    KNOWN,
    of_sigma,
    scheduler_name,
)

EXPLAINED = 0.999  # share of the score that the Gaussian explains at sigma_skip="auto"

# Those that cannot begin in the middle of their grid, or whose grid is more than a table, are left
# out.
SCHEDULERS = sorted(
    KNOWN
    - (EDM | BY_STEP)
    - {"CogVideoXDPMScheduler", "DDPMWuerstchenScheduler", "DPMSolverSDEScheduler"}
    - {"FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "LCMScheduler"}
    - {"LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PNDMScheduler", "TCDScheduler"}
    - {"UnCLIPScheduler"}
)
TABLES = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "order_list")


def levels(scheduler: Any) -> list[Level]:
    """(alpha, sigma) of the pipeline's samples at every entry of ``scheduler.timesteps``."""
    name = scheduler_name(scheduler)
    if name in BY_TIMESTEP:
        squares = scheduler.alphas_cumprod.cpu().double()[scheduler.timesteps.cpu().long()]
        return [(math.sqrt(square), math.sqrt(1 - square)) for square in squares.tolist()]
    sigmas = torch.as_tensor(scheduler.sigmas).double().tolist()[: len(scheduler.timesteps)]
    if name in EXPLODING and not scheduler.config.get("use_flow_sigmas", False):
        return [(1.0, sigma) for sigma in sigmas]
    found = (of_sigma(scheduler, sigma) for sigma in sigmas)
    return [(float(level.alpha), float(level.sigma)) for level in found]


def trusted_sigma(statistics: DatasetStatistics, share: float = EXPLAINED) -> float:
    """The noise level sigma / alpha from which on the Gaussian explains `share` of the score."""
    low, high = 1e-4, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if statistics.explained(middle) >= share else (middle, high)
    return high


class _Jump(NamedTuple):
    """A jump that is still to come."""

    source: Level  # (alpha, sigma) of the pipeline's initial noise
    target: Level  # where the network's first input is moved to
    after: Level  # where the sample is moved to if the first ``step`` has to do it
    on_input: bool = False  # whether the network's input was moved already


class GaussianTeleport:
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
        jump: When the sample is moved. "input": before it first reaches the network, which takes
            a pipeline that hands it to ``scale_model_input`` first. "auto" works everywhere: a
            start one evaluation early, which is of no use in pipelines that do not; where the
            scheduler leaves no choice, "input" (samples of exploding variance) or the move in the
            first ``step`` (no ``scale_model_input``).

    After ``set_timesteps``, `skipped` is the number of network evaluations saved (in pipelines
    with two branches a pair counts once).

    Raises:
        ValueError: an unknown scheduler or option.
    """

    teleport_class: ClassVar[Any]
    stock_class: ClassVar[Any]
    order: int
    timesteps: Tensor

    def __new__(cls, scheduler: Any, *args: Any, **kwargs: Any) -> GaussianTeleport:
        """A shallow copy of `scheduler` with the class that does both."""
        name = type(scheduler).__name__
        if isinstance(scheduler, GaussianTeleport):
            raise ValueError(f"this {name} teleports already: wrap the stock scheduler")
        if scheduler_name(scheduler) not in SCHEDULERS:
            raise ValueError(
                f"{name} cannot start in the middle of its grid, or its noise levels are not "
                f"known: use one of {', '.join(SCHEDULERS)}"
            )
        if scheduler.config.get("invert_sigmas", False):
            raise ValueError(f"{name} with invert_sigmas is not supported")
        made = _blank(cls, type(scheduler))
        made.__dict__.update(copy.copy(scheduler).__dict__)
        return made

    def __init__(
        self,
        scheduler: Any,
        statistics: DatasetStatistics,
        sigma_skip: float | str = "auto",
        jump: str = "auto",
    ) -> None:
        scales = hasattr(scheduler, "scale_model_input")
        if jump not in ("auto", "input"):
            raise ValueError(f"unknown jump {jump!r}: expected 'auto' or 'input'")
        if jump == "input" and not scales:
            raise ValueError(f"{type(scheduler).__name__} has no scale_model_input: jump='auto'")
        if sigma_skip == "auto":
            sigma_skip = trusted_sigma(statistics)
        elif isinstance(sigma_skip, str) or not sigma_skip > 0:
            raise ValueError(f"sigma_skip must be 'auto' or a number > 0, got {sigma_skip!r}")
        if not scales:
            jump = "step"
        elif scheduler_name(scheduler) in EXPLODING:
            jump = "input"  # no pipeline can use them without scale_model_input
        self.statistics, self.sigma_skip, self.jump = statistics, float(sigma_skip), jump
        self.skipped = 0
        self._jump: _Jump | None = None
        self._initial: Any = None  # what the pipeline scales its noise by, of the whole grid

    def __reduce__(self) -> tuple[Any, ...]:
        # An empty scheduler knows how its class is found again, a fused one among them.
        empty = object.__new__(self.stock_class)
        return _blank_like, (self.teleport_class, empty), self.__dict__.copy()

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A stock scheduler: configurations do not hold statistics."""
        return cls.stock_class.from_config(*args, **kwargs)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """See the stock scheduler; the grid begins where the jump ends."""
        self._initial, self._jump, self.skipped = None, None, 0
        self.stock_class.set_timesteps(self, *args, **kwargs)
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
        first = start - 1 if self.jump == "auto" else start
        self._jump = _Jump(source=grid[0], target=grid[first], after=grid[start])
        self._keep([*([0] if self.jump == "step" else []), *range(first, len(grid))])

    def _keep(self, indices: list[int]) -> None:
        """Restrict every table of the grid to some steps."""
        count = len(self.timesteps)
        # Schedulers by timestep have one table; what else they hold is of training.
        for name in TABLES[:1] if scheduler_name(self) in BY_TIMESTEP else TABLES:
            table = getattr(self, name, None)
            if table is None:
                continue
            kept = indices + list(range(count, len(table)))
            picked = [table[i] for i in kept] if isinstance(table, list) else table[kept]
            setattr(self, name, picked)

    def scale_model_input(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
        """See the stock scheduler; what the network is given first is the teleported sample."""
        if self._jump is not None and self.jump != "step":
            self._check_first(timestep)
            self._jump = self._jump._replace(on_input=True)
            sample = self.statistics.teleport(sample, self._jump.source, self._jump.target)
        return self.stock_class.scale_model_input(self, sample, timestep, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """See the stock scheduler."""
        jump = self._jump
        if jump is None:
            return self.stock_class.step(self, *args, **kwargs)
        bound = inspect.signature(self.stock_class.step).bind(self, *args, **kwargs)
        self._check_first(bound.arguments["timestep"])
        sample = bound.arguments["sample"]
        if jump.on_input:
            sample = self.statistics.teleport(sample, jump.source, jump.target)
            bound.arguments["sample"], self._jump = sample, None
            return self.stock_class.step(*bound.args, **bound.kwargs)
        if self.jump == "input":
            raise ValueError(
                "this pipeline does not hand its first sample to scale_model_input, so the network "
                "was given it where it was: use jump='auto'"
            )
        moved = self.statistics.teleport(sample, jump.source, jump.after)
        self._jump = None
        self._keep(list(range(1, len(self.timesteps))))
        if hasattr(self, "_step_index"):
            self._step_index, self._begin_index = None, 0
        if not bound.arguments.get("return_dict", True):
            return (moved,)
        return SchedulerOutput(prev_sample=moved)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """See the stock scheduler; a run that teleports begins at its beginning."""
        if begin_index and self._jump is not None:
            raise ValueError(
                f"a teleported run cannot begin at step {begin_index} (from a given picture)"
            )
        self.stock_class.set_begin_index(self, begin_index)

    def add_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """See the stock scheduler; refused where a run would begin from a given picture."""
        if self._jump is not None:
            raise ValueError("a teleported run begins from pure noise, not from a given picture")
        return self.stock_class.add_noise(self, *args, **kwargs)

    def _check_first(self, timestep: Any) -> None:
        first = float(torch.as_tensor(timestep).reshape(-1)[0])
        if first != float(self.timesteps[0]):
            raise ValueError(
                f"the run begins at timestep {first:g}, expected {float(self.timesteps[0]):g}: "
                "a teleported run begins from pure noise"
            )


@functools.cache
def _teleporting_class(own: Any, stock: Any) -> Any:
    """The subclass of a scheduler class and of `GaussianTeleport`, of the stock class' name.

    Args:
        own: `GaussianTeleport` or a subclass of it.
        stock: The scheduler's class.
    """
    members: dict[str, Any] = {
        "teleport_class": own,
        "stock_class": stock,
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
    }
    for name in ("set_timesteps", "scale_model_input", "step", "set_begin_index", "add_noise"):
        # Pipelines read the signatures (eta, timesteps, ...), and whether a method is there.
        if hasattr(stock, name):
            members[name] = _with_signature(getattr(own, name), getattr(stock, name))
        else:
            members[name] = property(_absent)
    if isinstance(getattr(stock, "init_noise_sigma", None), property):
        # Computed from the table of sigmas, which no longer begins at the beginning.
        members["init_noise_sigma"] = property(
            lambda self: (
                stock.init_noise_sigma.fget(self) if self._initial is None else self._initial
            )
        )
    return type(stock.__name__, (own, stock), members)


def _blank(own: type, stock: type) -> GaussianTeleport:
    """A scheduler whose state follows."""
    return object.__new__(_teleporting_class(own, stock))


def _blank_like(own: type, scheduler: Any) -> GaussianTeleport:
    return _blank(own, type(scheduler))


def _with_signature(method: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def call(self: GaussianTeleport, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return call


def _absent(scheduler: GaussianTeleport) -> Any:
    """A method that the stock class does not have."""
    raise AttributeError
