"""A store of plans and masks that are kept between calls, bounded in bytes.

Plans and masks depend on the token layout, and a program may use many layouts. All of them share
one store, which drops the least recently used ones first.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

MOST = 64 << 20  # bytes of everything that is kept
_ENTRY = 512  # about the bytes of an entry's key and bookkeeping


class Store:
    """Values by key, at most ``most`` bytes of them; the least recently used leave first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._newest: tuple[Any, int] | None = None  # saves that a repeated key is hashed again
        self._lock = threading.Lock()

    def find(
        self,
        key: Hashable,
        make: Callable[..., Any],
        size: Callable[[Any], int],
        args: tuple[Any, ...] = (),
    ) -> Any:
        """The value at ``key``. If there is none, ``make(*args)`` makes it, and it is kept.

        Args:
            key: any hashable object.
            make, args: the function and its arguments. It is called without the lock, so two
                threads may make the same value.
            size: gives the bytes of a value. A value larger than ``most`` is not kept.
        """
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                if found is not self._newest:
                    self._entries.move_to_end(key)
                    self._newest = found
                return found[0]
        value = make(*args)
        needed = size(value) + _ENTRY
        with self._lock:
            self._drop(key)
            if needed <= self.most:
                self._entries[key] = self._newest = value, needed
                self.bytes += needed
                while self.bytes > self.most:
                    self._drop(next(iter(self._entries)))
        return value

    def forget(self, belongs: Callable[[Any], bool]) -> None:
        """Drop the entries for whose key ``belongs`` returns True."""
        with self._lock:
            for key in [key for key in self._entries if belongs(key)]:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        _, size = self._entries.pop(key, (None, 0))
        self.bytes -= size
        self._newest = None  # or it would outlive its entry


STORE = Store(MOST)


def kept(size: Callable[[Any], int]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that keeps the results of a function of hashable arguments in ``STORE``.

    Args:
        size: gives the bytes of a result.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Hashable) -> Any:
            return STORE.find((function, *args), function, size, args)

        wrapper.cache_clear = lambda: STORE.forget(  # type: ignore[attr-defined]
            lambda key: key[0] is function
        )
        return wrapper

    return decorate
