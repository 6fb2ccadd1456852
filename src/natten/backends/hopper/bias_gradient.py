"""Gradient of the relative positional bias on Hopper, alone or with dQ.

All blocks of a program are as far from their tiles, so that a pair of a row and a column has the
same bias in every tile. So dS of many tiles is summed as it is, in registers. Then a program adds
up the pairs that have the same bias, and another kernel those sums of all programs
(``bias_sum.py``). The order of both is fixed. Sets of a tile follow one another (``sets.py``).

A program has one block of a tile. Where registers hold the sums of all blocks of a tile, it has all
of them, and makes dQ of dS, too.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton import primitives, windows
from ..triton.launch import kernel
from ..triton.primitives import LN2
from .backward import GV, QK
from .bias import bias_of
from .bias_sum import offsets_of
from .geometry import WARPS, volume
from .gluon_names import (
    aggregate,
    barrier,
    fence_async_shared,
    from_triton,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    store_wait,
    warpgroup_mma_wait,
)
from .key_masks import LANES, clear_rows, lane_of_warp
from .pipeline import TmaPipeline, TmaTensor, allocate, tma_bases, tma_pipeline
from .products import add, add_product, left_operand, multiply, store, times, wait, zeros
from .sets import Walk, all_tiles, geometry_of_sets, region_of, walk_of

bit, packed = from_triton(primitives.bit), from_triton(primitives.packed)
tiles_that_attend = from_triton(windows.tiles_that_attend)


@aggregate
class StageNumbers:
    """Numbers that go with the blocks of a pipeline, which a warp lays in shared memory."""

    numbers: gl.shared_memory_descriptor  # [STAGES, *SHAPE]
    full: gl.shared_memory_descriptor  # the pipeline's, if its own warp lays them
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
    def lay(self, stage, AT: gl.constexpr, number):
        """Lay one of a stage's numbers there, ``[1, 1]``."""
        self.numbers.index(stage % self.STAGES).slice(AT, 1, 1).store(number)

    @gluon.jit
    def consumer_wait(self, stage):
        """Until they are there."""
        mbarrier.wait(self.full.index(stage % self.STAGES), stage // self.STAGES & 1)

    @gluon.jit
    def load(self, stage, AXIS: gl.constexpr, AT: gl.constexpr, LAYOUT: gl.constexpr):
        """The numbers of a stage at an index ``AT`` of an axis."""
        return self.numbers.index(stage % self.STAGES).slice(AT, 1, AXIS).load(LAYOUT)


@gluon.jit
def stage_numbers(
    pipeline, SHAPE: gl.constexpr, DTYPE: gl.constexpr, BY_MASKER: gl.constexpr
):  # fmt: skip
    """Room for numbers of that shape, of two axes, for each stage of a pipeline; the warp lays them
    that masks its blocks, or one that waits for itself."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    STAGES: gl.constexpr = pipeline.STAGES
    numbers = gl.allocate_shared_memory(DTYPE, [STAGES] + SHAPE, FLAT)
    full = pipeline.full
    if not BY_MASKER:
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for index in gl.static_range(STAGES):
            mbarrier.init(full.index(index), count=1)
    return StageNumbers(numbers, full, pipeline.empty, STAGES)


@aggregate
class Context:
    """What the roles of a program share."""

    walk: Walk
    of_queries: gl.tuple  # query, gradient of the output
    of_keys: gl.tuple  # key, value
    lse_delta: gl.tensor  # of the head, float32 [batch, *space, heads, 4]
    rows: gl.tuple  # how many rows of it are from one batch entry and token to the next, per axis
    key_mask: gl.tuple  # bool [batch or 1, *keys], if there is one
    mask_strides: gl.tuple  # of batch and three axes
    last: gl.tensor  # where a batch entry's last key is in the mask
    tiles: TmaPipeline
    blocks: TmaPipeline
    of_rows: StageNumbers  # LSE and delta, [M, 2]
    of_columns: gl.tuple  # of a mask of keys: StageNumbers, words of 32 keys, [1, N / 32]
    dq: gl.tuple  # a TmaTensor and a buffer [1, *tile, D], if the program makes it
    sums: gl.tensor  # where the program's [blocks, M, N] are
    of_offsets: gl.tensor  # where its sums of pairs with the same bias are
    kv_head: gl.tensor
    scale_log2: gl.tensor  # scores times it are exponents of two
    QK_CHUNKS: gl.constexpr  # channels of queries and keys, as products take them
    V_CHUNKS: gl.constexpr  # of values
    IS_FIRST_PASS: gl.constexpr  # of a backward: the one that makes dQ

    @gluon.jit
    def begin(self):
        """Wait for the kernel before, unless that is a pass of the same backward, which makes
        nothing of what is read here."""
        if self.IS_FIRST_PASS:
            gdc_wait()

    @gluon.jit
    def end(self):
        """Who waits for the end of this kernel waits for that of the one before, too."""
        if not self.IS_FIRST_PASS:
            gdc_wait()
            gdc_launch_dependents()  # the next kernel can be set up, and waits for this one's end


@gluon.jit
def _fetch_tiles(ctx):
    """Warp that fetches tiles of queries."""
    walk = ctx.walk
    t, group, batch = walk.first_step()
    ctx.begin()
    for step in range(walk.end - walk.begin):
        bases = tma_bases(ctx.of_queries, batch, group, walk.head)
        ctx.tiles.produce(step, ctx.of_queries, bases, (walk.first_token(t),))
        t, group, batch = walk.next_step(t, group, batch)


@gluon.jit
def _fetch_blocks(ctx):
    """Warp that fetches their blocks of keys."""
    walk = ctx.walk
    COUNT: gl.constexpr = volume(walk.BLOCKS)
    t, group, batch = walk.first_step()
    ctx.begin()
    if ctx.IS_FIRST_PASS:
        gdc_launch_dependents()  # the next pass can start where there is room
    for step in range(walk.end - walk.begin):
        bases = tma_bases(ctx.of_keys, batch, group, ctx.kv_head)
        first = walk.first_token(t)
        for NUMBER in gl.static_range(COUNT):
            block_start = walk.block_start(first, NUMBER)
            ctx.blocks.produce(step * COUNT + NUMBER, ctx.of_keys, bases, (block_start,))
        t, group, batch = walk.next_step(t, group, batch)


@gluon.jit
def _loaded_lse_delta(ctx, t, group, batch):
    """LSE and delta of a tile's queries, ``[M, 2]``."""
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [1, 1], [1, 0])
    row, real = ctx.walk.rows(ctx.walk.first_token(t), group, ctx.rows[1:], PAIRS)  # [M] each
    at = ctx.lse_delta + batch.to(gl.int64) * ctx.rows[0] * 4 + row.to(gl.int64) * 4  # [M]
    both = gl.arange(0, 2, gl.SliceLayout(0, PAIRS))  # [2]
    return gl.load(at[:, None] + both[None, :], mask=real[:, None], other=0.0)


