"""Tests of kernels that Triton interprets, each file in a process of its own."""

import pathlib

import numpy as np
import pytest
from helpers import run_interpreted

from natten.backends.triton import releases

TRITON = releases.release(releases.version() or "")
pytestmark = [
    pytest.mark.skipif(TRITON < releases.OLDEST, reason="needs Triton 3.4 or newer"),
    pytest.mark.skipif(
        TRITON < (3, 7) and releases.release(np.__version__) >= (2, 3),
        reason="the interpreter of this Triton needs NumPy before 2.3",
    ),
]
FILES = sorted((pathlib.Path(__file__).parent / "interpreter").glob("test_*.py"))
EMPTY_ROWS = ["test_a_bias_hides_everything[2-triton]", "test_additional_tokens_are_left[triton]"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    run_interpreted(str(file))


def test_rows_with_nothing_to_attend():
    run_interpreted(*(f"tests/test_empty_rows.py::{name}" for name in EMPTY_ROWS))


FAILURES = {
    "a test fails": "def test(): assert 5 == 6, 'inner message'",
    "no test": "pass",
    "every test is skipped": "import pytest\ndef test(): pytest.skip('no')",
    "the process dies": "import os\ndef test_a(): pass\ndef test_b(): os._exit(0)",
}


@pytest.mark.parametrize("reason", FAILURES)
def test_failures_are_not_lost(reason, tmp_path):
    file = tmp_path / "test_inner.py"
    file.write_text(FAILURES[reason])
    with pytest.raises(AssertionError, match="exit code") as failure:
        run_interpreted(str(file))
    assert reason != "a test fails" or "inner message" in str(failure.value)
