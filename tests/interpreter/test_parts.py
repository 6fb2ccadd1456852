"""Parts of a layout, finer queries, and truncated and circular windows, in all kernels."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_close, reference
from helpers import triton as portable
from torch import Tensor

import natten
from natten.backends.triton.windows import modes, per_key, reach, span
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood, query_range

# Name, keys, windows, then what differs from a whole layout of self attention.
PROBLEMS = {
    "part": ((23,), dict(kernel_size=5), (9,), 6),
    "part of long dilation": ((17,), dict(kernel_size=3, stride=2, dilation=4), (3,), 2),
    "decoding": ((15,), dict(kernel_size=20, is_causal=True, boundary="truncate"), (1,), 14),
    "finer": ((6,), dict(kernel_size=3, dilation=2, queries_per_key=3), (18,), None),
    "truncated": (
        (13,), dict(kernel_size=6, stride=4, dilation=2, boundary="truncate"), (13,), None,
    ),
    "window beyond the layout": (
        (4,), dict(kernel_size=9, dilation=5, boundary="truncate"), (4,), None,
    ),
    "ring": ((12,), dict(kernel_size=5, stride=2, dilation=2, boundary="circular"), (12,), None),
    "part of a finer ring": (
        (9,), dict(kernel_size=8, queries_per_key=2, boundary="circular"), (13,), 4,
    ),
    "truncated and finer": (
        (4, 3), dict(kernel_size=(4, 2), dilation=(1, 2), boundary="truncate", queries_per_key=2),
        (8, 6), None,
    ),
    "part of a ring": (
        (7, 6), dict(kernel_size=(3, 5), is_causal=(True, False), boundary=("shift", "circular")),
        (2, 6), (5, 0),
    ),
    "key of one token": (
        (4, 1), dict(kernel_size=(2, 3), boundary="truncate", queries_per_key=(1, 4)),
        (3, 3), (1, 1),
    ),
    "three axes": (
        (3, 4, 3),
        dict(kernel_size=(2, 3, 2), stride=(1, 1, 2), is_causal=(True, False, False),
             boundary=("truncate", "circular", "shift")),
        (2, 4, 3), (1, 0, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("_poison")
def test_all_kernels(name: str) -> None:
    """Every operation, with grouped heads, a bias and additional tokens, against the reference."""
    key_shape, windows, shape, offset = PROBLEMS[name]
    rule = Neighborhood.create(len(shape), **windows, query_offset=offset)
    rule.check(shape, key_shape)
    q, k, v = (torch.randn(1, *each, 4) for each in ((*shape, 2), (*key_shape, 1), (*key_shape, 1)))
    rpb = torch.randn(2, *(2 * k - 1 for k in rule.kernel_size))
    inputs = Inputs(q, k, v[..., :3], rpb, torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 3))
    expected, actual = (each.forward(inputs, rule, 0.6) for each in (reference, portable))
    for a, b in zip(expected, actual):
        assert_close("forward", a, b, 1e-5)
    grads = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    both = (
        each.backward(*grads, inputs, *expected, rule, 0.6)._asdict()
        for each in (reference, portable)
    )
    for (what, a), b in zip(next(both).items(), next(both).values()):
        assert_close(f"gradient of {what}", a, b, 2e-5)

    k, v = (x.expand(-1, *key_shape, 2, 4) for x in (k, v))
    attn = torch.randn(1, *shape, rule.window_tokens, 2).transpose(-1, -2)
    # What is masked must not even be read.
    attn = attn.masked_fill(~rule.attended_slots(shape, key_shape)[..., None, :], float("nan"))
    for what, arguments in {
        "qk": (q, k), "av": (attn, v), "av_transposed": (attn, q, key_shape),
        "rpb_bias": (rpb, shape, key_shape), "rpb_bias_transposed": (attn[0], key_shape),
    }.items():  # fmt: skip
        a, b = (getattr(each, what)(*arguments, rule) for each in (reference, portable))
        assert_close(what, a, b, 1e-5)


@pytest.fixture
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing was written to yet holds NaN."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", lambda *x, **y: poisoned(new_empty(*x, **y)))
    monkeypatch.setattr(torch, "empty_like", lambda *x, **y: poisoned(empty_like(*x, **y)))


def test_packed_documents_with_borders() -> None:
    layout = natten.VarlenLayout([(3, 4), (1, 2), (6, 4), (0, 2)])
    tensors = torch.randn(layout.total_tokens, 2, 4), *torch.randn(2, layout.total_tokens, 1, 4)
    leaves = [x.requires_grad_() for x in tensors]
    found = []
    for backend in ("triton", "tiled"):
        options = dict(boundary=("truncate", "circular"), backend=backend, return_lse=True)
        outputs = natten.na2d_varlen(*leaves, layout, (5, 3), (2, 1), **options)
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for a, b in zip(*reversed(found)):
        assert_close("packed", a, b, 2e-5)


# Of one axis: keys, window, stride, boundary, causal, queries per key, offset, queries.
AXES = [
    (n, k, s, boundary, causal, r, offset, length)
    for n, k, s in ((1, 1, 1), (6, 3, 2), (6, 5, 1), (6, 6, 3), (8, 4, 4))
    for boundary, causal in (
        ("shift", False), ("shift", True), ("truncate", False), ("circular", False)
    )
    for r, offset, length in ((1, 0, n), (1, n // 3, n // 2), (3, n, 2 * n - 1))
    if length > 0
]  # fmt: skip


@triton.jit
def _kernel(
    out, length, n, offset, k, s, MODES: tl.constexpr, PER_KEY: tl.constexpr, SIZE: tl.constexpr
):
    own = span((1, 1, length), (1, 1, n), (0, 0, offset), (1, 1, 1), (0, 0, 0), PER_KEY)
    i = tl.arange(0, SIZE)
    j = tl.minimum(i + own.first[2], own.n[2] - 1)
    for of_keys in tl.static_range(2):
        at = i if of_keys else j
        starts, ends = reach((0, 0, at), own, (1, 1, k), (1, 1, s), MODES, PER_KEY, of_keys)
        tl.store(out + 2 * of_keys * SIZE + i, starts[2])
        tl.store(out + (2 * of_keys + 1) * SIZE + i, ends[2])
    tl.store(out + 4 * SIZE, own.first[2])
    tl.store(out + 4 * SIZE + 1, own.n[2])


def reached(rule: Neighborhood, n: int, length: int) -> dict[str, object]:
    """What queries of a 1-D layout of ``n`` keys reach, and what keys do."""
    out = torch.zeros(5, 64, dtype=torch.int32)
    _kernel[(1,)](
        out, length, n, rule.offset[0], rule.kernel_size[0], rule.stride[0],
        MODES=modes(rule, (n,)), PER_KEY=per_key(rule), SIZE=64,
    )  # fmt: skip
    names = ("query_starts", "query_ends", "key_starts", "key_ends")
    found = dict(zip(names, out[:4].tolist()))
    return found | {"first": out[4, 0].item(), "n": out[4, 1].item()}


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: "-".join(map(str, axis)))
def test_kernels_know_the_definition(axis: tuple[int, ...]) -> None:
    """What queries reach is :meth:`Neighborhood.windows`; what keys reach is its inverse."""
    n, k, s, boundary, causal, r, offset, length = axis
    rule = Neighborhood.create(1, k, s, 1, causal, boundary, r, offset)
    first, last = query_range(rule, 0, length, 0)
    found = reached(rule, n, length)
    start, end = rule.windows(0, torch.arange(first, last) // r, n)
    assert found["first"] == first and found["n"] == last
    assert found["query_starts"][: last - first] == start.tolist()
    assert found["query_ends"][: last - first] == end.tolist()
    for key in range(n):
        attending = set()
        for j, a, b in zip(range(first, last), start.tolist(), end.tolist()):
            if key in (p % n if boundary == "circular" else p for p in range(a, b)):
                attending.add(j)
        numbers = range(found["key_starts"][key], found["key_ends"][key])
        inside = {j % (n * r) for j in numbers} if boundary == "circular" else set(numbers)
        assert {j for j in inside if first <= j < last} == attending, key
        assert boundary == "circular" or inside == attending, key
