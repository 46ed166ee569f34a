"""The patch: a pipeline's denoisers and its scheduler are exchanged for the length of one call."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# (name, network, args, kwargs), in the place of ``network(*args, **kwargs)``: the denoiser `name`.
Evaluator = Callable[[str, Any, tuple, dict[str, Any]], Any]
# (step, args, kwargs), in the place of ``step(*args, **kwargs)`` of the scheduler.
Stepper = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]


class BusyError(RuntimeError):
    """A pipeline is called while it runs a guided call."""


class StandIn:
    """Passes for an object that it stands for, also to ``isinstance``; copies are of the object."""

    def __init__(self, target: Any) -> None:
        object.__setattr__(self, "_target", target)

    @property  # type: ignore[misc]  # object's own may be written to, this one only read
    def __class__(self) -> type:
        return type(self._target)

    def __getattr__(self, name: str) -> Any:
        if name == "_target":  # asked before there is one, by what makes copies
            raise AttributeError(name)
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._target, name)

    def __len__(self) -> int:
        return len(self._target)

    def __copy__(self) -> Any:
        return copy.copy(self._target)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._target, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._target.__reduce_ex__(protocol)


class GuidedDenoiser(StandIn):
    """A denoiser behind the seam: calls go to `evaluate`, everything else to the network."""

    def __init__(self, name: str, network: Any, evaluate: Evaluator) -> None:
        super().__init__(network)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_evaluate", evaluate)
        object.__setattr__(self, "_thread", threading.get_ident())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate behind the seam; straight through once that is gone, and for other threads."""
        if self._evaluate is None or threading.get_ident() != self._thread:
            return self._target(*args, **kwargs)
        return self._evaluate(self._name, self._target, args, kwargs)


class GuidedScheduler(StandIn):
    """A scheduler behind the seam: its `step` goes by `stepper`, everything else to it."""

    def __init__(self, scheduler: Any, stepper: Stepper) -> None:
        super().__init__(scheduler)
        thread = threading.get_ident()

        @functools.wraps(scheduler.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._stepper is None or threading.get_ident() != thread:
                return scheduler.step(*args, **kwargs)
            return self._stepper(scheduler.step, args, kwargs)

        object.__setattr__(self, "_stepper", stepper)
        object.__setattr__(self, "step", step)
        # What loops ask for at every step, within reach. Flow matching has no scaling, which some
        # pipelines tell by comparing the type itself.
        scaled = getattr(scheduler, "scale_model_input", lambda sample, *_: sample)
        object.__setattr__(self, "scale_model_input", scaled)
        if hasattr(scheduler, "order"):
            object.__setattr__(self, "order", scheduler.order)


@contextlib.contextmanager
def attached(
    pipe: Any, denoisers: Sequence[str], evaluate: Evaluator, step: Stepper | None = None
) -> Iterator[None]:
    """Put `evaluate` in front of some denoisers of `pipe`, and `step` of its scheduler's.

    Only the pipeline's own references are exchanged, past ``DiffusionPipeline.__setattr__`` (which
    would record them in the configuration): the network, and every other pipeline that shares it,
    never notices. Those of `denoisers` that the pipeline does not have are passed over. At the end
    what is still ours is taken away again; what somebody else has put in its place stays.
    """
    own = pipe.__dict__
    stand_ins: dict[str, StandIn] = {
        name: GuidedDenoiser(name, own[name], evaluate)
        for name in denoisers
        if own.get(name) is not None
    }
    if step is not None:
        stand_ins["scheduler"] = GuidedScheduler(own["scheduler"], step)
    own.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if own.get(name) is stand_in:
                own[name] = stand_in._target
            # Offload hooks, and loops that are still running, may keep a reference to it.
            hook = "_stepper" if isinstance_of(stand_in, GuidedScheduler) else "_evaluate"
            object.__setattr__(stand_in, hook, None)


def isinstance_of(stand_in: Any, kind: type) -> bool:
    """`isinstance`, which a stand-in answers for what it stands for."""
    return issubclass(type(stand_in), kind)


def unwrapped(value: Any) -> Any:
    """What a stand-in stands for; any other value itself."""
    return value._target if isinstance_of(value, StandIn) else value


class Runs:
    """The guided calls that a pipeline is in the middle of: more than one only from within."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.depth = 0


_RUNS: weakref.WeakKeyDictionary[Any, Runs] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@contextlib.contextmanager
def one_at_a_time(pipe: Any) -> Iterator[None]:
    """Mark a guided call of a pipeline; a call from within it sees the pipeline as it was before.

    Raises:
        BusyError: another thread is in the middle of a guided call of this very pipeline.
    """
    with aside(pipe):
        with _LOCK:
            runs = _RUNS.setdefault(pipe, Runs())
            _check_thread(pipe, runs)
            runs.depth += 1
        try:
            yield
        finally:
            runs.depth -= 1
            if not runs.depth:
                _RUNS.pop(pipe, None)


@contextlib.contextmanager
def aside(pipe: Any) -> Iterator[None]:
    """Take away, for a while, what the guided call that `pipe` is in the middle of has put there.

    For calls of the same pipeline from within its own loop, such as previews: what these change of
    the pipeline and its scheduler is as before at the end. Elsewhere nothing happens.

    Raises:
        BusyError: another thread is in the middle of a guided call of this very pipeline.
    """
    runs = _RUNS.get(pipe)
    if runs is None:
        yield
        return
    _check_thread(pipe, runs)
    own = pipe.__dict__
    before, scheduler = dict(own), unwrapped(own.get("scheduler"))
    at = dict(vars(scheduler)) if scheduler is not None else {}
    own.update({name: unwrapped(value) for name, value in own.items()})
    try:
        yield
    finally:
        own.clear()
        own.update(before)
        if scheduler is not None:
            vars(scheduler).clear()
            vars(scheduler).update(at)


def _check_thread(pipe: Any, runs: Runs) -> None:
    if runs.thread != threading.get_ident():
        raise BusyError(
            f"this {type(pipe).__name__} is in the middle of a guided call in another thread: give "
            "each thread a pipeline of its own (from_pipe shares the weights)"
        )
