"""Shared memory that one warp fills by TMA and warpgroups empty."""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from .gluon_names import aggregate, gl, gluon, load_box, mbarrier


@aggregate
class Ring:
    """Buffers that are filled and emptied in turn; ``i`` counts the boxes that went through."""

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, buffers, full, empty, STAGES):
        self.buffers, self.full, self.empty = buffers, full, empty
        self.STAGES = gl.constexpr(STAGES)

    @gluon.jit
    def fill(self, i, descriptor, at):
        """Fetch the box that starts at ``at``, once its buffer is empty."""
        self.expect(i, descriptor.block_type.nbytes)
        self.load(i, descriptor, at, self.buffers)

    @gluon.jit
    def expect(self, i, BYTES: gl.constexpr):
        """Once buffer ``i`` is empty, announce what will fill it."""
        stage = i % self.STAGES
        mbarrier.wait(self.empty.index(stage), (i // self.STAGES & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), BYTES)

    @gluon.jit
    def load(self, i, descriptor, at, buffers):
        """Fetch a box into the ``i``-th of ``buffers``, which are filled with the ring's."""
        stage = i % self.STAGES
        buffer = buffers.index(stage).reshape(descriptor.block_type.shape)
        load_box(descriptor, at, self.full.index(stage), buffer)

    @gluon.jit
    def wait(self, i, ROWS: gl.constexpr):
        """Box ``i`` as a matrix ``[ROWS, channels]``, once it is there."""
        stage = i % self.STAGES
        mbarrier.wait(self.full.index(stage), i // self.STAGES & 1)
        return self.matrix(i, ROWS, self.buffers)

    @gluon.jit
    def matrix(self, i, ROWS: gl.constexpr, buffers):
        """The ``i``-th of ``buffers``, filled with the ring's, as a matrix ``[ROWS, channels]``."""
        return buffers.index(i % self.STAGES).reshape([ROWS, buffers.shape[5]])

    @gluon.jit
    def release(self, i, pred=True):
        """This warpgroup has no more need of box ``i``, if ``pred``."""
        mbarrier.arrive(self.empty.index(i % self.STAGES), count=1, pred=pred)

    @gluon.jit
    def skip(self, i):
        """Hand box ``i`` back unread."""
        stage = i % self.STAGES
        mbarrier.wait(self.full.index(stage), i // self.STAGES & 1)
        mbarrier.arrive(self.empty.index(stage), count=1)


@gluon.jit
def ring(descriptor, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring of boxes as the descriptor has them, that many warpgroups read."""
    buffers = gl.allocate_shared_memory(
        descriptor.dtype, [STAGES] + descriptor.block_type.shape, descriptor.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(buffers, full, empty, STAGES)
