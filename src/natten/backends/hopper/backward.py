"""Backward on Hopper in passes without atomics, so that every run gives the same bits.

All passes are one kernel: dQ is summed for tiles of queries over blocks of keys, dK and dV for
tiles of keys over blocks of queries. In both the tile is the left operand: S = Q K^T and
dP = dO V^T in the first, their transposes in the second. So the weights P and
dS = P * (dP - delta), made in registers, stay there as left operands of what is summed:
dQ += dS K, or dK += dS^T Q and dV += P^T dO.

Of wide heads the registers do not hold dK and dV at once. Then each has a pass, and both make the
weights. That of dV needs no dP, and so it can sum slices of the channels.

No pass reads what another one makes. So where one follows another, its programs start as soon as
there is room, beside the last programs of the one before.

Of plain attention, dK and dV may leave dS^T in memory, of some heads at a time. Then dQ is one
product of it, where a pass of its own would make scores and dP again (``dq_from_ds.py``).
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton.launch import kernel
from ..triton.primitives import LN2
from .bias import Bias, bias_of
from .costs import PASSES
from .documents import num_tiles_of
from .geometry import OWN, WARPS, Geometry, Part, fetched_tokens, mma_layout, rows_held, volume
from .gluon_names import (
    aggregate,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    reinterpret,
    store_wait,
    warpgroup_mma_wait,
)
from .head_rows import stored_tensor
from .key_masks import Additional, KeyMask, key_mask_of, mask_blocks
from .masks import COLUMNS, COMPARE, FIRST, Mask, TileMask, column_tables, stage_factors
from .pipeline import (
    TmaPipeline,
    TmaTensor,
    allocate,
    are_half_aligned,
    clear_blocks,
    clears,
    first_row,
    rows_of,
    shared_by_heads,
    slice_of,
    tma_bases,
    tma_pipeline,
)
from .products import add, kept, left_operand, multiply, store, times, wait, zeros

# Tensors of a pipeline: query or key; the gradient of the output or value; and with queries four
# numbers of each: LSE in exponents of two, delta, zeros. With COLUMNS, theirs are the last.
QK, GV, LSE_DELTA = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
LSE, DELTA = gl.constexpr(0), gl.constexpr(1)
DQ, DKDV, DK, DV = map(gl.constexpr, PASSES)


@aggregate
class LeftDs:
    """Where dS^T is left in memory, ``[heads, keys, queries]``."""

    tensor: TmaTensor
    buffers: gl.tuple  # of each warpgroup, [1, 1, 1, M, N]
    first_tile: gl.tensor  # of heads whose dS there is room for


@aggregate
class Context:
    """What the roles of a program share; ``masks``, ``tiles`` and ``buffers`` are per warpgroup."""

    geometry: Geometry
    masks: gl.tuple
    key_mask: KeyMask
    bias: Bias
    outer: gl.tuple  # tensors of tiles: of queries, or of keys
    inner: gl.tuple  # tensors of blocks: of keys, or of queries
    additional: Additional
    grads: gl.tuple  # what the pass sums, dQ, dK, dV, or dK and dV: TmaTensors, or HeadRows
    heads_per_kv: gl.tensor
    scale_log2: gl.tensor  # scores times it are exponents of two
    tiles: gl.tuple  # pipelines
    blocks: TmaPipeline
    buffers: gl.tuple  # for each of the gradients, [1, *tile, D]
    HAS_ADDITIONAL: gl.constexpr
    HAS_MASKS: gl.constexpr  # of keys or of additional ones
    HAS_BIAS: gl.constexpr
    HALF_ALIGNED: gl.constexpr  # heads, of which TMA can not store every one (``head_rows.py``)
    OWN_OUT: gl.constexpr  # gradients do not take the place of their tiles
    PASS: gl.constexpr
    EARLY: gl.constexpr  # dP is made beside the scores, else after the weights, if at all
    LATE: gl.constexpr  # dS of a block is added while the next one is made; of dV, its weights
    QK_CHUNKS: gl.constexpr  # channels of queries and keys, as products take them
    V_CHUNKS: gl.constexpr  # of values
    BESIDE: gl.constexpr  # this kernel runs beside the one before, a pass of the same backward
    NEXT_BESIDE: gl.constexpr  # and the next one beside this
    SUM_CHUNKS: gl.constexpr  # of ``acc``
    SCORES: gl.constexpr  # layout of [M, N]
    left_ds: gl.tuple  # a LeftDs, if dS is left in memory

    @gluon.jit
    def first_program(self):
        """The number of the program's first tile."""
        first = gl.program_id(0)
        if len(self.left_ds) > 0:
            first += self.left_ds[0].first_tile
        return first


