"""Gradient of the relative positional bias on Hopper.

All blocks of a program are as far from their tiles, so that a pair of a row and a column has the
same bias in every tile. So dS of many tiles is summed as it is, in registers, and a second kernel
adds up the pairs that have the same bias, in a fixed order.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton import windows
from ..triton.launch import kernel
from .backward import GV, QK, row_lse_delta
from .bias import Bias, bias_of
from .geometry import OWN, Geometry, Group, Side, Tile, mma_layout, volume
from .gluon_names import aggregate, from_triton, gdc_wait, gl, gluon, warpgroup_mma_wait
from .masks import COMPARE, Mask
from .pipeline import TmaPipeline, TmaTensor, tma_bases, tma_pipeline
from .products import multiply

tiles_that_attend = from_triton(windows.tiles_that_attend)


@aggregate
class Context:
    """What the roles of a program share."""

    geometry: Geometry
    mask: Mask
    bias: Bias
    of_queries: gl.tuple  # query, gradient of the output, LSE and delta
    of_keys: gl.tuple  # key, value
    tiles: TmaPipeline
    blocks: TmaPipeline
    sums: gl.tensor  # where the program's [M, N] are
    apart: gl.tuple  # how far a block is from its tile, per axis
    first: gl.tuple  # the first of the tiles of such a block, per axis
    counts: gl.tuple  # how many there are, per axis
    begin: gl.tensor  # the program's first one of all batch entries and dilation groups
    end: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    scale_log2: gl.tensor  # scores times it are exponents of two
    QK_CHUNKS: gl.constexpr  # channels of queries and keys, as products take them
    V_CHUNKS: gl.constexpr  # of values
    SCORES: gl.constexpr  # layout of [M, N]


@gluon.jit
def _digit(number, base):
    """Last digit of a number, and the others."""
    return number % base, number // base


@gluon.jit
def _begin(ctx):
    """The program's first tile: its index per axis, dilation group, and batch entry."""
    t2, rest = _digit(ctx.begin, ctx.counts[2])
    t1, rest = _digit(rest, ctx.counts[1])
    t0, rest = _digit(rest, ctx.counts[0])
    dilation = ctx.geometry.dilation
    g2, rest = _digit(rest, dilation[2])
    g1, rest = _digit(rest, dilation[1])
    g0, rest = _digit(rest, dilation[0])
    return (t0, t1, t2), (g0, g1, g2), rest


@gluon.jit
def _after(i, sizes):
    """The index after ``i`` per axis, and whether it is the first one again: divisions would cost
    as much as a softmax."""
    i2 = i[2] + 1
    end2 = i2 == sizes[2]
    i1 = gl.where(end2, i[1] + 1, i[1])
    end1 = i1 == sizes[1]
    i0 = gl.where(end1, i[0] + 1, i[0])
    end0 = i0 == sizes[0]
    return (gl.where(end0, 0, i0), gl.where(end1, 0, i1), gl.where(end2, 0, i2)), end0


@gluon.jit
def _next(ctx, t, group, batch):
    """The tile after one, as :func:`_begin` says."""
    t, is_last = _after(t, ctx.counts)
    next_group, is_last_group = _after(group, ctx.geometry.dilation)
    batch = gl.where(is_last & is_last_group, batch + 1, batch)
    group = (
        gl.where(is_last, next_group[0], group[0]),
        gl.where(is_last, next_group[1], group[1]),
        gl.where(is_last, next_group[2], group[2]),
    )
    return t, group, batch


@gluon.jit
def _first_token(ctx, t):
    """First query of a tile, per axis."""
    TILE: gl.constexpr = ctx.geometry.TILE
    return (
        (ctx.first[0] + t[0]) * TILE[0],
        (ctx.first[1] + t[1]) * TILE[1],
        (ctx.first[2] + t[2]) * TILE[2],
    )


@gluon.jit
def _beside(ctx, first):
    """Where the block of a tile begins."""
    apart = ctx.apart
    return first[0] + apart[0], first[1] + apart[1], first[2] + apart[2]


