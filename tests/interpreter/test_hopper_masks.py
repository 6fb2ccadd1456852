"""The Hopper kernels' geometry and masks against the definition.

They are the kernels' own code, run on scores of zero.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

import gluon  # before the kernels
import torch
import triton
import triton.language as tl
from hopper_problems import FLAT, PROBLEMS, each_way, name_of, partners, rule_of

from natten import tuning
from natten.backends.hopper import backward, bias, costs, key_masks, masks
from natten.backends.hopper import plan as planning
from natten.backends.hopper import tiles as tiling
from natten.backends.hopper.cuts import cuts, rows_held
from natten.backends.hopper.flat import Flat, flattened
from natten.backends.hopper.flat_plan import FlatColumns
from natten.backends.hopper.geometry import Geometry
from natten.backends.interface import KINDS, Tiles
from natten.neighborhood import window_mask
from natten.tiling import padded

DIM = 64  # of heads

# With three axes, small ones: masks of each kind, and more than one block along each axis. Where
# windows slide along two axes, they are narrow or along three.
SMALL = [each for each in PROBLEMS if math.prod(each[0]) < 1000 and each[0] != (17, 19)] + [
    ((5, 9, 12), (3, 5, 7), 1, 1, False),
    ((4, 8, 16), (4, 4, 8), 1, 1, (True, False, False)),
    ((6, 10, 12), (4, 5, 6), (2, 3, 4), (1, 2, 1), False),
]


class Keys:
    """A pipeline whose blocks are zeros, beside which is the factor of a mask of keys; ``block`` is
    the one that is there."""

    def __init__(self, key_mask, tile):
        self.key_mask, self.tile = key_mask, tile
        self.rows = rows_held(key_mask.geometry.BLOCK)

    def consumer_wait(self, stage):
        pass

    def factor(self):
        if not self.key_mask.mask:
            return ()
        k = tl.arange(0, self.rows)
        within = self.key_mask.within_block(k)
        allowed = self.key_mask.of_block(self.tile, self.block, k, within)
        return (gluon.masked_factor(self.key_mask, allowed),)

    def matrix(self, stage):
        return tl.full([self.rows, 16], 0, tl.bfloat16)


def walk(g, mask, key_mask, bias, tile, warpgroup, scores, starts, first_tokens):
    """Store the scores of a warpgroup's blocks, and where its tokens and its blocks begin."""
    first = g.first_of(tile, warpgroup)
    for axis in range(3):
        tl.store(first_tokens + axis, first[axis])
    of_tile, biases = mask.of_tile(tile, first, None), bias.of_tile(tile, first, tile.head)
    width = rows_held(g.BLOCK)
    rows, columns = tl.arange(0, costs.ROWS), tl.arange(0, width)
    before, end, count, block = g.own_blocks(first, tile)
    assert 0 <= before < end <= count
    q, keys = tl.full([costs.ROWS, 16], 0, tl.bfloat16), Keys(key_mask, tile)
    for i in range(int(end) - int(before)):
        keys.block = block
        s = of_tile.scores(q, (), keys, i, block, biases, keys.factor(), None, (DIM,))
        s = of_tile.compare(s, block, i == 0)
        at = (i * costs.ROWS + rows[:, None]) * width + columns[None, :]
        tl.store(scores + at, s)
        start, _ = g.block_start(block, tile.origin)
        for axis in range(3):
            tl.store(starts + 3 * i + axis, start[axis])
        block = g.next_block(block, tile.blocks)


NUMBERS = "num_tiles", "heads", "heads_at_once"


def geometry_of(arguments):
    """The geometry of a launch, as its kernel makes it."""
    fields = {"length": "N", "window": "K", "stride": "S", "dilation": "D", "tiles": "T"}
    per_axis = {
        field: tuple(tl.full([], arguments[f"{letter}{axis}"], tl.int32) for axis in range(3))
        for field, letter in fields.items()
    }
    names = (
        "MODES",
        "TILE",
        "BLOCK",
        "SPLIT_AXIS",
        "WARPGROUPS",
        "DILATED",
        "QUERIES",
        "PIECE",
        "SEAM_PIECE",
        "HEADS_FIRST",
        "OF_KEYS",
    )
    constants = {name: arguments[name] for name in names}
    numbers = {name: tl.full([], arguments[name], tl.int32) for name in NUMBERS}
    return Geometry(**per_axis, part=(), tile_table=(), **numbers, **constants)