@aggregate
class Operands:
    """What a warpgroup keeps of its tile while it walks over the blocks."""

    mask: TileMask
    qk: gl.shared_memory_descriptor  # query or key, [M, D]
    gv: gl.shared_memory_descriptor  # gradient of the output or value, [M, DV]; not of dV
    columns: gl.tuple  # the rows' factor of a mask, [M, C], if it came with the tile
    lse_delta: gl.tuple  # of queries: both [M, 1]
    ds: gl.tuple  # where dS is left: of which first head, and first key; and a buffer


@gluon.jit
def _row_lse_delta(tiles, tile_iteration, SCORES: gl.constexpr):
    """LSE and delta of queries that are rows, ``[M, 1]`` each."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffer = tiles.buffers[LSE_DELTA].index(tile_iteration % tiles.STAGES)  # [1, *tile, 4]
    four = reinterpret(buffer, gl.float32, [rows_of(buffer), 4], FLAT)
    return four.slice(LSE, 1, 1).load(SCORES), four.slice(DELTA, 1, 1).load(SCORES)


@gluon.jit
def _column_lse_delta(blocks, stage, WHICH: gl.constexpr, SCORES: gl.constexpr):
    """``LSE`` or ``DELTA`` of queries that are columns, ``[1, N]``."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    buffer = blocks.buffers[LSE_DELTA].index(stage % blocks.STAGES)  # [1, *block, 4]
    four = reinterpret(buffer, gl.float32, [4, rows_of(buffer)], FLAT)
    return four.slice(WHICH, 1, 0).load(SCORES)


