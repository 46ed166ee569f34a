"""What the fused schedulers have in common: a table of coefficients, a counter on the host."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...guidance import NoiseLevel
from ...guidance.device import to_device
from ...guidance.ops.solver import COLUMNS, INDEX, SolverStep
from ..seam.noise_levels import of_sigma, prediction_type_of


class FusedScheduler:
    """First base class of a fused scheduler; another one is the stock scheduler it replaces.

    Configuration, timesteps, noise and sigmas (kept on the host) are the stock scheduler's.

    Attributes:
        stock_class: The stock scheduler's class.
    """

    stock_class: ClassVar[Any]
    timesteps: Any  # this and the next three are the stock scheduler's
    num_inference_steps: Any
    _step_index: Any
    _begin_index: Any
    _steps: tuple[Tensor, list[float]] | None = None
    _levels: list[float]
    _table: Tensor | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if FusedScheduler not in cls.__bases__:
            return  # a descendant of a fused scheduler
        others = [base for base in cls.__bases__ if issubclass(base, SchedulerMixin)]
        if not others:
            return  # a base of fused schedulers to come
        stock: Any = others[0]
        cls.stock_class = stock
        # diffusers writes these two into saved pipelines, which then load without Pilotage, and
        # looks schedulers up by name. repr() shows the qualified name, which stays ours.
        cls.__name__, cls.__module__ = stock.__name__, stock.__module__

        @functools.wraps(stock.__init__)
        def checked(self: FusedScheduler, *args: Any, **kwargs: Any) -> None:
            stock.__init__(self, *args, **kwargs)
            self.check_config()

        @functools.wraps(stock.set_timesteps)
        def tabulated(self: FusedScheduler, *args: Any, device: Any = None, **kwargs: Any) -> None:
            stock.set_timesteps(self, *args, **kwargs)  # on the host
            self.tabulate(device)

        for wrapped in (checked, tabulated):
            setattr(cls, wrapped.__name__, wrapped)

    def __reduce__(self) -> tuple[Any, ...]:
        cls = type(self)
        # Ours have the stock classes' names.
        return _unpickled, (_named().get(cls, cls),), self.__dict__.copy()

    def check_config(self) -> None:
        """Raise ValueError for settings that the fused step does not have."""
        prediction_type_of(self)

    def coefficients(self) -> Tensor:
        """The table of `guidance.ops.solver.COLUMNS`, one row per step, float64, on the host."""
        raise NotImplementedError

    def noise_level(self, timestep: Tensor | float) -> NoiseLevel:
        """The noise level of the network's input at the current step, without a device read."""
        index = self.current_index(timestep, default=0)
        self.known_steps()
        return of_sigma(self, self._levels[index])

    def tabulate(self, device: torch.device | str | None = None) -> None:
        """Compute the tables again, after the timesteps or sigmas were changed by hand."""
        values = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)
        self._steps = (self.timesteps, values)
        sigmas: Tensor | None = getattr(self, "sigmas", None)
        self._levels = [] if sigmas is None else sigmas.tolist()
        self._table = None
        if getattr(self, "num_inference_steps", None) is not None:
            self.table()

    def table(self) -> Tensor:
        """The coefficients, on the device of the timesteps; computed once.

        Raises:
            ValueError: they depend on ``set_timesteps``, and it was not called.
        """
        if self._table is None:
            self._table = to_device(self.coefficients().float(), self.timesteps.device)
        return self._table

    def known_steps(self) -> tuple[Tensor, list[float]]:
        """The timesteps and their values on the host; tables follow if they were exchanged.

        Before ``set_timesteps`` they are those of the stock scheduler, its whole training.
        """
        if self._steps is None or self._steps[0] is not self.timesteps:
            self.tabulate()
        assert self._steps is not None
        return self._steps

    def check_begun(self) -> None:
        """Raise ValueError before ``set_timesteps``, for those that have no table until then."""
        if self.num_inference_steps is None:
            raise ValueError(f"{type(self).__qualname__}: call set_timesteps first")

    def host_timestep(self, timestep: Tensor | float) -> float | None:
        """The value of a timestep; None if only the device knows it."""
        if not isinstance(timestep, Tensor):
            return timestep
        own, values = self.known_steps()
        if timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            # What a loop over `timesteps` yields is a view: where it lies tells which one it is.
            return values[int(timestep.storage_offset()) - int(own.storage_offset())]
        return timestep.reshape(-1)[0].item() if timestep.device.type == "cpu" else None

    def current_index(self, timestep: Tensor | float, default: int | None = None) -> int:
        """Index of the step about to be taken, counted on the host.

        Args:
            timestep: Looked up before the first step only, by the stock scheduler's rule.
            default: Taken where the timestep is not in the table or known to the device only;
                None: such a timestep is read from the device, once.

        Raises:
            ValueError: the timestep is not in the table.
        """
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        value = self.host_timestep(timestep)
        if value is None and default is None:
            value = torch.as_tensor(timestep).reshape(-1)[0].item()
        values = self.known_steps()[1]
        found = [index for index, known in enumerate(values) if known == value]
        if found:
            return found[min(1, len(found) - 1)]  # of equal ones the second, as the stock scheduler
        if default is None:
            raise ValueError(
                f"timestep {value} is not one of the scheduler's {len(values)} timesteps: "
                "pass one of `scheduler.timesteps`"
            )
        return default

    def solver_row(self, row: int, device: torch.device, has_previous: bool = False) -> SolverStep:
        """A row of the table, on the device of the samples (moved there once if need be)."""
        self.known_steps()
        table = self.table()
        if table.device != device:
            table = self._table = to_device(table.cpu(), device)
        return SolverStep(table[row], has_previous)


def table_of(
    count: int, level: NoiseLevel, spread: float | Tensor = 1.0, **columns: float | Tensor
) -> Tensor:
    """A table with `count` rows.

    Args:
        level: Noise levels of the network's input, numbers or shape (count,): the columns of D.
        spread: The network's input is the sample times this.
        columns: The others of `COLUMNS`.
    """
    if level.prediction == "epsilon":
        own = {
            "d_s": spread / torch.as_tensor(level.alpha),
            "d_x": 1.0,
            "d_p": -level.sign * level.sigma / spread,
        }
    else:
        d_x, d_p = level.coefficients()
        own = {"d_s": 1.0, "d_x": spread * d_x, "d_p": d_p}
    d_p = torch.as_tensor(own["d_p"], dtype=torch.float64)
    own["d_q"] = d_p - d_p.float()
    table = torch.zeros(count, len(COLUMNS), dtype=torch.float64)
    for name, values in (own | columns).items():
        table[:, INDEX[name]] = torch.as_tensor(values, dtype=torch.float64)
    return table


def refuse_integer(timestep: Any) -> None:
    """Raise ValueError where a timestep is an index, which these schedulers cannot take."""
    if isinstance(timestep, int):
        raise ValueError(
            f"expected one of `scheduler.timesteps`, got the integer {timestep} "
            "(from `enumerate(timesteps)`?)"
        )


def _named() -> dict[Any, str]:
    """Fused schedulers that have a stock scheduler's name, and our names for them."""
    return {
        cls: cls.__qualname__
        for cls in FusedScheduler.__subclasses__()
        if "stock_class" in vars(cls)
    }


def _unpickled(found: str | type[FusedScheduler]) -> FusedScheduler:
    """A scheduler whose state follows; the class of one of ours is found by our name for it."""
    ours = {name: cls for cls, name in _named().items()}
    cls = ours[found] if isinstance(found, str) else found
    return cls.__new__(cls)
