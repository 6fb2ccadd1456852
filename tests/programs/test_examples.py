"""The examples do what they promise."""

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, *needed: str) -> dict[str, Any]:
    """The names of an example, which needs these packages."""
    for package in needed:
        pytest.importorskip(package)
    with warnings.catch_warnings():  # other libraries may warn of deprecations
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.parametrize("epochs", [1, None], ids=["one epoch", "all epochs"])
def test_digits(epochs, tmp_path, capsys):
    """One epoch is not enough, and the example says so; all of them reach the goal."""
    example = load("digits.py", "sklearn", "rich", "matplotlib")
    picture = tmp_path / "pictures" / "digits.png"
    few = [] if epochs is None else ["--epochs", str(epochs)]
    status = example["main"]([*few, "--output", str(picture)])
    output = capsys.readouterr()
    assert "test accuracy" in output.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ("below the goal" in output.err) == (status == 1) == (epochs is not None)


@pytest.fixture(scope="module")
def weather():
    return load("weather.py", "rich", "matplotlib")


def test_weather(weather, tmp_path, capsys):
    """Two steps are not enough, and the example says so."""
    picture = tmp_path / "pictures" / "weather.png"
    assert weather["main"](["--steps", "2", "--output", str(picture)]) == 1
    output = capsys.readouterr()
    assert "12 hours ahead: error" in output.out and "of persistence's" in output.out
    assert "above the goal" in output.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_ocean_keeps_its_water(weather):
    torch.manual_seed(0)
    heights = weather["simulate"](2, 5).double()
    area = weather["LATITUDE"].deg2rad().cos()
    volume = (heights * area).sum((-2, -1))
    torch.testing.assert_close(volume, volume[:, :1].expand_as(volume), rtol=1e-4, atol=1e-3)
    assert not heights[..., ~weather["is_sea"]()].any()
    assert (heights.diff(dim=1).abs().amax((-2, -1)) > 0.1).all()  # and it moves


def test_the_forecaster_is_causal_and_goes_around_the_globe(weather):
    torch.manual_seed(0)
    model = weather["Forecaster"](scale=0.2)
    torch.nn.init.normal_(model.head.weight)
    heights = 0.2 * torch.randn(1, 4, *weather["is_sea"]().shape)
    out = model(heights)
    later = heights.clone()
    later[:, 2:] += 1
    torch.testing.assert_close(model(later)[:, :2], out[:, :2])
    model.sea, model.where = model.sea.roll(6, -1), model.where.roll(6, -1)
    model.tokens = model.tokens.roll(3, -1)  # patches of two cells
    torch.testing.assert_close(model(heights.roll(6, -1)), out.roll(6, -1), rtol=1e-4, atol=1e-4)