@triton.jit
def masks_kernel(
    tile_ids, scores, starts, first_tokens, tables, key_mask, count, most, ARGUMENTS: tl.constexpr
):
    """Walk the blocks of some tiles, as one program of the kernels does."""
    g = geometry_of(ARGUMENTS)
    table = [ARGUMENTS[name] for name in ("bias_size", "bias_middle", "BIAS_STRIDES")]
    biases = bias.bias_of(g, tables, *table)
    kind = [ARGUMENTS[name] for name in ("MASK", "ENDS", "BY_ROW", "STEPS")]
    columns = masks.column_tables(g, *kind, ARGUMENTS["TABLES"])
    size = rows_held(g.BLOCK) * costs.ROWS
    strides = [tl.full([], ARGUMENTS[f"m_{axis}"], tl.int32) for axis in "b012"]
    has_key_mask, factors = ARGUMENTS["HAS_KEY_MASK"], ()
    if has_key_mask and not g.OF_KEYS:
        factors = (masks.stage_factors(g, 1, *kind, ARGUMENTS["TABLES"]),)
    of_keys = key_masks.key_mask_of(
        g, key_mask, strides, ARGUMENTS["m_last"], factors, has_key_mask, kind[0]
    )
    own_masks = [ARGUMENTS["make_mask"](g, columns, *kind) for _ in range(g.WARPGROUPS)]
    for i in range(count):
        tile = g.tile(tl.load(tile_ids + i))
        for warpgroup in range(g.WARPGROUPS):
            at = i * g.WARPGROUPS + warpgroup
            walk(
                g, own_masks[warpgroup], of_keys, biases, tile, warpgroup,
                scores + at * most * size, starts + at * most * 3, first_tokens + at * 3,
            )  # fmt: skip


@triton.jit
def tiles_kernel(found, SIZE: tl.constexpr, WARPGROUP: tl.constexpr, ARGUMENTS: tl.constexpr):
    """Where all tiles are: batch entry, head, dilation group, first token of a warpgroup."""
    g = geometry_of(ARGUMENTS)
    ids = tl.arange(0, SIZE)
    tile = g.tile(ids)
    numbers = (tile.batch, tile.head, *g.own_side(tile).group, *g.first_of(tile, WARPGROUP))
    for i in range(8):
        tl.store(found + 8 * ids + i, numbers[i])


def grid(*sizes):
    """Coordinates of a block's tokens, ``[tokens, 3]``."""
    return torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, 3)


def held(shape):
    """:func:`grid` of what a matrix holds, whose last rows are as the last token."""
    tokens = grid(*shape)
    return tokens[torch.arange(rows_held(shape)).clamp(max=len(tokens) - 1)]


