"""The examples do what they promise."""

import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("epochs", [1, None], ids=["one epoch", "all epochs"])
def test_digits(epochs, tmp_path, capsys):
    """One epoch is not enough, and the example says so; all of them reach the goal."""
    for needed in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(needed)
    with warnings.catch_warnings():  # other libraries may warn of deprecations
        warnings.simplefilter("ignore")
        example = runpy.run_path(str(EXAMPLES / "digits.py"))
    picture = tmp_path / "pictures" / "digits.png"
    few = [] if epochs is None else ["--epochs", str(epochs)]
    status = example["main"]([*few, "--output", str(picture)])
    output = capsys.readouterr()
    assert "test accuracy" in output.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ("below the goal" in output.err) == (status == 1) == (epochs is not None)
