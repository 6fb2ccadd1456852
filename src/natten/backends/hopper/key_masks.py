"""Masks of keys: a warp of its own masks blocks that have been fetched, before they are read.

Scores are masked by a product, as ``masks.py`` tells: at two columns the rows' factor masks all
rows, and the columns' factor, which lies beside the block, masked keys. Where the other mask is a
product with two columns to spare, these are they, so that a mask costs a score nothing. Else there
is one more step of the product, of 16 columns.

In memory, masked keys and values may hold anything, and no weight of zero takes NaN or infinity
away. So masked tokens of a block are set to zero in shared memory.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton.windows import CIRCULAR
from .geometry import Geometry, rows_held, wrapped
from .gluon_names import aggregate, barrier, gdc_wait, gl, gluon, reinterpret
from .masks import COLUMNS, MASKED, ROOT

LANES = gl.constexpr(32)  # threads of a warp


@gluon.constexpr_function
def _has_rings(modes):
    """Whether some axis is circular."""
    return max(modes) >= CIRCULAR.value


@aggregate
class KeyMask:
    """The mask of keys of all tiles, or none."""

    geometry: Geometry
    mask: gl.tuple  # where bool [batch or 1, *keys] is; () if there is none
    strides: gl.tuple  # of batch and three axes
    last: gl.tensor  # where a batch entry's last key is
    factors: gl.tuple  # of kernels that have blocks of keys: columns' factors [STAGES, N, C]
    OTHER: gl.constexpr  # the kind of the other mask

    @gluon.jit
    def allowed(self, tile, position):
        """Which of the tile's keys at these positions, per axis, may be attended; as numbers."""
        g, side = self.geometry, tile.group.keys
        at = tile.batch.to(gl.int64) * self.strides[0]
        real = True
        for AXIS in gl.static_range(3):
            i, n = position[AXIS], side.length[AXIS]
            if g.MODES[AXIS] >= CIRCULAR:
                i = wrapped(i, n)
            token = i * g.dilation[AXIS] + side.group[AXIS]
            at = at + token.to(gl.int64) * self.strides[1 + AXIS]
            real = (i >= 0) & (i < n) & real
        return gl.load(self.mask[0] + at, mask=real, other=0).to(gl.int8)

    @gluon.jit
    def allowed_of_block(self, tile, block, k):
        """:meth:`allowed` of the tokens ``k`` of a tile's block."""
        g = self.geometry
        start, _ = g.block_start(block, tile.origin)
        return self.allowed(
            tile,
            (start[0] + g.in_block(k, 0), start[1] + g.in_block(k, 1), start[2] + g.in_block(k, 2)),
        )

    @gluon.jit
    def within_block(self, k):
        """How far the tokens ``k`` of a block are from its first one."""
        g, strides = self.geometry, self.strides
        at = g.in_block(k, 0) * (g.dilation[0] * strides[1])
        at += g.in_block(k, 1) * (g.dilation[1] * strides[2])
        return at + g.in_block(k, 2) * (g.dilation[2] * strides[3])

    @gluon.jit
    def of_block(self, tile, block, k, within):
        """As :meth:`allowed_of_block`; what lies beyond an axis may be allowed or not, because its
        scores are masked. ``within`` is :meth:`within_block` of ``k``."""
        g = self.geometry
        if _has_rings(g.MODES):
            return self.allowed_of_block(tile, block, k)
        else:
            start, _ = g.block_start(block, tile.origin)
            group, at = tile.group.keys.group, 0
            for AXIS in gl.static_range(3):
                at += (start[AXIS] * g.dilation[AXIS] + group[AXIS]) * self.strides[1 + AXIS]
            at = gl.minimum(gl.maximum(at, 0) + within, self.last)
            return gl.load(self.mask[0] + tile.batch.to(gl.int64) * self.strides[0] + at)

    @gluon.jit
    def of_rows(self, tile, first, acc):
        """A sum ``[M, D]`` of a warpgroup's keys from ``first`` on, zero in masked ones."""
        if len(self.mask) > 0:
            found = ()
            for i in gl.static_range(len(acc)):
                found = found + (self._of_rows(tile, first, acc[i]),)
            return found
        else:
            return acc

    @gluon.jit
    def _of_rows(self, tile, first, x):
        LAYOUT: gl.constexpr = x.type.layout
        allowed = self.allowed(tile, self.geometry.tokens(first, LAYOUT))  # [M]
        return gl.where((allowed != 0)[:, None], x, 0.0)

    @gluon.jit
    def factor(self, stage):
        """The columns' factor of a block's scores, ``[N, C]`` in a tuple; () without a mask."""
        found = ()
        if len(self.factors) > 0:
            found = (self.factors[0].index(stage % self.factors[0].shape[0]),)
        return found


@gluon.jit
def key_mask_of(
    g, mask, strides, last, factors, HAS_KEY_MASK: gl.constexpr, OTHER: gl.constexpr
):  # fmt: skip
    """The mask of keys, if there is one, beside the ``OTHER`` mask; ``factors`` in a tuple where
    blocks are of keys."""
    masks = ()
    if HAS_KEY_MASK:
        masks = (mask,)
    return KeyMask(g, masks, strides, last, factors, OTHER)


# Each thread of the warp that masks has numbers of its own. To Triton they are one number of all
# threads, which does no harm as long as threads that part meet no barrier.


@gluon.jit
def lane_of_warp(number):
    """Which thread of its warp a thread is; some number is what Triton needs to ask."""
    return gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [number], gl.int32, True, 1)


