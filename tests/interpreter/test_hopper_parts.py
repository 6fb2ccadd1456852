"""Parts, finer queries, cut windows and rings: where the Hopper kernels' tiles and blocks are, and
what masks hide. It is the kernels' own code, beside the definition.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

import gluon  # before the kernels
import torch
import triton
import triton.language as tl
from hopper_problems import PARTS, PLAIN, RINGS, id_of

from natten import tuning
from natten.backends.hopper import backward, bias, costs, descriptors, geometry, key_masks, masks
from natten.backends.hopper import plan as planning
from natten.backends.hopper import tiles as tiling
from natten.backends.hopper.cuts import OWN, rows_held
from natten.backends.hopper.documents import num_tiles_of
from natten.backends.hopper.lse_delta import lse_delta_kernel
from natten.backends.interface import KINDS, Tiles
from natten.backends.reference import relative_bias
from natten.neighborhood import Dense, Neighborhood, Rule, window_mask
from natten.tiling import padded

DIM = 64  # of heads


def plan_of(
    queries: Any, keys: Any, rule: Rule, has_bias: bool, key_mask: torch.Tensor | None = None
) -> planning.Plan:
    """The plan of a problem on tensors without data."""
    q, k = (
        torch.empty(1, *layout, 2, DIM, dtype=torch.bfloat16, device="meta")
        for layout in (queries, keys)
    )
    bias_dtype = torch.float32 if has_bias else None
    return planning.plan_for(q, k, k, None, rule, 0.5, bias_dtype, None, (key_mask, None))


def ways(kind: str, queries: Any, keys: Any, rule: Rule) -> list[Tiles]:
    """The best tiles of each kind of program and mask."""
    found: dict[Any, Tiles] = {}
    for tiles in tiling.candidates(kind, rule, queries, keys, DIM, DIM):
        mask = costs.mask(kind, rule, queries, keys, tiles, costs.work(kind, DIM, DIM))
        found.setdefault((tiles.num_warps, mask.kind, mask.by_row, mask.steps), tiles)
    return list(found.values())


class Keys:
    """A pipeline whose blocks are zeros."""

    def __init__(self, g: Any) -> None:
        self.rows = rows_held(g.BLOCK)

    def consumer_wait(self, stage: Any) -> None:
        pass

    def matrix(self, stage: Any) -> Any:
        return tl.full([self.rows, 16], 0, tl.bfloat16)


def geometry_of(arguments: dict[str, Any], tile_table: Any = None) -> Any:
    """The geometry of a launch, as its kernel makes it."""
    documents: Any = ()
    if arguments["PACKED"]:
        documents = (tile_table,)
        tiles, num_tiles = num_tiles_of(tile_table, arguments["heads"])
        arguments = arguments | {"T2": int(tiles), "num_tiles": int(num_tiles)}

    def numbers(**letters: str) -> dict[str, Any]:
        return {
            field: tuple(tl.full([], arguments[f"{name}{axis}"], tl.int32) for axis in range(3))
            for field, name in letters.items()
        }

    part: Any = ()
    if arguments["QUERIES"] != OWN:
        part = geometry.Part(
            **numbers(queries="Q", short_queries="SQ", short_keys="SN"),
            **numbers(offset="O", group="G", per_key="R"),
            first_key=numbers(first="F")["first"] if "F0" in arguments else (),
        )
    numbers_of_tiles = "num_tiles", "heads", "heads_at_once"
    names = (
        "MODES", "TILE", "BLOCK", "SPLIT_AXIS", "WARPGROUPS", "DILATED", "QUERIES", "PIECE",
        "SEAM_PIECE", "HEADS_FIRST",
    )  # fmt: skip
    return geometry.Geometry(
        **numbers(length="N", window="K", stride="S", dilation="D", tiles="T"),
        part=(part,) if part else (),
        tile_table=documents,
        **{name: tl.full([], arguments[name], tl.int32) for name in numbers_of_tiles},
        **{name: arguments[name] for name in names},
        OF_KEYS=arguments.get("PASS", costs.DQ) != costs.DQ,
    )


FOUND: list[Any] = []  # what the program below saw


class Places:
    """A pipeline that notes where a block's pieces are, and which ones they are."""

    def produce(
        self, stage: Any, tensors: Any, bases: Any, places: Any, at_seam: bool = False,
        TOKENS: int = 0,
    ) -> None:  # fmt: skip
        self.found = [numbers(x) for x in places]
        self.pieces = "SEAM_PIECE" if at_seam else "PIECE"


