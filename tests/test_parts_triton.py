"""The Triton kernels' parts of a layout, finer queries, and truncated and circular windows."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from natten.backends.triton import releases

ROOT = pathlib.Path(__file__).parent.parent
FOUND = releases.release(releases.version() or "")
pytestmark = pytest.mark.skipif(FOUND < releases.OLDEST, reason="needs Triton 3.4 or newer")


@pytest.mark.skipif(
    FOUND < (3, 7) and releases.release(np.__version__) >= (2, 3),
    reason="the interpreter of this Triton needs NumPy before 2.3",
)
def test_kernels_interpreted() -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/interpreter/test_parts.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
