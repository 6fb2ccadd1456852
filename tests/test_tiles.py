"""How the tiles of GPU kernels are chosen: what is counted, and which ones are the cheapest."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from typing import Any

import pytest

from natten.backends.interface import KINDS, Shape
from natten.neighborhood import Dense, Neighborhood
from natten.tiling import reach

hopper = pytest.importorskip("natten.backends.hopper.tiles")
triton = pytest.importorskip("natten.backends.triton.tiles")
cuts = pytest.importorskip("natten.backends.hopper.cuts")
widths = pytest.importorskip("natten.backends.hopper.widths")
uneven = pytest.importorskip("natten.backends.hopper.uneven")
programs = pytest.importorskip("natten.backends.hopper.programs")

Problem = tuple[Neighborhood, tuple[int, ...], tuple[int, ...]]


def drawn(draw: random.Random) -> Problem:
    """A rule, and layouts of queries and of keys; now and then the queries are a part."""
    rank = draw.choice((1, 2, 3))
    axes = []
    for _ in range(rank):
        boundary, d = draw.choice(("shift", "truncate", "circular")), draw.choice((1, 1, 1, 2, 3))
        n = draw.randint(1, (200, 40, 16)[rank - 1]) * d
        k = draw.randint(1, min(n // d, 13))
        s = draw.choice((1, 1, draw.randint(1, k)))
        n = -(-n // (s * d)) * s * d if boundary == "circular" else n + draw.choice((0, 0, 1))
        axes.append((n, k, s, d, boundary != "circular" and draw.random() < 0.2, boundary))
    shape, *parameters = zip(*axes)
    offset = None
    keys = shape
    if "circular" not in parameters[-1] and draw.random() < 0.3:
        offset = tuple(draw.randint(0, n - 1) for n in shape)
        shape = tuple(draw.randint(1, n - o) for n, o in zip(shape, offset))
    return Neighborhood.create(rank, *parameters, 1, offset), shape, keys


def counted(
    first: list[int], last: list[int], begins: range, tile: int, block: int, groups: int,
    piece: int, ring: int,
) -> tuple[int, int, int, int, bool]:  # fmt: skip
    """What :class:`cuts.Axis` says, tile by tile; ``ring``: 0 if there is none."""
    blocks = full = fetched = most = 0
    masked = False
    for begin in begins:
        tokens = range(begin, begin + tile * groups)
        partners = [(first[min(i, len(first) - 1)], last[min(i, len(first) - 1)]) for i in tokens]
        low, high = partners[0][0], partners[-1][1]
        if ring and (low < 0 or high > ring):  # pieces meet at the seam
            seam = 0 if low < 0 else ring
            low = next(x for x in range(low, low - piece, -1) if (seam - x) % piece == 0)
        own = [partners[i : i + tile] for i in range(0, tile * groups, tile)]
        for each in own:
            visited = {(x - low) // block for a, b in each for x in range(a, b)}
            blocks += max(len(visited), 1)
            begins_full, ends_full = max(a for a, _ in each), min(b for _, b in each)
            starts = (low + block * i for i in visited)
            full += sum(begins_full <= x and x + block <= ends_full for x in starts)
            masked |= len(set(each)) > 1
            masked |= any((a - low) % block or (b - low) % block for a, b in each)
        count = max(-(-(high - low) // block), 1)
        fetched, most = fetched + count * groups, max(most, count)
    return blocks, full, fetched, most, masked


@pytest.mark.parametrize("seed", range(40))
def test_axes_are_counted_tile_by_tile(seed: int) -> None:
    draw = random.Random(seed)
    rule, shape, key_shape = drawn(draw)
    axis = draw.randrange(rule.rank)
    rule, length, key_length = rule.of_axis(axis), shape[axis], key_shape[axis]
    (d,) = rule.dilation
    for of_keys in (False, True):
        first, last = (x.tolist() for x in reach(rule, 0, length, key_length, 0, of_keys))
        if not first:
            continue
        ring = -(-key_length // d) if rule.boundary == ("circular",) else 0
        span = rule.attended(0, length, key_length) if of_keys else (0, len(first))
        found = cuts.AxisCuts(span, [(first, last)], ring or None)
        for _ in range(4):
            tile, block = 2 ** draw.randint(0, 6), 2 ** draw.randint(0, 6)
            groups = draw.choice((1, 2))
            piece = block >> draw.randint(0, block.bit_length() - 1) if ring else block
            cut = found.cut(tile, block, groups, piece)
            size = tile * groups
            begins = range(span[0] // size * size, span[1], size)
            expected = counted(first, last, begins, tile, block, groups, piece, ring)
            assert (cut.blocks, cut.full, cut.fetched, cut.most, cut.masked) == expected
            assert cut.tiles == len(begins)
            visits = found.visits(tile, groups)
            visited = cut.blocks + cuts.IDLE * (cut.fetched - cut.blocks)
            assert visits[block] <= 1.000001 * visited
            if not ring:
                assert visits[block] == pytest.approx(visited)
                assert visits.tiles == groups * cut.tiles


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_cheapest_of_all(seed: int) -> None:
    draw = random.Random(seed)
    rule, shape, key_shape = drawn(draw)
    dim = draw.choice((32, 64, 128))
    for kind in KINDS:
        search = hopper._Search(kind, *hopper._model(rule, shape, key_shape), dim, dim)
        found = search.cheapest()
        every = [*search.every()]
        assert [found[1]] == every[:1] if found else not every
        if found:
            assert search.cheapest(found[0]) is None
            assert search.cheapest(1.01 * found[0]) == found
        sizes = dim, dim, draw.choice((2, 4)), False, triton.gpu_of(90)
        search = triton._Search(kind, *triton.typical(rule, shape, key_shape), *sizes)
        found = search.cheapest()
        assert found[1] == next(iter(search.every()))
        assert search.cheapest(found[0]) is None


def test_the_search_prices_few(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, shape = Neighborhood.create(3, 5), (21, 34, 55)
    price, priced = hopper._Search._priced, []

    def counting(self: Any, tiles: Any) -> Any:
        priced.append(tiles)
        return price(self, tiles)

    monkeypatch.setattr(hopper._Search, "_priced", counting)
    for kind in KINDS:
        search = hopper._Search(kind, rule, shape, shape, 64, 64)
        search.cheapest()
        few = len(priced)
        priced.clear()
        assert few < len(search.every()) / 20
        priced.clear()


def test_tiles_follow_strides() -> None:
    """A tile of one stride, or of a part of it, has one window, and its blocks no mask."""
    rule, shape = Neighborhood.create(3, (9, 15, 24), (3, 5, 8)), (21, 45, 80)
    pairs = math.prod(shape) * math.prod(rule.kernel_size)
    for kind in KINDS:
        tiles = hopper.choose(kind, rule, shape, shape, 128, 128)
        tile, _ = cuts.tile_and_block(tiles, kind == "dkdv")
        assert tile == (3, 5, 4) and tiles.split_axis == 2 and tiles.num_warps == 8
        assert hopper.computed_pairs(kind, rule, shape, shape, tiles) < 1.15 * pairs
        # Where a part may begin anywhere, all are powers of two.
        part = Neighborhood.create(3, (9, 15, 24), (3, 5, 8), query_offset=0)
        packed = hopper.candidates(kind, rule, shape, shape, 128, 128, packed=True)
        others = hopper.candidates(kind, part, shape, shape, 128, 128)
        for each in itertools.chain(packed, others):
            assert all(n & (n - 1) == 0 for n in each.q_block + each.kv_block)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_and_blocks_of_other_sizes(seed: int) -> None:
    """They follow strides, most of a matrix is tokens, and blocks cover what a tile reaches."""
    draw = random.Random(seed)
    lengths = tuple(draw.randint(20, 60) for _ in range(3))
    strides = tuple(draw.choice((1, 3, 5, 6, 7, 8)) for _ in range(3))
    windows = tuple(s * draw.randint(1, 3) for s in strides)
    for tile, span in uneven.tiles_of_strides(64, lengths, lengths, windows, strides, True):
        assert 48 < math.prod(tile) <= 64
        assert all(s % n == 0 or n % s == 0 for n, s in zip(tile, strides))
        for n, k, s, size, reached in zip(lengths, windows, strides, tile, span):
            rule = Neighborhood.create(1, k, s)
            first, last = (x.tolist() for x in reach(rule, 0, n, n, 0, False))
            spans = (last[min(i + size, n) - 1] - first[i] for i in range(0, n, size))
            assert max(spans) <= reached
        for columns in (64, 128):
            for block in uneven.blocks_of_span(span, strides, columns):
                assert columns * 3 // 4 < math.prod(block) <= columns


def test_small_windows_have_tiles_of_any_size() -> None:
    """In large layouts, where they are estimated to take less, whatever the price."""
    rule, shape = Neighborhood.create(2, 7), (128, 128)
    for kind in KINDS:
        search = hopper._Search(kind, rule, shape, shape, 64, 64)
        cost, tiles = search.cheapest()
        tile, _ = cuts.tile_and_block(tiles, kind == "dkdv")
        assert tile == (1, 6, 10)
        search.uneven = []
        assert cost < 0.96 * search.cheapest()[0]
        # Small layouts share kernels, and pieces of rings divide blocks.
        ring = Neighborhood.create(2, 7, boundary="circular")
        assert not hopper._Search(kind, rule, (64, 64), (64, 64), 64, 64).uneven
        assert not hopper._Search(kind, ring, shape, shape, 64, 64).uneven


@pytest.mark.parametrize(
    ("shape", "window", "most"),
    [((30, 48, 80), (18, 24, 24), 0.97), ((33, 49, 80), (16, 10, 18), 0.85)],
)
def test_large_windows_of_three_axes_have_tiles_of_any_size(
    shape: Shape, window: Shape, most: float
) -> None:
    """They exceed windows that are no multiples of a power of two less."""
    rule = Neighborhood.create(3, window)
    assert rule.window_tokens > uneven.SMALL
    search = hopper._Search("forward", rule, shape, shape, 128, 128)
    cost, _ = search.cheapest()
    search.uneven = []
    assert cost < most * search.cheapest()[0]


def test_a_bias_has_blocks_of_powers_of_two_with_wide_heads() -> None:
    problem = "forward", Neighborhood.create(3, (9, 17, 25)), *[(21, 45, 80)] * 2, 128, 128
    assert math.prod(hopper.choose(*problem).kv_block) < 128
    assert math.prod(hopper.choose(*problem, has_bias=True).kv_block) == 128


@pytest.mark.parametrize(("window", "stride", "dim"), [(7, 2, 32), (13, 4, 64)])
def test_windows_with_strides_have_tiles_of_any_size(window: int, stride: int, dim: int) -> None:
    """In small layouts, too, of queries: tiles that follow strides reach other sizes of blocks."""
    rule, shape = Neighborhood.create(2, window, stride), (56, 56)
    for kind in ("forward", "dq"):
        search = hopper._Search(kind, rule, shape, shape, dim, dim)
        cost, _ = search.priced(hopper.choose(kind, rule, shape, shape, dim, dim))
        search.uneven = []
        assert cost < 0.95 * search.cheapest()[0]


def test_plain_attention_has_tiles() -> None:
    for kind in KINDS:
        for causal in (False, True):
            problem = (Dense(causal), (300,), (200,), 64, 64, 2)
            found = triton.candidates(kind, *problem)
            assert triton.choose(kind, *problem) == found[0]
            assert all(16 <= math.prod(each.q_block) <= 128 for each in found)


@pytest.mark.parametrize("tiles", [hopper, triton], ids=["hopper", "triton"])
def test_layouts_of_many_sizes_share_tiles(tiles: Any) -> None:
    rest = () if tiles is hopper else (2, False, triton.gpu_of(90))
    rule, draw = Neighborhood.create(2, 7), random.Random(0)
    sizes = [(draw.randint(14, 90), draw.randint(14, 90)) for _ in range(60)]
    for kind in KINDS:
        chosen = {}
        for shape in sizes:
            chosen[shape] = found = tiles.choose(kind, rule, shape, shape, 32, 32, 2)
            assert found == tiles.candidates(kind, rule, shape, shape, 32, 32, 2)[0]
            search = tiles._Search(kind, rule, shape, shape, 32, 32, *rest)
            (least, _), (cost, same) = search.cheapest(), search.priced(found)
            tokens = math.prod(shape)
            assert same == found and cost <= least * (1.35 if tokens < 1536 else 1.05)
        assert len(set(chosen.values())) <= 2
        tiles._usual.cache_clear()  # the same in another order, with nothing kept
        triton._shared_tiles.cache_clear()
        for shape in sizes[::-1]:
            assert tiles._usual(kind, rule, shape, shape, 32, 32, *rest) == chosen[shape]


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (Neighborhood.create(2, 13), (91, 180)),  # a large layout
        (Neighborhood.create(2, 10), (14, 14)),  # windows of half of it
        (Neighborhood.create(2, 7, query_offset=(3, 5)), (20, 30)),
    ],
    ids=["large", "near", "part"],
)
def test_others_have_the_cheapest_tiles(rule: Neighborhood, shape: tuple[int, ...]) -> None:
    key_shape = shape if rule.query_offset is None else (40, 40)
    for kind in KINDS:
        search = hopper._Search(kind, *hopper._model(rule, shape, key_shape), 32, 32)
        assert hopper.choose(kind, rule, shape, key_shape, 32, 32) == search.cheapest()[1]
        model = triton.typical(rule, shape, key_shape)
        search = triton._Search(kind, *model, 32, 32, 2, False, triton.gpu_of(90))
        assert triton.choose(kind, rule, shape, key_shape, 32, 32, 2) == search.cheapest()[1]


@pytest.mark.parametrize("channels", range(8, 257, 8))
def test_lines_that_heads_lie_across(channels: int) -> None:
    """By the bytes of 64 heads, one by one."""
    lines = [
        {byte // 128 for byte in range(i * 2 * channels, (i + 1) * 2 * channels)} for i in range(64)
    ]
    begins = {i * 2 * channels % 128 for i in range(64)}
    whole = all(len(each) == max(1, channels // 64) for each in lines)
    expected = 0.0 if whole else sum(map(len, lines)) / 64
    assert widths.split_lines(channels) == pytest.approx(expected)
    assert widths.heads_of_lines(channels) == len(begins)


def test_heads_that_tma_is_slow_with_share_what_is_fetched() -> None:
    """Measured: pairs of warpgroups take 20 % less with 72 channels, 12 % with 56. With 40 they
    take 12 % more, as blocks have the next head's channels."""
    rule, shape = Neighborhood.create(2, 13), (64, 64)
    for dim, warps in ((40, 4), (48, 4), (56, 8), (64, 4), (72, 8), (80, 8), (96, 8)):
        assert hopper.choose("forward", rule, shape, shape, dim, dim).num_warps == warps
    for dim, warps in ((40, 4), (48, 4), (56, 8), (64, 4)):
        assert hopper.choose("dq", rule, shape, shape, dim, dim).num_warps == warps