@triton.jit
def walk_kernel(
    tile_id, bias_tables, tile_table, mask, WARPGROUP: tl.constexpr, ARGUMENTS: tl.constexpr
):  # fmt: skip
    """Walk a warpgroup's blocks of a tile as the kernels do."""
    g = geometry_of(ARGUMENTS, tile_table)
    strides = [tl.full([], ARGUMENTS[f"m_{axis}"], tl.int32) for axis in "b012"]
    kind = [ARGUMENTS[name] for name in ("MASK", "ENDS", "BY_ROW", "STEPS")]
    last, has_key_mask, factors = ARGUMENTS["m_last"], ARGUMENTS["HAS_KEY_MASK"], ()
    if has_key_mask:
        factors = (masks.stage_factors(g, 1, *kind, ARGUMENTS["TABLES"]),)
    key_mask = key_masks.key_mask_of(g, mask, strides, last, factors, has_key_mask, kind[0])
    columns = tl.arange(0, rows_held(g.BLOCK))
    within = key_mask.within_block(columns)
    biases = bias.bias_of(
        g, bias_tables, *(ARGUMENTS[name] for name in ("bias_size", "bias_middle", "BIAS_STRIDES"))
    )
    tables = masks.column_tables(g, *kind, ARGUMENTS["TABLES"])
    make = backward._mask if "PASS" in ARGUMENTS else forward_mask
    tile = g.tile(tile_id)
    first = g.first_of(tile, WARPGROUP)
    window = make(g, tables, *kind).of_tile(tile, first, None)
    biases = biases.of_tile(tile, first, tile.head)
    before, end, count, block = g.own_blocks(first, tile)
    assert 0 <= before < end <= count
    q = tl.full([costs.ROWS, 16], 0, tl.bfloat16)
    own, other = g.own_side(tile), g.other_side(tile)
    blocks = []
    for i in range(int(end) - int(before)):
        masked: Any = ()
        if ARGUMENTS["HAS_KEY_MASK"]:
            allowed = key_mask.of_block(tile, block, columns, within)
            masked = (gluon.masked_factor(key_mask, allowed),)
        s = window.scores(q, (), Keys(g), i, block, biases, masked, None, (DIM,))
        s = window.compare(s, block, i == 0)
        start, _ = g.block_start(block, tile.origin)
        scores = torch.from_numpy(s.handle.data)
        places = Places()
        g.fetch(places, i, (), (), other, start)
        blocks.append((numbers(start), places, scores))
        block = g.next_block(block, tile.blocks)
    loaded = [numbers(x) for x in g.places_of_tile(own, first)]
    FOUND.append((side(own), side(other), numbers(first), loaded, blocks))


def forward_mask(g: Any, tables: Any, *kind: Any) -> Any:
    return masks.Mask(g, tables, (), *kind)


def numbers(values: Any) -> torch.Tensor:
    return torch.tensor([int(x) for x in values])


def side(x: Any) -> list[torch.Tensor]:
    fields = x.length, x.group, x.bases, x.skipped, x.document
    return [numbers(y or (0, 0, 0)) for y in fields]


def grid(*sizes: int) -> torch.Tensor:
    """Coordinates of a block's tokens, ``[tokens, 3]``."""
    return torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, 3)


