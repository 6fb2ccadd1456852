"""dQ of plain attention from dS that dK and dV left in memory: dQ = scale * dS K.

dS^T lies as ``[heads, keys, queries]``. A tile is queries of two warpgroups, a block is keys. Those
that are masked may be NaN, and so may be their dS, so with a mask of keys a warp sets both to zero.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton.launch import kernel
from ..triton.primitives import LN2
from .geometry import WARPS
from .gluon_names import (
    aggregate,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    store_wait,
)
from .key_masks import LANES, ballot, clear_rows, lane_of_warp, next_stage
from .pipeline import TmaPipeline, TmaTensor, allocate, rows_of, tma_pipeline
from .products import add, store, times, wait, zeros

KEY, DS = gl.constexpr(0), gl.constexpr(1)


@aggregate
class Context:
    """What the roles of a program share."""

    tensors: gl.tuple  # keys and dS
    grad_query: TmaTensor
    first: gl.tensor  # of the key heads of all batch entries whose dS is there
    count: gl.tensor  # query heads whose dS is there
    kv_heads: gl.tensor
    heads_per_kv: gl.tensor
    num_blocks: gl.tensor
    num_tiles: gl.tensor
    scale_log2: gl.tensor
    key_mask: gl.tuple  # bool [batch or 1, keys], if there is one
    mask_strides: gl.tuple  # of batch and keys
    last: gl.tensor  # where a batch entry's last key is in the mask
    blocks: TmaPipeline
    buffers: gl.tuple  # of each warpgroup, [1, 1, 1, M, D]
    CHUNKS: gl.constexpr  # channels, as products take them

    @gluon.jit
    def tile(self, tile_id):
        """Of a tile: which dS is its head's, batch entry, head of keys, head, first query."""
        which = tile_id % self.count
        kv = self.first + which // self.heads_per_kv
        kv_head = kv % self.kv_heads
        head = kv_head * self.heads_per_kv + which % self.heads_per_kv
        M: gl.constexpr = rows_of(self.buffers[0])
        return which, kv // self.kv_heads, kv_head, head, tile_id // self.count * (2 * M)


@gluon.jit
def _fetch(ctx):
    """Warp that fetches blocks of keys, with their dS. Those come first that were written last."""
    N: gl.constexpr = rows_of(ctx.blocks.buffers[KEY].index(0))
    stage = 0
    for tile_id in range(gl.program_id(0), ctx.num_tiles, gl.num_programs(0)):
        which, batch, kv_head, _, query = ctx.tile(tile_id)
        none = (query * 0, query * 0, query * 0)
        bases = [ctx.tensors[KEY].tma_base(batch, none, kv_head), (which, query)]
        gdc_wait()  # until the kernel before, which made dS, has ended
        for i in range(ctx.num_blocks):
            at = (0, 0, (ctx.num_blocks - 1 - i) * N)
            ctx.blocks.produce(stage, ctx.tensors, bases, (at,))
            stage += 1
    gdc_launch_dependents()  # the next kernel can be set up, and waits for this one's end


