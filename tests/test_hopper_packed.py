"""Packed documents and packed sequences by the Hopper kernels: choices and plans on the CPU,
results on a GPU.

What the kernels see of documents is in interpreter/test_hopper_packed.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import hopper, reference
from hopper_problems import DOCUMENTS, IMAGES, SEQUENCES, VIDEOS, chosen, packed_ways, windows

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

from natten import tuning
from natten.backends import Problem
from natten.backends.hopper import costs, documents_plan, fused
from natten.backends.hopper import plan as planning
from natten.backends.interface import KINDS
from natten.documents import Documents, Sizes
from natten.inputs import Inputs
from natten.neighborhood import Dense, Neighborhood, Rule


def problem(rule: Rule, dim: int = 64, value_dim: int = 64, scale: float = 0.1) -> Problem:
    return Problem(
        "packed", torch.device("cpu"), torch.bfloat16, dim, value_dim, rule=rule, scale=scale
    )


def test_what_it_runs() -> None:
    for rule in (windows(2, 7), windows(3, 5, 2, is_causal=True), Dense(), Dense(True)):
        assert hopper.lacks(problem(rule)) is None
    assert "dilation" in str(hopper.lacks(problem(windows(2, 7, 1, (1, 2)))))
    assert "circular" in str(hopper.lacks(problem(windows(2, 7, boundary="circular"))))
    assert "128 channels" in str(hopper.lacks(problem(Dense(), 256, 256)))
    assert "usual size" in str(hopper.lacks(problem(Dense(), scale=-1.0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rule", "space"),
    [
        (windows(1, 64), (512,)),
        (windows(2, 7), (64, 64)),
        (windows(2, 7), (64, 5)),
        (windows(3, (3, 5, 7), 2), (8, 24, 24)),
        (windows(2, 9, boundary="truncate"), (4, 40)),
        (Dense(), (1000,)),
        (Dense(True), (1000,)),
    ],
)
def test_tiles_are_rows_that_fit(rule: Rule, space: Any, kind: str) -> None:
    for dim in (32, 64, 128):
        work = costs.work(kind, dim, dim)
        for tiles in packed_ways(kind, rule, space, dim):
            mask = costs.mask(kind, rule, space, space, tiles, work, packed=True)
            assert not mask.by_row and mask.tables == 1
            assert mask.kind != costs.NONE or (isinstance(rule, Dense) and kind == "dkdv")
            own = costs.own_out(tiles, mask, work)
            assert costs.shared_bytes(tiles, mask, work, own) <= 227 * 1024
            for shape in tiles[:2]:
                assert shape[2] >= 8  # the pattern of shared memory has eight rows
            pieces = costs.pieces(kind, rule, space, tiles, packed=True)
            assert pieces.piece == pieces.at_seam
            boxes = costs.boxes(tiles, kind == "dkdv", pieces.piece, packed=True)
            assert boxes[:2] == tuple((1, 1, shape[2]) for shape in tiles[:2])


@pytest.mark.parametrize("layouts", [[(70,), (64,), (1,), (900,)], IMAGES, VIDEOS])
@pytest.mark.parametrize("size", [(1, 1, 64), (1, 8, 8), (2, 4, 16)])
def test_there_are_no_more_tiles_than_expected(layouts: Any, size: Any) -> None:
    rank = len(layouts[0])
    tile = (*(1,) * (3 - rank), *size[:rank]) if rank > 1 else (1, 1, 64)
    rule = windows(rank, 3)
    documents = Documents.of_layouts(layouts, rule, torch.device("cpu"))
    needed = 0
    for shape in layouts:
        needed += math.prod(-(-n // t) for n, t in zip(shape, tile[3 - rank :]))
    tokens = sum(map(math.prod, layouts))
    for of_keys in (False, True):
        assert documents_plan.most_tiles(documents.sizes, tile, tokens, of_keys) >= needed


def test_documents_of_other_sizes_share_kernels() -> None:
    """Lengths up to a bound, how many documents there are, and their tokens compile nothing."""
    compiled = set()
    for number, tokens, longest in ((3, 700, 61), (40, 1000, 64), (64, 99999, 57)):
        table = torch.empty(number, 16, dtype=torch.int64, device="meta")
        space = Documents.of_layouts([(longest, longest)], windows(2, 7), torch.device("meta"))
        documents = Documents(table, Sizes(number, *space.sizes[1:]))
        q = torch.empty(1, tokens, 2, 64, dtype=torch.bfloat16, device="meta")
        plan = planning.plan_for(q, q, q, None, windows(2, 7), 0.1, documents=documents)
        compiled.add(tuple(id(getattr(plan, kind).launch._kernels) for kind in KINDS))
    assert len(compiled) == 1


# heads, heads of keys, head dim, value dim, gradient of the LSE, dtype
TENSORS = [
    (3, 3, 64, 64, False, torch.bfloat16),
    (4, 2, 128, 128, True, torch.float16),
    (2, 1, 32, 24, True, torch.bfloat16),
    (1, 1, 72, 96, False, torch.bfloat16),
]


def random_inputs(tokens: int, key_tokens: int, tensors: Any) -> Inputs:
    """Random inputs on the GPU; those of equal heads and channels lie side by side."""
    heads, kv_heads, dim, value_dim, _, dtype = tensors

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=dtype)

    if (heads, dim, tokens) == (kv_heads, value_dim, key_tokens):
        return Inputs(*random(1, tokens, 3, heads, dim).unbind(2))
    return Inputs(
        random(1, tokens, heads, dim), random(1, key_tokens, kv_heads, dim),
        random(1, key_tokens, kv_heads, value_dim),
    )  # fmt: skip


def exact(
    inputs: Inputs, grads: Any, lengths: Any, rules: list[Rule], layouts: list[Any], scale: float
) -> list[torch.Tensor]:
    """Output, LSE and gradients in float64, document by document."""
    found = []
    sizes = (lengths[0], lengths[1], lengths[1], lengths[0], lengths[0])
    tensors = (*inputs[:3], *grads)
    split = [
        [None] * len(n) if x is None else x.double().split(n, 1) for x, n in zip(tensors, sizes)
    ]
    for q, k, v, grad_out, grad_lse, rule, shape in zip(*split, rules, layouts):
        q, k, v, grad_out, grad_lse = (
            x if shape is None or x is None else x.unflatten(1, shape)
            for x in (q, k, v, grad_out, grad_lse)
        )
        own = Inputs(q, k, v)
        out, lse = reference.forward(own, rule, scale)
        back = reference.backward(grad_out, grad_lse, own, out, lse, rule, scale)[:3]
        results = out, *back
        flat = [x if shape is None else x.flatten(1, -3) for x in results]
        found.append((flat[0], lse if shape is None else lse.flatten(1, -2), *flat[1:]))
    return [torch.cat(each, 1) for each in zip(*found)]


def check(
    inputs: Inputs, tensors: Any, documents: Documents, rule: Rule, lengths: Any,
    rules: list[Rule], layouts: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Output, LSE and gradients by several tiles, with one program and with many; every run the
    same; and NaN in every second document changes nothing in the others.

    PyTorch fills what is not initialized with NaN.
    """
    heads, _, dim, value_dim, has_grad_lse, dtype = tensors
    tokens, scale = inputs.query.shape[1], dim**-0.5
    grad_out = torch.randn(1, tokens, heads, value_dim, device="cuda", dtype=dtype)
    grad_lse = torch.randn(1, tokens, heads, device="cuda") if has_grad_lse else None
    expected = exact(inputs, (grad_out, grad_lse), lengths, rules, layouts, scale)

    def run(inputs: Inputs, grad_out: torch.Tensor) -> list[torch.Tensor]:
        out, lse = fused.forward(inputs, rule, scale, documents)
        grads = fused.backward(grad_out, grad_lse, inputs, out, lse, rule, scale, documents)
        return [out, lse, *(x for x in grads[:3] if x is not None)]

    bad = [
        torch.tensor([i % 2 > 0 for i, n in enumerate(each) for _ in range(n)], device="cuda")
        for each in lengths
    ]
    hidden = Inputs(
        *(x.masked_fill(bad[i > 0][:, None, None], math.nan) for i, x in enumerate(inputs[:3]))
    )
    hidden_grad = grad_out.masked_fill(bad[0][:, None, None], math.nan)
    _, space, _ = documents.sizes
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        ways = [packed_ways(kind, rule, space, max(dim, value_dim)) for kind in KINDS]
        most = 2 if dim == 64 else 1  # to compile them takes longer than to run them
        for choice in itertools.islice(itertools.zip_longest(*ways), most):
            tiles = {kind: each for kind, each in zip(KINDS, choice) if each is not None}
            with chosen(tiles, rule, documents, (dim, value_dim)):
                results = []
                for processors in (132, 1):  # with one, a program takes many tiles
                    monkeypatch.setattr(planning, "_processors", lambda _, n=processors: n)
                    tuning._forget_choices()
                    results += [run(inputs, grad_out) for _ in range(2)]
                dirty = run(hidden, hidden_grad)
            found, *others = results
            sides = (0, 0, 0, 1, 1)
            for name, right, x, nan, side, *same in zip(
                "olqkv", expected, found, dirty, sides, *others
            ):
                assert all(torch.equal(x, y) for y in same), name
                finite = right.isfinite()
                assert torch.equal(x.isfinite(), finite), name
                error = (x - right)[finite].square().mean().sqrt()
                size = right[finite].square().mean().sqrt().clamp(min=0.1)
                limit = 1e-4 if name == "l" else 2e-2 if dtype == torch.bfloat16 else 4e-3
                assert error < limit * size, (name, float(error / size))
                assert torch.equal(x[:, ~bad[side]], nan[:, ~bad[side]]), name
    finally:
        torch.use_deterministic_algorithms(False)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layouts, rule", DOCUMENTS)
@pytest.mark.parametrize("tensors", TENSORS)
def test_documents(
    layouts: Any, rule: Neighborhood, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layouts = [shape for shape in layouts if 0 not in shape]
    lengths = [math.prod(shape) for shape in layouts]
    documents = Documents.of_layouts(layouts, rule, torch.device("cuda"))
    inputs = random_inputs(sum(lengths), sum(lengths), tensors)
    rules = [rule.fitted(shape) for shape in layouts]
    check(inputs, tensors, documents, rule, (lengths, lengths), rules, layouts, monkeypatch)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lengths, key_lengths, causal", SEQUENCES)
@pytest.mark.parametrize("tensors", TENSORS)
def test_sequences(
    lengths: Any, key_lengths: Any, causal: bool, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    starts = [
        torch.tensor([0, *itertools.accumulate(each)], device="cuda")
        for each in (lengths, key_lengths)
    ]
    documents = Documents.of_sequences(starts, [max(lengths), max(key_lengths)])
    inputs, rule = random_inputs(sum(lengths), sum(key_lengths), tensors), Dense(causal)
    count = len(lengths)
    check(
        inputs, tensors, documents, rule, (lengths, key_lengths), [rule] * count, [None] * count,
        monkeypatch,
    )  # fmt: skip
