"""Which releases of Triton the kernels compile with; this file needs none."""

from __future__ import annotations

import re

KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))


def release() -> tuple[int, int]:
    """Major and minor number of the Triton that is installed; zeros if there is none."""
    try:
        import triton
    except ImportError:
        return 0, 0
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)
