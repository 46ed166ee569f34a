"""The branches of a call shared out among processes, each with a device of its own.

The rows of every call of the network are shared out in order, as evenly as may be: of two branches
in one call, each of two processes evaluates one. Where a pipeline calls its network once a branch,
those calls are shared out. Every process then gets all predictions, so that all take the same
decisions and hold the same latents.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...guidance import Run
from ...guidance.device import LaggedReads, on_host, row_index
from ...guidance.saved import to_dict
from .calls import Call, RowsError, with_rows
from .deferred import DeferringDriver, placeholder, shapes_of, tensors_of
from .exchange import Exchange, ProcessesError, bits
from .hooks import check_no_caches
from .layouts import LayoutError
from .patch import unwrapped
from .patterns import Pattern

# Arguments of a call in which processes may differ: what becomes of its result.
FREE = {"self", "output_type", "return_dict"}


class SharedCall(Call):
    """A call of a denoiser whose rows are shared out by `share`."""

    def __init__(self, share: Callable[[Call, list[int]], Any], *args: Any) -> None:
        super().__init__(*args)
        self.share = share

    def __call__(self, keep: list[int] | None = None) -> Any:
        """Evaluate some rows (None: all), together with the other processes."""
        return self.share(self, list(range(self.rows)) if keep is None else keep)

    def alone(self, keep: list[int] | None = None) -> Any:
        """Evaluate some rows in this process."""
        return super().__call__(keep)


class ParallelDriver(DeferringDriver):
    """One call of one pipeline that several processes make together.

    Args:
        exchange: The processes.
        args, kwargs: As of `Driver`.
    """

    def __init__(self, exchange: Exchange, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange, self.wish = exchange, "parallel='branches'"
        self.perturbed = bool(self.attention and self.options.get("pag_scale"))
        self.steps = 0
        self.splits: set[tuple[int, ...]] = set()  # rows of calls, and of every process's share
        self.seen: LaggedReads | None = None

    def new_call(self, network: Any, args: tuple, kwargs: dict[str, Any]) -> Call:
        """A call whose rows are shared out."""
        return SharedCall(self.shared, network, args, kwargs)

    def begin_step(self, call: Call) -> None:
        """See that all processes begin the same run, before the first evaluation."""
        if self.seen is None:
            if torch.is_grad_enabled():
                raise ValueError(f"{self.wish} has no gradients: call the pipeline without them")
            networks = {name: unwrapped(getattr(self.pipe, name)) for name in self.denoisers}
            check_no_caches(networks.values(), self.wish)
            self.exchange.agree(facts_of(self, call, networks))
            self.seen = LaggedReads(0 if on_host(_device_of(call)) else 1)
        super().begin_step(call)

    def start(self, batch: int, pattern: Pattern | None) -> Run:
        """Begin the run, if its branches go round."""
        if pattern is not None and not getattr(self.pipe, "do_classifier_free_guidance", False):
            self.check_number(pattern)
        return super().start(batch, pattern)

    def check_pattern(self, run: Run, pattern: Pattern) -> None:
        """Refuse what a pattern has no place for, or cannot be shared out."""
        super().check_pattern(run, pattern)
        self.check_number(pattern)
        name = type(self.pipe).__name__
        if pattern.aside:
            raise LayoutError(
                f"{name} evaluates its network in a pass that takes no part in guidance (for a "
                f"reference, for instance), and what that leaves behind is not exchanged: leave "
                f"out {self.wish}"
            )
        if self.perturbed and run.batch < self.exchange.size:
            raise LayoutError(
                f"perturbed attention takes the rows of a call for its branches, so that "
                f"{self.exchange.size} processes can share out whole pictures only: give {name} as "
                f"many at a time, or leave out {self.wish}"
            )

    def check_number(self, pattern: Pattern) -> None:
        """Refuse more processes than branches."""
        if pattern.branches < self.exchange.size:
            noun = "branch" if pattern.branches == 1 else "branches"
            raise ValueError(
                f"{self.exchange.size} processes cannot share the {pattern.branches} {noun} that "
                f"{type(self.pipe).__name__} evaluates in this call: start as many processes as "
                f"there are branches, or fewer"
            )

    # Rows of one call

    def shared(self, call: Call, rows: list[int]) -> Any:
        """The network's output for some rows, each evaluated by one process.

        Processes without a row evaluate what the first one does, for the shape of it.
        """
        assert isinstance(call, SharedCall)
        shares = shared_out(self.units(call, rows), self.exchange.size)
        own = shares[self.exchange.rank] or shares[0]
        sizes, order = [len(share) for share in shares], sum(shares, [])
        output = self.evaluated(call, own, (call.rows, *sizes))
        places = None if order == rows else [order.index(row) for row in rows]

        def gather(tensors: list[Tensor]) -> Tensor:
            every = self.exchange.gather_rows(tensors[0], sizes)
            return every if places is None else every[row_index(places, every.device)]

        return with_rows([output], gather, [len(own)])

    def evaluated(self, call: SharedCall, own: list[int], split: tuple[int, ...]) -> Any:
        """The network's output for the rows of this process.

        Whether the network takes rows alone, all processes tell each other at the first split of
        a kind, so that none waits for one that has failed.
        """
        output: Any = None
        failed: Exception | None = None
        try:
            output = call.alone(None if len(own) == call.rows else own)
        except (RuntimeError, ValueError) as error:
            if split in self.splits or len(own) == call.rows:  # or nothing is split
                raise
            failed = error
        if split not in self.splits:
            told = self.exchange.tell(None if failed is None else str(failed) or repr(failed))
            if reasons := list(filter(None, told)):
                cause = failed or RowsError(reasons[0])
                raise LayoutError(self.indivisible(call, cause)) from failed
            self.splits.add(split)
        return output

    def units(self, call: Call, rows: list[int]) -> list[list[int]]:
        """Rows of a call, together where the network needs them together."""
        if not (self.layout.whole or self.perturbed):
            return [[row] for row in rows]
        if self.run is None:
            return [rows]
        batch = self.run.batch
        units: dict[int, list[int]] = {}
        for row in rows:  # by pictures, where attention takes rows for branches; else by branches
            units.setdefault(row % batch if self.perturbed else row // batch, []).append(row)
        return list(units.values())

    # Calls of one step

    def owner(self, place: int) -> int:
        """The process that evaluates a call of the step."""
        assert self.wanted is not None
        counts = self.wanted.pattern.calls
        middle = sum(counts[:place]) + (counts[place] - 1) / 2
        return int(middle * self.exchange.size / sum(counts))

    def output_of(self, place: int, call: Call, like: Any) -> Any:
        """The output, if this process is to evaluate it or does not know its shape yet."""
        assert isinstance(call, SharedCall)
        if like is None or self.owner(place) == self.exchange.rank:
            return call.alone()
        return placeholder(like)

    def complete(self) -> None:
        """Give every process what each of them has evaluated."""
        if self.waits and not self.sound:  # once a run
            shapes = self.exchange.tell(shapes_of(self.outputs))
            if any(other != shapes[0] for other in shapes):
                raise LayoutError(self.unforeseen())
        for place, output in enumerate(self.outputs):
            for tensor in tensors_of(output):
                self.exchange.overwrite(tensor, self.owner(place))

    def combined(self, mixed: Tensor) -> None:
        """Take what the pipeline made in the first process, which had no placeholder to copy."""
        self.exchange.overwrite(mixed, 0)

    # Agreement from step to step

    def end_step(self, made: list, mixed: Tensor, sample: Tensor) -> Tensor:
        """What the scheduler is to step instead of `mixed`, if all processes step the same."""
        assert self.seen is not None
        self.seen.push(self.steps, self.steps, self.exchange.fingerprints(sample))
        self.steps += 1
        self.check_seen(self.seen.due(self.steps))
        return super().end_step(made, mixed, sample)

    def check_seen(self, sums: Any) -> None:
        """Raise ProcessesError if the latents of the processes differ, in all of them."""
        for step, values in sums:
            if len(set(values)) > 1:
                raise ProcessesError(
                    f"the processes have different latents at step {step}: noise that is drawn on "
                    "the way needs generator=, of the same seed in every process, and callbacks "
                    "have to do the same in all of them"
                )

    def finish(self) -> None:
        """Raise what was still on its way from the device, or if nothing was guided."""
        if self.seen is not None:
            self.check_seen(self.seen.rest())
        super().finish()


def shared_out(units: list[list[int]], size: int) -> list[list[int]]:
    """Rows for each of `size` processes, in order; the first ones have one unit more."""
    each, more = divmod(len(units), size)
    ends = [rank * each + min(rank, more) for rank in range(size + 1)]
    return [sum(units[a:b], []) for a, b in zip(ends, ends[1:], strict=False)]


def facts_of(driver: ParallelDriver, call: Call, networks: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what all processes must have in common, by a name that a user knows.

    Args:
        driver: Of the call.
        call: The first one of its network.
        networks: Those of the loop; of every weight a few elements count.
    """
    guidance, scheduler = driver.guidance, driver.scheduler
    try:
        settings: Any = to_dict(guidance)
    except ValueError:  # of a class that is not registered
        settings = str(guidance)
    packages = (torch, diffusers, sys.modules[__name__.partition(".")[0]])
    facts = {f"version of {p.__name__}": str(vars(p).get("__version__")) for p in packages}
    facts["device"] = _device_of(call).type
    facts["pipeline"] = type(driver.pipe).__name__
    facts["guidance"] = digest([settings, driver.detailed])
    # What begins with _ is how it came about, in an order of its own in every process.
    config = {name: v for name, v in scheduler.config.items() if not name.startswith("_")}
    facts["scheduler"] = digest([type(scheduler).__name__, config])
    facts["steps"] = digest(getattr(scheduler, "timesteps", None))
    facts |= {f"argument {n}": digest(v) for n, v in driver.options.items() if n not in FREE}
    inputs = [*zip(call.names, call.args, strict=False), *call.kwargs.items()]
    facts |= {f"the network's input {name}": digest(value) for name, value in inputs}
    facts |= {f"weights of {name}": digest(some_weights(n)) for name, n in networks.items()}
    return facts


def some_weights(network: Any, count: int = 8) -> list[Tensor]:
    """A few elements of every parameter that is a plain tensor in memory, by device."""
    found: dict[torch.device, list[Tensor]] = {}
    for value in network.parameters() if isinstance(network, nn.Module) else ():
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.numel():
            some = value.detach().reshape(-1)[:: max(1, value.numel() // count)][:count]
            found.setdefault(value.device, []).append(some.float())
    return [torch.cat(parts) for parts in found.values()]


def digest(value: Any) -> str:
    """SHA-256 of a value as far as it is data: tensors, pictures, numbers, text, and lists."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Generator):
            value = value.get_state()
        if isinstance(value, Image.Image):
            value = np.asarray(value)
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(bits(value.detach().cpu().contiguous()).numpy().data)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            add([item for pair in sorted(value.items(), key=str) for item in pair])
        elif isinstance(value, (list, tuple)):
            sha.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            plain = isinstance(value, (str, bytes, bool, int, float, type(None)))
            sha.update(f"{type(value).__name__}{value if plain else ''};".encode())

    add(value)
    return sha.hexdigest()


def _device_of(call: Call) -> torch.device:
    first = call.first
    while not isinstance(first, Tensor):
        first = first[0]
    return first.device