@gluon.jit
def _fetch_tiles(ctx):
    """Warp that fetches each warpgroup's tiles."""
    g = ctx.geometry
    TOKENS: gl.constexpr = fetched_tokens(g.TILE)
    tile_iteration = 0
    for tile_id in range(ctx.first_program(), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        side = g.own_side(tile)
        bases = tma_bases(ctx.outer, tile.batch, side.bases, tile.head, ctx.HALF_ALIGNED)
        if not ctx.BESIDE:
            gdc_wait()  # until the kernel before has ended; what comes first need not
        places = g.places_of_tile(side, g.first_of(tile, 0))
        ctx.tiles[0].produce(tile_iteration, ctx.outer, bases, places, TOKENS=TOKENS)
        if g.WARPGROUPS == 2:
            places = g.places_of_tile(side, g.first_of(tile, 1))
            ctx.tiles[1].produce(tile_iteration, ctx.outer, bases, places, TOKENS=TOKENS)
        tile_iteration += 1  # noqa: SIM113


@gluon.jit
def _fetch_blocks(ctx):
    """Warp that fetches the additional tokens, then blocks of each head that shares the tile's."""
    g = ctx.geometry
    stage = 0
    if ctx.NEXT_BESIDE:
        if not ctx.BESIDE:
            gdc_wait()  # so that the next kernel finds what this one waited for
        gdc_launch_dependents()  # the next kernel can start where there is room
    for tile_id in range(ctx.first_program(), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        if g.OF_KEYS:
            first_head, heads = tile.head * ctx.heads_per_kv, ctx.heads_per_kv
        else:
            first_head, heads = tile.head // ctx.heads_per_kv, 1
        side = g.other_side(tile)
        if not ctx.BESIDE:
            gdc_wait()
        if ctx.HAS_ADDITIONAL:
            tensors = ctx.additional.tensors
            bases = tma_bases(tensors, tile.batch, side.group, first_head)
            for position in range(0, ctx.additional.count, rows_held(g.BLOCK)):
                ctx.blocks.produce(stage, tensors, bases, ((0, 0, position),))
                stage += 1
        for head in range(first_head, first_head + heads):
            bases = tma_bases(ctx.inner, tile.batch, side.bases, head, ctx.HALF_ALIGNED)
            block = (stage * 0, stage * 0, stage * 0)
            for _ in range(tile.blocks[0] * tile.blocks[1] * tile.blocks[2]):
                start, _ = g.block_start(block, tile.origin)
                g.fetch(ctx.blocks, stage, ctx.inner, bases, side, start)
                block = g.next_block(block, tile.blocks)
                stage += 1
    if ctx.BESIDE:
        gdc_wait()  # who waits for the end of this kernel waits for that of the one before, too
    if not ctx.NEXT_BESIDE:
        gdc_launch_dependents()  # the next kernel can be set up, and waits for this one's end


@gluon.jit
def _clear_blocks(ctx):
    """Warp that clears blocks."""
    heads = ctx.heads_per_kv if ctx.geometry.OF_KEYS else 1
    count = ctx.additional.count if ctx.HAS_ADDITIONAL else 0
    clear_blocks(ctx.blocks, ctx.geometry, ctx.first_program(), count, heads)


@gluon.jit
def _step(
    ctx, tile, bias, block, stage, acc, acc_v, ds, LATE: gl.constexpr, IS_FIRST: gl.constexpr
):  # fmt: skip
    """Make dS of the block in a stage; if ``LATE``, add ``ds`` of the block before meanwhile.

    ``acc`` is what the pass sums, ``[M, D]``; where that is dK and dV, ``acc_v`` is dV. The pass of
    dV has weights instead of dS.
    """
    PASS: gl.constexpr = ctx.PASS
    blocks = ctx.blocks
    DTYPE: gl.constexpr = ctx.inner[QK].descriptor.dtype
    masked = ctx.key_mask.factor(stage)
    s = tile.mask.scores(  # S = Q K^T
        tile.qk, tile.columns, blocks, stage, block, bias, masked, ctx.SCORES, ctx.QK_CHUNKS
    )
    gv = blocks.matrix(stage, GV)  # [N, DV]
    if LATE:
        acc = _added(ctx, acc, ds, stage - 1)
    if ctx.EARLY:
        dp = multiply(tile.gv, gv, ctx.SCORES, ctx.V_CHUNKS)  # dP = dO V^T, [M, N]
    LATER: gl.constexpr = (len(acc) if LATE else 0) + (len(ctx.V_CHUNKS) if ctx.EARLY else 0)
    s = warpgroup_mma_wait(LATER, deps=[s])  # [M, N]
    if PASS == DQ:
        lse, delta = tile.lse_delta  # [M, 1]
    else:
        lse = _column_lse_delta(blocks, stage, LSE, ctx.SCORES)  # [1, N]
    s = tile.mask.compare(s, block, IS_FIRST)
    p = gl.exp2(s * ctx.scale_log2 - lse)  # [M, N]
    if PASS == DKDV:
        dp = multiply(tile.gv, gv, ctx.SCORES, ctx.V_CHUNKS)
        weights = gl.convert_layout(p.to(DTYPE), left_operand(ctx.V_CHUNKS[0]))
        acc_v = add(acc_v, weights, gv, ctx.V_CHUNKS)  # dV += P^T dO
    PENDING: gl.constexpr = len(acc_v) if PASS == DKDV else 0
    if PASS == DV:
        if LATE:
            acc = wait(acc, 0)
    elif LATE:
        found = wait(acc + (dp,), PENDING)
        acc, dp = found[:-1], found[-1]
    else:
        dp = warpgroup_mma_wait(PENDING, deps=[dp])
    if LATE:
        blocks.consumer_release(stage - 1)
    if PASS == DV:
        ds = p
    else:
        if PASS != DQ:
            delta = _column_lse_delta(blocks, stage, DELTA, ctx.SCORES)  # [1, N]
        ds = p * (dp - delta)  # dS = P * (dP - delta), [M, N]
    return acc, acc_v, gl.convert_layout(ds.to(DTYPE), left_operand(ctx.SUM_CHUNKS[0]))


@gluon.jit
def _added(ctx, acc, ds, stage):
    """Start to add dS of the block in a stage, or its weights."""
    # dQ += dS K, dK += dS^T Q, or dV += P^T dO
    factor = ctx.blocks.matrix(stage, GV if ctx.PASS == DV else QK)  # [N, D]
    return add(acc, ds, factor, ctx.SUM_CHUNKS)


@gluon.jit
def _add(ctx, tile, block, head, acc, acc_v, ds, stage):
    """Add dS of the block in a stage, or its weights, and hand the block back."""
    acc = _added(ctx, acc, ds, stage)
    if len(ctx.left_ds) > 0:
        _leave(ctx, tile, block, head, ds)
    if ctx.PASS == DKDV:
        found = wait(acc + acc_v, 0)
        acc, acc_v = found[: len(acc)], found[len(acc) :]
    else:
        acc = wait(acc, 0)
    ctx.blocks.consumer_release(stage)
    return acc, acc_v


@gluon.jit
def _leave(ctx, tile, block, head, ds):
    """Start to write dS^T of a block to memory."""
    first, key, buffer = tile.ds
    query, _ = ctx.geometry.block_start(block, tile.mask.origin)
    store_wait(0)  # the block before has left the buffer
    buffer.reshape([rows_of(buffer), buffer.shape[4]]).store(gl.convert_layout(ds, ctx.SCORES))
    fence_async_shared()
    ctx.left_ds[0].tensor.store((first + head, query[2]), (0, 0, key), buffer)


@gluon.jit
def _add_additional(ctx, tile, batch, acc, stage):
    """Add the additional tokens' part of dQ; they come from a stage on."""
    N: gl.constexpr = rows_held(ctx.geometry.BLOCK)
    DTYPE: gl.constexpr = tile.gv.dtype
    blocks = ctx.blocks
    lse, delta = tile.lse_delta  # [M, 1]
    for position in range(0, ctx.additional.count, N):
        blocks.consumer_wait(stage)
        s = multiply(
            tile.qk, blocks.matrix(stage, QK), ctx.SCORES, ctx.QK_CHUNKS
        )  # S = Q K^T, [M, N]
        dp = multiply(
            tile.gv, blocks.matrix(stage, GV), ctx.SCORES, ctx.V_CHUNKS
        )  # dP = dO V^T, [M, N]
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])
        s = ctx.additional.masked(s, batch, position)
        p = gl.exp2(s * ctx.scale_log2 - lse)  # [M, N]
        ds = (p * (dp - delta)).to(DTYPE)  # dS = P * (dP - delta), [M, N]
        ds = gl.convert_layout(ds, left_operand(ctx.SUM_CHUNKS[0]))
        acc = wait(_added(ctx, acc, ds, stage), 0)  # dQ += dS K, [M, D]
        blocks.consumer_release(stage)
        stage += 1
    return acc, stage


