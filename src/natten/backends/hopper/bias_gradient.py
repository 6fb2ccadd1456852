"""Gradient of the relative positional bias on Hopper.

All blocks of a program are as far from their tiles, so that a pair of a row and a column has the
same bias in every tile. So dS of many tiles is summed as it is, in registers, and a second kernel
adds up the pairs that have the same bias, in a fixed order.

A tile and its block have the same biases and mask in every batch entry and dilation group, a *set*.
So sets follow one another, and what products of scores start from is made once for all of them.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton import windows
from ..triton.launch import kernel
from .backward import GV, QK
from .bias import Bias, bias_of
from .geometry import OWN, Geometry, Group, Side, Tile, mma_layout, volume
from .gluon_names import (
    aggregate,
    from_triton,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma_wait,
)
from .masks import COMPARE, MASKED, Mask
from .pipeline import TmaPipeline, TmaTensor, tma_bases, tma_pipeline
from .products import add_product, multiply

tiles_that_attend = from_triton(windows.tiles_that_attend)


@aggregate
class Beside:
    """Numbers that a warp lays beside the blocks of a pipeline."""

    numbers: gl.shared_memory_descriptor  # float32 [STAGES, *SHAPE]
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor  # the pipeline's
    STAGES: gl.constexpr

    @gluon.jit
    def produce(self, stage, numbers):
        """Once the stage is empty, lay its numbers there."""
        index = stage % self.STAGES
        mbarrier.wait(self.empty.index(index), (stage // self.STAGES & 1) ^ 1)
        self.numbers.index(index).store(numbers)
        mbarrier.arrive(self.full.index(index), count=1)

    @gluon.jit
    def consumer_wait(self, stage):
        """Until they are there."""
        mbarrier.wait(self.full.index(stage % self.STAGES), stage // self.STAGES & 1)

    @gluon.jit
    def load(self, stage, AXIS: gl.constexpr, AT: gl.constexpr, LAYOUT: gl.constexpr):
        """The numbers of a stage at an index ``AT`` of an axis."""
        return self.numbers.index(stage % self.STAGES).slice(AT, 1, AXIS).load(LAYOUT)


@gluon.jit
def beside(pipeline, SHAPE: gl.constexpr):
    """Numbers of that shape, of two axes, beside each block of a pipeline."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    STAGES: gl.constexpr = pipeline.STAGES
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES] + SHAPE, FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(STAGES):
        mbarrier.init(full.index(index), count=1)
    return Beside(numbers, full, pipeline.empty, STAGES)


@aggregate
class Context:
    """What the roles of a program share."""

    geometry: Geometry
    mask: Mask
    bias: Bias
    of_queries: gl.tuple  # query, gradient of the output
    of_keys: gl.tuple  # key, value
    lse_delta: gl.tensor  # of the head, float32 [batch, *space, heads, 4]
    rows: gl.tuple  # how many rows of it are from one batch entry and token to the next, per axis
    key_mask: gl.tuple  # bool [batch or 1, *keys], if there is one
    mask_strides: gl.tuple  # of batch and three axes
    tiles: TmaPipeline
    blocks: TmaPipeline
    of_rows: Beside  # LSE and delta, [M, 2]
    of_columns: gl.tuple  # of a mask of keys: a Beside of ones and zeros, [1, N]
    start: gl.shared_memory_descriptor  # what scores of a tile start from, float32 [M, N]
    sums: gl.tensor  # where the program's [M, N] are
    apart: gl.tuple  # how far a block is from its tile, per axis
    first: gl.tuple  # the first of the tiles of such a block, per axis
    counts: gl.tuple  # how many there are, per axis
    batches: gl.tensor
    sets: gl.tensor  # batch entries and dilation groups
    begin: gl.tensor  # the program's first step, of the sets of all tiles
    end: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    scale_log2: gl.tensor  # scores times it are exponents of two
    QK_CHUNKS: gl.constexpr  # channels of queries and keys, as products take them
    V_CHUNKS: gl.constexpr  # of values
    SCORES: gl.constexpr  # layout of [M, N]


