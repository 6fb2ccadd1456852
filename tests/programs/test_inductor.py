"""Programs that PyTorch compiles to C++: with torch.compile, and ahead of time as packages."""

import shutil

import pytest
import torch
from helpers import assert_close
from torch.export import Dim, export

import natten

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def test_compiled_programs():
    def function(q):
        return natten.na1d(q * 2, q, q, 3).relu()

    q = torch.randn(1, 6, 2, 4)
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    assert_close("inductor", function(q), compiled(q), 1e-5)


class Packaged(torch.nn.Module):
    """A module with a layer, plain attention and unfused operators, in two dtypes."""

    def __init__(self):
        super().__init__()
        self.layer = natten.NeighborhoodAttention2D(
            16, 2, 3, dilation=(1, 2), is_causal=(True, False), rel_pos_bias=True
        )
        self.low = natten.NeighborhoodAttention1D(16, 2, 3).bfloat16()

    def forward(self, x):
        y = self.layer(x)
        heads = y.unflatten(-1, (2, 8))
        first = heads.movedim(-2, 1)
        tokens = heads.flatten(1, 2)
        dense, lse = natten.attention(tokens, tokens, tokens, return_lse=True)
        attn = natten.na2d_qk(first, first, 3).softmax(-1)
        return y, dense, lse, natten.na2d_av(attn, first, 3), self.low(x[:, 0].bfloat16())


def test_packages(tmp_path):
    """Packages are compiled ahead of time, loaded, and run with other batch sizes."""
    module, x = Packaged().eval(), torch.randn(2, 5, 7, 16)
    fast = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # to compile; PyTorch 2.6 lacks it
    if not hasattr(torch._inductor.config.aot_inductor, "compile_wrapper_opt_level"):
        fast = {}
    with torch.no_grad():
        program = export(module, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs=fast,
        )
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (2, 3):
            x = torch.randn(batch, 5, 7, 16)
            for expected, found in zip(module(x), loaded(x), strict=True):
                assert found.dtype == expected.dtype
                ratio = 1e-2 if found.dtype == torch.bfloat16 else 1e-5
                assert_close("package", expected, found, ratio)