@gluon.jit
def _fetch_lse_delta(ctx):
    """Warp that fetches LSE and delta of tiles: TMA takes as long for these few bytes of a query as
    for its channels."""
    walk = ctx.walk
    t, group, batch = walk.first_step()
    ctx.begin()
    numbers = _loaded_lse_delta(ctx, t, group, batch)
    for step in range(walk.end - walk.begin):
        t, group, batch = walk.next_step(t, group, batch)
        following = _loaded_lse_delta(ctx, t, group, batch)  # of the first tile after the last one
        ctx.of_rows.produce(step, numbers)
        numbers = following


@gluon.jit
def _words_of_masks(ctx, t, group, batch):
    """Which keys of a tile's blocks may be attended, words of 32 keys each. What lies beyond an
    axis may be allowed or not: nobody sees it."""
    walk, g, strides = ctx.walk, ctx.walk.geometry, ctx.mask_strides
    WORDS: gl.constexpr = volume(g.BLOCK) // LANES
    k = gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))  # [32]
    mask = ctx.key_mask[0] + batch.to(gl.int64) * strides[0]
    first, allowed = walk.first_token(t), ()
    for NUMBER in gl.static_range(volume(walk.BLOCKS)):
        start = _token_at(walk.block_start(first, NUMBER), group, g.dilation, strides)
        for w in gl.static_range(WORDS):
            at = start
            for AXIS in gl.static_range(3):
                step = g.dilation[AXIS] * strides[1 + AXIS]
                at = at + g.in_block(k + LANES * w, AXIS) * step
            at = gl.minimum(gl.maximum(at, 0), ctx.last)  # [32]
            allowed = allowed + (gl.load(mask + at).to(gl.int32),)
    words = ()
    for i in gl.static_range(len(allowed)):
        words = words + (packed(allowed[i], k, 0),)
    return words


