"""Warnings that point at the user's line, also if torch.compile traces the code that warns."""

from __future__ import annotations

import sys
import warnings

from ._torch import run_while_compiling

_given: set[str] = set()
_SKIPPED = (f"{__package__}.", "torch.")


@run_while_compiling
def warn(message: str) -> None:
    """Warn; compiled code warns when it is compiled."""
    warnings.warn(message, stacklevel=_level())


@run_while_compiling
def warn_once(message: str) -> None:
    """Warn, but only once with the same message."""
    if message not in _given:
        warnings.warn(message, stacklevel=_level())
        _given.add(message)


def _level() -> int:
    """The ``stacklevel``, as seen by the caller, of the first frame outside natten and torch."""
    level, frame = 1, sys._getframe(1)
    while f"{frame.f_globals.get('__name__')}.".startswith(_SKIPPED):
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    return level