@gluon.jit
def _walk(ctx, tile, first, operands, bias, head, stage, acc, acc_v):
    """Sum over a warpgroup's blocks; the tile's first one is in that stage. ``head`` counts the
    query heads that share a key head."""
    g, blocks = ctx.geometry, ctx.blocks
    before, end, count, block = g.own_blocks(first, tile)
    for i in range(before):
        blocks.consumer_skip(stage + i)
    if ctx.LATE:
        acc, acc_v, ds = _step(
            ctx, operands, bias, block, stage + before, acc, acc_v, 0, False, True
        )
        for i in range(before + 1, end):
            if ctx.PASS == DKDV:
                acc_v = wait(acc_v, 0)
            block = g.next_block(block, tile.blocks)
            acc, acc_v, ds = _step(
                ctx, operands, bias, block, stage + i, acc, acc_v, ds, True, False
            )
        acc, acc_v = _add(ctx, operands, block, head, acc, acc_v, ds, stage + end - 1)
    else:
        if operands.mask.mask.KIND == FIRST:
            at = stage + before
            acc, acc_v, ds = _step(ctx, operands, bias, block, at, acc, acc_v, 0, False, True)
            acc, acc_v = _add(ctx, operands, block, head, acc, acc_v, ds, at)
            block = g.next_block(block, tile.blocks)
            before += 1
        for i in range(before, end):
            acc, acc_v, ds = _step(
                ctx, operands, bias, block, stage + i, acc, acc_v, 0, False, False
            )
            acc, acc_v = _add(ctx, operands, block, head, acc, acc_v, ds, stage + i)
            block = g.next_block(block, tile.blocks)
    for i in range(end, count):
        blocks.consumer_skip(stage + i)
    return acc, acc_v


