"""An iterator's items, made ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import TypeVar

Item = TypeVar("Item")

PAUSE = 0.1  # seconds; how soon a thread that waits for room sees that nobody wants more


class _End:
    pass


def prefetch(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The same items, up to `depth` of them made before they are asked for.

    An exception reaches the consumer in the place of the item. Closing the generator ends the
    thread and closes `items` there.
    """
    ready: queue.Queue[Item | _End | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def hand_over(item: Item | _End | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=PAUSE)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        last: _End | BaseException = _End()
        try:
            for item in items:
                if not hand_over(item):
                    break
        except BaseException as error:
            last = error
        finally:
            items.close()
        hand_over(last)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
