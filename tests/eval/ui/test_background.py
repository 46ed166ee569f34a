"""Work in a thread, as a generator."""

import threading

import pytest

from pilotage.eval.ui.background import Stopped, followed, streamed


def result(news, seen=None):
    """What a generator returns; `seen` is given what it yields."""
    while True:
        try:
            item = next(news)
        except StopIteration as end:
            return end.value
        if seen is not None and item is not None:
            seen.append(item)


def test_news_and_result():
    def work(emit):
        emit("a")
        emit("b")
        return "done"

    seen = []
    assert result(streamed(work, threading.Lock()), seen) == "done"
    assert seen == ["a", "b"]
    assert list(followed(streamed(work, threading.Lock()), str.upper)) == ["A", "B"]


def test_silence_is_none():
    go_on = threading.Event()
    news = streamed(lambda emit: go_on.wait(), threading.Lock(), wait=0.01)
    assert next(news) is None
    go_on.set()
    assert result(news) is True


def test_errors_are_raised_where_the_result_is_waited_for():
    def work(emit):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        result(streamed(work, threading.Lock()))


def test_closing_ends_the_work():
    asked, ended, lock = threading.Event(), [], threading.Lock()

    def work(emit):
        emit("begun")
        asked.wait()
        try:
            emit("nobody listens")
        except Stopped:
            ended.append(True)
            raise

    news = followed(streamed(work, lock), str)
    assert next(news) == "begun"
    news.close()
    asked.set()
    with lock:  # given back
        assert ended == [True]


def test_one_waits_for_the_other():
    lock, go_on, order = threading.Lock(), threading.Event(), []

    def first(emit):
        emit("begun")
        go_on.wait()
        order.append("first")

    one = streamed(first, lock, wait=0.01)
    assert next(one) == "begun"
    other = streamed(lambda emit: order.append("second"), lock, wait=0.01)
    assert next(other) is None and order == []
    go_on.set()
    result(other)
    result(one)
    assert order == ["first", "second"]


def test_who_leaves_the_queue_is_not_waited_for():
    lock, done = threading.Lock(), []
    with lock:
        news = streamed(lambda emit: done.append(True), lock, wait=0.01)
        assert next(news) is None
        news.close()
    for thread in threading.enumerate():
        if thread.name == "pilotage work":
            thread.join()
    assert done == []
