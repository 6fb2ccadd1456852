"""What kernels know of windows, against :class:`natten.neighborhood.Neighborhood`."""

import pytest
import torch
import triton
import triton.language as tl

from natten.backends.triton.windows import (
    CAUSAL,
    SLIDING,
    STRIDED,
    UNIT,
    lpt_order,
    modes,
    queries_of,
    tiles_that_attend,
    window,
)
from natten.neighborhood import Neighborhood
from natten.tiling import reach

# length, window, stride, causal
AXES = [
    (n, k, s, causal)
    for n in (1, 2, 5, 8, 13)
    for k in range(1, n + 1)
    for s in range(1, k + 1)
    for causal in (False, True)
]


def name_of(axis):
    n, k, s, causal = axis
    return f"{n}-k{k}-s{s}" + "-causal" * causal


@triton.jit
def bounds_kernel(out, n, k, s, MODE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    start, end = window(i, n, n, k, s, MODE)
    first, last = queries_of(i, n, n, k, s, MODE)
    tl.store(out + i, start), tl.store(out + N + i, end)
    tl.store(out + 2 * N + i, first), tl.store(out + 3 * N + i, last)


@pytest.mark.parametrize("axis", AXES, ids=name_of)
def test_windows_are_the_definition_and_have_an_inverse(axis):
    n, k, s, causal = axis
    rule = Neighborhood.create(1, k, s, 1, causal)
    out = torch.zeros(4, 16, dtype=torch.int32)
    bounds_kernel[(1,)](out, n, k, s, MODE=modes(rule, (n,))[2], N=16)
    start, end = rule.windows(0, torch.arange(n), n)
    assert out[0, :n].tolist() == start.tolist()
    assert out[1, :n].tolist() == end.tolist()
    for key in range(n):
        queries = ((start <= key) & (key < end)).nonzero().flatten().tolist()
        assert queries == list(range(*out[2:, key].tolist())), key


@triton.jit
def tiles_kernel(
    out, length, d, k, s, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr
):
    i = tl.arange(0, 64)
    first, count = tiles_that_attend(length, d, k, s, i - 32, ROWS, COLUMNS, MODE)
    tl.store(out + i, first), tl.store(out + 64 + i, count)


def attending(rule, length, o, rows, columns, beyond):
    """First rows of tiles that attend the block ``o`` from them on, or so many keys beside it."""
    found, (d,) = set(), rule.dilation
    for n in {-(-length // d), length // d}:
        start, end = rule.windows(0, torch.arange(n), n)
        f = torch.arange(n) // rows * rows
        attend = (start < f + o + columns + beyond) & (f + o - beyond < end)
        found |= set(f[attend].tolist())
    return found


@pytest.mark.parametrize(
    ("dilation", "missing", "rows", "columns"),
    [(1, 0, 4, 2), (1, 1, 2, 8), (2, 0, 4, 2), (2, 1, 2, 8)],
    ids=["all", "all-but-one", "dilated", "dilated-but-one"],
)
@pytest.mark.parametrize(
    "axis", [axis for axis in AXES if axis[0] in (1, 13) and axis[2] in (1, 3)], ids=name_of
)
def test_tiles_that_attend(axis, dilation, missing, rows, columns):
    n, k, s, causal = axis
    length = n * dilation - missing
    if dilation * k > length:
        pytest.skip("the window is longer than the axis")
    rule = Neighborhood.create(1, k, s, dilation, causal)
    out = torch.zeros(2, 64, dtype=torch.int32)
    mode = modes(rule, (n,))[2]
    tiles_kernel[(1,)](out, length, dilation, k, s, ROWS=rows, COLUMNS=columns, MODE=mode)
    # Windows of leaders are as far as that, and ends of groups of two lengths are one apart.
    apart = s - 1 + (length % dilation > 0)
    for o, first, count in zip(range(-32, 32), *out.tolist()):
        found = set(range(first * rows, (first + count) * rows, rows))
        least, most = (attending(rule, length, o, rows, columns, b) for b in (0, apart))
        assert least <= found <= most, o


@triton.jit
def order_kernel(out, tiles, k, SIZE: tl.constexpr, MODES: tl.constexpr, N: tl.constexpr):
    t = tl.arange(0, N)
    tl.store(out + t, lpt_order(t, tiles, k, SIZE, MODES))


def tiles_of(n, k, size, *modes):
    """The tiles of an axis in the order in which they come."""
    out = torch.full((128,), -1, dtype=torch.int32)
    order_kernel[(1,)](out, -(-n // size), k, SIZE=size, MODES=[m.value for m in modes], N=128)
    return out[: -(-n // size)].tolist()


@pytest.mark.parametrize("mode", [SLIDING, STRIDED], ids=["sliding", "strided"])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (16, 16), (300, 7), (300, 299), (777, 512), (1000, 100), (1024, 1024)]
)
def test_every_tile_comes_once(n, k, mode, size):
    assert sorted(tiles_of(n, k, size, UNIT, UNIT, mode)) == list(range(-(-n // size)))


@pytest.mark.parametrize(
    "modes",
    [(UNIT, UNIT, CAUSAL), (UNIT, SLIDING, SLIDING), (STRIDED, UNIT, SLIDING)],
    ids=["causal", "two axes", "first axis"],
)
def test_tiles_come_as_they_are(modes):
    assert tiles_of(1000, 100, 16, *modes) == list(range(63))


def first_come(costs, slots):
    """When the last of jobs ends that are taken in turn."""
    ends = [0] * slots
    for cost in costs:
        ends[ends.index(min(ends))] += cost
    return max(ends)


def test_no_long_tile_of_keys_starts_last():
    """66 processors are busy to the end."""
    first, last = reach(Neighborhood.create(1, 256), 0, 2048, 2048, 0, True)
    costs = [int(last[a + 15] - first[a]) for a in range(0, 2048, 16)]
    balanced = sum(costs) / 66
    found = first_come([costs[t] for t in tiles_of(2048, 256, 16, UNIT, UNIT, SLIDING)], 66)
    assert found < 1.1 * balanced < 1.2 * balanced < first_come(costs, 66)