@gluon.jit
def _sum_gradients(ctx, WARPGROUP: gl.constexpr):
    """Warpgroup that makes the gradients of its tokens of each tile."""
    g, tiles = ctx.geometry, ctx.tiles[WARPGROUP]
    M: gl.constexpr = rows_held(g.TILE)
    DTYPE: gl.constexpr = ctx.inner[QK].descriptor.dtype
    tile_iteration = 0
    stage = 0  # of the tile's first block
    if (ctx.HAS_BIAS or ctx.HAS_MASKS) and not ctx.BESIDE:
        gdc_wait()  # until the kernel before, which made what is loaded here, has ended
    for tile_id in range(ctx.first_program(), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        first = g.first_of(tile, WARPGROUP)
        mask = ctx.masks[WARPGROUP].of_tile(tile, first, ctx.SCORES)

        acc = zeros(M, ctx.SUM_CHUNKS)  # [M, D]
        acc_v = zeros(M, ctx.V_CHUNKS) if ctx.PASS == DKDV else acc  # dV, [M, DV]
        tiles.consumer_wait(tile_iteration, tile.head)
        qk = tiles.matrix(tile_iteration, QK)  # [M, D]
        gv = qk
        if ctx.PASS != DV:
            gv = tiles.matrix(tile_iteration, GV)  # [M, DV]
        lse_delta = ()
        if not g.OF_KEYS:
            # Rows that are no query have zeros, and gradients that nobody reads.
            lse_delta = _row_lse_delta(tiles, tile_iteration, ctx.SCORES)
        columns = ()
        if mask.mask.KIND == COLUMNS:
            columns = (tiles.matrix(tile_iteration, len(tiles.buffers) - 1),)  # [M, C]
        ds = ()
        if len(ctx.left_ds) > 0:
            left = ctx.left_ds[0]
            number = tile.batch * g.heads + tile.head - left.first_tile // g.tiles[2]
            ds = (number * ctx.heads_per_kv, first[2], left.buffers[WARPGROUP])
        operands = Operands(mask, qk, gv, columns, lse_delta, ds)
        if ctx.HAS_ADDITIONAL:
            acc, stage = _add_additional(ctx, operands, tile.batch, acc, stage)
        count = tile.blocks[0] * tile.blocks[1] * tile.blocks[2]
        # Of keys: the query heads that share a key head follow one another.
        for i in range(ctx.heads_per_kv if g.OF_KEYS else 1):
            head = tile.head * ctx.heads_per_kv + i if g.OF_KEYS else tile.head
            bias = ctx.bias.of_tile(tile, first, head)
            acc, acc_v = _walk(ctx, tile, first, operands, bias, i, stage, acc, acc_v)
            stage += count
        if g.OF_KEYS:  # those of masked keys and values are zero, whatever these are
            acc = ctx.key_mask.of_rows(tile, first, acc)
            acc_v = ctx.key_mask.of_rows(tile, first, acc_v)
        if ctx.OWN_OUT:
            tiles.consumer_release(tile_iteration)

        if g.QUERIES != OWN and len(g.tile_table) > 0:  # a document may have one side only
            has_partners = g.other_side(tile).length[2] > 0
            acc, acc_v = kept(acc, has_partners), kept(acc_v, has_partners)

        if not ctx.HALF_ALIGNED:
            store_wait(0)  # the tile before has left the buffers
        if ctx.PASS != DV:
            acc = times(acc, ctx.scale_log2 * LN2)
        side = g.own_side(tile)
        if ctx.HALF_ALIGNED:
            steps = ctx.grads[0].steps
            base = first_row(steps, tile.batch, side.group, tile.head)
            row, real = g.rows(base, steps, side, g.tokens(first, ctx.SCORES))
            ctx.grads[0].store(acc, row, real, tile.head)
            if ctx.PASS == DKDV:
                ctx.grads[1].store(acc_v, row, real, tile.head)
        else:
            buffers = ctx.buffers[WARPGROUP]
            store(acc, buffers[0], ctx.SUM_CHUNKS, DTYPE)
            if ctx.PASS == DKDV:
                store(acc_v, buffers[1], ctx.V_CHUNKS, DTYPE)
            fence_async_shared()
            base = ctx.grads[0].tma_base(tile.batch, side.bases, tile.head)
            g.store_tile(ctx.grads[0], base, side, first, buffers[0])
            if ctx.PASS == DKDV:
                g.store_tile(ctx.grads[1], base, side, first, buffers[1])
        if not ctx.OWN_OUT:
            store_wait(0)
            tiles.consumer_release(tile_iteration)
        tile_iteration += 1  # noqa: SIM113
    store_wait(0)


@gluon.jit
def _buffers(tiles, grads, OWN_OUT: gl.constexpr, PIECES: gl.constexpr):
    """Where a warpgroup's gradients wait to be stored: if need be, in the place of its tile."""
    if OWN_OUT:
        return [allocate(grad, 1, PIECES).index(0) for grad in grads]
    else:
        return [buffer.index(0) for buffer in tiles.buffers[: len(grads)]]


@gluon.jit
def _mask(
    g, tables, KIND: gl.constexpr, ENDS: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr
):
    """A warpgroup's mask; its bounds are in shared memory, for want of registers."""
    bounds = ()
    if KIND == COMPARE:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        bounds = (gl.allocate_shared_memory(gl.int32, [6, rows_held(g.TILE)], FLAT),)
    return Mask(g, tables, bounds, KIND, ENDS, BY_ROW, STEPS)


@kernel(
    gluon.jit,
    tensors="query key value grad_out lse_delta additional_keys additional_values query_columns "
    "key_columns ds grad_query grad_key grad_value qk_at_seam gv_at_seam lse_delta_at_seam "
    "bias_tables tile_table",
    masks="key_mask additional_mask",
)
def backward_kernel(
    query, key, value, grad_out, lse_delta, additional_keys, additional_values,
    query_columns, key_columns, ds, grad_query, grad_key, grad_value,
    qk_at_seam, gv_at_seam, lse_delta_at_seam, bias_tables, tile_table, key_mask, additional_mask,
    O0, O1, O2, G0, G1, G2,
    q_b, q_0, q_1, q_2, q_h, q_c, k_b, k_0, k_1, k_2, k_h, k_c, v_b, v_0, v_1, v_2, v_h, v_c,
    m_b, m_0, m_1, m_2, m_last, N0, N1, N2, Q0, Q1, Q2, SN0, SN1, SN2, SQ0, SQ1, SQ2,
    T0, T1, T2, num_tiles, F0, F1, F2, g_b, g_0, g_1, g_2, g_h, g_c,
    l_b, l_0, l_1, l_2, l_h, l_c,
    d_b, d_0, d_1, additional_b, K0, K1, K2, S0, S1, S2, D0, D1, D2, R0, R1, R2,
    heads, heads_per_kv, heads_at_once, num_additional, scale_log2, bias_size, bias_middle,
    a_b, a_0, first_tile,
    MODES: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, SPLIT_AXIS: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, ENDS: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, TABLES: gl.constexpr, HAS_ADDITIONAL: gl.constexpr, OWN_OUT: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr, WARPGROUPS: gl.constexpr,
    DILATED: gl.constexpr, QUERIES: gl.constexpr, PIECE: gl.constexpr,
    SEAM_PIECE: gl.constexpr, HEADS_FIRST: gl.constexpr,
    PACKED: gl.constexpr, BIAS_STRIDES: gl.constexpr, QK_CHUNKS: gl.constexpr,
    V_CHUNKS: gl.constexpr, SLICES: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
    HAS_ADDITIONAL_MASK: gl.constexpr, OVERLAP: gl.constexpr, PASS: gl.constexpr,
    LEAVE_DS: gl.constexpr, QK_CLEARED: gl.constexpr, V_CLEARED: gl.constexpr,
):  # fmt: skip
    """One pass: dQ from tiles of queries, or dK, dV, or both from tiles of keys.

    The first thirteen tensors are descriptors, but gradients of heads that TMA can not store. So
    are the next three where a block at the seam of a ring comes in smaller ``SEAM_PIECE``s, those
    of what blocks are of. Numbers are as in the forward kernel; the gradients that a pass stores
    have the steps ``d``, and tiles of keys begin at ``F``. The pass of dV may have ``SLICES``. With
    ``OVERLAP``, passes follow one another with no other kernel in between. To ``LEAVE_DS``, tiles
    are those of the heads that ``ds`` has room for, from ``first_tile`` on.
    """
    OF_KEYS: gl.constexpr = PASS != DQ
    part, documents = (), ()
    if PACKED:
        documents = (tile_table,)
        T2, num_tiles = num_tiles_of(tile_table, heads)
    if QUERIES != OWN:
        part = (
            Part(
                queries=(Q0, Q1, Q2), short_queries=(SQ0, SQ1, SQ2), short_keys=(SN0, SN1, SN2),
                offset=(O0, O1, O2), group=(G0, G1, G2), per_key=(R0, R1, R2),
                first_key=(F0, F1, F2),
            ),
        )  # fmt: skip
    g = Geometry(
        length=(N0, N1, N2), window=(K0, K1, K2), stride=(S0, S1, S2), dilation=(D0, D1, D2),
        tiles=(T0, T1, T2), part=part, tile_table=documents, num_tiles=num_tiles, heads=heads,
        heads_at_once=heads_at_once, MODES=MODES, TILE=TILE, BLOCK=BLOCK, SPLIT_AXIS=SPLIT_AXIS,
        WARPGROUPS=WARPGROUPS, DILATED=DILATED, QUERIES=QUERIES, PIECE=PIECE,
        SEAM_PIECE=SEAM_PIECE, HEADS_FIRST=HEADS_FIRST, OF_KEYS=OF_KEYS,
    )  # fmt: skip
    of_slice = slice_of(grad_out, SLICES)
    qk_pieces, gv_pieces, lse_delta_pieces = (), (), ()
    if SEAM_PIECE != PIECE:  # of the tensors that have blocks
        qk_pieces, gv_pieces, lse_delta_pieces = (qk_at_seam,), (gv_at_seam,), (lse_delta_at_seam,)
    of_queries = (
        TmaTensor(query, (q_b, q_0, q_1, q_2, q_h, q_c), (), qk_pieces),
        TmaTensor(grad_out, (g_b, g_0, g_1, g_2, g_h, g_c), of_slice, gv_pieces),
        TmaTensor(lse_delta, (l_b, l_0, l_1, l_2, l_h, l_c), (), lse_delta_pieces),
    )
    of_keys = (TmaTensor(key, (k_b, k_0, k_1, k_2, k_h, k_c), (), qk_pieces),)
    if PASS != DV:
        of_keys += (TmaTensor(value, (v_b, v_0, v_1, v_2, v_h, v_c), (), gv_pieces),)
    if MASK == COLUMNS:
        of_queries += (shared_by_heads(query_columns),)
        of_keys += (shared_by_heads(key_columns),)
    HALF_ALIGNED: gl.constexpr = are_half_aligned(QK_CLEARED)
    grad_steps = (d_b, d_0, d_1, heads, 1, 0)
    if OF_KEYS:
        outer, inner = of_keys, of_queries
        of_first = grad_value if PASS == DV else grad_key
        grads = (stored_tensor(of_first, grad_steps, of_slice, QK_CLEARED),)
        if PASS == DKDV:
            grads += (stored_tensor(grad_value, grad_steps, (), QK_CLEARED),)
    else:
        outer, inner = of_queries, of_keys
        grads = (stored_tensor(grad_query, grad_steps, (), QK_CLEARED),)
    additional, own_mask = (), ()
    if HAS_ADDITIONAL:
        steps = (additional_b, 0, 0, 0, 1, 0)
        additional = (
            TmaTensor(additional_keys, steps, (), ()),
            TmaTensor(additional_values, steps, (), ()),
        )
    if HAS_ADDITIONAL_MASK:
        own_mask = (additional_mask,)
    # A masked key is a row of dK and dV, which are zero there.
    MASKS_BLOCKS: gl.constexpr = HAS_KEY_MASK and not OF_KEYS
    factors = ()
    if MASKS_BLOCKS:
        factors = (stage_factors(g, STAGES, MASK, ENDS, BY_ROW, STEPS, TABLES),)
    masked = key_mask_of(g, key_mask, (m_b, m_0, m_1, m_2), m_last, factors, HAS_KEY_MASK, MASK)
    PIECES: gl.constexpr = volume(BLOCK) // volume(PIECE)
    # The weights of dV have no sum over the values' channels.
    CLEARED: gl.constexpr = QK_CLEARED if PASS == DV else QK_CLEARED + V_CLEARED
    HAS_WARP: gl.constexpr = MASKS_BLOCKS or clears(CLEARED)  # beside those that fetch
    blocks = tma_pipeline(
        inner, STAGES, WARPGROUPS, PIECES, MASKS_BLOCKS, CLEARED, not MASKS_BLOCKS
    )
    if fetched_tokens(BLOCK) > 0:
        blocks.fill()
    tables = column_tables(g, MASK, ENDS, BY_ROW, STEPS, TABLES)
    ROWS: gl.constexpr = volume(TILE) // TILE[2] if PACKED else 1
    tiles = (tma_pipeline(outer, 1, 1, ROWS, False, CLEARED),)
    masks = (_mask(g, tables, MASK, ENDS, BY_ROW, STEPS),)
    if WARPGROUPS == 2:
        tiles += (tma_pipeline(outer, 1, 1, ROWS, False, CLEARED),)
        masks += (_mask(g, tables, MASK, ENDS, BY_ROW, STEPS),)
    left_ds = ()
    if LEAVE_DS:
        tensor = shared_by_heads(ds)
        buffers = (allocate(tensor, 1, 1).index(0),)
        if WARPGROUPS == 2:
            buffers += (allocate(tensor, 1, 1).index(0),)
        left_ds = (LeftDs(tensor, buffers, first_tile),)
    WIDTH: gl.constexpr = query.block_type.shape[4]
    ctx = Context(
        geometry=g, masks=masks, key_mask=masked,
        bias=bias_of(g, bias_tables, bias_size, bias_middle, BIAS_STRIDES),
        outer=outer, inner=inner, grads=grads,
        additional=Additional(additional, num_additional, own_mask, (a_b, a_0)),
        heads_per_kv=heads_per_kv, scale_log2=scale_log2,
        tiles=tiles, blocks=blocks,
        buffers=[_buffers(each, grads, OWN_OUT and not HALF_ALIGNED, ROWS) for each in tiles],
        HAS_ADDITIONAL=HAS_ADDITIONAL, HAS_MASKS=HAS_KEY_MASK or HAS_ADDITIONAL_MASK,
        HAS_BIAS=len(BIAS_STRIDES) > 0, HALF_ALIGNED=HALF_ALIGNED,
        OWN_OUT=OWN_OUT or HALF_ALIGNED,
        # Registers do not suffice for dP with two sums, nor for adding late to two of 128 channels.
        PASS=PASS, EARLY=len(grads) == 1 and PASS != DV, LATE=PASS != DKDV or WIDTH < 128,
        left_ds=left_ds,
        BESIDE=OVERLAP and PASS != DQ, NEXT_BESIDE=OVERLAP and PASS != DKDV and PASS != DV,
        QK_CHUNKS=QK_CHUNKS, V_CHUNKS=V_CHUNKS, SUM_CHUNKS=V_CHUNKS if PASS == DV else QK_CHUNKS,
        SCORES=mma_layout(rows_held(BLOCK)),
    )  # fmt: skip
    # Triton has no variable for a list of functions, so the roles are put together in place.
    gl.warp_specialize(
        [(_sum_gradients, (ctx, 0)), (_sum_gradients, (ctx, 1))][:WARPGROUPS]
        + [(_fetch_tiles, (ctx,)), (_fetch_blocks, (ctx,))]
        + [(mask_blocks, (masked, (blocks,), num_additional))][: 1 if MASKS_BLOCKS else 0]
        + [(_clear_blocks, (ctx,))][: 1 if HAS_WARP and not MASKS_BLOCKS else 0],
        [WARPS, 1, 1, 1][2 - WARPGROUPS : 4 if HAS_WARP else 3],
        ([REGISTERS] + [FETCH_REGISTERS] * 3)[2 - WARPGROUPS : 4 if HAS_WARP else 3],
    )
