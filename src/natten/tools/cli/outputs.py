"""One rule for every file that a command writes.

``-`` is standard output. Folders that are missing are made. What can not be written is refused
before anything runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

STDOUT = "-"


def output(text: str) -> str:
    """Check that a file can be written, as far as one can tell beforehand: an option's type."""
    if text == STDOUT:
        return text
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; add the name of a file")
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if there != path and not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} can not be written: {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} can not be written: no right to {str(there)!r}")
    return text


def write(target: str, content: str | bytes) -> None:
    """Write text with a line's end, or bytes, to what :func:`output` has checked."""
    data = content if isinstance(content, bytes) else f"{content}\n".encode()
    if target == STDOUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
    else:
        path(target).write_bytes(data)


def path(target: str) -> Path:
    """The path of a file to write, in a folder that exists now."""
    found = Path(target)
    found.parent.mkdir(parents=True, exist_ok=True)
    return found
