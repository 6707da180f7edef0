"""Threads that read ahead and write behind keep order, bounds and errors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.stream.threads import Behind, ahead


class Counted:
    """Counts how many of its items were made and not yet let go."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def make(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def drop(self) -> None:
        with self._lock:
            self.now -= 1


def numbers(count: int, counted: Counted, pause: float = 0) -> Iterator[int]:
    for i in range(count):
        counted.make()
        time.sleep(pause)
        yield i


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in ("reader", "writer")]


pauses = st.lists(st.sampled_from([0, 0, 1e-3]), min_size=2, max_size=2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(1, 3), pauses)
def test_at_most_depth_items_are_made_beside_the_one_in_use(count, depth, pauses):
    counted, found = Counted(), []
    for item in ahead(numbers(count, counted, pauses[0]), depth):
        time.sleep(pauses[1])
        found.append(item)
        counted.drop()
    assert found == list(range(count))
    assert counted.most <= depth + 1


def test_reading_goes_on_while_an_item_is_in_use():
    counted = Counted()
    with contextlib.closing(ahead(numbers(5, counted), 2)) as items:
        assert next(items) == 0
        end = time.monotonic() + 10
        while counted.now < 3 and time.monotonic() < end:
            time.sleep(1e-3)
        time.sleep(0.05)
        assert counted.now == 3
    assert not threads()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(1, 3), pauses)
def test_at_most_depth_items_wait_beside_the_one_that_is_made(count, depth, pauses):
    counted, found = Counted(), []

    def consume(item: int) -> None:
        time.sleep(pauses[0])
        found.append(item)
        counted.drop()

    with Behind(consume, depth) as sink:
        for item in numbers(count, counted, pauses[1]):
            sink.put(item)
    assert found == list(range(count))
    assert counted.most <= depth + 1
    assert not threads()


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_while_reading_is_raised_in_its_place(at):
    found = []

    def failing() -> Iterator[int]:
        yield from range(at)
        raise OSError("no more")

    def read() -> None:
        found.extend(iter(ahead(failing(), 1)))

    with pytest.raises(OSError, match="no more"):
        read()
    assert not threads()
    with contextlib.closing(ahead(failing(), 1)) as items:
        assert [next(items) for _ in range(at)] == list(range(at))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_an_error_while_writing_is_raised_by_put_or_at_the_end(count, depth):
    put = []

    def consume(item: int) -> None:
        time.sleep(1e-3)
        raise OSError("disk full")

    def write() -> None:
        with Behind(consume, depth) as sink:
            for item in range(count):
                sink.put(item)
                put.append(item)

    with pytest.raises(OSError, match="disk full"):
        write()
    assert len(put) <= depth + 1
    assert not threads()


def test_every_put_after_an_error_raises_it():
    raised = []

    def consume(item: int) -> None:
        raise OSError("disk full")

    def write() -> None:
        with Behind(consume, 1) as sink:
            for item in range(5):
                try:
                    sink.put(item)
                except OSError:
                    raised.append(item)

    with pytest.raises(OSError, match="disk full"):
        write()
    assert raised == list(range(5))[-len(raised) :]
    assert len(raised) >= 3
    assert not threads()


def test_an_error_of_the_caller_leaves_what_waits():
    found, begun = [], threading.Event()

    def consume(item: int) -> None:
        begun.set()
        time.sleep(0.05)
        found.append(item)

    def write() -> None:
        with Behind(consume, 3) as sink:
            for item in range(3):
                sink.put(item)
            assert begun.wait(10)
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert found == [0]
    assert not threads()


def test_a_reader_that_is_closed_early_ends():
    counted = Counted()
    items = ahead(numbers(100, counted), 2)
    assert next(items) == 0
    items.close()
    assert not threads()
    assert counted.now < 5
