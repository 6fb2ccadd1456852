"""Copies of heads whose width 8 does not divide, as Hopper's kernels read and write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

import gluon  # noqa: F401
import torch
import triton
import triton.language as tl

from natten.backends.hopper import channels, head_rows
from natten.inputs import Gradients, Inputs

# Views of a tensor [2, 5, 6, 3, C], each with strides of another kind.
VIEWS: dict[str, Callable[[int], torch.Tensor]] = {
    "contiguous": lambda c: torch.randn(2, 5, 6, 3, c),
    "heads first": lambda c: torch.randn(3, 2, 5, 6, c).movedim(0, -2),
    "packed": lambda c: torch.randn(2, 5, 6, 3, 3 * c)[..., c : 2 * c],
    "cropped": lambda c: torch.randn(2, 6, 8, 3, c)[:, 1:, :-2],
    "channels apart": lambda c: torch.randn(2, 5, 6, 3, c, 2)[..., 0],
}


@pytest.mark.parametrize("dim", [20, 12, 7, 1, 250])  # words of 8, 8, 2, 2 and 4 bytes
@pytest.mark.parametrize("view", VIEWS)
def test_heads_are_widened_and_narrowed(view: str, dim: int) -> None:
    x = VIEWS[view](dim).to(torch.bfloat16)
    wide = channels.widened(x)
    assert wide.is_contiguous() and wide.shape == (2, 5, 6, 3, -(-dim // 8) * 8)
    assert torch.equal(wide[..., :dim], x) and not wide[..., dim:].any()
    assert torch.equal(channels.narrowed(wide, dim), x)


def test_what_needs_no_copy_is_not_copied() -> None:
    x = torch.randn(1, 4, 2, 24, dtype=torch.float16)
    assert channels.widened(x) is x and channels.narrowed(x, 24) is x
    assert channels.widened(x.new_empty(1, 0, 2, 20)).shape == (1, 0, 2, 24)


def test_all_tensors_with_channels_are_widened() -> None:
    q, v = torch.randn(1, 4, 2, 20).half(), torch.randn(1, 4, 1, 12).half()
    rpb, tokens = torch.randn(2, 5).half(), torch.randn(1, 3, 1, 20).half()
    inputs = Inputs(q, q[..., :1, :], v, rpb, tokens, tokens[..., :12])
    wide = channels.widened_inputs(inputs)
    assert [None if x is None else x.shape[-1] for x in wide[:6]] == [24, 24, 16, 5, 24, 16]
    grads = channels.narrowed_gradients(Gradients(*wide[:6]), inputs)
    assert all(torch.equal(x, y) for x, y in zip(grads, inputs[:6]) if x is not None is not y)


def loaded(sums, head, sizes):
    """A head's sums ``[M, D]`` of ``[heads, M, channels]``, in chunks of so many channels."""
    row, found, start = (head * 4 + tl.arange(0, 4)[:, None]) * sum(sizes), [], 0
    for size in sizes:
        found.append(tl.load(sums + row + start + tl.arange(0, size)[None, :]))
        start += size
    return found


@triton.jit
def store_kernel(out, sums, heads, SIZES: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the sums of each head; of four tokens, one is none."""
    rows, token = head_rows.HeadRows(out, (), (), CHANNELS), tl.arange(0, 4)
    for i in range(heads):
        head = tl.full([], i, tl.int32)
        rows.store(loaded(sums, head, SIZES), token * heads + head, token < 3, head)


@pytest.mark.parametrize(("dim", "sizes"), [(20, (32,)), (28, (32,)), (44, (32, 16)), (12, (32,))])
def test_half_aligned_heads_are_stored_beside_others(dim: int, sizes: tuple[int, ...]) -> None:
    heads, width = 4, sum(sizes)
    sums = torch.randn(heads, 4, width)
    out = torch.full((4, heads, dim), torch.nan)
    store_kernel[(1,)](out, sums, heads, sizes, dim)
    for head in range(heads):
        first = head * dim % 8
        assert torch.equal(out[:3, head], sums[head, :3, first : first + dim])
    assert out[3].isnan().all()