@gluon.constexpr_function
def _as_in_registers(rows, columns):
    """Layout of scores ``[rows, columns]`` in shared memory, where four numbers of a thread are
    side by side: a warp has 16 rows, a thread two of them and two columns of each eight."""
    of_thread = [[0, 1], [8, 0]]
    of_lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    eights = [[0, 8 << i] for i in range((columns // 8).bit_length() - 1)]
    of_warps = [[16 << i, 0] for i in range((rows // 16).bit_length() - 1)]
    return gl.SharedLinearLayout(of_thread + of_lanes + eights + of_warps)


@gluon.jit
def _digit(number, base):
    """Last digit of a number, and the others."""
    return number % base, number // base


@gluon.jit
def _begin(ctx):
    """The program's first tile: its index per axis, dilation group, and batch entry."""
    batch, rest = _digit(ctx.begin, ctx.batches)
    dilation = ctx.geometry.dilation
    g2, rest = _digit(rest, dilation[2])
    g1, rest = _digit(rest, dilation[1])
    g0, rest = _digit(rest, dilation[0])
    t2, rest = _digit(rest, ctx.counts[2])
    t1, t0 = _digit(rest, ctx.counts[1])
    return (t0, t1, t2), (g0, g1, g2), batch


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
def _after_if(condition, i, sizes):
    """As :func:`_after`, or ``i`` itself and False."""
    after, is_first = _after(i, sizes)
    i0 = gl.where(condition, after[0], i[0])
    i1 = gl.where(condition, after[1], i[1])
    return (i0, i1, gl.where(condition, after[2], i[2])), condition & is_first


@gluon.jit
def _next(ctx, t, group, batch):
    """What comes after a step, as :func:`_begin` says."""
    is_last = batch + 1 == ctx.batches
    group, is_last_set = _after_if(is_last, group, ctx.geometry.dilation)
    t, _ = _after_if(is_last_set, t, ctx.counts)
    return t, group, gl.where(is_last, 0, batch + 1)


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
def _block_start(ctx, first):
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
        start = _block_start(ctx, _first_token(ctx, t))
        ctx.blocks.produce(stage, ctx.of_keys, bases, (start,))
        t, group, batch = _next(ctx, t, group, batch)


@gluon.jit
def _loaded_lse_delta(ctx, t, group, batch):
    """LSE and delta of a tile's queries, ``[M, 2]``."""
    g, rows = ctx.geometry, ctx.rows
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [1, 1], [1, 0])
    i0, i1, i2 = g.tokens(_first_token(ctx, t), PAIRS)  # [M] each
    real = (i0 < g.length[0]) & (i1 < g.length[1]) & (i2 < g.length[2])
    row = (i0 * g.dilation[0] + group[0]) * rows[1] + (i1 * g.dilation[1] + group[1]) * rows[2]
    row += (i2 * g.dilation[2] + group[2]) * rows[3]
    at = ctx.lse_delta + batch.to(gl.int64) * rows[0] * 4 + row.to(gl.int64) * 4  # [M]
    both = gl.arange(0, 2, gl.SliceLayout(0, PAIRS))  # [2]
    return gl.load(at[:, None] + both[None, :], mask=real[:, None], other=0.0)


@gluon.jit
def _fetch_lse_delta(ctx):
    """Warp that fetches LSE and delta of tiles: TMA takes as long for these few bytes of a query as
    for its channels."""
    t, group, batch = _begin(ctx)
    gdc_wait()
    numbers = _loaded_lse_delta(ctx, t, group, batch)
    for stage in range(ctx.end - ctx.begin):
        t, group, batch = _next(ctx, t, group, batch)
        following = _loaded_lse_delta(ctx, t, group, batch)  # of the first tile after the last one
        ctx.of_rows.produce(stage, numbers)
        numbers = following


@gluon.jit
def _fetch_key_mask(ctx):
    """Warp that fetches which keys of blocks may be attended."""
    g = ctx.geometry
    N: gl.constexpr = volume(g.BLOCK)
    ROW: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])
    i = gl.arange(0, N, gl.SliceLayout(0, ROW))  # [N]
    t, group, batch = _begin(ctx)
    gdc_wait()
    for stage in range(ctx.end - ctx.begin):
        start = _block_start(ctx, _first_token(ctx, t))
        at = ctx.key_mask[0] + batch.to(gl.int64) * ctx.mask_strides[0]
        real = True
        for AXIS in gl.static_range(3):
            position = start[AXIS] + g.in_block(i, AXIS)
            token = position * g.dilation[AXIS] + group[AXIS]
            at = at + token.to(gl.int64) * ctx.mask_strides[1 + AXIS]
            real = (position >= 0) & (position < g.length[AXIS]) & real
        allowed = gl.load(at, mask=real, other=0).to(gl.int8)
        ctx.of_columns[0].produce(stage, (allowed != 0).to(gl.float32)[None, :])
        t, group, batch = _next(ctx, t, group, batch)


@gluon.jit
def _start(ctx, t):
    """What scores of a tile start from, ``[M, N]``: biases, masked."""
    g = ctx.geometry
    zero = ctx.begin * 0
    here = zero, zero, zero
    side = Side(g.length, here, here, (), ())
    group = Group(side, side, (), g.window, g.stride)
    first = _first_token(ctx, t)
    tile = Tile(ctx.head, ctx.head, group, first, _block_start(ctx, first), here)
    (start,) = ctx.bias.of_tile(tile, first, ctx.head).of_block(here, ctx.SCORES)  # [M, N]
    start = ctx.mask.of_tile(tile, first, ctx.SCORES).compare(start, here, True)
    i0, i1, i2 = g.tokens(first, ctx.SCORES)  # [M] each
    real = (i0 < g.length[0]) & (i1 < g.length[1]) & (i2 < g.length[2])
    return gl.where(real[:, None], start, MASKED)


@gluon.jit
def _sum(ctx):
    """Warpgroup that sums dS."""
    tiles, blocks, sets = ctx.tiles, ctx.blocks, ctx.sets
    M: gl.constexpr = volume(ctx.geometry.TILE)
    N: gl.constexpr = volume(ctx.geometry.BLOCK)
    acc = gl.zeros([M, N], gl.float32, ctx.SCORES)  # [M, N]
    t, _, _ = _begin(ctx)
    gdc_wait()
    for tile_id in range(ctx.begin // sets, (ctx.end + sets - 1) // sets):
        ctx.start.store(_start(ctx, t))
        first = gl.maximum(tile_id * sets, ctx.begin)
        last = gl.minimum((tile_id + 1) * sets, ctx.end)
        for stage in range(first - ctx.begin, last - ctx.begin):
            start = ctx.start.load(ctx.SCORES)
            tiles.consumer_wait(stage)
            blocks.consumer_wait(stage)
            q, grad_out = tiles.matrix(stage, QK), tiles.matrix(stage, GV)  # [M, D], [M, DV]
            k, v = blocks.matrix(stage, QK), blocks.matrix(stage, GV)  # [N, D], [N, DV]
            s = add_product(q, k, start, ctx.QK_CHUNKS)  # S = Q K^T
            dp = multiply(grad_out, v, ctx.SCORES, ctx.V_CHUNKS)  # dP = dO V^T
            ctx.of_rows.consumer_wait(stage)
            lse = ctx.of_rows.load(stage, 1, 0, ctx.SCORES)  # [M, 1]
            delta = ctx.of_rows.load(stage, 1, 1, ctx.SCORES)  # [M, 1]
            s = warpgroup_mma_wait(len(ctx.V_CHUNKS), deps=[s])
            p = gl.exp2(s * ctx.scale_log2 - lse)  # [M, N]
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = p * (dp - delta)  # dS = P * (dP - delta)
            if len(ctx.of_columns) > 0:  # masked keys and values may be anything
                ctx.of_columns[0].consumer_wait(stage)
                allowed = ctx.of_columns[0].load(stage, 0, 0, ctx.SCORES)  # [1, N]
                ds = gl.where(allowed > 0, ds, 0.0)
            tiles.consumer_release(stage)
            blocks.consumer_release(stage)
            acc += ds
        t, _is_last = _after(t, ctx.counts)
    row = gl.arange(0, M, gl.SliceLayout(1, ctx.SCORES))[:, None]
    column = gl.arange(0, N, gl.SliceLayout(0, ctx.SCORES))[None, :]
    gl.store(ctx.sums + row * N + column, acc)


@kernel(
    gluon.jit,
    tensors="query key value grad_out lse_delta sums bias_tables",
    masks="key_mask",
)
def bias_gradient_kernel(
    query, key, value, grad_out, lse_delta, sums, bias_tables, key_mask,
    q_b, q_0, q_1, q_2, q_h, q_c, k_b, k_0, k_1, k_2, k_h, k_c, v_b, v_0, v_1, v_2, v_h, v_c,
    m_b, m_0, m_1, m_2, N0, N1, N2, g_b, g_0, g_1, g_2, g_h, g_c, l_b, l_0, l_1,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, A0, A1, A2, B1, B2,
    batches, heads_per_kv, scale_log2, bias_size, bias_middle,
    MODES: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, BIAS_STRIDES: gl.constexpr, QK_CHUNKS: gl.constexpr,
    V_CHUNKS: gl.constexpr, HAS_KEY_MASK: gl.constexpr, QK_CLEARED: gl.constexpr,
    V_CLEARED: gl.constexpr,
):  # fmt: skip
    """dS of one block of keys for each tile of queries, summed over a split of the tiles, into
    ``sums [splits, heads, blocks, queries, keys]``.

    The first four tensors are descriptors. Numbers are as in the forward kernel; ``l``: how many
    rows of ``lse_delta`` are from one batch entry and token to the next. ``A``: how far the first
    block is from its tile, ``B``: how many blocks there are, per axis.
    """
    g = Geometry(
        length=(N0, N1, N2), window=(K0, K1, K2), stride=(S0, S1, S2), dilation=(D0, D1, D2),
        tiles=(N0, N1, N2), part=(), tile_table=(), num_tiles=batches, heads=batches,
        heads_at_once=batches, MODES=MODES, TILE=TILE, BLOCK=BLOCK, SPLIT_AXIS=0, WARPGROUPS=1,
        DILATED=True, QUERIES=OWN, PIECE=BLOCK, SEAM_PIECE=BLOCK, HEADS_FIRST=False, OF_KEYS=False,
    )  # fmt: skip
    of_queries = (
        TmaTensor(query, (q_b, q_0, q_1, q_2, q_h, q_c), (), ()),
        TmaTensor(grad_out, (g_b, g_0, g_1, g_2, g_h, g_c), (), ()),
    )
    of_keys = (
        TmaTensor(key, (k_b, k_0, k_1, k_2, k_h, k_c), (), ()),
        TmaTensor(value, (v_b, v_0, v_1, v_2, v_h, v_c), (), ()),
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
    sets = D0 * D1 * D2 * batches
    count = count0 * count1 * count2 * sets
    per_split = (count + splits - 1) // splits
    begin = gl.minimum(split_id * per_split, count)
    M: gl.constexpr = volume(TILE)
    N: gl.constexpr = volume(BLOCK)
    at = (split_id.to(gl.int64) * heads + head) * gl.num_programs(0) + block
    CLEARED: gl.constexpr = QK_CLEARED + V_CLEARED
    tiles = tma_pipeline(of_queries, STAGES, 1, 1, False, CLEARED)
    blocks = tma_pipeline(of_keys, STAGES, 1, 1, False, CLEARED)
    of_columns, masks = (), ()
    if HAS_KEY_MASK:
        of_columns, masks = (beside(blocks, [1, N]),), (key_mask,)
    ctx = Context(
        geometry=g, mask=Mask(g, (), (), COMPARE, (0, 0, 0), False, 1),
        bias=bias_of(g, bias_tables, bias_size, bias_middle, BIAS_STRIDES),
        of_queries=of_queries, of_keys=of_keys, lse_delta=lse_delta + head * 4,
        rows=(l_b, l_0, l_1, heads), key_mask=masks, mask_strides=(m_b, m_0, m_1, m_2),
        tiles=tiles, blocks=blocks, of_rows=beside(tiles, [M, 2]), of_columns=of_columns,
        start=gl.allocate_shared_memory(gl.float32, [M, N], _as_in_registers(M, N)),
        sums=sums + at * (M * N),
        apart=(apart0, apart1, apart2), first=(t0, t1, t2),
        counts=(gl.maximum(count0, 1), gl.maximum(count1, 1), gl.maximum(count2, 1)),
        batches=batches, sets=sets, begin=begin, end=gl.minimum(begin + per_split, count),
        head=head, kv_head=head // heads_per_kv, scale_log2=scale_log2, QK_CHUNKS=QK_CHUNKS,
        V_CHUNKS=V_CHUNKS, SCORES=mma_layout(N),
    )  # fmt: skip
    # Triton has no variable for a list of functions, so the roles are put together in place.
    gl.warp_specialize(
        [
            (_sum, (ctx,)),
            (_fetch_tiles, (ctx,)),
            (_fetch_blocks, (ctx,)),
            (_fetch_lse_delta, (ctx,)),
        ]
        + [(_fetch_key_mask, (ctx,))][: 1 if HAS_KEY_MASK else 0],
        [1, 1, 1, 1][: 4 if HAS_KEY_MASK else 3],
        ([FETCH_REGISTERS] * 4)[: 4 if HAS_KEY_MASK else 3],
    )
