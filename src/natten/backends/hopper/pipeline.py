"""Tensors as TMA sees them, and shared memory that one warp fills by TMA and warpgroups empty."""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from .cuts import WARPS as _WARPS
from .geometry import rows_held
from .gluon_names import (
    aggregate,
    barrier,
    fence_async_shared,
    gl,
    gluon,
    load_block,
    mbarrier,
    store_block,
    tensor_descriptor,
)

WARPS = gl.constexpr(_WARPS)  # of a warpgroup
NOTHING = gl.constexpr((0, 0))  # channels to set to zero: none


@aggregate
class TmaTensor:
    """A tensor's descriptor, how far apart its batch entries, tokens along three axes and heads
    are along the descriptor's first axis, and heads along its last one (``descriptors.py``), and of
    a slice of its channels the first one."""

    descriptor: tensor_descriptor
    steps: gl.tuple
    slice: gl.tuple  # () unless a program has a slice only
    at_seam: gl.tuple  # the descriptor of small pieces, at the seam of a ring; () if there are none

    @gluon.jit
    def tma_base(self, batch, group, head, HALF_ALIGNED: gl.constexpr = False):
        """Where the rows of a batch entry's head and dilation group begin along the first axis, and
        the program's channels along the last one; of half aligned heads, those that TMA can begin
        with, which may be four before."""
        base = first_row(self.steps, batch, group, head)
        channel = head * self.steps[5]
        if HALF_ALIGNED:
            channel = channel & -8
        if len(self.slice) > 0:
            channel += self.slice[0]
        return base, channel

    @gluon.jit
    def store(self, base, first, buffer):
        """Start to write a tile ``[1, *tile, channels]`` whose first token is ``first``."""
        at = [base[0], first[0], first[1], first[2], base[1]]
        store_block(self.descriptor, at, buffer)


@gluon.jit
def first_row(steps, batch, group, head):
    """Where the rows of a batch entry's head and dilation group begin, of such steps."""
    row = batch * steps[0] + head * steps[4]
    return row + (group[0] * steps[1] + group[1] * steps[2] + group[2] * steps[3])


@gluon.jit
def shared_by_heads(descriptor):
    """A tensor of tokens that all batch entries and heads share."""
    return TmaTensor(descriptor, (0, 0, 0, 0, 0, 0), (), ())


@gluon.jit
def slice_of(tensor, SLICES: gl.constexpr):
    """The first channel of the program's slice of a tensor, whose blocks have one slice."""
    first = ()
    if SLICES > 1:
        first = (gl.program_id(1) * tensor.block_type.shape[4],)
    return first


@gluon.jit
def tma_bases(tensors, batch, group, head, HALF_ALIGNED: gl.constexpr = False):
    """:meth:`TmaTensor.tma_base` of each tensor."""
    return [tensor.tma_base(batch, group, head, HALF_ALIGNED) for tensor in tensors]


@gluon.jit
def allocate(tensor, STAGES: gl.constexpr, PIECES: gl.constexpr):
    """Shared memory for that many blocks of a tensor, ``[STAGES, PIECES, *piece, channels]``."""
    descriptor = tensor.descriptor
    shape: gl.constexpr = [STAGES, PIECES] + descriptor.block_type.shape[1:]
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.constexpr_function
def rows_of(buffer):
    """Tokens of a block ``[PIECES, *piece, channels]``."""
    return buffer.shape[0] * buffer.shape[1] * buffer.shape[2] * buffer.shape[3]


@gluon.constexpr_function
def _bytes(tensors, pieces, at_seam, tokens):
    """Bytes of that many pieces of each of the tensors, in which so many tokens are fetched; 0
    stands for all that there is room for."""
    every = [tensor.at_seam[0] if at_seam else tensor.descriptor for tensor in tensors]
    total = 0
    for each in every:
        size = each.block_type.nbytes
        if tokens > 0:
            size = size // rows_of(each.block_type) * tokens
        total += size
    return pieces * total


@gluon.constexpr_function
def clears(cleared):
    """Whether there are channels to set to zero, in any of some ranges: of each, the first channel
    and the end."""
    return any(first < end for first, end in zip(cleared[::2], cleared[1::2]))


@gluon.constexpr_function
def are_half_aligned(cleared):
    """Whether heads of which a kernel clears these channels begin at multiples of 8 bytes, and not
    all of them at those of 16 (``head_rows.py``)."""
    return cleared[0] % 8 > 0


