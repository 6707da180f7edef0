"""Reads ahead and writes behind in threads, a few items at most; errors surface in the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T]:
    """Iterate in a thread; an exception there is raised here.

    At most `depth` items are made or wait, beside the one that was yielded last.
    """
    made: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    stop, end, places = Event(), object(), Semaphore(depth)

    def work() -> None:
        item = None
        try:
            source = iter(items)
            while item is not end:
                places.acquire()
                if stop.is_set():
                    return
                item = next(source, end)
                made.put((item, None))
        except BaseException as error:  # raised in the consumer
            made.put((end, error))

    thread = Thread(target=work, name="reader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            places.release()
            yield item
    finally:
        stop.set()
        places.release()
        thread.join()


class Behind(Generic[T]):
    """Consumes items in a thread. `put` and exit raise its exception.

    At most `depth` items wait or are consumed, beside the one that the caller makes.
    """

    def __init__(self, consume: Callable[[T], None], depth: int = 2) -> None:
        self._consume, self._items = consume, SimpleQueue[Any]()
        self._places, self._stop, self._end = Semaphore(depth), Event(), object()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, name="writer", daemon=True)
        self.waited = 0.0

    def put(self, item: T) -> None:
        """Pass one item to the thread; waits until there is a place for it."""
        begin = time.perf_counter()
        self._places.acquire()
        self.waited += time.perf_counter() - begin
        if self._error is not None:
            self._places.release()
            raise self._error
        self._items.put(item)

    def _work(self) -> None:
        try:
            while (item := self._items.get()) is not self._end and not self._stop.is_set():
                self._consume(item)
                del item  # its memory is free before there is a place for another
                self._places.release()
        except BaseException as error:  # raised in the producer
            self._error = error
            self._places.release()

    def __enter__(self) -> Behind[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        begin = time.perf_counter()
        if kind is not None:
            self._stop.set()
        self._items.put(self._end)
        self._thread.join()
        self.waited += time.perf_counter() - begin
        if kind is None and self._error is not None:
            raise self._error