@gluon.jit
def ballot(number):
    """The bits of the warp's threads whose number is zero."""
    BALLOT: gl.constexpr = """{
        .reg .pred zero;
        setp.eq.s32 zero, $1, 0;
        vote.sync.ballot.b32 $0, zero, 0xffffffff;
    }"""
    return gl.inline_asm_elementwise(BALLOT, "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def _shifted(bits, by):
    """Bits from one on. This is done anew for each tensor, because of a shared number the compiler
    would keep a predicate for each bit."""
    return gl.inline_asm_elementwise(
        "shr.b32 $0, $1, $2;", "=r,r,r", [bits, by], gl.int32, False, 1
    )  # fmt: skip


@gluon.jit
def clear_rows(tokens, masked, lane):
    """Set masked rows of ``tokens [N, D]`` to zero; bit ``k`` of ``masked[w]`` is of the token
    ``32 w + k``.

    In memory, a token is in rows of at most 128 bytes. Those of the first 64 channels come first,
    token by token; in a row channels are swizzled, which zeros are not. Threads that have 16 bytes
    each of a row are a group, and of ``G`` groups, group ``g`` has the tokens ``G i + g``.
    """
    WORDS: gl.constexpr = min(32, tokens.shape[1] // 2)
    THREADS: gl.constexpr = WORDS // 4
    GROUPS: gl.constexpr = LANES // THREADS
    STEPS: gl.constexpr = tokens.shape[0] // GROUPS
    PARTS: gl.constexpr = tokens.shape[1] // 2 // WORDS
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [GROUPS, THREADS], [1, 1], [1, 0])
    rows = reinterpret(tokens, gl.int32, [PARTS * STEPS, GROUPS, WORDS], FLAT)
    zeros = gl.zeros([GROUPS, WORDS], gl.int32, LAYOUT)
    for w in gl.static_range(len(masked)):
        own = _shifted(masked[w], lane // THREADS)  # of the tokens from the group's first on
        for i in gl.static_range(THREADS):
            for part in gl.static_range(PARTS):
                barrier()  # so that Triton sees no need for one below, where threads part
                if own & (1 << GROUPS * i) != 0:
                    rows.index(part * STEPS + THREADS * w + i).store(zeros)


@gluon.jit
def next_stage(stage, STAGES: gl.constexpr):
    """The stage after one. It begins again after two turns, which is all that waiting depends on:
    of a number that only grew, the compiler would keep every address."""
    return gl.where(stage == 2 * STAGES - 1, 0, stage + 1)


@gluon.jit
def mask_blocks(key_mask, pipelines, num_additional):
    """Warp that masks blocks that have been fetched: of the first of the pipelines, which has keys,
    and of others; additional tokens come first. Of the first, the last tensor is a factor of the
    other mask if that has ``COLUMNS``."""
    g = key_mask.geometry
    N: gl.constexpr = rows_held(g.BLOCK)
    STAGES: gl.constexpr = pipelines[0].STAGES
    BESIDE: gl.constexpr = 1 if key_mask.OTHER == COLUMNS else 0
    ROWS: gl.constexpr = gl.BlockedLayout([1, 2], [LANES, 1], [1, 1], [1, 0])
    lane = lane_of_warp(gl.program_id(0))
    within = ()
    for w in gl.static_range(N // LANES):
        within = within + (key_mask.within_block(lane + LANES * w),)
    stage = 0
    gdc_wait()  # until the kernel before, which may have made the mask, has ended
    for tile_id in range(gl.program_id(0), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        for _ in range(0, num_additional, N):
            for j in gl.static_range(len(pipelines)):
                pipelines[j].masker_wait(stage)
                pipelines[j].masker_release(stage)
            stage = next_stage(stage, STAGES)
        block = (stage * 0, stage * 0, stage * 0)
        for _ in range(tile.blocks[0] * tile.blocks[1] * tile.blocks[2]):
            allowed, masked = (), ()
            for w in gl.static_range(N // LANES):
                k = lane + LANES * w
                allowed = allowed + (key_mask.of_block(tile, block, k, within[w]).to(gl.int32),)
                masked = masked + (ballot(allowed[w]),)
            for j in gl.static_range(len(pipelines)):
                pipelines[j].masker_wait(stage)
                if j == 0:
                    factor = key_mask.factor(stage)[0]  # [N, C]
                    own = factor.slice(factor.shape[1] - 2, 2, 1)  # [N, 2]
                    for w in gl.static_range(N // LANES):
                        lowered = gl.where(allowed[w] == 0, -ROOT / 2, 0.0)
                        rows = gl.full([LANES, 2], lowered, gl.bfloat16, ROWS)
                        own.slice(LANES * w, LANES, 0).store(rows)
                for WHICH in gl.static_range(len(pipelines[j].buffers) - BESIDE * (j == 0)):
                    clear_rows(pipelines[j].matrix(stage, WHICH), masked, lane)
                pipelines[j].masker_release(stage)
            block = g.next_block(block, tile.blocks)
            stage = next_stage(stage, STAGES)


@aggregate
class Additional:
    """Additional tokens: tensors of keys and values, how many there are, and which may be
    attended."""

    tensors: gl.tuple  # () if there are none
    count: gl.tensor
    mask: gl.tuple  # where bool [batch or 1, count] is; () if there is none
    strides: gl.tuple

    @gluon.jit
    def masked(self, s, batch, position):
        """Scores ``[M, N]`` of the tokens from a position on."""
        c = position + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))  # [N]
        present = c < self.count
        if len(self.mask) > 0:
            at = batch.to(gl.int64) * self.strides[0] + c.to(gl.int64) * self.strides[1]
            present = present & (gl.load(self.mask[0] + at, mask=present, other=0).to(gl.int8) != 0)
        return gl.where(present[None, :], s, MASKED)
