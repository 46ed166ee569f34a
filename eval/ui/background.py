"""Work in a thread of its own, whose news come as a generator that may be closed at any time."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

Result = TypeVar("Result")
Shown = TypeVar("Shown")
Emit = Callable[[Any], None]
WAIT = 0.5  # seconds without news after which None is yielded


class Stopped(BaseException):
    """Raised in the work when nobody waits for it any more. No error: nothing is to catch it."""


def streamed(
    work: Callable[[Emit], Result], lock: threading.Lock, wait: float = WAIT
) -> Generator[Any, None, Result]:
    """Do something in a thread, yield what it emits, and return its result.

    Where there is no news for `wait` seconds None is yielded. When the generator is closed the work
    ends with `Stopped` at the next time that it emits something. The thread does not keep the
    program from ending.

    Args:
        work: Called with a function that emits.
        lock: Held while it works; whoever comes meanwhile waits.
        wait: Seconds.
    """
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    closed = threading.Event()

    def emit(item: Any) -> None:
        if closed.is_set():
            raise Stopped
        news.put(("news", item))

    def run() -> None:
        try:
            with lock:
                if not closed.is_set():
                    news.put(("result", work(emit)))
        except BaseException as error:  # it is raised where the result is waited for
            news.put(("error", error))

    threading.Thread(target=run, name="pilotage work", daemon=True).start()
    try:
        while True:
            try:
                kind, item = news.get(timeout=wait)
            except queue.Empty:
                yield None
                continue
            if kind == "result":
                return item
            if kind == "error":
                raise item
            yield item
    finally:
        closed.set()


def followed(
    news: Generator[Any, None, Result], show: Callable[[Any], Shown]
) -> Generator[Shown, None, Result]:
    """What is to be shown of the news of a generator, and its result; None is no news."""
    with contextlib.closing(news):
        while True:
            try:
                item = next(news)
            except StopIteration as end:
                return end.value
            if item is not None:
                yield show(item)