@gluon.jit
def _token_at(start, group, dilation, strides):
    """Where a mask has the token at a position of a dilation group."""
    at = (start[0] * dilation[0] + group[0]) * strides[1]
    at += (start[1] * dilation[1] + group[1]) * strides[2]
    return at + (start[2] * dilation[2] + group[2]) * strides[3]


@gluon.jit
def _mask_keys(ctx):
    """Warp that lays beside blocks which of their keys may be attended, once they are there, and
    sets the others to zero where weights of zero meet them, which do not take NaN or infinity away.
    """
    walk, blocks = ctx.walk, ctx.blocks
    COUNT: gl.constexpr = volume(walk.BLOCKS)
    WORDS: gl.constexpr = volume(walk.geometry.BLOCK) // LANES
    ONE: gl.constexpr = gl.BlockedLayout([1, 1], [1, LANES], [1, 1], [1, 0])
    lane = lane_of_warp(walk.begin)
    t, group, batch = walk.first_step()
    ctx.begin()
    for step in range(walk.end - walk.begin):
        words = _words_of_masks(ctx, t, group, batch)
        for NUMBER in gl.static_range(COUNT):
            stage, masked = step * COUNT + NUMBER, ()
            blocks.masker_wait(stage)
            for w in gl.static_range(WORDS):
                word = words[NUMBER * WORDS + w]
                ctx.of_columns[0].lay(stage, w, gl.full([1, 1], word, gl.int32, ONE))
                masked = masked + (~word,)
            if len(ctx.dq) > 0:
                clear_rows(blocks.matrix(stage, QK), masked, lane)
            clear_rows(blocks.matrix(stage, GV), masked, lane)
            blocks.masker_release(stage)
        t, group, batch = walk.next_step(t, group, batch)


@gluon.constexpr_function
def _pending(number, count):
    """How many products may be under way that were started after those of a block of that number:
    of dQ, that of the block before, and both of the next block."""
    return (1 if number > 0 else 0) + (2 if number + 1 < count else 0)