@gluon.jit
def _mask(ctx):
    """Warp that sets masked keys of blocks, and their dS, to zero."""
    N: gl.constexpr = rows_of(ctx.blocks.buffers[KEY].index(0))
    lane = lane_of_warp(gl.program_id(0))
    stage = 0
    gdc_wait()  # until the kernel before has ended, and with it who made the mask
    for tile_id in range(gl.program_id(0), ctx.num_tiles, gl.num_programs(0)):
        _, batch, _, _, _ = ctx.tile(tile_id)
        mask = ctx.key_mask[0] + batch.to(gl.int64) * ctx.mask_strides[0]
        for i in range(ctx.num_blocks):
            masked = ()
            for w in gl.static_range(N // LANES):
                key = (ctx.num_blocks - 1 - i) * N + LANES * w + lane
                at = gl.minimum(key * ctx.mask_strides[1], ctx.last)
                masked = masked + (ballot(gl.load(mask + at).to(gl.int32)),)
            ctx.blocks.masker_wait(stage)
            clear_rows(ctx.blocks.matrix(stage, KEY), masked, lane)
            clear_rows(ctx.blocks.matrix(stage, DS), masked, lane)
            ctx.blocks.masker_release(stage)
            stage = next_stage(stage, ctx.blocks.STAGES)


@gluon.jit
def _sum(ctx, WARPGROUP: gl.constexpr):
    """Warpgroup that sums dQ of its queries of each tile."""
    blocks, buffer = ctx.blocks, ctx.buffers[WARPGROUP]
    M: gl.constexpr = rows_of(buffer)
    stage = 0
    for tile_id in range(gl.program_id(0), ctx.num_tiles, gl.num_programs(0)):
        _, batch, _, head, query = ctx.tile(tile_id)
        acc = zeros(M, ctx.CHUNKS)  # [M, D]
        for i in range(ctx.num_blocks):
            blocks.consumer_wait(stage)
            ds = blocks.matrix(stage, DS).slice(M * WARPGROUP, M, 1)  # dS^T, [N, M]
            # dQ += dS K
            acc = add(acc, ds.permute((1, 0)), blocks.matrix(stage, KEY), ctx.CHUNKS)
            acc = wait(acc, len(ctx.CHUNKS))
            blocks.consumer_release(stage - 1, i > 0)  # the block before has been added
            stage += 1
        acc = wait(acc, 0)
        blocks.consumer_release(stage - 1)
        store_wait(0)  # the tile before has left the buffer
        store(times(acc, ctx.scale_log2 * LN2), buffer, ctx.CHUNKS, ctx.grad_query.descriptor.dtype)
        fence_async_shared()
        none = (query * 0, query * 0, query * 0)
        base = ctx.grad_query.tma_base(batch, none, head)
        ctx.grad_query.store(base, (0, 0, query + M * WARPGROUP), buffer)
    store_wait(0)


@kernel(gluon.jit, tensors="key ds grad_query", masks="key_mask")
def dq_from_ds_kernel(
    key, ds, grad_query, key_mask, k_b, k_h, k_c, m_b, m_k, m_last, q_b, first, count, kv_heads,
    heads_per_kv, num_blocks, num_tiles, scale_log2, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """The tensors are descriptors: of blocks of keys, of dS of these and of a tile's queries, and
    of a warpgroup's dQ. Keys have the steps ``k`` (:class:`TmaTensor`), a batch entry's dQ begins
    ``q_b`` rows after another's. A mask of keys has the strides ``m``, and a batch entry's last key
    at ``m_last``."""
    tensors = (
        TmaTensor(key, (k_b, 0, 0, 0, k_h, k_c), (), ()),
        TmaTensor(ds, (0, 0, 0, 0, 1, 0), (), ()),
    )
    grad = TmaTensor(grad_query, (q_b, 0, 0, 0, 1, 0), (), ())
    masks = ()
    if HAS_KEY_MASK:
        masks = (key_mask,)
    ctx = Context(
        tensors=tensors, grad_query=grad, first=first, count=count, kv_heads=kv_heads,
        heads_per_kv=heads_per_kv, num_blocks=num_blocks, num_tiles=num_tiles,
        scale_log2=scale_log2, key_mask=masks, mask_strides=(m_b, m_k), last=m_last,
        blocks=tma_pipeline(tensors, STAGES, 2, 1, HAS_KEY_MASK),
        buffers=(allocate(grad, 1, 1).index(0), allocate(grad, 1, 1).index(0)), CHUNKS=CHUNKS,
    )  # fmt: skip
    gl.warp_specialize(
        [(_sum, (ctx, 0)), (_sum, (ctx, 1)), (_fetch, (ctx,))]
        + [(_mask, (ctx,))][: 1 if HAS_KEY_MASK else 0],
        [WARPS, 1, 1][: 3 if HAS_KEY_MASK else 2],
        [REGISTERS, FETCH_REGISTERS, FETCH_REGISTERS][: 3 if HAS_KEY_MASK else 2],
    )
