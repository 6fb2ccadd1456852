"""Which release of Triton is installed, and which ones the kernels need; this file needs none."""

from __future__ import annotations

import functools
import re

OLDEST = (3, 4)  # the portable kernels index tuples of constants, and 3.3 can not
# With these Hopper's kernels are compiled, and the short launch is compared with Triton's own.
CHECKED = ((3, 6), (3, 7), (3, 8), (3, 9))


def version() -> str | None:
    """The version of the Triton that is installed, None if there is none."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


@functools.cache
def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version; zeros if it has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
