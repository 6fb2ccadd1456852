"""Another default device, as in ``with torch.device("meta")``, changes nothing for CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import natten
from natten import draw, profiler, simulator, tuning
from natten.backends import explain
from natten.cli import main
from natten.utils.varlen import generate_varlen_parameters

SPACES = {1: (11,), 2: (5, 6), 3: (4, 4, 5)}


def tensors(rank: int, heads_first: bool = False) -> list[Tensor]:
    space = SPACES[rank]
    shape = (1, 2, *space, 4) if heads_first else (1, *space, 2, 4)
    numbers = torch.linspace(-1, 1, torch.Size(shape).numel(), device="cpu").view(shape)
    return [(numbers * factor).requires_grad_() for factor in (1.0, -2.0, 3.0)]


def bias(rank: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * 5**rank, device="cpu").view(2, *(5,) * rank)


def fused(rank: int, backend: str) -> Any:
    q, k, v = tensors(rank)
    options = {"dilation": (2, *(1,) * rank)[:rank], "is_causal": (True, *(False,) * rank)[:rank]}
    kernel = (2, 3, 3)[:rank]
    rpb = bias(rank)[(slice(None), slice(1, 4))].requires_grad_()
    more = {"rpb": rpb, "additional_keys": q.flatten(1, -3), "additional_values": v.flatten(1, -3)}
    out, lse = natten.neighborhood_attention_generic(
        q, k, v, kernel, 1, return_lse=True, backend=backend, **options, **more
    )
    loss = out.square().sum() + lse.sum()
    first = torch.autograd.grad(loss, (q, k, v, rpb), create_graph=True)
    total = sum((x.square().sum() for x in first), loss)
    return [out, lse, *first, *torch.autograd.grad(total, (q, k, v, rpb))]


def unfused(rank: int) -> Any:
    q, k, v = tensors(rank, heads_first=True)
    rpb = bias(rank).requires_grad_()
    attn = getattr(natten.functional, f"na{rank}d_qk_with_bias")(q, k, rpb, 3)
    out = getattr(natten, f"na{rank}d_av")(attn.softmax(-1), v, 3)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v, rpb))]


def varlen(rank: int) -> Any:
    q, k, v = (x[0].flatten(0, rank - 1) for x in tensors(rank))
    layout = natten.VarlenLayout([SPACES[rank]], device="cpu")
    rule = natten.Neighborhood.create(rank, 3)
    table = layout.documents(rule, torch.device("cpu")).table  # GPUs read this table
    return [getattr(natten, f"na{rank}d_varlen")(q, k, v, layout, 3), layout.offsets, table]


def packed() -> Any:
    q, k, v = tensors(1)
    lengths = torch.tensor([5, 6], device="cpu")
    longest = generate_varlen_parameters(q, k, v, lengths, lengths)
    first = natten.attention(q, k, v, False, None, None, None, *longest[:2], *longest[2:])
    second = natten.attention(q, k, v, True, seqlens_Q=lengths, seqlens_KV=lengths)
    return [first, second, natten.merge_attentions([q, k], [q[..., 0], k[..., 0]])[0]]


def layer() -> Any:
    torch.manual_seed(0)
    with torch.device("cpu"):
        module = natten.NeighborhoodAttention2D(8, 2, kernel_size=3, rel_pos_bias=True)
    return [module(tensors(2)[0].flatten(-2)), module.eval()(tensors(2)[1].flatten(-2))]


def pictures() -> Any:
    weights = torch.linspace(0, 1, 9, device="cpu")
    return [
        draw.draw_neighborhood((7, 6), 3, 2, query=(0, 1)),
        draw.draw_neighborhood((3, 7, 6), 3, is_causal=(True, False, False)),
        draw.draw_neighborhood((7, 6), 3, weights=weights),
        draw.draw_mask((7, 6), 3, q_tile=(2, 2), kv_tile=(1, 3)),
        draw.draw_tiles((7, 6), 3, dilation=2, q_tile=(2, 2), kv_tile=(1, 3)),
        draw.draw_examples(),
    ]


def predictions() -> Any:
    options = {"device": simulator.DEVICES["h100"], "heads": 2, "head_dim": 64}
    return [
        simulator.simulate((33, 40), 9, 3, is_causal=(True, False), **options),
        *simulator.simulate_strides((33, 40), (5, 6), **options),
        *simulator.recommend((33, 40), 9, near=0.2, **options),
    ]


def counts() -> Any:
    problem = profiler.Problem((9, 8), natten.Neighborhood.create(2, 3, dilation=2))
    tuning.remember("default device", [1])
    return [problem.needed_pairs, problem.is_self_attention, explain(tensors(2)[0], kernel_size=3)]


def commands() -> Any:
    layer = ["-i", "9", "8", "-w", "3"]
    quick = ["--device", "cpu", "--warmup-steps", "0", "--backprop"]
    return [
        main(["profile", *layer, *quick]),
        main(["profile", *layer, *quick, "--dry-run"]),
        main(["simulate", *layer]),
        main(["env"]),
    ]


CASES: dict[str, Callable[[], Any]] = {
    **{
        f"na{rank}d {backend}": lambda rank=rank, backend=backend: fused(rank, backend)
        for rank in SPACES
        for backend in ("tiled", "reference")
    },
    **{f"na{rank}d unfused": lambda rank=rank: unfused(rank) for rank in SPACES},
    **{f"na{rank}d varlen": lambda rank=rank: varlen(rank) for rank in SPACES},
    **{each.__name__: each for each in (packed, layer, pictures, predictions, counts, commands)},
}


@pytest.mark.parametrize("name", CASES)
def test_another_default_device(name: str, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path))
    with tuning.trial("nothing", None), torch.device("meta"):  # drops all plans
        found = CASES[name]()
    for actual, expected in zip(found, CASES[name](), strict=True):
        if isinstance(actual, Tensor):
            assert actual.device.type == "cpu" and torch.equal(actual, expected)
        else:
            assert actual == expected


def test_offsets_are_where_they_are_asked_for() -> None:
    with torch.device("meta"):
        assert natten.VarlenLayout([(2, 3)], device="cpu").offsets.tolist() == [0, 6]
        assert natten.VarlenLayout([(2, 3)]).offsets.is_meta  # like PyTorch's own tensors
        layout, _ = natten.VarlenLayout.from_tensor_list([torch.ones(3, 1, 1, device="cpu")])
        assert layout.offsets[1]
