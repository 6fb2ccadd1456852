"""Masks of keys: what the scores of a block start from, and what masked keys and values hold.

A warp of its own reads the mask as it lies, and lays a number for each key beside the block of
keys: 0, or ``MASKED`` if no query may attend the key. The product of the scores starts from these
numbers, as from a bias, so that a mask costs a score nothing more.

In memory, masked keys and values may hold anything. Nearly always these are numbers of usual size,
which weights of zero take away. NaN, infinity and huge numbers are left by no weight, so a small
kernel looks for them first, in masked tokens alone. Only if it finds some, masked tokens of blocks
are set to zero in shared memory, before products read them.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

import triton
import triton.language as tl

from ..triton.launch import kernel
from ..triton.primitives import load_mask
from ..triton.windows import CIRCULAR
from .geometry import WARPS, Geometry, volume, wrapped
from .gluon_names import (
    aggregate,
    barrier,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    reinterpret,
)
from .masks import MASKED

# Programs that look at masked tokens, each of which says what it found.
FINDERS = tl.constexpr(2048)


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
    unclean: gl.tuple  # where int8 [FINDERS] is, of kernels that have blocks of keys

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
    def is_unclean(self):
        """Whether a masked key or value holds what no weight takes away."""
        found = False
        if len(self.unclean) > 0:
            i = gl.arange(0, FINDERS, gl.BlockedLayout([16], [32], [WARPS], [0]))
            found = gl.max(gl.load(self.unclean[0] + i).to(gl.int32), 0) > 0
        return found

    @gluon.jit
    def clean(self, is_unclean, tile, block, pipeline, stage, WHICH: gl.constexpr):
        """If need be, set the masked tokens of a tensor's block to zero, once it is there.

        The two warpgroups of a program store the same, so that neither waits for the other.
        """
        if len(self.unclean) > 0:  # noqa: SIM102 (the other is known only when a kernel runs)
            if is_unclean:
                pipeline.consumer_wait(stage)
                tokens = pipeline.matrix(stage, WHICH)  # [N, D]
                N: gl.constexpr = tokens.shape[0]
                # In memory, a token is in rows of at most 128 bytes. Those of the first 64 channels
                # come first, token by token; in a row channels are swizzled, which zeros are not.
                WORDS: gl.constexpr = min(32, tokens.shape[1] // 2)
                ROWS: gl.constexpr = 512 // WORDS
                THREADS: gl.constexpr = WORDS // 4
                FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
                LAYOUT: gl.constexpr = gl.BlockedLayout(
                    [1, 4], [32 // THREADS, THREADS], [WARPS, 1], [1, 0]
                )
                COUNT: gl.constexpr = N * tokens.shape[1] // (2 * WORDS * ROWS)
                some = reinterpret(tokens, gl.int32, [COUNT, ROWS, WORDS], FLAT)
                row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
                # A bound that is known only now, so that the loop is not unrolled.
                for i in range(COUNT * gl.minimum(self.geometry.heads, 1)):
                    allowed = self.allowed_of_block(tile, block, (i * ROWS + row) % N)  # [ROWS]
                    rows = some.index(i)  # [ROWS, WORDS]
                    rows.store(gl.where((allowed != 0)[:, None], rows.load(LAYOUT), 0))
                fence_async_shared()
                barrier()


@gluon.jit
def key_mask_of(g, mask, strides, last, unclean, HAS_KEY_MASK: gl.constexpr):
    """The mask of keys, if there is one."""
    masks, found = (), ()
    if HAS_KEY_MASK:
        masks = (mask,)
        if not g.OF_KEYS:
            found = (unclean,)
    return KeyMask(g, masks, strides, last, found)


@gluon.jit
def fetch_key_mask(key_mask, blocks, num_additional):
    """Warp that lays the mask beside the blocks of keys; additional tokens come first."""
    g = key_mask.geometry
    N: gl.constexpr = volume(g.BLOCK)
    k = gl.arange(0, N, gl.BlockedLayout([1], [32], [1], [0]))
    within = key_mask.within_block(k)  # [N]
    stage = 0
    gdc_wait()
    for tile_id in range(gl.program_id(0), g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        for _ in range(0, num_additional, N):
            blocks.produce_start(stage, k * 0.0)
            stage += 1
        block = (stage * 0, stage * 0, stage * 0)
        for _ in range(tile.blocks[0] * tile.blocks[1] * tile.blocks[2]):
            allowed = key_mask.of_block(tile, block, k, within)
            blocks.produce_start(stage, gl.where(allowed != 0, 0.0, MASKED))
            block = g.next_block(block, tile.blocks)
            stage += 1


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


@triton.jit
def _too_large(x, at, apart, masked, LIMIT: tl.constexpr, WORDS: tl.constexpr, SHAPE: tl.constexpr):
    """``SHAPE``: bits 15 and 31 say that of two numbers the first or the second is at least the
    positive number of bits ``LIMIT``, or no number; of the tokens that are ``masked``. Tokens begin
    ``at``, pairs of numbers, and are ``apart``."""
    # TMA reads the tensors, so tokens begin where 16 bytes divide.
    tokens = tl.multiple_of(at + tl.arange(0, SHAPE[0]) * apart, 4)[:, None]
    c = tl.arange(0, SHAPE[1])[None, :]
    words = x.to(tl.pointer_type(tl.int32)) + tokens + c
    both = tl.load(words, mask=masked[:, None] & (c < WORDS), other=0)
    return (both & 0x7FFF7FFF) + (0x8000 - LIMIT) * 0x10001


@triton.jit
def _offset(outer, token, strides, lengths, AXES: tl.constexpr):
    """Of a token along the last axis, of the ``outer``-th row of tokens."""
    offset = token.to(tl.int64) * strides[3]
    if AXES > 1:
        offset += (outer % lengths[2]).to(tl.int64) * strides[2]
    if AXES > 2:
        offset += (outer // lengths[2] % lengths[1]).to(tl.int64) * strides[1]
    if AXES > 3:
        offset += (outer // lengths[2] // lengths[1]).to(tl.int64) * strides[0]
    return offset


@kernel(triton.jit, tensors="key value unclean", masks="key_mask")
def unclean_kernel(
    key, value, unclean, key_mask,
    k_0, k_1, k_2, k_3, k_h, v_0, v_1, v_2, v_3, v_h, m_0, m_1, m_2, m_3, L1, L2, L3,
    chunks, tasks, heads,
    LIMIT: tl.constexpr, AXES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Whether masked keys or values are too large or no numbers, of each program's share.

    Tokens lie along up to four ``AXES``, the last of ``L3`` tokens in chunks. ``SHAPE`` are a
    chunk's tokens and channels. Strides ``k`` and ``v``, and channels, count pairs of numbers.
    ``LIMIT`` are bits of the least number that is too large.
    """
    gdc_wait()  # until the kernel before has ended
    gdc_launch_dependents()  # the next one can be set up
    T: tl.constexpr = SHAPE[0]
    found = tl.zeros(SHAPE, dtype=tl.int32)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        outer = task // chunks if AXES > 1 else 0
        first = (task - outer * chunks) * T
        present = first + tl.arange(0, T) < L3  # [T]
        at = _offset(outer, first, (m_0, m_1, m_2, m_3), (0, L1, L2), AXES)
        masked = present & (load_mask(key_mask + at, tl.arange(0, T) * m_3, present) == 0)
        k_at = _offset(outer, first, (k_0, k_1, k_2, k_3), (0, L1, L2), AXES)
        v_at = _offset(outer, first, (v_0, v_1, v_2, v_3), (0, L1, L2), AXES)
        for _ in range(heads):
            found |= _too_large(key, k_at, k_3, masked, LIMIT, D, SHAPE)
            found |= _too_large(value, v_at, v_3, masked, LIMIT, DV, SHAPE)
            k_at += k_h
            v_at += v_h
    signs = ((found & -0x7FFF8000) != 0).to(tl.int32)
    tl.store(unclean + tl.program_id(0), tl.max(tl.max(signs, 1), 0).to(tl.int8))
