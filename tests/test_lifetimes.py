"""Nothing keeps a caller's tensors or graphs alive; reference counts alone free them."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import sdpa, tiled
from torch import Tensor

import natten
from natten import operators
from natten.documents import Documents, Sizes
from natten.errors import ArgumentError
from natten.inputs import Inputs
from natten.neighborhood import Dense
from natten.operators.packed import packed_attention

SPACES = {1: (6,), 2: (4, 5), 3: (3, 4, 3)}
LENGTHS = (4, 2)
TABLE = "attention, packed, by a table"
Operator = Callable[..., Any]


def fused(rank: int) -> Operator:
    def run(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, more: Tensor) -> Any:
        options = {"rpb": rpb, "additional_keys": more, "additional_values": more}
        return getattr(natten, f"na{rank}d")(q, k, v, 3, return_lse=True, **options)

    return run


def unfused(rank: int) -> Operator:
    def run(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, _: Tensor) -> Any:
        q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
        with_bias = getattr(natten.functional, f"na{rank}d_qk_with_bias")(q, k, rpb, 3)
        attn = with_bias + getattr(natten, f"na{rank}d_qk")(q, k, 3, is_causal=True).clamp(min=-9)
        return getattr(natten, f"na{rank}d_av")(attn.softmax(-1), v, 3)

    return run


def varlen(rank: int) -> Operator:
    layout = natten.VarlenLayout([(2,) * rank, (3,) * rank])

    def run(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, _: Tensor) -> Any:
        q, k, v = (x.flatten(0, -3).tile(3, 1, 1)[: layout.total_tokens] for x in (q, k, v))
        return getattr(natten, f"na{rank}d_varlen")(q, k, v, layout, 3, rpb=rpb, return_lse=True)

    return run


def dense(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    return natten.attention(q, k, v, return_lse=True)


def sequences(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    lengths = torch.tensor(LENGTHS)
    return natten.attention(q, k, v, seqlens_Q=lengths, seqlens_KV=lengths, return_lse=True)


def table(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    """Attention of one document by a backend that reads tables of documents, as on GPUs."""
    rule, documents = Dense(), Documents(q, Sizes(1, (6,), (6,)))
    backend = SimpleNamespace(
        packed_forward=lambda inputs, _, *rest: tiled.forward(inputs, *rest),
        packed_backward=lambda *args: tiled.backward(*args[:5], *args[6:]),
    )

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operators.attention(Inputs(q, k, v), rule, 0.5)

    return packed_attention(backend, q, k, v, documents, rule, 0.5, one_by_one)


def merged(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, more: Tensor) -> Any:
    parts = natten.na1d(q, k, v, 3, rpb=rpb, return_lse=True), dense(q, more, more)
    return natten.merge_attentions(*zip(*parts))


def layer(q: Tensor, *_: Tensor) -> Any:
    module = natten.NeighborhoodAttention1D(8, 2, kernel_size=3, rel_pos_bias=True)
    return module(q.flatten(-2))


OPERATORS: dict[str, tuple[Operator, int]] = {
    **{f"na{rank}d": (fused(rank), rank) for rank in SPACES},
    **{f"na{rank}d unfused": (unfused(rank), rank) for rank in SPACES},
    **{f"na{rank}d varlen": (varlen(rank), rank) for rank in SPACES},
    "attention": (dense, 1),
    "attention, packed": (sequences, 1),
    TABLE: (table, 1),
    "merge_attentions": (merged, 1),
    "a layer": (layer, 1),
}


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def inputs(rank: int) -> list[Tensor]:
    """Query, key, value, bias, and additional tokens."""
    space = SPACES[rank]
    shapes = [(1, *space, 2, 4)] * 3 + [(2, *(5,) * rank), (1, 2, 2, 4)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def forward(function: Operator, given: list[Tensor]) -> list[Tensor]:
    return tensors(function(*given))


def no_grad(function: Operator, given: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return forward(function, given)


def gradients(outputs: list[Tensor], given: list[Tensor], create: bool) -> list[Tensor]:
    total = sum((x.square().sum() for x in outputs), torch.zeros(()))
    found = torch.autograd.grad(total, given, create_graph=create, allow_unused=True)
    return [x for x in found if x is not None]


def backward(function: Operator, given: list[Tensor]) -> list[Tensor]:
    outputs = forward(function, given)
    return [*outputs, *gradients(outputs, given, False)]


def backward_with_graph(function: Operator, given: list[Tensor]) -> list[Tensor]:
    outputs = forward(function, given)
    return [*outputs, *gradients(outputs, given, True)]


def double_backward(function: Operator, given: list[Tensor]) -> list[Tensor]:
    outputs = forward(function, given)
    first = gradients(outputs, given, True)
    return [*outputs, *first, *gradients(first, given, False)]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "step", [no_grad, forward, backward, backward_with_graph, double_backward],
    ids=lambda step: step.__name__,
)  # fmt: skip
def test_after(step: Callable[..., list[Tensor]], name: str) -> None:
    function, rank = OPERATORS[name]
    given = inputs(rank)
    found = step(function, given)
    alive = [weakref.ref(x) for x in (*given, *found)]
    assert all(each() is not None for each in alive)
    del given, found
    assert [number for number, each in enumerate(alive) if each() is not None] == []


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != TABLE])
def test_after_an_argument_that_is_refused(name: str) -> None:
    function, rank = OPERATORS[name]
    given = inputs(rank)
    given[0] = given[0].to(torch.float64)  # another dtype than the others have
    alive = [weakref.ref(x) for x in given]

    def call(given: list[Tensor]) -> None:
        with pytest.raises((ArgumentError, RuntimeError)):
            function(*given)

    call(given)
    del given
    assert [number for number, each in enumerate(alive) if each() is not None] == []


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_after_a_kernel_that_fails(part: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no room")

    names = {part: (sdpa, tiled)}
    names |= dict.fromkeys(
        ("qk", "rpb_bias") if part == "forward" else ("av_transposed",), (tiled,)
    )
    function, rank = OPERATORS[name]
    given = inputs(rank)
    alive = [weakref.ref(x) for x in given]
    natten.functional._calls.clear()  # which keep what ran an earlier call

    def call(given: list[Tensor]) -> None:
        outputs = forward(function, given) if part == "backward" else []
        for each, modules in names.items():
            for module in modules:
                monkeypatch.setattr(module, each, fail)
        with pytest.raises(OSError, match="no room"):
            gradients(outputs or forward(function, given), given, False)

    call(given)
    # After an exception, PyTorch's engine keeps unfinished work until the next backward.
    leaf = torch.ones(1, requires_grad=True)
    torch.autograd.grad(leaf * 2, leaf)
    del given
    assert [number for number, each in enumerate(alive) if each() is not None] == []


def test_the_first_gradient_with_a_graph_imports_nothing() -> None:
    """Importing PyTorch's compiler takes seconds and leaves all callers' frames in a cycle."""
    code = """
import gc, sys, torch, weakref, natten
gc.disable()
def run():
    q, k, v = (torch.randn(1, 6, 1, 4, requires_grad=True) for _ in range(3))
    out = natten.na1d(q, k, v, 3)
    torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    return [weakref.ref(x) for x in (q, k, v, out)]
assert "torch._dynamo" not in sys.modules
print([each() for each in run()], "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[None, None, None, None] False\n", done.stderr