@pytest.mark.parametrize("seed", range(8))
def test_programs_share_tiles_evenly(seed: int) -> None:
    """By counting what each program of each number of them has to do."""
    draw = random.Random(seed)
    shape = draw.choice(((28, 28), (64, 64), (60, 100), (16, 32, 32)))
    rule = Neighborhood.create(len(shape), draw.choice((5, 7, 13)))
    kind = draw.choice(KINDS)
    tiles = hopper.choose(kind, rule, shape, shape, 64, 64)
    each, sets, resident = (1000.0, 2500.0), draw.choice((8, 64)), tiles.resident_programs
    blocks = cuts.cuts(kind == "dkdv", rule, shape, shape).blocks_of_tiles(tiles)
    work = [1000 * math.prod(each) + 2500 for each in itertools.product(*blocks)] * sets

    def longest(count: int) -> float:
        of_program = [sum(work[i::count]) for i in range(count)]
        of_processor = [sum(of_program[i::132]) for i in range(132)]
        return (resident * max(of_program) + max(of_processor)) / 2

    most = 132 * resident
    found = programs.programs_of(blocks, each, sets, 1, 132, resident)
    if len(work) <= most:
        assert found == most
        return
    least = min(map(longest, range(most - 8, most + 1)))
    if found is None:
        ends = [0.0] * most
        for cycles in work:
            heapq.heapreplace(ends, ends[0] + cycles + 5500 / resident)
        assert resident * max(ends) < 1.01 * least
    else:
        assert most - 8 <= found <= most
        assert longest(found) <= max(1.02 * sum(work) / 132, least) + 1


