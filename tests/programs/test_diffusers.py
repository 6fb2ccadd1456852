"""The examples that use diffusers: models with random weights, and our attention in them."""

import runpy

import pytest
import torch
from helpers import ROOT, assert_close

diffusers = pytest.importorskip("diffusers")


def example(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_decoder_of_ltx_in_parts(capsys):
    names = example("ltx")
    assert names["main"]() == 0
    assert "(1, 3, 9, 96, 96)" in capsys.readouterr().out
    model, latents = names["small_decoder"](), torch.randn(1, 4, 2, 3, 3)
    whole = names["decode"](model, latents)
    for frames in (1, 2, 4, 9):
        model.set_attn_processor(names["AttendInParts"](frames))
        assert_close(f"{frames} frames", whole, names["decode"](model, latents), 1e-5)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        names["AttendInParts"](0)
