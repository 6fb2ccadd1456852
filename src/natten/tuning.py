"""Tiles that were measured to be fastest, remembered on disk.

``natten profile --optimize`` and :func:`use_autotuner` write them, and the backends read them.
There is one small file for each device, version and problem. A file is replaced in one step, so
that processes may write at the same time.

The directory is ``$NATTEN_CACHE``, else ``$XDG_CACHE_HOME/natten``, else ``natten`` where the
system keeps caches: ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ._warnings import warn
from .errors import ArgumentError
from .version import __version__

_log = logging.getLogger("natten")
_trials: dict[str, Any] = {}
_caches: list[Any] = []
Function = TypeVar("Function", bound=Callable[..., Any])
Tiles = TypeVar("Tiles")


def directory() -> Path:
    """The directory of tiles for this device and version."""
    return Path(_directory())


def _directory() -> str:
    root = os.environ.get("NATTEN_CACHE") or os.path.join(_home(), "natten")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return os.path.join(root, "tiles", f"{_plain(device)}-{__version__}")


def _home() -> str:
    """Where programs keep what they can make again."""
    wanted = os.environ.get("XDG_CACHE_HOME")
    if wanted:
        return wanted
    if sys.platform == "win32":
        return os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    return os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")


def lookup(key: str) -> Any | None:
    """The tiles that are remembered for ``key``, or None.

    Args:
        key: the name of a kernel and a problem; different ones have different keys.

    Returns:
        The tiles given to :func:`remember`, after a round trip through JSON.
    """
    if key in _trials:
        return _trials[key]
    try:
        with open(_path(key), encoding="utf-8") as file:  # a Path takes as long again
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.debug("%s is ignored: %s", _path(key), error)
        return None


def choose(
    key: str, candidates: Callable[[], Sequence[Tiles]], usual: Callable[[], Tiles]
) -> Tiles:
    """The tiles that are remembered for ``key``, else the usual ones.

    The remembered tiles need not be a candidate, because another version may have written them.

    Args:
        key: as in :func:`lookup`.
        candidates: makes all tiles that can run.
        usual: makes the usual ones.
    """
    known = lookup(key)
    if known is None:
        return usual()
    known = _tuples(known)
    return next((tiles for tiles in candidates() if tiles == known), None) or usual()


def remember(key: str, tiles: Any, forget: bool = True) -> Path:
    """Write the tiles that :func:`lookup` returns from now on, in every process.

    Args:
        key: as in :func:`lookup`.
        tiles: any object that JSON can hold.
        forget: whether to drop all results that were kept by :func:`cached` and :class:`Kept`.

    Returns:
        The file.

    Raises:
        OSError: the directory can not be written.
    """
    path = Path(_path(key))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(tiles, file)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if forget:
        _forget_choices()
    return path


@contextlib.contextmanager
def trial(key: str, tiles: Any) -> Iterator[None]:
    """Let :func:`lookup` return ``tiles`` for ``key`` inside the context, in this process."""
    before = dict(_trials)
    _trials[key] = tiles
    _forget_choices()
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)
        _forget_choices()


class Autotuner:
    """The settings of :func:`use_autotuner`."""

    enabled_for_forward: bool = False
    enabled_for_backward: bool = False
    thorough_mode_forward: bool = False
    thorough_mode_backward: bool = False


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
) -> None:
    """Time a few tiles at the first GPU call of each problem, and remember the fastest on disk.

    A setting of None stays as it is. PyTorch's deterministic mode warns and leaves all as it is,
    because the tiles, and so the rounding, depend on the clock.

    Args:
        forward_pass, backward_pass: whether to time tiles of this pass.
        thorough_mode_forward, thorough_mode_backward: whether to time 24 tiles instead of 6.

    Raises:
        ArgumentError: a setting is no bool.

    Example:
        >>> use_autotuner(backward_pass=True)
        >>> wanted(backward=True), wanted(backward=False)
        (6, 0)
        >>> disable_autotuner()
    """
    settings = (
        ("forward_pass", "enabled_for_forward", forward_pass),
        ("backward_pass", "enabled_for_backward", backward_pass),
        ("thorough_mode_forward", "thorough_mode_forward", thorough_mode_forward),
        ("thorough_mode_backward", "thorough_mode_backward", thorough_mode_backward),
    )
    for name, _, flag in settings:
        if flag is not None and not isinstance(flag, bool):
            raise ArgumentError(f"`{name}` must be None or a bool, got {type(flag)}: {flag!r}.")
    if (forward_pass or backward_pass) and torch.are_deterministic_algorithms_enabled():
        warn("natten's autotuner is left off, because PyTorch's deterministic mode is on")
        return
    for _, setting, flag in settings:
        if flag is not None:
            setattr(Autotuner, setting, flag)
    _forget_choices()


def disable_autotuner() -> None:
    """Turn both passes and the thorough modes off."""
    use_autotuner(False, False, False, False)


def wanted(backward: bool) -> int:
    """How many tiles to time at the first call of a problem without remembered tiles."""
    if backward:
        enabled, thorough = Autotuner.enabled_for_backward, Autotuner.thorough_mode_backward
    else:
        enabled, thorough = Autotuner.enabled_for_forward, Autotuner.thorough_mode_forward
    return enabled * (24 if thorough else 6)


def times(
    name: str, candidates: Iterable[Any], measure: Callable[[Any], float]
) -> dict[Any, float]:
    """The time of each candidate; it is infinite if the candidate does not fit the GPU.

    Args:
        name: the name of the kernel, for messages.
        candidates: hashable tiles.
        measure: runs the kernel with a candidate and returns the time.

    Raises:
        RuntimeError: no candidate runs.
    """
    found: dict[Any, float] = {}
    reason = ""  # the text only: an exception's traceback would keep the tensors of all callers
    for candidate in candidates:
        try:
            found[candidate] = measure(candidate)
        # Compilers raise classes of their own for too much shared memory or too many registers.
        except Exception as error:
            found[candidate], reason = math.inf, f"{type(error).__name__}: {error}"
            _log.debug("%s: %s is passed over: %s", name, candidate, reason)
    if all(time == math.inf for time in found.values()):
        raise RuntimeError(f"none of the tiles of {name} runs here: {reason}")
    return found


def cached(function: Function) -> Function:
    """A ``functools.lru_cache`` that is emptied when the answers of :func:`lookup` change."""
    cache = functools.lru_cache(maxsize=1024)(function)
    _caches.append(cache)
    return cache  # type: ignore[return-value]


class Bounded(dict[Any, Any]):
    """A dictionary that stays small, because it is emptied when it is full."""

    __slots__ = ("most",)

    def __init__(self, most: int) -> None:
        self.most = most

    def find(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        """The value at ``key``. If there is none, ``make(*args)`` makes it, and it is kept."""
        found = self.get(key)
        if found is None:
            found = make(*args)
            self.keep(key, found)
        return found

    def keep(self, key: Any, value: Any) -> None:
        """Store ``value`` at ``key``."""
        if len(self) >= self.most:
            self.clear()
        self[key] = value


class Kept(Bounded):
    """Like :func:`cached`, for values that follow from more than their keys."""

    def __init__(self) -> None:
        super().__init__(1024)
        _caches.append(self)

    cache_clear = dict.clear


def _forget_choices() -> None:
    for cache in _caches:
        cache.cache_clear()


def _tuples(x: Any) -> Any:
    """Turn the lists that JSON makes of tuples back into tuples."""
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", text)


def _path(key: str) -> str:
    return os.path.join(_directory(), f"{_plain(key)}.json")
