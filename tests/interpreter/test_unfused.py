"""The unfused kernels against the reference."""

import pytest
import torch
from helpers import Case, assert_close, name_of, reference, triton

CASES = [
    Case((13,), (4,), dilation=3, dim=5),
    Case((11,), (5,), stride=4, is_causal=True),
    Case((7, 5), (3, 2), stride=(2, 1), dilation=(2, 2)),
    Case((4, 6), (3, 5), stride=(1, 3), is_causal=(True, False)),
    Case((3, 4, 5), (2, 3, 3), stride=(1, 2, 3), batch=1),
    Case((4, 1, 5), (2, 1, 2), dilation=(2, 1, 2), is_causal=(False, True, True), batch=1),
    Case((5,), (3,), batch=1, heads=1, dim=130),
]


@pytest.mark.parametrize("name", ["qk", "av", "av_transposed", "rpb_bias", "rpb_bias_transposed"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_map(case, name):
    rule, space = case.rule, case.space
    q, k, v = (torch.randn(case.heads, case.batch, *space, case.dim).movedim(0, -2) for _ in "qkv")
    attn = torch.randn(case.batch, *space, rule.window_tokens, case.heads).transpose(-1, -2)
    # What is masked must not even be read.
    attn = attn.masked_fill(~rule.attended_slots(space, space)[..., None, :], float("nan"))
    rpb = torch.randn(case.heads, *(2 * n - 1 for n in rule.kernel_size))
    arguments = {
        "qk": (q, k),
        "av": (attn, v),
        "av_transposed": (attn, q, space),
        "rpb_bias": (rpb, space, space),
        "rpb_bias_transposed": (attn[0], space),
    }[name]
    expected, actual = (getattr(m, name)(*arguments, rule) for m in (reference, triton))
    assert_close(name, expected, actual, 1e-5)


def test_no_batch():
    empty = torch.randn(0, 5, 1, 4)
    assert triton.qk(empty, empty, CASES[-1].rule).shape == (0, 5, 1, 3)
