"""Uses of the package for test_types.py: type checkers must object to the marked lines only."""

import torch
from torch import Tensor, nn

import natten
from natten import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    VarlenLayout,
    attention,
    fit_window,
    merge_attentions,
    na1d,
    na2d,
    na2d_av,
    na2d_qk,
    na2d_varlen,
    na3d,
    neighborhood_attention_generic,
)
from natten import na2dx  # wrong
from natten.draw import draw_mask
from natten.profiler import Problem, profile
from natten.simulator import simulate

q = torch.randn(1, 8, 8, 2, 4)
bias = nn.Parameter(torch.zeros(2, 5, 5))


def fused(flag: bool) -> None:
    out: Tensor = na2d(q, q, q, 3)
    out = na2d(q, q, q, (3, 3), 1, [2, 1], (True, False), 0.5, rpb=bias, backend="tiled")
    out = natten.functional.na2d(q, q, q, kernel_size=3, q_tile_shape=(8, 8), torch_compile=False)
    out = neighborhood_attention_generic(q, q, q, 3, return_lse=False)
    out, lse = na2d(q, q, q, 3, return_lse=True)
    lse = lse + 1
    pair: tuple[Tensor, Tensor] = na2d(q, q, q, 3, return_lse=True)
    either: Tensor | tuple[Tensor, Tensor] = na2d(q, q, q, 3, return_lse=flag)
    out = na2d(q, q, q, 3, return_lse=True)  # wrong
    pair = na2d(q, q, q, 3)  # wrong
    out = na2d(q, q, q, 3, return_lse=flag)  # wrong
    na2d(q, q, q, "3")  # wrong
    na2d(q, q, q)  # wrong
    na2d(q, q, q, 3, kernel=3)  # wrong
    na2d(q, q, q, 3, is_causal="yes")  # wrong
    na1d(q, q, None, 3)  # wrong
    na3d(q, q, q, 3, scale="1")  # wrong
    print(either, pair, out)


def plain() -> None:
    out: Tensor = attention(q[0], q[0], q[0], True, backend=None)
    parts = [attention(q[0], q[0], q[0], return_lse=True) for _ in range(2)]
    out, lse = merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
    attention(q, q, q, is_causal=(True,))  # wrong
    print(out, lse)


def packed() -> None:
    layout = VarlenLayout([(4, 4), (6, 8)])
    x = torch.randn(layout.total_tokens, 2, 4)
    out: Tensor = na2d_varlen(x, x, x, layout, 3, dilation=1)
    out, lse = na2d_varlen(x, x, x, layout, 3, return_lse=True)
    na2d_varlen(
        x, x, x, layout, 3, additional_keys=x, additional_values=x, additional_lengths=(16, 48),
        key_mask=x > 0, additional_mask=None,
    )  # fmt: skip
    na2d_varlen(x, x, x, [(4, 4)], 3)  # wrong
    na2d_varlen(x, x, x, layout, 3, additional_lengths=3)  # wrong
    print(out, lse)


def unfused() -> None:
    x = q.movedim(-2, 1)
    attn: Tensor = na2d_qk(x, x, 3, dilation=(1, 2), rpb=bias, stride=1)
    out: Tensor = na2d_av(attn.softmax(-1), x, 3, (1, 2))
    na2d_qk(x, x, 3.0)  # wrong
    print(out)


def layers() -> None:
    layer = NeighborhoodAttention2D(64, 4, kernel_size=7, dilation=(1, 2), rel_pos_bias=True)
    out: Tensor = layer(torch.randn(1, 16, 16, 64))
    nn.Sequential(NeighborhoodAttention1D(embed_dim=64, num_heads=4, kernel_size=7, stride=2))
    NeighborhoodAttention3D(
        dim=64, num_heads=4, kernel_size=(3, 5, 5), is_causal=(True, False, False)
    )
    tokens, mask = torch.randn(1, 5, 64), torch.ones(1, 5, dtype=torch.bool)
    out = layer.forward(q, key_mask=mask, additional_tokens=tokens, additional_mask=mask)
    out = layer.forward(q, layout=VarlenLayout([(4, 4)]), backend="tiled")
    out = layer.attention_weights(q, key_mask=mask)
    NeighborhoodAttention2D(64, 4, 7, oversize="pad", pad_mask=True)
    NeighborhoodAttention2D(64, 4, 7, pad_mask="yes")  # wrong
    layer.forward(q, mask)  # wrong
    layer.forward(q, key_mask=[True])  # wrong
    layer.forward(q, layout=(4, 4))  # wrong
    NeighborhoodAttention2D(64, 4, kernel_size="7")  # wrong
    NeighborhoodAttention2D(64, 4, 7, window=7)  # wrong
    NeighborhoodAttention1D(64, "4", 7)  # wrong
    print(out, layer.kernel_size[0] + 1)


def windows() -> tuple[int, ...]:
    kernel_size, stride, dilation = fit_window((8, 8), 7)
    fit_window(8, 7)  # wrong
    return kernel_size + stride + dilation


def tools() -> None:
    picture: str = draw_mask((4, 4), kernel_size=3)
    gain: float = simulate((16, 16), (4, 4)).flop_bound
    report = profile(Problem((16,), natten.Neighborhood.create(1, 3)), dense=False)
    natten.simulator.simulate((16, 16), "4")  # wrong
    natten.profiler.profile(problem=3)  # wrong
    natten.draw.draw_mask(path=3)  # wrong
    print(picture, gain, report.rows)
