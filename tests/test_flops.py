"""Operations are counted by the definition: one product of two rows for each pair."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten.neighborhood import window_mask

# Queries, keys, and the window by its names.
PARTS = [
    ((9,), (9,), {"kernel_size": 5, "boundary": "truncate"}),
    ((3,), (3,), {"kernel_size": 7, "stride": 2, "dilation": 4, "boundary": "truncate"}),
    ((5, 12), (8, 6), {"kernel_size": (3, 5), "query_offset": (2, 0), "queries_per_key": (1, 2)}),
    (
        (4, 3, 10), (6, 3, 6),
        {
            "kernel_size": (3, 5, 2), "dilation": (2, 1, 1), "query_offset": (2, 0, 1),
            "queries_per_key": (1, 1, 2), "boundary": ("circular", "truncate", "truncate"),
        },
    ),
]  # fmt: skip


def counted(function, *tensors):
    with FlopCounterMode(display=False) as counter:
        out = function(*tensors)
    return out, counter.get_total_flops()


def pairs_of(queries, keys, window):
    names = [name for name in window if name != "kernel_size"]
    options = {name: window[name] for name in names}
    rule = natten.Neighborhood.create(len(keys), window["kernel_size"], **options)
    return int(window_mask(rule, queries, keys).sum())


@pytest.mark.parametrize("queries, keys, window", PARTS)
def test_fused(queries, keys, window):
    q, k = torch.randn(2, *queries, 4, 8), torch.randn(2, *keys, 2, 8)
    v, additional = torch.randn(2, *keys, 2, 5), torch.randn(2, 3, 2, 8)
    q.requires_grad_()
    tokens = {"additional_keys": additional, "additional_values": additional[..., :5]}
    attend = getattr(natten, f"na{len(keys)}d")
    out, flops = counted(lambda: attend(q, k, v, **window, **tokens))
    pairs = 2 * 4 * (pairs_of(queries, keys, window) + 3 * math.prod(queries))
    assert flops == 2 * pairs * (8 + 5)
    _, flops = counted(lambda: out.sum().backward())
    assert flops == 2 * pairs * (3 * 8 + 2 * 5)


@pytest.mark.parametrize("queries, keys, window", PARTS)
def test_unfused(queries, keys, window):
    rank = len(keys)
    q = torch.randn(2, 3, *queries, 8)
    k = torch.randn(2, 3, *keys, 8, requires_grad=True)
    products = 2 * 2 * 3 * pairs_of(queries, keys, window) * 8
    attn, flops = counted(lambda: getattr(natten, f"na{rank}d_qk")(q, k, **window))
    assert flops == products
    weights = attn.softmax(-1)
    out, flops = counted(lambda: getattr(natten, f"na{rank}d_av")(weights, k, **window))
    assert flops == products
    # The gradients of the weights, of the values, and of the keys.
    assert counted(lambda: out.sum().backward())[1] == 3 * products


def test_causal_masking_is_not_subtracted():
    q = torch.randn(1, 6, 1, 8)
    for boundary, kernel_size, attended in (
        ("shift", 4, 4),
        ("truncate", 4, 4),
        ("truncate", 9, 6),
    ):
        with FlopCounterMode(display=False) as counter:
            natten.na1d(q, q, q, kernel_size, is_causal=True, boundary=boundary)
        assert counter.get_total_flops() == 2 * 6 * attended * (8 + 8), (boundary, kernel_size)


def test_where_windows_can_not_be_worked_out_they_count_in_full():
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 6, 1, 8)
        _, flops = counted(lambda: natten.na1d(q, q, q, 5, boundary="truncate"))
    assert flops == 2 * 6 * 5 * (8 + 8)


@pytest.mark.parametrize("queries, keys, window", PARTS)
def test_fvcore(queries, keys, window):
    pytest.importorskip("fvcore")
    rank = len(keys)

    class Model(torch.nn.Module):
        def forward(self, q, k):
            first, second = q.movedim(-2, 1), k.movedim(-2, 1)
            attn = getattr(natten, f"na{rank}d_qk")(first, second, **window)
            out = getattr(natten, f"na{rank}d_av")(attn, second, **window)
            return getattr(natten, f"na{rank}d")(q, k, k, **window) + out.movedim(1, -2)

    given = torch.randn(2, *queries, 3, 8), torch.randn(2, *keys, 3, 8)
    found = natten.flops.get_flops(Model(), given, disable_warnings=True)
    assert found == 4 * 2 * 3 * pairs_of(queries, keys, window) * 8