@gluon.constexpr_function
def _row_layout(channels, warps):
    """Of channels of rows, ``[rows, channels]``: 16 bytes a thread."""
    lanes = min(4, max(1, channels // 8))
    return gl.BlockedLayout([1, min(8, channels)], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _clear(matrix, FIRST: gl.constexpr, END: gl.constexpr, WARPS: gl.constexpr):
    """Set channels of rows to zero, from one up to another."""
    if FIRST < END:
        ROWS: gl.constexpr = matrix.shape[0]
        COUNT: gl.constexpr = FIRST & -FIRST  # shared memory has slices of powers of two
        zeros = gl.zeros([ROWS, COUNT], matrix.dtype, _row_layout(COUNT, WARPS))
        matrix.slice(FIRST, COUNT, 1).store(zeros)
        _clear(matrix, FIRST + COUNT, END, WARPS)


@gluon.jit
def _clear_beside(matrix, head, FIRST: gl.constexpr, END: gl.constexpr, WARPS: gl.constexpr):
    """Set to zero what ``matrix [N, D]`` has beside a head, up to channel ``END``. The head is all
    before ``FIRST``, or if it is half aligned and odd, as many channels after the first four."""
    if FIRST % 8 > 0:
        ROWS: gl.constexpr = matrix.shape[0]
        zeros = gl.zeros([ROWS, 4], matrix.dtype, _row_layout(4, WARPS))
        if head % 2 == 0:
            matrix.slice(FIRST, 4, 1).store(zeros)
        else:
            matrix.slice(0, 4, 1).store(zeros)
        _clear(matrix, FIRST + 4, END, WARPS)
    else:
        _clear(matrix, FIRST, END, WARPS)


@gluon.jit
def _fill(matrix):
    """Lay zeros in a matrix, or if it is of LSE and delta a large number."""
    DTYPE: gl.constexpr = matrix.dtype
    LAYOUT: gl.constexpr = _row_layout(matrix.shape[1], WARPS)
    NUMBER: gl.constexpr = 1e30 if gl.float32 == DTYPE else 0.0
    matrix.store(gl.full(matrix.shape, NUMBER, DTYPE, LAYOUT))


@aggregate
class TmaPipeline:
    """Stages that are filled and emptied in turn; ``stage`` counts all that went through.

    A stage has a buffer for a block of each of some tensors, which are fetched together. A block
    may be fetched in pieces, which follow one another in the buffer. With a mask of keys, another
    warp masks what has been fetched before the stage is full.

    Of heads that are joined (``descriptors.py``), a block has channels of the next head. A sum over
    channels must not find them, not even beside zeros, as 0 times infinity is NaN. So they are set
    to zero before, by a warp if there is one for that, else by each warpgroup.
    """

    buffers: gl.tuple  # per tensor, [STAGES, PIECES, *piece, channels]
    fetched: gl.shared_memory_descriptor  # without such a warp, that is full
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    CLEARED: gl.constexpr  # of each of the first buffers, channels: the first, and the end
    BY_WARP: gl.constexpr  # whether a warp sets them to zero

    @gluon.jit
    def producer_acquire(self, stage, BYTES: gl.constexpr):
        """Once the stage is empty, announce how much will fill it."""
        index = stage % self.STAGES
        mbarrier.wait(self.empty.index(index), (stage // self.STAGES & 1) ^ 1)
        mbarrier.expect(self.fetched.index(index), BYTES)

    @gluon.jit
    def producer_commit(self, stage, tensors, bases, places, AT_SEAM: gl.constexpr):
        """Start to fetch each tensor's block, whose pieces are at ``places``.

        The stage is fetched when all has arrived.
        """
        index = stage % self.STAGES
        for WHICH in gl.static_range(len(tensors)):
            buffer = self.buffers[WHICH].index(index)  # [PIECES, *piece, channels]
            if AT_SEAM:
                descriptor = tensors[WHICH].at_seam[0]
                buffer = buffer.reshape([len(places)] + descriptor.block_type.shape[1:])
            else:
                descriptor = tensors[WHICH].descriptor
            for PIECE in gl.static_range(len(places)):
                place = places[PIECE]
                base, channel = bases[WHICH]
                at = [base, place[0], place[1], place[2], channel]
                if len(places) > 1:
                    piece = buffer.slice(PIECE, 1)
                else:
                    piece = buffer.reshape(descriptor.block_type.shape)
                load_block(descriptor, at, self.fetched.index(index), piece)

    @gluon.jit
    def produce(
        self, stage, tensors, bases, places, AT_SEAM: gl.constexpr = False,
        TOKENS: gl.constexpr = 0,
    ):  # fmt: skip
        """Acquire and commit; ``AT_SEAM``: in the smaller pieces. ``TOKENS``: of a piece, if they
        are fewer than there is room for."""
        self.producer_acquire(stage, _bytes(tensors, len(places), AT_SEAM, TOKENS))
        self.producer_commit(stage, tensors, bases, places, AT_SEAM)

    @gluon.jit
    def masker_wait(self, stage):
        """Until the stage is fetched."""
        mbarrier.wait(self.fetched.index(stage % self.STAGES), stage // self.STAGES & 1)

    @gluon.jit
    def masker_release(self, stage):
        """What the warp has written to the stage is all: it is full."""
        fence_async_shared()
        barrier()
        mbarrier.arrive(self.full.index(stage % self.STAGES), count=1)

    @gluon.jit
    def clear(self, stage, head, WARPS: gl.constexpr):
        """Start to set channels beside a head's to zero, by so many warps."""
        for WHICH in gl.static_range(len(self.CLEARED) // 2):
            matrix = self.matrix(stage, WHICH)
            _clear_beside(matrix, head, self.CLEARED[2 * WHICH], self.CLEARED[2 * WHICH + 1], WARPS)

    @gluon.jit
    def fill(self):
        """Before all else, lay in all rows what they keep if nothing is fetched to them: zeros, and
        as LSE of queries so much that they attend nothing."""
        for WHICH in gl.static_range(len(self.buffers)):
            for STAGE in gl.static_range(self.STAGES):
                _fill(self.matrix(STAGE, WHICH))
        fence_async_shared()

    @gluon.jit
    def consumer_wait(self, stage, head=0):
        """Until the stage is full, and what is to be zero beside a ``head`` is."""
        self._wait(stage)
        if clears(self.CLEARED) and not self.BY_WARP:
            self.clear(stage, head, WARPS)
            fence_async_shared()
            barrier()

    @gluon.jit
    def _wait(self, stage):
        mbarrier.wait(self.full.index(stage % self.STAGES), stage // self.STAGES & 1)

    @gluon.jit
    def consumer_release(self, stage, pred=True):
        """This warpgroup has no more need of the stage, if ``pred``."""
        mbarrier.arrive(self.empty.index(stage % self.STAGES), count=1, pred=pred)

    @gluon.jit
    def consumer_skip(self, stage):
        """Hand the stage back unread."""
        self._wait(stage)
        self.consumer_release(stage)

    @gluon.jit
    def matrix(self, stage, WHICH: gl.constexpr = 0):
        """A tensor's block as a matrix ``[tokens, channels]``."""
        buffer = self.buffers[WHICH].index(stage % self.STAGES)  # [PIECES, *piece, channels]
        return buffer.reshape([rows_of(buffer), buffer.shape[4]])


@gluon.jit
def tma_pipeline(
    tensors, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PIECES: gl.constexpr,
    IS_MASKED: gl.constexpr = False, CLEARED: gl.constexpr = NOTHING,
    BY_WARP: gl.constexpr = False,
):  # fmt: skip
    """A pipeline of blocks of the tensors, in pieces, which that many warpgroups consume; before,
    a warp may mask them, or set channels to zero if there are some to be ``CLEARED``."""
    buffers = [allocate(tensor, STAGES, PIECES) for tensor in tensors]
    full = _barriers(STAGES, 1)
    fetched = full
    if IS_MASKED or (BY_WARP and clears(CLEARED)):
        fetched = _barriers(STAGES, 1)
    return TmaPipeline(
        buffers, fetched, full, _barriers(STAGES, CONSUMERS), STAGES, CLEARED, BY_WARP
    )


@gluon.jit
def clear_blocks(blocks, g, first_tile, num_additional, heads):
    """Warp that sets channels of blocks to zero: of a tile's additional tokens, and of so many
    heads' blocks."""
    N: gl.constexpr = rows_held(g.BLOCK)
    stage = 0
    for tile_id in range(first_tile, g.num_tiles, gl.num_programs(0)):
        tile = g.tile(tile_id)
        count = (num_additional + N - 1) // N
        count += tile.blocks[0] * tile.blocks[1] * tile.blocks[2] * heads
        for _ in range(count):
            blocks.masker_wait(stage)
            blocks.clear(stage, tile.head, 1)
            blocks.masker_release(stage)
            stage += 1


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """For each stage, a barrier at which that many arrive."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(STAGES):
        mbarrier.init(barriers.index(index), count=COUNT)
    return barriers