def tokens_of(
    found: Any, at: torch.Tensor, layout: Any, dilation: Any, view: descriptors.View
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens where TMA looks, and which of them there are; it must find just these."""
    length, group, bases, skipped, _ = found
    position = at - skipped
    layout, dilation = torch.tensor(padded(layout, 1)), torch.tensor(padded(dilation, 1))
    token = position * dilation + group
    real = ((position >= 0) & (position < length)).all(1)
    assert (token[real] < layout).all()
    assert (length * dilation + group >= layout).all()  # the group has no more
    token = (token[:, 0] * layout[1] + token[:, 1]) * layout[2] + token[:, 2]
    inside = ((at >= 0) & (at < torch.tensor(view.shape[1:4]))).all(1)
    base = int((bases * torch.tensor(view.steps[1:4])).sum())
    assert 0 <= base < view.shape[0]
    address = base * view.strides[0] + (at * torch.tensor(view.strides[1:4])).sum(1)
    assert torch.equal(inside, real)
    assert torch.equal(address[real] - view.before, token[real] * 2 * DIM)
    return token, real


def check_load(at: torch.Tensor, found: Any, first: torch.Tensor, view: descriptors.View) -> None:
    """A box begins where its first token is; if there is none, within a view that begins before
    the tensor, and within the tensor."""
    length, _, bases, skipped, _ = found
    if (first < length).all():
        assert torch.equal(at, first + skipped)
    elif view.before:
        assert ((at >= 0) & (at < torch.tensor(view.shape[1:4]))).all()
        base = int((bases * torch.tensor(view.steps[1:4])).sum())
        address = base * view.strides[0] + int((at * torch.tensor(view.strides[1:4])).sum())
        assert address >= view.before


def check(kind: str, queries: Any, keys: Any, rule: Rule, tiles: Tiles, most: int) -> None:
    """Every partner of a token is visible in one block, with its bias, and nothing else is.

    Of plain attention, gradients of keys also see queries beyond the last, which are zeros.
    """
    of_keys = kind == "dkdv"
    has_bias = isinstance(rule, Neighborhood) and max(rule.queries_per_key) == 1
    name = tiling.key(kind, rule, queries, keys, DIM, DIM, 2)
    with tuning.trial(name, list(tiles)):
        # Masked keys are rows of dK and dV, which are not those of scores.
        key_mask = None if of_keys else torch.rand(1, *keys) < 0.8
        plan = plan_of(queries, keys, rule, has_bias, key_mask)
        launch: Any = getattr(plan, kind)
        arguments = launch.arguments
    wanted = window_mask(rule, queries, keys)
    if key_mask is not None:
        wanted = wanted & key_mask.flatten()
    tables, added = None, torch.zeros(wanted.shape)
    if isinstance(rule, Neighborhood) and has_bias:
        rpb = torch.randn(2, *(2 * k - 1 for k in rule.kernel_size))
        tables = torch.full(launch.shape, math.nan)
        launch.make.run(rpb=rpb, tables=tables)
        added = relative_bias(rule, queries, keys, rpb)[0] / 0.5
    layouts, views = (queries, keys), (plan.views.query, plan.views.key)
    if of_keys:
        wanted, added, layouts, views = wanted.T, added.T, layouts[::-1], views[::-1]
    is_plain = isinstance(rule, Dense)
    ids = range(arguments["num_tiles"] // arguments["heads"])  # of the first head
    if is_plain:  # heads have tiles in turn
        ids = range(0, arguments["num_tiles"], arguments["heads_at_once"])
    every, walked = len(ids) <= most, 0
    seen = torch.zeros(len(wanted), dtype=torch.bool)
    for tile, warpgroup in itertools.product(
        ids if every else random.sample(ids, most), range(arguments["WARPGROUPS"])
    ):
        FOUND.clear()
        walk_kernel[(1,)](tile, tables, None, key_mask, warpgroup, arguments)
        ((own, other, first, (loaded,), blocks),) = FOUND
        check_load(loaded, own, first, views[0])
        at = first + own[3] + grid(*arguments["TILE"])
        rows, is_row = tokens_of(own, at, layouts[0], rule.dilation, views[0])
        visible = torch.zeros(len(rows), wanted.shape[1], dtype=torch.int64)
        for start, places, scores in blocks:
            # The last rows and columns may be no token.
            scores = scores[: len(rows)]
            unmasked = scores > -(2.0**99)
            if (start >= other[0]).any() and "circular" not in rule.boundary:
                (place,) = places.found
                check_load(place, other, start, views[1])
                assert not unmasked[is_row].any()
                continue
            of_piece = grid(*arguments[places.pieces])
            at = torch.cat([place + of_piece for place in places.found])
            columns, is_column = tokens_of(other, at, layouts[1], rule.dilation, views[1])
            assert of_keys or not unmasked[is_row][:, len(columns) :].any()
            scores, unmasked = scores[:, : len(columns)], unmasked[:, : len(columns)]
            assert (is_plain and of_keys) or not unmasked[is_row][:, ~is_column].any()
            visible.index_add_(1, columns[is_column], unmasked[:, is_column].long())
            at, pairs = columns[is_column], unmasked[is_row][:, is_column]
            expected = added[rows[is_row]][:, at]
            assert torch.equal(scores[is_row][:, is_column][pairs], expected[pairs])
        assert torch.equal(visible[is_row], wanted[rows[is_row]].long())
        seen[rows[is_row]] = True
        walked += len(blocks)
    unattended = torch.zeros(layouts[0], dtype=torch.bool)
    if of_keys:
        unattended = ~has_tiles(plan, layouts[0])
    assert not wanted[unattended.flatten()].any()
    if every:
        assert (seen | unattended.flatten()).all()
        pairs = walked * costs.ROWS * rows_held(arguments["BLOCK"])
        assert tiling.computed_pairs(kind, rule, queries, keys, tiles) == pairs


def has_tiles(plan: Any, layout: Any) -> torch.Tensor:
    """Which keys of a layout have tiles."""
    found = torch.zeros(layout, dtype=torch.bool)
    found[tuple(slice(*each) for each in plan.attended(plan.key_spans))] = True
    return found


def test_gradients_of_keys_without_tiles_are_zeros() -> None:
    """And those of the others stay as they are; queries have their LSE and delta."""
    for queries, keys, rule in (
        ((4, 7), (30, 20), Neighborhood.create(2, (5, 3), query_offset=(8, 3))),
        ((9,), (400,), Neighborhood.create(1, 9, dilation=3, query_offset=130)),
        ((3, 4, 5), (3, 4, 5), Neighborhood.create(3, 3, query_offset=0)),
    ):
        plan = plan_of(queries, keys, rule, False)
        out, grad_out = (torch.randn(1, *queries, 2, DIM).bfloat16() for _ in range(2))
        lse, lse_delta = torch.randn(1, *queries, 2), torch.empty(1, *queries, 2, 4)
        grads = [torch.ones(1, *keys, 2, DIM, dtype=torch.bfloat16) for _ in range(2)]
        launch = plan.lse_delta[False]
        lse_delta_kernel[launch.grid](out, lse, grad_out, None, lse_delta, *grads, *launch.values)
        expected = torch.stack([lse / math.log(2), (out.float() * grad_out).sum(-1)], -1)
        assert torch.allclose(lse_delta[..., :2], expected, rtol=1e-5, atol=1e-4)
        for grad in grads:
            assert (grad == has_tiles(plan, keys)[..., None, None]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("each", PARTS + RINGS + PLAIN, ids=id_of)
def test_what_kernels_see_is_the_window(each: Any, kind: str) -> None:
    random.seed(0)
    found = ways(kind, *each)
    for tiles in random.sample(found, min(2, len(found))):
        check(kind, *each, tiles, most=3 if "circular" in each[2].boundary else 4)
