"""Tiles that were measured to be fastest, remembered on disk.

``natten profile --optimize`` and :func:`natten.use_autotuner` write them, the backends read them.
There is one small file per device, version and problem, which is replaced in one step: processes
that write at once do no harm.

The directory is ``$NATTEN_CACHE``, else ``$XDG_CACHE_HOME/natten``, else ``~/.cache/natten``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .version import __version__

_log = logging.getLogger("natten")
_trials: dict[str, Any] = {}
_wanted = {"forward": 0, "backward": 0}
_caches: list[Any] = []
Function = TypeVar("Function", bound=Callable[..., Any])
Tiles = TypeVar("Tiles")


def directory() -> Path:
    """Where tiles for this device and version are."""
    root = os.environ.get("NATTEN_CACHE")
    if not root:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(caches, "natten")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Path(root, "tiles", f"{_plain(device)}-{__version__}")


def lookup(key: str) -> Any | None:
    """What was remembered of ``key``, or None.

    Args:
        key: names a kernel and a problem; different ones have different keys.

    Returns:
        What :func:`remember` was given, after a round trip through JSON.
    """
    if key in _trials:
        return _trials[key]
    try:
        return json.loads(_path(key).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.debug("%s is ignored: %s", _path(key), error)
        return None


def choose(key: str, candidates: Sequence[Tiles]) -> Tiles:
    """The candidate that was remembered of ``key``, else the first one.

    What was remembered need not be among them: another version or GPU may have written it.
    """
    known = _tuples(lookup(key))
    return next((tiles for tiles in candidates if tiles == known), candidates[0])


def remember(key: str, tiles: Any, forget: bool = True) -> Path:
    """Write what :func:`lookup` shall return from now on, in every process.

    Args:
        key: as in :func:`lookup`.
        tiles: anything that JSON can hold.
        forget: whether functions under :func:`cached` forget what they chose before.

    Returns:
        The file.

    Raises:
        OSError: the directory can not be written.
    """
    path = _path(key)
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
    """Inside, :func:`lookup` returns ``tiles`` for ``key``, in this process."""
    before = dict(_trials)
    _trials[key] = tiles
    _forget_choices()
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)
        _forget_choices()


def autotune(forward: int, backward: int) -> None:
    """How many tiles to time at the first call of a problem of which nothing is remembered.

    Args:
        forward, backward: for kernels of the forward and of the backward pass; 0 is off.
    """
    _wanted.update(forward=forward, backward=backward)
    _forget_choices()


def wanted(backward: bool) -> int:
    """What :func:`autotune` was told."""
    return _wanted["backward" if backward else "forward"]


def times(
    name: str, candidates: Iterable[Any], measure: Callable[[Any], float]
) -> dict[Any, float]:
    """The time of each candidate; infinite where it can not run, as what does not fit the GPU.

    Args:
        name: of the kernel, for the message.
        candidates: tiles, hashable.
        measure: runs one and says how long that takes.

    Raises:
        RuntimeError: none of them runs.
    """
    found: dict[Any, float] = {}
    reason = ""  # not the exception, whose traceback would keep the tensors of all callers
    for candidate in candidates:
        try:
            found[candidate] = measure(candidate)
        # Compilers have their own classes: too much shared memory, too many registers.
        except Exception as error:
            found[candidate], reason = math.inf, f"{type(error).__name__}: {error}"
            _log.debug("%s: %s is passed over: %s", name, candidate, reason)
    if all(time == math.inf for time in found.values()):
        raise RuntimeError(f"none of the tiles of {name} runs here: {reason}")
    return found


def cached(function: Function) -> Function:
    """``functools.lru_cache`` that is emptied when :func:`lookup` changes, as all choices are."""
    cache = functools.lru_cache(maxsize=1024)(function)
    _caches.append(cache)
    return cache  # type: ignore[return-value]


class Bounded(dict[Any, Any]):
    """A dictionary that stays small: emptied when full."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: Any, value: Any) -> None:
        """Let ``value`` be found at ``key``."""
        if len(self) >= self.most:
            self.clear()
        self[key] = value


class Kept(Bounded):
    """As :func:`cached`, for what is worked out from more than its key."""

    def __init__(self) -> None:
        super().__init__(1024)
        _caches.append(self)

    cache_clear = dict.clear


def _forget_choices() -> None:
    for cache in _caches:
        cache.cache_clear()


def _tuples(x: Any) -> Any:
    """Undo what JSON makes of tuples."""
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", text)


def _path(key: str) -> Path:
    return directory() / f"{_plain(key)}.json"
