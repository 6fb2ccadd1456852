"""The examples that use diffusers: models with random weights, and our attention in them."""

import importlib
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


def test_the_layer_that_is_measured_is_the_decoder_s(monkeypatch):
    decoder = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    theirs = decoder.LTX2VideoVaeNeighborhoodAttention(64, (3, 5, 5), head_dim=32)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = importlib.import_module("decoding").Layer(64, (3, 5, 5), head_dim=32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 5, 6, 64)
    for name, a, b in zip("qkv", theirs.project_qkv(x), ours.project_qkv(x), strict=True):
        assert_close(name, a, b, 1e-6)


@pytest.mark.parametrize("text", [1, 7])
@pytest.mark.parametrize("window", [(3, 1), ((4, 5), (2, 3)), ((6, 9), 1)])
def test_windows_in_a_flux(window, text):
    """Outputs and gradients equal those of dense attention with a mask."""
    names, size = example("flux"), (6, 9)
    model, inputs = names["small_flux"](), names["random_inputs"](size, text)
    mask = names["dense_mask"](size, *window, text)
    assert bool(mask.all()) == (window == ((6, 9), 1))

    def run(**options):
        model.zero_grad()
        out = model(**inputs, **options).sample
        out.square().sum().backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, wanted_grads = run(joint_attention_kwargs={"attention_mask": mask})
    model.set_attn_processor(names["WindowedAttention"](size, *window))
    found, grads = run()
    assert_close("output", wanted, found, 1e-5)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        assert_close(name, grad, grads[name], 1e-4)


def test_windows_in_a_flux_refuse_what_they_do_not_know(capsys):
    names = example("flux")
    assert names["main"]() == 0 and "17%" in capsys.readouterr().out
    model, inputs = names["small_flux"](), names["random_inputs"]((6, 9), 5)
    model.set_attn_processor(names["WindowedAttention"]((6, 8), 3))
    with pytest.raises(ValueError, match=r"size is \(6, 8\), but the image has 54 tokens"):
        model(**inputs)
    mask = torch.ones(59, 59, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask"):
        model(**inputs, joint_attention_kwargs={"attention_mask": mask})
