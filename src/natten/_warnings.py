"""Warnings that point at the user's line, also where torch.compile traces the code that warns."""

from __future__ import annotations

import sys
import warnings

_given: set[str] = set()


def warn(message: str) -> None:
    """Warn; compiled code does so when it is compiled."""
    warnings.warn(message, stacklevel=_level())


def warn_once(message: str) -> None:
    """Warn, but not in these words again."""
    if message not in _given:
        warnings.warn(message, stacklevel=_level())
        _given.add(message)


# torch.compile runs them while it compiles, instead of breaking the graph. It is what
# torch.compiler.assume_constant_result does, which would import the compiler.
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _level() -> int:
    """The caller's ``stacklevel`` of the first frame that is neither ours nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("natten", "torch"):
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    return level
