"""Reads ahead and writes behind in threads with bounded queues; errors surface in the caller."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T]:
    """Iterate in a thread, `depth` items ahead; an exception there is raised here."""
    queue: Queue[tuple[Any, BaseException | None]] = Queue(depth)
    stop, end = Event(), object()

    def offer(item: Any, error: BaseException | None = None) -> None:
        while not stop.is_set():
            with contextlib.suppress(Full):
                queue.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                offer(item)
                if stop.is_set():
                    return
            offer(end)
        except BaseException as error:  # raised in the consumer
            offer(end, error)

    thread = Thread(target=work, name="reader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


class Behind(Generic[T]):
    """Consumes items in a thread; at most `depth` wait. `put` and exit raise its exception."""

    def __init__(self, consume: Callable[[T], None], depth: int = 2) -> None:
        self._consume, self._queue = consume, Queue[Any](depth)
        self._error: BaseException | None = None
        self._stop, self._end = Event(), object()
        self._thread = Thread(target=self._work, name="writer", daemon=True)
        self.waited = 0.0

    def put(self, item: T) -> None:
        """Pass one item to the thread; waits while the queue is full."""
        begin = time.perf_counter()
        self._offer(item)
        self.waited += time.perf_counter() - begin

    def _offer(self, item: Any) -> None:
        while self._error is None:
            with contextlib.suppress(Full):
                self._queue.put(item, timeout=0.1)
                return
        raise self._error

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with contextlib.suppress(Empty):
                    item = self._queue.get(timeout=0.1)
                    if item is self._end:
                        return
                    self._consume(item)
        except BaseException as error:  # raised in the producer
            self._error = error

    def __enter__(self) -> Behind[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
            self._thread.join()
            return
        begin = time.perf_counter()
        self._offer(self._end)
        self._thread.join()
        self.waited += time.perf_counter() - begin
        if self._error is not None:
            raise self._error