@gluon.jit
def _fetch_tiles(ctx):
    """Warp that fetches tiles of queries."""
    t, group, batch = _begin(ctx)
    gdc_wait()
    for stage in range(ctx.end - ctx.begin):
        bases = tma_bases(ctx.of_queries, batch, group, ctx.head)
        ctx.tiles.produce(stage, ctx.of_queries, bases, (_first_token(ctx, t),))
        t, group, batch = _next(ctx, t, group, batch)


@gluon.jit
def _fetch_blocks(ctx):
    """Warp that fetches their blocks of keys."""
    t, group, batch = _begin(ctx)
    gdc_wait()
    for stage in range(ctx.end - ctx.begin):
        bases = tma_bases(ctx.of_keys, batch, group, ctx.kv_head)
        start = _beside(ctx, _first_token(ctx, t))
        ctx.blocks.produce(stage, ctx.of_keys, bases, (start,))
        t, group, batch = _next(ctx, t, group, batch)


@gluon.jit
def _sum(ctx):
    """Warpgroup that sums dS."""
    g, tiles, blocks = ctx.geometry, ctx.tiles, ctx.blocks
    M: gl.constexpr = volume(g.TILE)
    N: gl.constexpr = volume(g.BLOCK)
    acc = gl.zeros([M, N], gl.float32, ctx.SCORES)  # [M, N]
    t, _, _ = _begin(ctx)
    zero = ctx.begin * 0
    here = zero, zero, zero
    side = Side(g.length, here, here, (), ())
    group = Group(side, side, (), g.window, g.stride)
    gdc_wait()
    for stage in range(ctx.end - ctx.begin):
        first = _first_token(ctx, t)
        start = _beside(ctx, first)
        tile = Tile(ctx.head, ctx.head, group, first, start, here)
        mask = ctx.mask.of_tile(tile, first, ctx.SCORES)
        bias = ctx.bias.of_tile(tile, first, ctx.head)
        tiles.consumer_wait(stage)
        q, grad_out = tiles.matrix(stage, QK), tiles.matrix(stage, GV)  # [M, D], [M, DV]
        s = mask.scores(q, blocks, stage, here, bias, (), ctx.SCORES, ctx.QK_CHUNKS)  # S = Q K^T
        dp = multiply(grad_out, blocks.matrix(stage, GV), ctx.SCORES, ctx.V_CHUNKS)  # dP = dO V^T
        lse, delta = row_lse_delta(tiles, stage, ctx.SCORES)  # [M, 1] each
        i0, i1, i2 = g.tokens(first, ctx.SCORES)  # [M] each
        real = (i0 < g.length[0]) & (i1 < g.length[1]) & (i2 < g.length[2])
        # Rows that are no query have weights of zero, whatever their bias.
        lse = gl.where(real[:, None], lse, float("inf"))
        s = warpgroup_mma_wait(len(ctx.V_CHUNKS), deps=[s])
        s = mask.compare(s, here, True)
        p = gl.exp2(s * ctx.scale_log2 - lse)  # [M, N]
        dp = warpgroup_mma_wait(0, deps=[dp])
        tiles.consumer_release(stage)
        blocks.consumer_release(stage)
        acc += p * (dp - delta)  # dS = P * (dP - delta)
        t, _is_last = _after(t, ctx.counts)
    row = gl.arange(0, M, gl.SliceLayout(1, ctx.SCORES))[:, None]
    column = gl.arange(0, N, gl.SliceLayout(0, ctx.SCORES))[None, :]
    gl.store(ctx.sums + row * N + column, acc)