@aggregate
class Step:
    """What makes dS of a step, a small part of the context: Triton takes long for a function to
    which all of a context is passed."""

    start: gl.shared_memory_descriptor  # the walk's
    tiles: TmaPipeline
    blocks: TmaPipeline
    of_rows: StageNumbers
    of_columns: gl.tuple
    scale_log2: gl.tensor
    HAS_DQ: gl.constexpr
    QK_CHUNKS: gl.constexpr
    V_CHUNKS: gl.constexpr
    SCORES: gl.constexpr

    @gluon.jit
    def add(self, acc, step):
        """Add dS of a step to ``acc``, which is ``[M, N]`` for each of a tile's blocks; and dQ of
        the tile, ``[M, D]``, if the program makes it."""
        tiles, blocks = self.tiles, self.blocks
        SCORES: gl.constexpr = self.SCORES
        COUNT: gl.constexpr = len(acc)
        stage = step * COUNT
        tiles.consumer_wait(step)
        q, grad_out = tiles.matrix(step, QK), tiles.matrix(step, GV)  # [M, D], [M, DV]
        s, dp = self._products(q, grad_out, self.start.index(0), stage)
        self.of_rows.consumer_wait(step)
        lse = self.of_rows.load(step, 1, 0, SCORES)  # [M, 1]
        delta = self.of_rows.load(step, 1, 1, SCORES)  # [M, 1]
        dq = zeros(acc[0].shape[0], self.QK_CHUNKS)  # [M, D]
        summed = ()
        for NUMBER in gl.static_range(COUNT):
            # Products of the next block are under way while weights of this one are made.
            following = (s, dp)
            if NUMBER + 1 < COUNT:
                start, at = self.start.index(NUMBER + 1), stage + NUMBER + 1
                following = self._products(q, grad_out, start, at)
            ds = self._ds(s, dp, lse, delta, stage + NUMBER, _pending(NUMBER, COUNT))
            summed = summed + (acc[NUMBER] + ds,)
            if self.HAS_DQ:
                if NUMBER > 1:  # its product is made
                    blocks.consumer_release(stage + NUMBER - 2)
                keys = blocks.matrix(stage + NUMBER, QK)  # [N, D]
                ds = gl.convert_layout(ds.to(keys.dtype), left_operand(self.QK_CHUNKS[0]))
                dq = add(dq, ds, keys, self.QK_CHUNKS)  # dQ += dS K
            else:
                blocks.consumer_release(stage + NUMBER)
            s, dp = following
        if self.HAS_DQ:
            dq = wait(dq, 0)
            for NUMBER in gl.static_range(COUNT - 2 if COUNT > 2 else 0, COUNT):
                blocks.consumer_release(stage + NUMBER)
        tiles.consumer_release(step)
        return summed, dq

    @gluon.jit
    def _products(self, q, grad_out, start, stage):
        """Start S and dP of a tile and the block in a stage; scores begin with ``start [M, N]``."""
        blocks = self.blocks
        start = start.load(self.SCORES)
        blocks.consumer_wait(stage)
        s = add_product(q, blocks.matrix(stage, QK), start, self.QK_CHUNKS)  # S = Q K^T
        dp = multiply(grad_out, blocks.matrix(stage, GV), self.SCORES, self.V_CHUNKS)  # dO V^T
        return s, dp

    @gluon.jit
    def _ds(self, s, dp, lse, delta, stage, PENDING: gl.constexpr):
        """dS of the block in a stage, ``[M, N]``; so many products that were started since its own
        may be under way."""
        s = warpgroup_mma_wait(PENDING + len(self.V_CHUNKS), deps=[s])
        p = gl.exp2(s * self.scale_log2 - lse)  # [M, N]
        if len(self.of_columns) > 0:
            p = gl.where(self._allowed(stage, p.shape[1]), p, 0.0)
        dp = warpgroup_mma_wait(PENDING, deps=[dp])
        return p * (dp - delta)  # dS = P * (dP - delta)

    @gluon.jit
    def _allowed(self, stage, N: gl.constexpr):
        """Which keys of the block in a stage may be attended, ``[1, N]``."""
        SCORES: gl.constexpr = self.SCORES
        words = self.of_columns[0]
        k = gl.arange(0, N, gl.SliceLayout(0, SCORES))[None, :]
        word = words.load(stage, 1, 0, SCORES)  # [1, 1]
        for w in gl.static_range(1, N // LANES):
            word = gl.where(k < LANES * w, word, words.load(stage, 1, w, SCORES))
        return bit(word, k & 31)


@gluon.jit
def _sum(ctx):
    """Warpgroup that sums dS."""
    walk = ctx.walk
    SCORES: gl.constexpr = walk.SCORES
    M: gl.constexpr = volume(walk.geometry.TILE)
    N: gl.constexpr = volume(walk.geometry.BLOCK)
    HAS_DQ: gl.constexpr = len(ctx.dq) > 0
    of_step = Step(
        start=walk.start, tiles=ctx.tiles, blocks=ctx.blocks, of_rows=ctx.of_rows,
        of_columns=ctx.of_columns, scale_log2=ctx.scale_log2, HAS_DQ=HAS_DQ,
        QK_CHUNKS=ctx.QK_CHUNKS, V_CHUNKS=ctx.V_CHUNKS, SCORES=SCORES,
    )  # fmt: skip
    acc = ()  # of each block, [M, N]
    for _i in gl.static_range(volume(walk.BLOCKS)):
        acc = acc + (gl.zeros([M, N], gl.float32, SCORES),)
    t, group, batch = walk.first_step()
    ctx.begin()
    for tile_id in range(walk.begin // walk.sets, (walk.end + walk.sets - 1) // walk.sets):
        walk.lay(t)
        first_step, end = walk.steps_of(tile_id)
        for step in range(first_step, end):
            acc, dq = of_step.add(acc, step)
            if HAS_DQ:
                _store_dq(ctx, dq, walk.first_token(t), group, batch)
            t, group, batch = walk.next_step(t, group, batch)
    if HAS_DQ:
        store_wait(0)
    ctx.end()
    _store_and_add_up(ctx, acc)


@gluon.jit
def _store_dq(ctx, dq, first, group, batch):
    """Start to write dQ of a tile."""
    tensor, buffer = ctx.dq
    store_wait(0)  # the tile before has left the buffer
    store(times(dq, ctx.scale_log2 * LN2), buffer, ctx.QK_CHUNKS, tensor.descriptor.dtype)
    fence_async_shared()
    tensor.store(tensor.tma_base(batch, group, ctx.walk.head), first, buffer)


@gluon.jit
def _store_and_add_up(ctx, acc):
    """Add up the pairs of a sum that have the same bias, of each of the blocks ``[M, N]``."""
    M: gl.constexpr = acc[0].shape[0]
    N: gl.constexpr = acc[0].shape[1]
    SCORES: gl.constexpr = ctx.walk.SCORES
    row = gl.arange(0, M, gl.SliceLayout(1, SCORES))[:, None]
    column = gl.arange(0, N, gl.SliceLayout(0, SCORES))[None, :]
    for NUMBER in gl.static_range(len(acc)):
        gl.store(ctx.sums + NUMBER * M * N + row * N + column, acc[NUMBER])
    barrier()  # then every warp finds what the others stored
    _add_up(ctx)


@gluon.jit
def _offsets_along(walk, AXIS: gl.constexpr):
    """Of how far keys of the program's blocks are from queries of its tiles, along an axis: the
    first distance with a bias, counted from the least, and how many there are."""
    g = walk.geometry
    REGION: gl.constexpr = region_of(g.BLOCK, walk.BLOCKS)
    least, most = walk.apart[AXIS] - g.TILE[AXIS] + 1, walk.apart[AXIS] + REGION[AXIS] - 1
    first = gl.maximum(least, 1 - g.window[AXIS])
    return first - least, gl.maximum(gl.minimum(most, g.window[AXIS] - 1) - first + 1, 0)


@gluon.jit
def _add_up(ctx):
    """Add up the pairs that have the same bias."""
    g = ctx.walk.geometry
    TILE: gl.constexpr = g.TILE
    BLOCK: gl.constexpr = g.BLOCK
    BLOCKS: gl.constexpr = ctx.walk.BLOCKS
    REGION: gl.constexpr = region_of(BLOCK, BLOCKS)
    E1: gl.constexpr = TILE[1] + REGION[1] - 1
    E2: gl.constexpr = TILE[2] + REGION[2] - 1
    M: gl.constexpr = volume(TILE)
    THREADS: gl.constexpr = 32 * WARPS
    # A thread has all pairs of an offset: so many loads are on their way at once.
    PAIRS: gl.constexpr = gl.BlockedLayout([M, 1], [1, 32], [1, WARPS], [1, 0])
    first0, n0 = _offsets_along(ctx.walk, 0)
    first1, n1 = _offsets_along(ctx.walk, 1)
    first2, n2 = _offsets_along(ctx.walk, 2)
    row = gl.arange(0, M, gl.SliceLayout(1, PAIRS))[:, None]
    r0, r1, r2 = g.tokens((0, 0, 0), PAIRS)  # [M] each
    for begin in range(0, n0 * n1 * n2, THREADS):
        i = begin + gl.arange(0, THREADS, gl.SliceLayout(0, PAIRS))
        e2, rest = first2 + i % n2, i // n2
        e1, e0 = first1 + rest % n1, first0 + rest // n1
        # Each query's key, from the first block's first key on.
        c0 = r0[:, None] + (e0 - (TILE[0] - 1))[None, :]
        c1 = r1[:, None] + (e1 - (TILE[1] - 1))[None, :]
        c2 = r2[:, None] + (e2 - (TILE[2] - 1))[None, :]
        here = (c0 >= 0) & (c0 < REGION[0]) & (c1 >= 0) & (c1 < REGION[1])
        here = here & (c2 >= 0) & (c2 < REGION[2]) & (i < n0 * n1 * n2)[None, :]
        number = (c0 // BLOCK[0] * BLOCKS[1] + c1 // BLOCK[1]) * BLOCKS[2] + c2 // BLOCK[2]
        pair = ((number * M + row) * BLOCK[0] + c0 % BLOCK[0]) * BLOCK[1] + c1 % BLOCK[1]
        pair = pair * BLOCK[2] + c2 % BLOCK[2]
        found = gl.sum(gl.load(ctx.sums + pair, mask=here, other=0.0), 0)
        gl.store(ctx.of_offsets + (e0 * E1 + e1) * E2 + e2, found, mask=i < n0 * n1 * n2)


@kernel(
    gluon.jit,
    tensors="query key value grad_out grad_query lse_delta sums of_offsets bias_tables",
    masks="key_mask",
)
def bias_gradient_kernel(
    query, key, value, grad_out, grad_query, lse_delta, sums, of_offsets, bias_tables, key_mask,
    q_b, q_0, q_1, q_2, q_h, q_c, k_b, k_0, k_1, k_2, k_h, k_c, v_b, v_0, v_1, v_2, v_h, v_c,
    m_b, m_0, m_1, m_2, m_last, N0, N1, N2, g_b, g_0, g_1, g_2, g_h, g_c, l_b, l_0, l_1,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, A0, A1, A2, B1, B2,
    batches, heads_per_kv, scale_log2, bias_size, bias_middle,
    MODES: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_STAGES: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
    BIAS_STRIDES: gl.constexpr, QK_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr, QK_CLEARED: gl.constexpr, V_CLEARED: gl.constexpr,
    HAS_DQ: gl.constexpr,
):  # fmt: skip
    """dS of ``BLOCKS`` of keys for each tile of queries, summed over a split of the tiles, into
    ``sums [splits, heads, programs, blocks, queries, keys]``; and of these, the sums of pairs that
    have the same bias, into ``of_offsets [splits, heads, programs, offsets]``: how far a key is
    from a query, from the tile's last query and the blocks' first key on.

    The first five tensors are descriptors. Numbers are as in the forward kernel; ``l``: how many
    rows of ``lse_delta`` are from one batch entry and token to the next. ``A``: how far the first
    block is from its tile, ``B``: how many programs' blocks there are, per axis. With dQ, a program
    has all blocks of a tile, and the kernel is the first pass of a backward. Without, it begins
    beside the pass before.
    """
    g = geometry_of_sets(
        (N0, N1, N2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), batches, MODES, TILE, BLOCK
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
    if HAS_DQ:
        first, counts = all_tiles(g)
    else:
        # Of one dilation group: all have the same length.
        t0, count0 = tiles_that_attend(N0, 1, K0, S0, apart0, TILE[0], BLOCK[0], MODES[0])
        t1, count1 = tiles_that_attend(N1, 1, K1, S1, apart1, TILE[1], BLOCK[1], MODES[1])
        t2, count2 = tiles_that_attend(N2, 1, K2, S2, apart2, TILE[2], BLOCK[2], MODES[2])
        first, counts = (t0, t1, t2), (count0, count1, count2)
    walk = walk_of(
        g, bias_of(g, bias_tables, bias_size, bias_middle, BIAS_STRIDES), (apart0, apart1, apart2),
        first, counts, batches, split_id, splits, head, BLOCKS,
    )  # fmt: skip
    M: gl.constexpr = volume(TILE)
    N: gl.constexpr = volume(BLOCK)
    PAIRS: gl.constexpr = volume(BLOCKS) * M * N
    OFFSETS: gl.constexpr = offsets_of(TILE, region_of(BLOCK, BLOCKS))
    at = (split_id.to(gl.int64) * heads + head) * gl.num_programs(0) + block
    CLEARED: gl.constexpr = QK_CLEARED + V_CLEARED
    tiles = tma_pipeline(of_queries, STAGES, 1, 1, False, CLEARED)
    blocks = tma_pipeline(of_keys, BLOCK_STAGES, 1, 1, HAS_KEY_MASK, CLEARED)
    dq, of_columns, masks = (), (), ()
    if HAS_DQ:
        tensor = TmaTensor(grad_query, (l_b, l_0, l_1, heads, 1, 0), (), ())
        dq = (tensor, allocate(tensor, 1, 1).index(0))
    if HAS_KEY_MASK:
        of_columns, masks = (stage_numbers(blocks, [1, N // LANES], gl.int32, True),), (key_mask,)
    ctx = Context(
        walk=walk, of_queries=of_queries, of_keys=of_keys, lse_delta=lse_delta + head * 4,
        rows=(l_b, l_0, l_1, heads), key_mask=masks, mask_strides=(m_b, m_0, m_1, m_2), last=m_last,
        tiles=tiles, blocks=blocks, of_rows=stage_numbers(tiles, [M, 2], gl.float32, False),
        of_columns=of_columns, dq=dq, sums=sums + at * PAIRS, of_offsets=of_offsets + at * OFFSETS,
        kv_head=head // heads_per_kv, scale_log2=scale_log2, QK_CHUNKS=QK_CHUNKS,
        V_CHUNKS=V_CHUNKS, IS_FIRST_PASS=HAS_DQ,
    )  # fmt: skip
    # Triton has no variable for a list of functions, so the roles are put together in place.
    gl.warp_specialize(
        [
            (_sum, (ctx,)),
            (_fetch_tiles, (ctx,)),
            (_fetch_blocks, (ctx,)),
            (_fetch_lse_delta, (ctx,)),
        ]
        + [(_mask_keys, (ctx,))][: 1 if HAS_KEY_MASK else 0],
        [1, 1, 1, 1][: 4 if HAS_KEY_MASK else 3],
        ([FETCH_REGISTERS] * 4)[: 4 if HAS_KEY_MASK else 3],
    )
