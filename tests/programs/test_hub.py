"""The folder of ``make hub``: what kernels loads, and what diffusers does with it."""

import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT, assert_close

import natten

kernels = pytest.importorskip("kernels")
HUB = runpy.run_path(str(ROOT / ".ci" / "hub.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    HUB["write"](folder)
    HUB["write"](folder)  # once more, in place of the first
    return folder


@pytest.fixture(autouse=True)
def local_kernels(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"shi-labs/natten={folder}")


def operators(module: ModuleType) -> list[str]:
    """The operators in a program that was exported from a call of the module."""

    class Layer(torch.nn.Module):
        def forward(self, x):
            return module.na1d(x, x, x, kernel_size=3)

    program = torch.export.export(Layer(), (torch.randn(1, 6, 1, 8),))
    return [str(node.target) for node in program.graph.nodes if "attention" in str(node.target)]


def test_get_kernel_beside_the_installed_package(folder):
    module = kernels.get_kernel("shi-labs/natten", version=1)
    backend = "cuda" if torch.version.cuda else "cpu"
    name = f"natten_{natten.__version__.replace('.', '_')}_{backend}"
    assert module.__name__ == name and Path(module.__file__).is_relative_to(folder)
    assert operators(module) == [f"{name}.attention.default"]
    assert operators(natten) == ["natten.attention.default"]
    found = []
    for each in (module, natten):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 4, 6, 5, 2, 8, requires_grad=True) for _ in range(3))
        out = each.na3d(q, k, v, kernel_size=(3, 5, 3), scale=1.0, backend=None)
        found.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    assert all(map(torch.equal, *found))
    assert kernels.get_local_kernel(folder) is module


@pytest.mark.parametrize("backend", HUB["BACKENDS"])
def test_every_variant_loads(backend, folder):
    """Named as the loader names it for that backend; here each of them runs on the CPU."""
    module = kernels.get_local_kernel(folder / "build" / f"torch-{backend}")
    assert module.__name__.endswith(f"_{backend}")
    x = torch.randn(1, 6, 1, 8)
    assert torch.equal(module.na1d(x, x, x, 3), natten.na1d(x, x, x, 3))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_decoder_of_ltx(folder, monkeypatch):
    """LTX-2.5's, with diffusers' processor that asks the Hub for na3d, beside FlexAttention."""
    decoder = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")
    example = runpy.run_path(str(ROOT / "examples" / "ltx.py"))
    model, latents = example["small_decoder"](), torch.randn(1, 4, 2, 3, 3)
    flex = example["decode"](model, latents)
    processor = decoder.LTX2VideoVaeNeighborhoodNattenProcessor()
    assert processor._na3d is kernels.get_kernel("shi-labs/natten", version=1).na3d
    calls = []
    monkeypatch.setattr(
        processor, "_na3d", lambda *a, na3d=processor._na3d, **b: calls.append(b) or na3d(*a, **b)
    )
    model.set_attn_processor(processor)
    assert_close("decoder", flex, example["decode"](model, latents), 1e-5)
    windows = [each["kernel_size"] for each in calls]
    assert windows == [(3, 3, 3), (3, 3, 3), (3, 5, 5), (3, 5, 5), (5, 5, 5), (5, 5, 5)]
    assert all(each.keys() == {"kernel_size", "scale", "backend"} for each in calls)
