"""dK and dV where several programs share a tile of keys, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import Case, assert_close, name_of, reference
from helpers import triton as portable

import natten
from natten import tuning
from natten.backends.triton import launch, plan
from natten.inputs import Inputs
from natten.neighborhood import Dense, Rule

CASES = [
    Case((43,), (6,), dilation=2, batch=1, heads=1, kv_heads=1, dim=4, rpb=True),
    Case((40,), (31,), stride=3, is_causal=True, batch=1, heads=3, kv_heads=1, value_dim=5),
    Case((7, 5), (3, 2), (2, 1), (2, 2), batch=1, kv_heads=1, num_additional=1),
    Case((12,), (5,), dilation=2, boundary="circular", queries_per_key=4, batch=1),
    Case((40,), (21,), boundary="truncate", query_offset=(9,), query_space=(17,), batch=1),
]


@pytest.fixture(params=[(2, 1), (5, 3)], ids=str)
def _shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So many programs share the blocks of each tile of keys, and the query heads: also more than
    there are. Memory that nothing was written to yet holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(x: torch.Tensor, *shape: int, **options: torch.dtype) -> torch.Tensor:
        made = new_empty(x, *shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(plan.Plan, "_shares", lambda *_: lambda tiles: request.param)
    tuning._forget_choices()
    yield
    tuning._forget_choices()


def check(inputs: Inputs, rule: Rule, tiles: tuple[int, ...] = ()) -> None:
    """All gradients are the reference's, and dK and dV are sums of splits."""
    assert isinstance(plan.plan_for(*inputs[:5], rule, 0.6, tiles=tiles).dkdv, launch.Split)
    expected = reference.forward(inputs, rule, 0.6)
    grads = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    wanted = reference.backward(*grads, inputs, *expected, rule, 0.6)
    found = portable.backward(*grads, inputs, *expected, rule, 0.6, tiles)
    for name, a, b in zip(Inputs._fields, wanted, found):
        assert_close(f"gradient of {name}", a, b, 2e-5)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.usefixtures("_shared")
def test_neighborhoods(case: Case) -> None:
    check(case.inputs(torch.float32), case.rule)


@pytest.mark.usefixtures("_shared")
def test_full_blocks_of_two_axes() -> None:
    """A tile of keys has two rows of three full blocks, among partial ones."""
    case = Case(
        (4, 7), (4, 5), batch=1, heads=1, kv_heads=1, value_dim=20, queries_per_key=(2, 8)
    )  # fmt: skip
    check(case.inputs(torch.float32), case.rule, tiles=(0, 0, 0, 0, 4, 8, 4, 4))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("_shared")
def test_plain_attention(causal: bool) -> None:
    q, k = torch.randn(1, 70, 2, 4), torch.randn(1, 21, 1, 4)
    check(Inputs(q, k, k.clone()), Dense(causal))


@pytest.mark.usefixtures("_shared")
def test_packed_documents() -> None:
    layout = natten.VarlenLayout([(3, 4), (1, 2), (6, 4), (0, 2)])
    leaves = [torch.randn(layout.total_tokens, n, 4).requires_grad_() for n in (2, 1, 1)]
    found = []
    for backend in ("triton", "tiled"):
        out = natten.na2d_varlen(*leaves, layout, (5, 3), (2, 1), boundary="truncate",
                                 backend=backend)  # fmt: skip
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        found.append(torch.autograd.grad(out, leaves, weights))
    for a, b in zip(*reversed(found)):
        assert_close("packed", a, b, 2e-5)
