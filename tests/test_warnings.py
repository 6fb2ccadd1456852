"""Warnings about calls that run all the same; each comes once, also from compiled code."""

import warnings

import pytest
import torch
from helpers import reference
from torch._dynamo.testing import CompileCounterWithBackend

import natten
from natten import _warnings, tuning
from natten.backends import HINTS

FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
VARLEN = {1: natten.na1d_varlen, 2: natten.na2d_varlen, 3: natten.na3d_varlen}


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(_warnings, "_given", set())
    monkeypatch.setattr(natten.functional, "_calls", tuning.Kept())
    torch._dynamo.reset()
    yield
    tuning._forget_choices()


def said(function, *args, **kwargs):
    """The texts of the warnings that a call emits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(each.message) for each in caught if each.category is UserWarning]


def query(rank, size=6, heads=2):
    return torch.randn(1, *(size,) * rank, heads, 4, requires_grad=True)


# --- a backend that can not run ---


def calls(rank):
    """Calls of fused operators, packed documents and layers that ask for a backend."""
    q = query(rank)
    packed, layout = q[0].flatten(0, -3), natten.VarlenLayout([(6,) * rank])
    names = natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D
    layer = (*names, natten.NeighborhoodAttention3D)[rank - 1](8, 2, 3)
    lengths = {"seqlens_Q": torch.tensor([6]), "seqlens_KV": torch.tensor([6])}
    row = query(1)
    return {
        "fused": lambda name: FUSED[rank](q, q, q, 3, backend=name),
        "varlen": lambda name: VARLEN[rank](packed, packed, packed, layout, 3, backend=name),
        "layer": lambda name: layer(q.flatten(-2), backend=name),
        "attention": lambda name: natten.attention(row, row, row, backend=name),
        "packed": lambda name: natten.attention(row, row, row, **lengths, backend=name),
    }


@pytest.mark.parametrize("rank", FUSED)
@pytest.mark.parametrize("kind", ["fused", "varlen", "layer", "attention", "packed"])
def test_a_backend_that_can_not_run(rank, kind, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = calls(rank)[kind]
    for name in ("triton", "hopper"):
        wanted = f"backend {name!r} runs on GPUs, not on cpu; "
        (text,) = said(call, name)
        assert text.startswith(wanted) and text.endswith(
            (" 'sdpa' runs instead.", " 'tiled' runs instead.")
        )
        assert said(call, name) == []
    for name in (None, "tiled", "reference", *sorted(HINTS)):
        assert said(call, name) == []


def test_the_warning_points_at_the_call():
    q = query(1)
    with pytest.warns(UserWarning, match="'triton'") as caught:
        natten.na1d(q, q, q, 3, backend="triton")
    assert caught[0].filename == __file__


def test_a_compiled_call():
    compiled = torch.compile(
        lambda q: natten.na2d(q, q, q, 3, backend="triton"), fullgraph=True, backend="eager"
    )
    assert len(said(compiled, query(2))) == 1
    assert said(compiled, query(2)) == [] and said(compiled, query(2, size=7)) == []


def test_another_backend_for_the_backward(monkeypatch):
    """The forward runs on the backend asked for, so the warning comes with the gradient."""
    monkeypatch.setattr(reference, "operations", ("attention",))
    tuning._forget_choices()
    q = query(2)
    for times in (1, 0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = natten.na2d(q, q, q, 3, backend="reference")
        texts = said(out.sum().backward)
        assert len(texts) == times
        assert all(text.startswith("backend 'reference' has no fused backward; ") for text in texts)


# --- heads first ---

HEADS_FIRST = {1: (2, 4, 96, 8), 2: (2, 4, 14, 14, 8), 3: (1, 4, 3, 34, 34, 4)}
HEADS_LAST = [
    (2, 96, 4, 8), (2, 14, 14, 4, 8), (2, 8, 8, 8, 4), (2, 7, 7, 32, 4), (1, 8, 16, 4, 4),
    (1, 4, 6, 6, 16, 4), (1, 3, 16, 16, 16, 4), (1, 8, 16, 4),
]  # fmt: skip


@pytest.mark.parametrize("rank", FUSED)
def test_heads_first(rank):
    q = torch.randn(HEADS_FIRST[rank])
    (text,) = said(FUSED[rank], q, q, q, 3)
    assert str(tuple(q.shape)) in text and "q.movedim(1, -2)" in text
    assert said(FUSED[rank], q, q, q, 3) == []
    right = q.movedim(1, -2)
    if rank < 3:
        assert said(FUSED[rank], right, right, right, 3) == []


@pytest.mark.parametrize("shape", HEADS_LAST)
def test_heads_last(shape):
    q = torch.randn(shape)
    assert said(natten.neighborhood_attention_generic, q, q, q, 3) == []


def test_no_question_about_sizes_in_compiled_code():
    """A comparison of sizes would compile again for other sizes."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q: natten.na1d(q, q, q, 3), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((2, 4, 96, 8), (3, 97, 5, 8)):
        compiled(torch.randn(shape))
    assert counter.frame_count == 1


# --- merging ---


def test_merging_compiles_where_an_lse_needs_no_gradient():
    """It is one graph with the same numbers and gradients, and compiling it warns."""

    def merged(out, lse, frozen):
        return natten.merge_attentions([out, out * 2], [lse, frozen])[0]

    out, lse = torch.randn(1, 4, 1, 2), torch.randn(1, 4, 1)
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    results = []
    for function in (merged, compiled):
        given = [x.clone().requires_grad_() for x in (out, lse)]
        with pytest.warns(UserWarning, match="incomplete"):
            result = function(*given, lse * 0.5)
        results.append((result, *torch.autograd.grad(result.square().sum(), given)))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-6)
    assert said(compiled, out.requires_grad_(), lse.requires_grad_(), lse.detach()) == []
