"""Plain guidance: the pipeline does everything itself, and its steps are only counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .calls import Call
from .driver import Driver


class PlainDriver(Driver):
    """One call of one pipeline under its own guidance."""

    rows = 0  # that its networks have evaluated since the last step

    def __call__(self, name: str, network: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the place of ``network(*args, **kwargs)``."""
        self.rows += Call(network, args, kwargs).rows
        return network(*args, **kwargs)

    def step(self, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the place of ``scheduler.step(*args, **kwargs)``."""
        rows, self.rows = self.rows, 0
        if rows:
            at, sample_at = self.where
            mixed = args[at] if len(args) > at else kwargs["model_output"]
            run = self.run
            if run is None or self.is_over(run):
                timestep = args[at + 1] if len(args) > at + 1 else kwargs["timestep"]
                if run is None:
                    sample = args[sample_at] if len(args) > sample_at else kwargs["sample"]
                    batch = len(sample) // 2 if self.layout.doubled else len(sample)
                    self.run = run = self.new_run(batch, self.total(timestep), mixed.device)
                else:
                    run = self.next_run(run, timestep)
            run.count(mixed, rows // run.batch)
        return stock(*args, **kwargs)

    def finish(self) -> None:
        """Raise what was still on its way from the device."""
        if self.run is not None:
            self.run.finish()
