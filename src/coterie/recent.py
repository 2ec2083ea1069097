"""A dictionary that cannot grow with the number of customers: what is old leaves it, and so does what is too much.

Notable: entries lie in the order in which they were put, so those that are over stand at the front, and each `put`
takes them away there. A plain bound would keep what is over until as many others have come: all of it, on a small desk.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last `most` entries that were put, none for longer than `seconds` of `clock`. Safe to use from several
    threads. `get` does not make an entry younger; `put` does."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.seconds, self.clock = most, seconds, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()  # with the time at which it was put

    def __len__(self) -> int:
        """How many are in memory; some may be over, until the next is put."""
        return len(self._kept)

    def get(self, key: K) -> V | None:
        """The entry, while it lasts."""
        with self._lock:
            at, value = self._kept.get(key, (0.0, None))
            return value if value is not None and self.clock() - at < self.seconds else None

    def put(self, key: K, value: V) -> None:
        """Keep it, in place of the former one; what is over or too much is dropped."""
        with self._lock:
            now = self.clock()
            self._kept[key] = now, value
            self._kept.move_to_end(key)
            while len(self._kept) > self.most or now - next(iter(self._kept.values()))[0] >= self.seconds:
                self._kept.popitem(last=False)

    def values(self) -> list[V]:
        """Those in memory, oldest first; some may be over."""
        with self._lock:
            return [value for _, value in self._kept.values()]

    def drop(self, key: K) -> None:
        """Forget it, if it is there."""
        with self._lock:
            self._kept.pop(key, None)
