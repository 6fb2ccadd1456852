"""Forward on Hopper: blocks by TMA, products by wgmma; two warps fetch, one or two warpgroups
compute. With a mask of keys, a warp masks what was fetched (``key_masks.py``).

A program takes tiles of queries in turn, so that the next tile is fetched while this one ends. Keys
and values come block by block; a warpgroup hands back unread what its queries do not attend.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton.launch import kernel
from ..triton.primitives import LN2, ROUNDING
from .bias import Bias, bias_of
from .documents import num_tiles_of
from .geometry import OWN, WARPS, Geometry, Part, fetched_tokens, mma_layout, rows_held, volume
from .gluon_names import (
    aggregate,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    store_wait,
    warpgroup_mma_wait,
)
from .head_rows import stored_tensor
from .key_masks import Additional, KeyMask, key_mask_of, mask_blocks
from .masks import COLUMNS, MASKED, Mask, column_tables, stage_factors
from .pipeline import (
    TmaPipeline,
    TmaTensor,
    allocate,
    are_half_aligned,
    clear_blocks,
    clears,
    first_row,
    shared_by_heads,
    slice_of,
    tma_bases,
    tma_pipeline,
)
from .products import add, kept, left_operand, multiply, scaled, store, wait, zeros


@aggregate
class Context:
    """What the roles of a program share; tuples of pipelines and buffers are per warpgroup."""

    geometry: Geometry
    mask: Mask
    key_mask: KeyMask
    bias: Bias
    query: gl.tuple  # TmaTensor, with COLUMNS a second one
    key: gl.tuple  # likewise
    value: TmaTensor
    out: gl.tuple  # a TmaTensor, or HeadRows where TMA can not store heads
    lse: gl.tensor
    additional: Additional
    heads_per_kv: gl.tensor
    scale_log2: gl.tensor  # scores times it are exponents of two
    queries: gl.tuple  # pipelines of tiles
    keys: TmaPipeline
    values: TmaPipeline
    outs: gl.tuple  # buffers of outputs, [1, 1, *tile, DV]
    HAS_ADDITIONAL: gl.constexpr
    HAS_MASKS: gl.constexpr  # of keys or of additional ones
    HAS_BIAS: gl.constexpr
    HALF_ALIGNED: gl.constexpr  # heads, of which TMA can not store every one (``head_rows.py``)
    OWN_OUT: gl.constexpr  # outputs do not take the place of their queries
    QK_CHUNKS: gl.constexpr  # channels of queries and keys, as products take them
    V_CHUNKS: gl.constexpr  # of values
    SCORES: gl.constexpr  # layout of [M, N]


@gluon.jit
def _fetch_queries(ctx):
    """Warp that fetches each warpgroup's queries."""
    g = ctx.geometry
    TOKENS: gl.constexpr = fetched_tokens(g.TILE)
    tile_iteration = 0
    for tile_id in range(gl.program_id(0), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        side, tensors = tile.group.queries, ctx.query
        bases = tma_bases(tensors, tile.batch, side.bases, tile.head, ctx.HALF_ALIGNED)
        places = g.places_of_tile(side, g.first_of(tile, 0))
        gdc_wait()  # until the kernel before has ended; what comes first need not
        ctx.queries[0].produce(tile_iteration, tensors, bases, places, TOKENS=TOKENS)
        if g.WARPGROUPS == 2:
            places = g.places_of_tile(side, g.first_of(tile, 1))
            ctx.queries[1].produce(tile_iteration, tensors, bases, places, TOKENS=TOKENS)
        tile_iteration += 1  # noqa: SIM113


@gluon.jit
def _fetch_blocks(ctx):
    """Warp that fetches the additional tokens, then blocks of keys and values."""
    g = ctx.geometry
    stage = 0
    for tile_id in range(gl.program_id(0), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        side, head = tile.group.keys, tile.head // ctx.heads_per_kv
        k_bases = tma_bases(ctx.key, tile.batch, side.bases, head, ctx.HALF_ALIGNED)
        v_base = ctx.value.tma_base(tile.batch, side.bases, head, ctx.HALF_ALIGNED)
        gdc_wait()
        if ctx.HAS_ADDITIONAL:
            tensors = ctx.additional.tensors
            bases = tma_bases(tensors, tile.batch, side.group, head)
            for position in range(0, ctx.additional.count, rows_held(g.BLOCK)):
                places = ((0, 0, position),)
                ctx.keys.produce(stage, tensors[:1], (bases[0],), places)
                ctx.values.produce(stage, tensors[1:], (bases[1],), places)
                stage += 1
        block = (stage * 0, stage * 0, stage * 0)
        for _ in range(tile.blocks[0] * tile.blocks[1] * tile.blocks[2]):
            start, _ = g.block_start(block, tile.origin)
            g.fetch(ctx.keys, stage, ctx.key, k_bases, side, start)
            g.fetch(ctx.values, stage, (ctx.value,), (v_base,), side, start)
            block = g.next_block(block, tile.blocks)
            stage += 1
    gdc_launch_dependents()  # the next kernel can be set up, and waits for this one's end


@gluon.jit
def _clear_blocks(ctx):
    """Warp that clears keys."""
    count = ctx.additional.count if ctx.HAS_ADDITIONAL else 0
    clear_blocks(ctx.keys, ctx.geometry, gl.program_id(0), count, 1)


@gluon.jit
def _softmax(ctx, s, row_max, row_sum):
    """Weights of scores ``[M, N]`` as a left operand, new maximum and sum, and what earlier sums
    are rescaled by, all ``[M]``."""
    new_max = gl.max(s, 1) * ctx.scale_log2  # [M]
    if ctx.HAS_BIAS:
        # Scores of a large negative bias are far from zero, and so are the rounding errors of their
        # maximum: above all of its scores, no weight is infinite.
        new_max += gl.abs(new_max) * ROUNDING
    new_max = gl.maximum(row_max, new_max)
    p = gl.exp2(s * ctx.scale_log2 - new_max[:, None])  # [M, N]
    rescale = gl.exp2(row_max - new_max)  # [M]
    row_sum = row_sum * rescale + gl.sum(p, 1)  # [M]
    p = gl.convert_layout(p.to(ctx.value.descriptor.dtype), left_operand(ctx.V_CHUNKS[0]))
    return p, new_max, row_sum, rescale


@gluon.jit
def _add(ctx, acc, p, stage):
    """Start ``acc += P V`` of the block in a stage, once its values are there."""
    ctx.values.consumer_wait(stage)
    return add(acc, p, ctx.values.matrix(stage), ctx.V_CHUNKS)  # [M, DV]


@gluon.jit
def _skip(ctx, stage, first, end):
    """Hand blocks back unread, of those that begin with a stage."""
    for block in range(first, end):
        ctx.keys.consumer_skip(stage + block)
        ctx.values.consumer_skip(stage + block)


@gluon.jit
def _attend(ctx, WARPGROUP: gl.constexpr):
    """Warpgroup that computes the attention of its queries of each tile."""
    g, keys, values = ctx.geometry, ctx.keys, ctx.values
    queries, out_buffer = ctx.queries[WARPGROUP], ctx.outs[WARPGROUP]
    M: gl.constexpr = rows_held(g.TILE)
    N: gl.constexpr = rows_held(g.BLOCK)
    ROWS: gl.constexpr = gl.SliceLayout(1, ctx.SCORES)
    tile_iteration = 0
    stage = 0  # of the tile's first block
    if ctx.HAS_BIAS or ctx.HAS_MASKS:
        gdc_wait()  # until the kernel before, which made what is loaded here, has ended
    for tile_id in range(gl.program_id(0), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        first = g.first_of(tile, WARPGROUP)
        before, end, count, block = g.own_blocks(first, tile)
        tokens = g.tokens(first, ctx.SCORES)  # [M]
        mask = ctx.mask.of_tile(tile, first, ctx.SCORES)
        bias = ctx.bias.of_tile(tile, first, tile.head)

        acc = zeros(M, ctx.V_CHUNKS)  # [M, DV]
        row_max = gl.full([M], float("-inf"), gl.float32, ROWS)  # [M]
        row_sum = gl.zeros([M], gl.float32, ROWS)  # [M]
        queries.consumer_wait(tile_iteration, tile.head)
        q = queries.matrix(tile_iteration)  # [M, D]
        rows = ()
        if ctx.mask.KIND == COLUMNS:
            rows = (queries.matrix(tile_iteration, 1),)  # [M, C]
        if ctx.HAS_ADDITIONAL:
            for position in range(0, ctx.additional.count, N):
                keys.consumer_wait(stage)
                s = multiply(q, keys.matrix(stage), ctx.SCORES, ctx.QK_CHUNKS)  # [M, N]
                s = warpgroup_mma_wait(0, deps=[s])
                keys.consumer_release(stage)
                s = ctx.additional.masked(s, tile.batch, position)
                p, row_max, row_sum, rescale = _softmax(ctx, s, row_max, row_sum)
                acc = _add(ctx, scaled(acc, rescale), p, stage)
                acc = wait(acc, 0)
                values.consumer_release(stage)
                stage += 1

        _skip(ctx, stage, 0, before)
        at = stage + before
        masked = ctx.key_mask.factor(at)
        s = mask.scores(q, rows, keys, at, block, bias, masked, ctx.SCORES, ctx.QK_CHUNKS)  # [M, N]
        s = warpgroup_mma_wait(0, deps=[s])
        keys.consumer_release(at)
        if ctx.OWN_OUT:  # after the last scores the next tile's queries can come
            queries.consumer_release(tile_iteration, before + 1 == end)
        s = mask.compare(s, block, True)
        p, row_max, row_sum, rescale = _softmax(ctx, s, row_max, row_sum)
        if ctx.HAS_ADDITIONAL:
            acc = scaled(acc, rescale)
        # While the softmax of a block is computed, the values of the block before it are added.
        for i in range(before + 1, end):
            block = g.next_block(block, tile.blocks)
            masked = ctx.key_mask.factor(stage + i)
            s = mask.scores(
                q, rows, keys, stage + i, block, bias, masked, ctx.SCORES, ctx.QK_CHUNKS
            )
            acc = _add(ctx, acc, p, stage + i - 1)
            s = warpgroup_mma_wait(len(ctx.V_CHUNKS), deps=[s])
            keys.consumer_release(stage + i)
            if ctx.OWN_OUT:
                queries.consumer_release(tile_iteration, i + 1 == end)
            s = mask.compare(s, block, False)
            p, row_max, row_sum, rescale = _softmax(ctx, s, row_max, row_sum)
            acc = wait(acc, 0)
            values.consumer_release(stage + i - 1)
            acc = scaled(acc, rescale)
        acc = _add(ctx, acc, p, stage + end - 1)
        acc = wait(acc, 0)
        values.consumer_release(stage + end - 1)
        _skip(ctx, stage, end, count)

        if not ctx.HALF_ALIGNED:
            store_wait(0)  # the tile before has left the buffer
        inverse = 1.0 / row_sum  # [M]
        if ctx.HAS_BIAS:  # of -inf, which may leave nothing to attend
            inverse = gl.where(row_sum > 0, inverse, 0.0)
        if ctx.HAS_MASKS:  # which may leave nothing either
            attends = row_max > ctx.scale_log2 * (MASKED / 2)  # [M]
            inverse = gl.where(attends, inverse, 0.0)
        out = scaled(acc, inverse)  # O = acc / row_sum, [M, DV]
        if g.QUERIES != OWN and len(g.tile_table) > 0:  # it may be a document without keys
            has_keys = tile.group.keys.length[2] > 0
            out = kept(out, has_keys)
            row_max = gl.where(has_keys, row_max, float("-inf"))
        side, tensor = tile.group.queries, ctx.out[0]
        if not ctx.HALF_ALIGNED:
            store(out, out_buffer, ctx.V_CHUNKS, tensor.descriptor.dtype)
            fence_async_shared()
            base = tensor.tma_base(tile.batch, side.bases, tile.head)
            g.store_tile(tensor, base, side, first, out_buffer)
        if not ctx.OWN_OUT:
            store_wait(0)
            queries.consumer_release(tile_iteration)
        # A contiguous tensor's bases are its rows.
        base = first_row(tensor.steps, tile.batch, side.group, tile.head)
        row, real = g.rows(base, tensor.steps, side, tokens)
        if ctx.HALF_ALIGNED:
            tensor.store(out, row, real, tile.head)
        if len(tensor.slice) > 0:  # programs of the other slices have the same
            real = real & (tensor.slice[0] == 0)
        row_lse = (row_max + gl.log2(row_sum)) * LN2  # [M]
        if ctx.HAS_MASKS:
            row_lse = gl.where(attends, row_lse, float("-inf"))
        gl.store(ctx.lse + row, row_lse, mask=real)
        stage += count
        tile_iteration += 1  # noqa: SIM113
    store_wait(0)


@gluon.jit
def _out_buffer(queries, out, OWN_OUT: gl.constexpr, PIECES: gl.constexpr):
    """Where a warpgroup's outputs wait to be stored: if need be, in the place of its queries."""
    buffer = queries.buffers[0].index(0)
    if OWN_OUT:
        buffer = allocate(out, 1, PIECES).index(0)
    return buffer


@kernel(
    gluon.jit,
    tensors="query key value out additional_keys additional_values query_columns key_columns "
    "key_at_seam value_at_seam "
    "lse bias_tables tile_table",
    masks="key_mask additional_mask",
)
def forward_kernel(
    query, key, value, out, additional_keys, additional_values, query_columns, key_columns,
    key_at_seam, value_at_seam, lse, bias_tables, tile_table, key_mask, additional_mask,
    O0, O1, O2, G0, G1, G2,
    q_b, q_0, q_1, q_2, q_h, q_c, k_b, k_0, k_1, k_2, k_h, k_c, v_b, v_0, v_1, v_2, v_h, v_c,
    m_b, m_0, m_1, m_2, m_last, N0, N1, N2, Q0, Q1, Q2, SN0, SN1, SN2, SQ0, SQ1, SQ2,
    T0, T1, T2, num_tiles, o_b, o_0, o_1, additional_b, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    R0, R1, R2, heads, heads_per_kv, heads_at_once, num_additional, scale_log2,
    bias_size, bias_middle, a_b, a_0,
    MODES: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, SPLIT_AXIS: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, ENDS: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, TABLES: gl.constexpr, HAS_ADDITIONAL: gl.constexpr, OWN_OUT: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr, WARPGROUPS: gl.constexpr,
    DILATED: gl.constexpr, QUERIES: gl.constexpr, PIECE: gl.constexpr,
    SEAM_PIECE: gl.constexpr, HEADS_FIRST: gl.constexpr,
    PACKED: gl.constexpr, BIAS_STRIDES: gl.constexpr, QK_CHUNKS: gl.constexpr,
    V_CHUNKS: gl.constexpr, SLICES: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
    HAS_ADDITIONAL_MASK: gl.constexpr, QK_CLEARED: gl.constexpr, V_CLEARED: gl.constexpr,
):  # fmt: skip
    """The first eight tensors are descriptors, but outputs of heads that TMA can not store. So are
    the next two where a block at the seam of a ring comes in smaller ``SEAM_PIECE``s, of keys and
    of values. Steps are :class:`TmaTensor`'s:
    ``q_b`` from a batch entry to the next, ``q_0`` .. ``q_2`` from a token to the next, ``q_h``
    from a head, or ``q_c`` if heads lie along the channels.

    The other numbers are :class:`Geometry`'s, per axis: positions ``N`` of a dilation group, window
    ``K``, stride ``S``, dilation ``D``, tiles ``T``. What follows is :class:`Part`'s: queries
    ``Q``, from which groups on there is one query (``SQ``) or key (``SN``) less, queries before the
    part ``O``, the first query's group ``G``, queries per key ``R``. Of :class:`Bias` are the
    numbers ``bias_size`` and ``bias_middle``, and the strides, which are () without a bias. Masks
    of keys have the strides ``m``, and a batch entry's last key at ``m_last``; those of additional
    ones have the strides ``a``.

    Of ``PACKED`` documents, sizes and tiles are in the table, ``N`` and ``Q`` are all tokens as a
    row, and steps are from a head to the next.

    Each of ``SLICES`` of the value's channels has programs of its own, along the grid's second
    axis. ``QK_CHUNKS`` and ``V_CHUNKS`` are of channels (``products.py``), and ``CLEARED`` are
    those that :class:`TmaPipeline` sets to zero; values need it not, as there is no sum over their
    channels.
    """
    part, documents = (), ()
    if PACKED:
        documents = (tile_table,)
        T2, num_tiles = num_tiles_of(tile_table, heads)
    if QUERIES != OWN:
        part = (
            Part(
                queries=(Q0, Q1, Q2), short_queries=(SQ0, SQ1, SQ2), short_keys=(SN0, SN1, SN2),
                offset=(O0, O1, O2), group=(G0, G1, G2), per_key=(R0, R1, R2),
                first_key=(),
            ),
        )  # fmt: skip
    g = Geometry(
        length=(N0, N1, N2), window=(K0, K1, K2), stride=(S0, S1, S2), dilation=(D0, D1, D2),
        tiles=(T0, T1, T2), part=part, tile_table=documents, num_tiles=num_tiles, heads=heads,
        heads_at_once=heads_at_once, MODES=MODES, TILE=TILE, BLOCK=BLOCK, SPLIT_AXIS=SPLIT_AXIS,
        WARPGROUPS=WARPGROUPS, DILATED=DILATED, QUERIES=QUERIES, PIECE=PIECE,
        SEAM_PIECE=SEAM_PIECE, HEADS_FIRST=HEADS_FIRST, OF_KEYS=False,
    )  # fmt: skip
    of_slice = slice_of(value, SLICES)
    key_pieces, value_pieces = (), ()
    if SEAM_PIECE != PIECE:
        key_pieces, value_pieces = (key_at_seam,), (value_at_seam,)
    q = (TmaTensor(query, (q_b, q_0, q_1, q_2, q_h, q_c), (), ()),)
    k = (TmaTensor(key, (k_b, k_0, k_1, k_2, k_h, k_c), (), key_pieces),)
    if MASK == COLUMNS:
        q += (shared_by_heads(query_columns),)
        k += (shared_by_heads(key_columns),)
    v = TmaTensor(value, (v_b, v_0, v_1, v_2, v_h, v_c), of_slice, value_pieces)
    HALF_ALIGNED: gl.constexpr = are_half_aligned(QK_CLEARED)
    o = stored_tensor(out, (o_b, o_0, o_1, heads, 1, 0), of_slice, QK_CLEARED)
    additional, own_mask = (), ()
    if HAS_ADDITIONAL:
        steps = (additional_b, 0, 0, 0, 1, 0)
        additional = (
            TmaTensor(additional_keys, steps, (), ()),
            TmaTensor(additional_values, steps, of_slice, ()),
        )
    if HAS_ADDITIONAL_MASK:
        own_mask = (additional_mask,)
    factors = ()
    if HAS_KEY_MASK:
        factors = (stage_factors(g, STAGES, MASK, ENDS, BY_ROW, STEPS, TABLES),)
    masked = key_mask_of(g, key_mask, (m_b, m_0, m_1, m_2), m_last, factors, HAS_KEY_MASK, MASK)
    PIECES: gl.constexpr = volume(BLOCK) // volume(PIECE)
    HAS_WARP: gl.constexpr = HAS_KEY_MASK or clears(QK_CLEARED)  # beside those that fetch
    keys = tma_pipeline(k, STAGES, WARPGROUPS, PIECES, HAS_KEY_MASK, QK_CLEARED, not HAS_KEY_MASK)
    values = tma_pipeline((v,), STAGES, WARPGROUPS, PIECES, HAS_KEY_MASK)
    if fetched_tokens(BLOCK) > 0:
        keys.fill()
        values.fill()
    ROWS: gl.constexpr = volume(TILE) // TILE[2] if PACKED else 1
    queries = (tma_pipeline(q, 1, 1, ROWS, False, QK_CLEARED),)
    if WARPGROUPS == 2:
        queries += (tma_pipeline(q, 1, 1, ROWS, False, QK_CLEARED),)
    outs = [_out_buffer(each, o, OWN_OUT and not HALF_ALIGNED, ROWS) for each in queries]
    tables = column_tables(g, MASK, ENDS, BY_ROW, STEPS, TABLES)
    ctx = Context(
        geometry=g, mask=Mask(g, tables, (), MASK, ENDS, BY_ROW, STEPS), key_mask=masked,
        bias=bias_of(g, bias_tables, bias_size, bias_middle, BIAS_STRIDES),
        query=q, key=k, value=v, out=(o,), lse=lse,
        additional=Additional(additional, num_additional, own_mask, (a_b, a_0)),
        heads_per_kv=heads_per_kv, scale_log2=scale_log2,
        queries=queries, keys=keys, values=values, outs=outs,
        HAS_ADDITIONAL=HAS_ADDITIONAL, HAS_MASKS=HAS_KEY_MASK or HAS_ADDITIONAL_MASK,
        HAS_BIAS=len(BIAS_STRIDES) > 0, HALF_ALIGNED=HALF_ALIGNED,
        OWN_OUT=OWN_OUT or HALF_ALIGNED, QK_CHUNKS=QK_CHUNKS, V_CHUNKS=V_CHUNKS,
        SCORES=mma_layout(rows_held(BLOCK)),
    )  # fmt: skip
    # Triton has no variable for a list of functions, so the roles are put together in place.
    gl.warp_specialize(
        [(_attend, (ctx, 0)), (_attend, (ctx, 1))][:WARPGROUPS]
        + [(_fetch_queries, (ctx,)), (_fetch_blocks, (ctx,))]
        + [(mask_blocks, (masked, (keys, values), num_additional))][: 1 if HAS_KEY_MASK else 0]
        + [(_clear_blocks, (ctx,))][: 1 if HAS_WARP and not HAS_KEY_MASK else 0],
        [WARPS, 1, 1, 1][2 - WARPGROUPS : 4 if HAS_WARP else 3],
        ([REGISTERS] + [FETCH_REGISTERS] * 3)[2 - WARPGROUPS : 4 if HAS_WARP else 3],
    )