def some_tiles(counts):
    """Numbers of tiles: one in the middle, and some at the ends of all axes, so that along any two
    axes each end meets each."""
    ends = (0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)
    tiles = {tuple((n - 1) * last for n, last in zip(counts, each)) for each in ends}
    tiles.add(tuple(n // 2 for n in counts))
    return torch.tensor([(a * counts[1] + b) * counts[2] + c for a, b, c in sorted(tiles)])


def launch_of(kind, rule, shape, tiles, batch=1, heads=1, scale=1.0, bias_dtype=None, mask=None):
    """A launch, and its arguments with how the kernel makes its masks."""
    q = torch.empty(batch, *shape, heads, DIM, dtype=torch.bfloat16)
    measured = tuning.trial(tiling.key(kind, rule, shape, shape, DIM, DIM, 2), list(tiles))
    with measured, mock.patch.object(tiling, "choose", lambda *_: tiles):  # a candidate or not
        plan = planning.plan_for(q, q, q, None, rule, scale, bias_dtype, None, (mask, None))
        launch = getattr(plan, kind)
    if kind != "forward":
        more = {"OF_KEYS": kind == "dkdv", "make_mask": backward._mask}
        return launch, launch.arguments | more
    more = {"OF_KEYS": False, "make_mask": lambda g, tables, *x: masks.Mask(g, tables, (), *x)}
    return launch, launch.arguments | more


def check(kind, rule, shape, tiles, rpb=None, key_mask=None):
    """Every partner of a token is visible in one block, and nothing else is; with its bias, and
    unless it is masked."""
    bias_dtype, tables = None if rpb is None else rpb.dtype, None
    launch, arguments = launch_of(
        kind, rule, shape, tiles, scale=0.5, bias_dtype=bias_dtype, mask=key_mask
    )
    if rpb is not None:
        tables = torch.full(launch.shape, math.nan)
        launch.make.run(rpb=rpb, tables=tables)
    counts = [arguments[f"T{axis}"] for axis in range(3)]
    ids = some_tiles(counts) + math.prod(counts) * (math.prod(rule.dilation) - 1)  # last group
    most = math.prod(axis.most for axis in cuts(kind == "dkdv", rule, shape, shape)(tiles))
    sizes = arguments["WARPGROUPS"] * len(ids), most
    width = rows_held(arguments["BLOCK"])
    scores = torch.full((*sizes, costs.ROWS, width), -math.inf)
    starts = torch.full((*sizes, 3), 1 << 20, dtype=torch.int32)  # where there is no block
    first = torch.zeros(sizes[0], 3, dtype=torch.int32)
    masks_kernel[(1,)](
        ids, scores, starts, first, tables, key_mask, len(ids), most, ARGUMENTS=arguments
    )
    tokens = first[:, None] + held(arguments["TILE"])  # [tiles, rows, 3]
    at = starts[:, :, None] + held(arguments["BLOCK"])  # [tiles, blocks, columns, 3]
    # Columns that are no token are masked; of dK and dV, what is there adds nothing.
    of_block = torch.arange(width) < math.prod(arguments["BLOCK"])
    expected, needed, offsets = of_block, torch.tensor(1), []
    if kind == "dkdv":
        scores[..., ~of_block] = -math.inf
    for axis in range(3):
        missing, n = 3 - len(shape), arguments[f"N{axis}"]
        start, stop = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        if axis >= missing:
            start, stop = partners(kind, rule, axis - missing, n)
        i = tokens[..., axis].clamp(max=n - 1)  # past the end, those of the last are seen
        low, high = (x[i][:, None, :, None] for x in (start, stop))
        position = at[..., axis][:, :, None]
        expected = expected & (low <= position) & (position < high)
        needed = needed * (stop - start)[i]
        if axis >= missing:
            apart = position - tokens[..., axis][:, None, :, None]  # of a key from its query
            offsets.append((-apart if kind == "dkdv" else apart) + rule.kernel_size[axis - missing])
    allowed = torch.ones_like(expected)
    if key_mask is not None:
        lengths, dilation = padded(shape, 1), padded(rule.dilation, 1)
        where = [
            (at[..., axis] * dilation[axis] + dilation[axis] - 1) % lengths[axis]  # also on rings
            for axis in range(3)
        ]
        inside = key_mask.reshape(1, *lengths)[0][where]  # of what is outside, none is expected
        allowed = inside[:, :, None].expand(expected.shape)
    assert torch.equal(scores > -(2.0**99), expected & allowed)
    if rpb is not None:
        real = tokens < torch.tensor([arguments[f"N{axis}"] for axis in range(3)])
        seen = expected & allowed & real.all(-1)[:, None, :, None]
        index = [offset.expand(seen.shape)[seen] - 1 for offset in offsets]
        assert torch.equal(scores[seen], rpb[0][tuple(index)] * 2)
    assert torch.equal(expected.sum((1, 3)), needed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", SMALL, ids=name_of)
def test_masks_are_the_windows_and_scores_have_the_bias(problem, kind):
    shape, *parameters = problem
    rule = rule_of(shape, *parameters)
    rpb = torch.randn(1, *(2 * k - 1 for k in rule.kernel_size))
    mask = (torch.rand(*reversed(shape), 1) < 0.7).permute(*range(rule.rank, -1, -1))
    for i, tiles in enumerate(each_way(kind, rule, shape, DIM)):
        # Masked keys are rows of dK and dV, which are not those of scores.
        own = mask if i % 3 < 2 and kind != "dkdv" else None
        check(kind, rule, shape, tiles, rpb if i % 2 == 0 else None, own)


# Problems, and tiles and blocks that are no powers of two; warpgroups.
STRIDED = (7, 11, 13), (6, 5, 8), (3, 5, 4)
OTHER_SIZES = [
    ((*STRIDED, 1, False), (3, 5, 4), (1, 8, 8), 2),
    ((*STRIDED, 1, (True, False, False)), (2, 4, 8), (3, 5, 4), 1),
    (((14, 38), (7, 9), (7, 7), (1, 2), False), (1, 7, 7), (1, 7, 9), 1),
    (((13, 22), (5, 7), 1, 1, False), (1, 6, 10), (1, 3, 20), 2),
    (((12, 20), (9, 15), (3, 5), 1, False), (1, 3, 20), (1, 12, 5), 1),  # blocks are full
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("problem", "tile", "block", "groups"), OTHER_SIZES)
def test_tiles_and_blocks_need_not_be_powers_of_two(problem, tile, block, groups, kind):
    shape, *parameters = problem
    rule, work = rule_of(shape, *parameters), costs.work(kind, DIM, DIM)
    queries, keys = (block, tile) if kind == "dkdv" else (tile, block)
    tiles = Tiles(queries, keys, 4 * groups, 2, 2, 3 - groups)
    tiles = costs.fitted(tiles, costs.mask(kind, rule, shape, shape, tiles, work), work)
    rpb = torch.randn(1, *(2 * k - 1 for k in rule.kernel_size))
    mask = (torch.rand(*reversed(shape), 1) < 0.7).permute(*range(rule.rank, -1, -1))
    check(kind, rule, shape, tiles, rpb, mask if kind != "dkdv" else None)


@triton.jit
def rows_kernel(found, key_mask, tile_id, ARGUMENTS: tl.constexpr):
    """Ones in the rows of a tile of keys, but zeros in those of masked keys."""
    g = geometry_of(ARGUMENTS)
    strides = [tl.full([], ARGUMENTS[f"m_{axis}"], tl.int32) for axis in "b012"]
    of_keys = key_masks.key_mask_of(g, key_mask, strides, ARGUMENTS["m_last"], (), True, masks.NONE)
    tile = g.tile(tile_id)
    ones = tl.full([costs.ROWS, 16], 1.0, tl.float32)
    (kept,) = of_keys.of_rows(tile, g.first_of(tile, 0), (ones,))
    at = tl.arange(0, costs.ROWS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(found + at, kept)


@pytest.mark.parametrize("dilation", [1, 3])
def test_gradients_of_masked_keys_are_zero(dilation):
    shape, rule = (12, 21), rule_of((12, 21), (3, 5), 1, dilation, False)
    mask = torch.rand(2, *shape) < 0.5
    tiles = next(iter(each_way("dkdv", rule, shape, DIM)))
    _, arguments = launch_of("dkdv", rule, shape, tiles, batch=2, mask=mask)
    # The first tile of the last dilation group of the second batch entry.
    last = math.prod(arguments[f"T{axis}"] for axis in range(3)) * (2 * dilation**2 - 1)
    found = torch.full((costs.ROWS, 16), math.nan)
    rows_kernel[(1,)](found, mask, last, ARGUMENTS=arguments)
    tokens = held(arguments["TILE"])[:, 1:] * dilation + dilation - 1
    real = (tokens < torch.tensor(shape)).all(-1)
    expected = mask[1][tuple(tokens[real].T)].float()
    assert torch.equal(found[real], expected[:, None].expand(-1, 16))


class Row:
    """A pipeline of a row's keys, which are zeros, and of their columns ``[N, C]``."""

    buffers = None, None

    def __init__(self, columns):
        self.columns = columns

    def consumer_wait(self, stage):
        pass

    def matrix(self, stage, which=0):
        return self.columns if which else tl.full([self.columns.shape[0], 16], 0, tl.bfloat16)


@triton.jit
def row_kernel(found, query_columns, key_columns, lowered, N: tl.constexpr):
    """Scores of zero of so many queries and keys, of the masks of a row of tokens and of keys."""
    at = tl.arange(0, N)[:, None] * 16 + tl.arange(0, 16)[None, :]
    rows, row = tl.load(query_columns + at), Row(tl.load(key_columns + at))
    own = masks.Mask(None, (), (), masks.COLUMNS, (0, 0, 0), False, 1)
    of_tile = masks.TileMask(own, None, (), (), (), ())
    q = tl.full([N, 16], 0, tl.bfloat16)
    s = of_tile.scores(
        q, (rows,), row, 0, None, NoBias(), (tl.load(lowered + at),), None, (DIM,)
    )  # fmt: skip
    tl.store(found + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], s)


class NoBias:
    def of_block(self, block, layout):
        return ()


@pytest.mark.parametrize(("shape", "rule"), [each for each in FLAT if math.prod(each[0]) <= 256])
def test_masks_of_a_row_and_of_keys(shape, rule):
    tokens, mask = math.prod(shape), torch.rand(*shape) < 0.7
    columns = FlatColumns(flattened(rule, shape), tokens).make(torch.device("cpu"))
    size = len(columns["key_columns"])
    size = 1 << (size - 1).bit_length()
    query, key, lowered = (torch.zeros(size, 16, dtype=torch.bfloat16) for _ in range(3))
    for each, name in ((query, "query_columns"), (key, "key_columns")):
        each[: len(columns[name])] = columns[name]
    lowered[:tokens, -2:] = torch.where(mask.flatten(), 0.0, -(2.0**49))[:, None]
    found = torch.full((size, size), math.nan)
    row_kernel[(1,)](found, query, key, lowered, N=size)
    expected = window_mask(rule, shape, shape) & mask.flatten()
    assert torch.equal(found[:tokens, :tokens] > -(2.0**99), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_tiles_cover_every_token_once(problem, kind):
    shape, *parameters = problem
    rule = rule_of(shape, *parameters)
    ways = {(x.num_warps, x.split_axis): x for x in each_way(kind, rule, shape, DIM)}
    for number, tiles in enumerate(ways.values()):
        _, arguments = launch_of(kind, rule, shape, tiles, batch=2, heads=4)
        assert not arguments["HEADS_FIRST"]
        at_once = (1, 2, 4)[number % 3]
        arguments |= {"HEADS_FIRST": at_once > 1, "heads_at_once": at_once}
        lengths = [arguments[f"N{axis}"] for axis in range(3)]
        covered = torch.zeros(2, 4, *padded(rule.dilation, 1), *lengths, dtype=torch.int32)
        count = arguments["num_tiles"]
        for warpgroup in range(arguments["WARPGROUPS"]):
            size = 1 << (count - 1).bit_length()
            found = torch.zeros(size, 8, dtype=torch.int32)
            tiles_kernel[(1,)](found, SIZE=size, WARPGROUP=warpgroup, ARGUMENTS=arguments)
            place, first = found[:count].long().split([5, 3], 1)
            tokens = first[:, None] + grid(*arguments["TILE"])
            real = (tokens < torch.tensor(lengths)).all(-1)
            at = torch.cat([place[:, None].expand(-1, tokens.shape[1], -1), tokens], -1)[real]
            covered.index_put_(at.unbind(-1), torch.tensor(1, dtype=torch.int32), accumulate=True)
            heads = place[:, 1].view(-1, at_once)
            assert torch.equal(heads - heads[:, :1], torch.arange(at_once).expand_as(heads))
            elsewhere = torch.cat([place[:, [0, 2, 3, 4]], first], 1).view(-1, at_once, 7)
            assert (elsewhere == elsewhere[:, :1]).all()
        assert (covered == 1).all()


@pytest.mark.parametrize(("shape", "rule"), FLAT)
def test_columns_of_a_row_are_the_windows(shape, rule):
    """The product of both factors is 0 where a query attends a key, else -2^100 for each axis that
    hides it, and of tokens beyond the layout's no query attends any."""
    flat, tokens = flattened(rule, shape), math.prod(shape)
    assert isinstance(flat, Flat)
    factors = FlatColumns(flat, tokens).make(torch.device("cpu"))
    query, key = (factors[name].double() for name in ("query_columns", "key_columns"))
    found = query @ key.T / 2.0**100
    assert torch.equal(found[:tokens, :tokens] == 0, window_mask(rule, shape, shape))
    assert (found[:tokens, tokens:] < 0).all() and len(found) % 128 == 0
    assert {-1.0, -2.0, -3.0, 0.0} >= set(found.unique().tolist())
