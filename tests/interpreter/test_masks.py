"""Masks of keys in the fused kernels against the reference; what is masked holds NaN."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_close, name_of, reference, triton
from torch import Tensor

from natten.inputs import Gradients, Inputs
from natten.neighborhood import Dense, Rule

# As of a division by zero, whose result a GPU would not show.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

NAN = float("nan")
CASES = [
    Case((23,), (5,), dilation=2, heads=4, num_additional=3, rpb=True),
    Case((5, 6), (3, 4), (2, 1), is_causal=(True, False), kv_heads=1, rpb=True),
    Case((3, 4, 4), (2, 3, 2), dilation=(1, 1, 2), batch=1),
    Case(
        (12,), (5,), (2,), boundary="circular", queries_per_key=2, query_offset=(3,),
        query_space=(13,), kv_heads=1, num_additional=2, rpb=True,
    ),
    Case((7, 4), (4, 5), boundary=("circular", "truncate"), batch=1),
]  # fmt: skip


def with_masks(inputs: Inputs, shared: bool, few: bool = False) -> Inputs:
    """The inputs with masks, which all batch entries may share: a third of the keys is left, or
    ``few``. Masks begin at odd addresses, and their bytes are apart."""
    batch, left = 1 if shared else inputs.key.shape[0], 0.1 if few else 0.35

    def mask(x: Tensor) -> Tensor:
        return (torch.rand(batch, *x.shape[1:-2], 2) < left)[..., 1]

    additional = inputs.additional_keys
    return inputs._replace(
        key_mask=mask(inputs.key), additional_mask=None if additional is None else mask(additional)
    )


def dirty(x: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Keys or values that hold NaN where they are masked."""
    return x if x is None or mask is None else x.masked_fill(~mask[..., None, None], NAN)


def check(inputs: Inputs, rule: Rule, scale: float = 0.6) -> Tensor:
    """Outputs and gradients are the reference's of clean inputs; returns the LSE."""
    key, value, _, *additional = inputs[1:6]
    read = inputs._replace(
        key=dirty(key, inputs.key_mask), value=dirty(value, inputs.key_mask),
        additional_keys=dirty(additional[0], inputs.additional_mask),
        additional_values=dirty(additional[1], inputs.additional_mask),
    )  # fmt: skip
    expected = reference.forward(inputs, rule, scale)
    actual = triton.forward(read, rule, scale)
    for name, a, b in zip(("output", "LSE"), expected, actual):
        assert_close(name, a, b, 1e-5)
    empty = actual[1] == -torch.inf
    assert not actual[0][empty].any()
    grads = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    wanted = reference.backward(*grads, inputs, *expected, rule, scale)
    found = triton.backward(*grads, read, *actual, rule, scale)
    for name, a, b in zip(Gradients._fields, wanted, found):
        assert_close(f"gradient of {name}", a, b, 2e-5)
    assert not found.query[empty].any()
    masks = (inputs.key_mask, inputs.key_mask), (inputs.additional_mask, inputs.additional_mask)
    for pair, of in zip(masks, (found[1:3], found[4:6])):
        for mask, grad in zip(pair, of):
            assert mask is None or not grad[~mask.expand(grad.shape[:-2])].any()
    return actual[1]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing was written to yet holds NaN."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(NAN) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", lambda *x, **y: poisoned(new_empty(*x, **y)))
    monkeypatch.setattr(torch, "empty_like", lambda *x, **y: poisoned(empty_like(*x, **y)))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_neighborhoods(case: Case) -> None:
    scale = 0.6 if case.rpb else [-0.6, 0.0][len(case.space) % 2]
    check(with_masks(case.inputs(torch.float32), shared=case.kv_heads == 1), case.rule, scale)


def test_rows_with_nothing_left() -> None:
    """Some, and all."""
    case = Case((16,), (3,), num_additional=1, kv_heads=1, dim=4, value_dim=4)
    inputs = with_masks(case.inputs(torch.float32), shared=False, few=True)
    inputs.additional_mask[0] = False
    lse = check(inputs, case.rule)
    assert (lse[0] == -torch.inf).any() and (lse > -torch.inf).any()
    inputs.key_mask[:], inputs.additional_mask[:] = False, False
    assert (check(inputs, case.rule) == -torch.inf).all()


def test_additional_tokens_alone_are_masked() -> None:
    case = Case((9,), (3,), num_additional=20, batch=1, kv_heads=1, dim=4, value_dim=4)
    masked = with_masks(case.inputs(torch.float32), shared=True)
    check(masked._replace(key_mask=None), case.rule)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention(causal: bool) -> None:
    q, k = torch.randn(2, 9, 2, 4), torch.randn(2, 21, 1, 4)
    check(with_masks(Inputs(q, k, k.clone()), shared=causal), Dense(causal))


def test_a_mask_of_all_changes_no_bit() -> None:
    case = Case((17,), (4,), batch=1, num_additional=3, rpb=True)
    inputs = case.inputs(torch.float32)
    everything = torch.ones(1, *case.space, dtype=torch.bool)
    masked = inputs._replace(key_mask=everything, additional_mask=torch.ones(1, 3) > 0)
    outputs = [triton.forward(each, case.rule, 0.6) for each in (inputs, masked)]
    grads = [
        triton.backward(*outputs[0], each, *outputs[0], case.rule, 0.6) for each in (inputs, masked)
    ]
    for a, b in (*zip(*outputs), *zip(*grads)):
        assert torch.equal(a, b)