@kernel(
    gluon.jit,
    tensors="query key value grad_out lse_delta sums bias_tables",
)
def bias_gradient_kernel(
    query, key, value, grad_out, lse_delta, sums, bias_tables,
    q_b, q_0, q_1, q_2, q_h, q_c, k_b, k_0, k_1, k_2, k_h, k_c, v_b, v_0, v_1, v_2, v_h, v_c,
    N0, N1, N2, g_b, g_0, g_1, g_2, g_h, g_c, l_b, l_0, l_1, l_2, l_h, l_c,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, A0, A1, A2, B1, B2,
    batches, heads_per_kv, scale_log2, bias_size, bias_middle,
    MODES: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, BIAS_STRIDES: gl.constexpr, QK_CHUNKS: gl.constexpr,
    V_CHUNKS: gl.constexpr,
):  # fmt: skip
    """dS of one block of keys for each tile of queries, summed over a split of the tiles, into
    ``sums [splits, heads, blocks, queries, keys]``.

    Numbers are as in the forward kernel. ``A``: how far the first block is from its tile, ``B``:
    how many blocks there are, per axis.
    """
    g = Geometry(
        length=(N0, N1, N2), window=(K0, K1, K2), stride=(S0, S1, S2), dilation=(D0, D1, D2),
        tiles=(N0, N1, N2), part=(), tile_table=(), num_tiles=batches, heads=batches,
        heads_at_once=batches, MODES=MODES, TILE=TILE, BLOCK=BLOCK, SPLIT_AXIS=0, WARPGROUPS=1,
        DILATED=True, QUERIES=OWN, PIECE=BLOCK, HEADS_FIRST=False, OF_KEYS=False,
    )  # fmt: skip
    of_queries = (
        TmaTensor(query, (q_b, q_0, q_1, q_2, q_h, q_c), ()),
        TmaTensor(grad_out, (g_b, g_0, g_1, g_2, g_h, g_c), ()),
        TmaTensor(lse_delta, (l_b, l_0, l_1, l_2, l_h, l_c), ()),
    )
    of_keys = (
        TmaTensor(key, (k_b, k_0, k_1, k_2, k_h, k_c), ()),
        TmaTensor(value, (v_b, v_0, v_1, v_2, v_h, v_c), ()),
    )
    block, split_id, head = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    splits, heads = gl.num_programs(1), gl.num_programs(2)
    apart0 = A0 + block // (B1 * B2) * BLOCK[0]
    apart1 = A1 + block // B2 % B1 * BLOCK[1]
    apart2 = A2 + block % B2 * BLOCK[2]
    # Of one dilation group: all have the same length.
    t0, count0 = tiles_that_attend(N0, 1, K0, S0, apart0, TILE[0], BLOCK[0], MODES[0])
    t1, count1 = tiles_that_attend(N1, 1, K1, S1, apart1, TILE[1], BLOCK[1], MODES[1])
    t2, count2 = tiles_that_attend(N2, 1, K2, S2, apart2, TILE[2], BLOCK[2], MODES[2])
    count = count0 * count1 * count2 * (D0 * D1 * D2) * batches
    per_split = (count + splits - 1) // splits
    begin = gl.minimum(split_id * per_split, count)
    M: gl.constexpr = volume(TILE)
    N: gl.constexpr = volume(BLOCK)
    at = (split_id.to(gl.int64) * heads + head) * gl.num_programs(0) + block
    ctx = Context(
        geometry=g, mask=Mask(g, (), (), COMPARE, (0, 0, 0), False, 1),
        bias=bias_of(g, bias_tables, bias_size, bias_middle, BIAS_STRIDES),
        of_queries=of_queries, of_keys=of_keys, tiles=tma_pipeline(of_queries, STAGES, 1, 1),
        blocks=tma_pipeline(of_keys, STAGES, 1, 1), sums=sums + at * (M * N),
        apart=(apart0, apart1, apart2), first=(t0, t1, t2),
        counts=(gl.maximum(count0, 1), gl.maximum(count1, 1), gl.maximum(count2, 1)),
        begin=begin, end=gl.minimum(begin + per_split, count), head=head,
        kv_head=head // heads_per_kv, scale_log2=scale_log2, QK_CHUNKS=QK_CHUNKS, V_CHUNKS=V_CHUNKS,
        SCORES=mma_layout(N),
    )  # fmt: skip
    gl.warp_specialize(
        [(_sum, (ctx,)), (_fetch_tiles, (ctx,)), (_fetch_blocks, (ctx,))],
        [1, 1],
        [FETCH_REGISTERS, FETCH_REGISTERS],
    )
