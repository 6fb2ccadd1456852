"""The examples run; ``make demo`` shows how well the full training does."""

import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digits(tmp_path, capsys):
    for needed in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(needed)
    with warnings.catch_warnings():  # other libraries may warn of deprecations
        warnings.simplefilter("ignore")
        example = runpy.run_path(str(EXAMPLES / "digits.py"))
    picture = tmp_path / "pictures" / "digits.png"
    status = example["main"](["--epochs", "1", "--output", str(picture)])
    output = capsys.readouterr()
    assert "test accuracy" in output.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert status == 1 and "below the goal" in output.err