@pytest.mark.parametrize(("processors", "resident"), [(1, 2), (2, 3)])
def test_there_is_a_program_however_few_run_at_once(processors: int, resident: int) -> None:
    """Also where one tile is so long that no number of programs shares the tiles evenly."""
    blocks = [[1.0] * 7 + [100.0]]
    found = programs.programs_of(blocks, (1000.0, 0.0), 1, 1, processors, resident)
    assert found is None or 1 <= found <= processors * resident


def test_long_tiles_of_a_row_have_programs_of_their_own() -> None:
    """Measured: a row's tiles of keys, of which those that take long come first."""
    rule, shape = Neighborhood.create(1, 2048), (32768,)
    tiles = hopper.choose("dkdv", rule, shape, shape, 128, 128)
    blocks = cuts.cuts(True, rule, shape, shape).blocks_of_tiles(tiles)
    assert programs.programs_of(blocks, (3000.0, 3000.0), 1, 1, 132, 1) is None


def test_tiles_of_a_part_lie_within_strides() -> None:
    """A part may begin amid a stride: tiles that are short along it compute fewer pairs then."""
    shape, key_shape = (15, 48, 80), (30, 48, 80)
    sizes = (18, 24, 24), (16, 8, 8)
    pairs = []
    for offset in (0, 5, 15):
        rule = Neighborhood.create(3, *sizes, query_offset=(offset, 0, 0))
        chosen = hopper.choose("forward", rule, shape, key_shape, 128, 128)
        assert chosen.q_block == (1, 8, 8)
        other = chosen._replace(q_block=(4, 4, 4))  # as cheap by estimate
        pairs += [
            hopper.computed_pairs("forward", rule, shape, key_shape, tiles)
            for tiles in (chosen, other)
        ]
    assert all(ours <= theirs for ours, theirs in zip(pairs[::2], pairs[1::2]))
    assert sum(pairs[::2]) < 0.95 * sum(pairs[1::2])
