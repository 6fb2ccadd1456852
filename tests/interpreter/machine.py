"""A multiprocessor in Python, on which whole Hopper kernels run under Triton's interpreter.

Roles of a program are threads of which one runs at a time, until it waits at a barrier. If all of
them wait, the kernel would hang, which is an error. Shared memory is poisoned with NaN before a
program begins, boxes of TMA are copied at once, and numbers have no layouts. The warp that masks
keys is written anew here, because its own threads differ in a way that an interpreter has not.

Importing this module, before the kernels, is like importing ``gluon``.
"""

import itertools
import math
import threading
from typing import ClassVar
from unittest import mock

import gluon  # before the kernels
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from natten.backends.hopper import gluon_names

INTEGERS = {tl.int32: np.int32, tl.int64: np.int64}
NUMBERS = {tl.bfloat16: np.uint16, tl.float16: np.float16, tl.float32: np.float32}
NAN = {np.uint16: 0x7FC0, np.float16: np.nan, np.float32: np.nan}
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
LOWERED = np.uint16(0xD800)  # -2^49 in bfloat16


def block(numbers, dtype):
    """Triton's tensor of an array; bfloat16 is in words of 16 bits."""
    handle = interpreter.TensorHandle(np.ascontiguousarray(numbers), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(numbers.shape)))


class Shared:
    """Shared memory: a view of an array."""

    def __init__(self, numbers, dtype):
        self.numbers, self.dtype = numbers, dtype

    @classmethod
    def poisoned(cls, dtype, shape, layout=None):
        kind = (NUMBERS | INTEGERS)[dtype]
        return cls(np.full([int(n) for n in shape], NAN.get(kind, 0), kind), dtype)

    @property
    def shape(self):
        return list(self.numbers.shape)

    @property
    def place(self):
        return self.numbers.__array_interface__["data"][0]

    def index(self, i):
        return Shared(self.numbers[int(i)], self.dtype)

    def slice(self, start, length, dim=0):
        here = [slice(None)] * dim + [slice(int(start), int(start) + int(length))]
        return Shared(self.numbers[tuple(here)], self.dtype)

    def reshape(self, shape):
        found = self.numbers.reshape([int(n) for n in shape])
        assert np.shares_memory(found, self.numbers)
        return Shared(found, self.dtype)

    def permute(self, order):
        return Shared(self.numbers.transpose(order), self.dtype)

    def load(self, layout=None):
        return block(self.numbers.copy(), self.dtype)

    def store(self, value):
        assert value.dtype == self.dtype and list(value.handle.data.shape) == self.shape
        self.numbers[...] = value.handle.data


def reinterpret(memory, dtype, shape, layout):
    """Four numbers of each query, or the same from number to number."""
    if shape[0] == 4:
        return memory.reshape([shape[1], 4]).permute((1, 0))
    return memory.reshape(shape)


class Roles:
    """The roles of a program, of which the one whose ``turn`` it is runs."""

    def __init__(self, count):
        self.changed, self.turn, self.error = threading.Condition(), 0, None
        self.alive, self.waited = list(range(count)), 0

    def run(self, role, function, arguments):
        try:
            self.until_turn(role)
            function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        with self.changed:
            self.alive.remove(role)
            self.pass_on(role)

    def until_turn(self, role):
        with self.changed:
            self.changed.wait_for(lambda: self.turn == role or self.error)
        if self.error:
            raise RuntimeError("another role failed")

    def pass_on(self, role):
        """Give the turn to the next role, in a ring; who calls holds ``changed``."""
        if self.alive:
            self.turn = next((other for other in self.alive if other > role), self.alive[0])
        self.changed.notify_all()

    def wait(self):
        """Let others run."""
        self.waited += 1  # since anything happened
        if self.waited > 2 * len(self.alive):
            raise RuntimeError("every role waits for another one")
        role = self.turn
        with self.changed:
            self.pass_on(role)
        self.until_turn(role)


class Barrier:
    """``mbarrier``: phases that end when so many have arrived, and as many bytes as expected."""

    roles: ClassVar = None
    states: ClassVar = {}  # by place: arrivals of a phase, those that are missing, bytes, phase

    @staticmethod
    def MBarrierLayout():
        return None

    @classmethod
    def init(cls, barrier, count):
        cls.states[barrier.place] = [count, count, 0, 0]

    @classmethod
    def _change(cls, barrier, arrivals, size):
        state = cls.states[barrier.place]
        state[1] -= arrivals
        state[2] += int(size)
        assert state[1] >= 0
        if state[1] == state[2] == 0:
            state[1], state[3] = state[0], 1 - state[3]
        if cls.roles is not None:
            cls.roles.waited = 0

    @classmethod
    def expect(cls, barrier, size):
        cls._change(barrier, 1, size)

    @classmethod
    def copied(cls, barrier, size):
        cls._change(barrier, 0, -size)

    @classmethod
    def arrive(cls, barrier, count=1, pred=True):
        if pred:
            cls._change(barrier, count, 0)

    @classmethod
    def wait(cls, barrier, phase):
        while cls.states[barrier.place][3] == int(phase):
            cls.roles.wait()


class BlockType:
    """What kernels ask of a descriptor's block."""

    def __init__(self, shape, itemsize):
        self.shape, self.nbytes = list(shape), math.prod(shape) * itemsize


class Descriptor:
    """A tensor as TMA sees it, and the boxes that it copies."""

    layout = None

    def __init__(self, tensor, describe):
        self.view, self.box = describe.view, describe.box
        self.dtype = DTYPES[tensor.dtype]
        self.block_type = BlockType(describe.block, tensor.itemsize)
        words = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        count = words.untyped_storage().nbytes() // words.itemsize - words.storage_offset()
        self.numbers = np.lib.stride_tricks.as_strided(words.numpy(), (count,), (words.itemsize,))

    def _box_at(self, at):
        """Which numbers of a box there are, and where."""
        inside, where = np.array(True), np.array(-self.view.before)
        lengths = zip(at, self.box, self.view.shape, self.view.strides)
        for axis, (first, size, n, stride) in enumerate(lengths):
            i = (int(first) + np.arange(size)).reshape([-1] + [1] * (4 - axis))
            inside, where = inside & (i >= 0) & (i < n), where + i * stride
        return inside, where

    def load(self, at, barrier, memory):
        inside, where = self._box_at(at)
        found = np.where(inside, self.numbers[np.where(inside, where, 0)], 0)
        rows = found.astype(self.numbers.dtype).reshape(-1, self.box[-1])
        memory.reshape([-1, self.box[-1]]).numbers[: len(rows)] = rows
        Barrier.copied(barrier, rows.nbytes)

    def store(self, at, memory):
        inside, where = self._box_at(at)
        rows = memory.reshape([-1, self.box[-1]]).numbers[: math.prod(self.box[:-1])]
        self.numbers[where[inside]] = rows.reshape(inside.shape)[inside]


class Constant:
    """``gl.constexpr``: the constant itself. As an annotation it is known by its name."""

    def __new__(cls, value):
        return value


Constant.__name__ = "constexpr"


def scalars(*bounds):
    """``range``, of Triton's numbers."""
    for i in range(*map(int, bounds)):
        yield tl.tensor(interpreter.TensorHandle(np.array([i], np.int32), tl.int32), tl.int32)


def warp_specialize(roles, warps, registers):
    Barrier.roles = own = Roles(len(roles))
    threads = [threading.Thread(target=own.run, args=(i, *each)) for i, each in enumerate(roles)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    Barrier.roles = None
    if own.error:
        raise own.error


def mask_blocks(key_mask, pipelines, num_additional):
    """As ``key_masks.py`` has it, of all keys of a block at once."""
    g, stage = key_mask.geometry, itertools.count()
    k = tl.arange(0, key_masks.rows_held(g.BLOCK))
    within, beside = key_mask.within_block(k), key_mask.OTHER == key_masks.COLUMNS
    for tile_id in scalars(tl.program_id(0), g.num_tiles, tl.num_programs(0)):
        tile = g.tile(tile_id)
        for _ in range(0, int(num_additional), key_masks.rows_held(g.BLOCK)):
            at = next(stage)
            for each in pipelines:
                each.masker_wait(at)
                each.masker_release(at)
        position = (0, 0, 0)
        for _ in scalars(tile.blocks[0] * tile.blocks[1] * tile.blocks[2]):
            at = next(stage)
            allowed = key_mask.of_block(tile, position, k, within).to(tl.int32).handle.data != 0
            for j, each in enumerate(pipelines):
                each.masker_wait(at)
                if j == 0:
                    (factor,) = key_mask.factor(at)
                    factor.numbers[:, -2:] = np.where(allowed, 0, LOWERED)[:, None]
                for which in range(len(each.buffers) - (beside and j == 0)):
                    each.matrix(at, which).numbers[~allowed] = 0
                each.masker_release(at)
            position = g.next_block(position, tile.blocks)


language = gluon.Language
language.allocate_shared_memory = staticmethod(Shared.poisoned)
language.warp_specialize = staticmethod(warp_specialize)
language.shared_memory_descriptor, language.constexpr, language.tuple = Shared, Constant, tuple
vars(gluon_names).update(
    mbarrier=Barrier, tensor_descriptor=Descriptor, reinterpret=reinterpret,
    load_block=lambda descriptor, at, barrier, memory: descriptor.load(at, barrier, memory),
    store_block=lambda descriptor, at, memory: descriptor.store(at, memory),
    store_wait=lambda pending: None, barrier=lambda: None,
    warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else tuple(deps),
)  # fmt: skip

from natten.backends.hopper import backward, forward, key_masks, pipeline  # noqa: E402
from natten.backends.triton.launch import Launch  # noqa: E402

for module in (forward, backward, pipeline):
    module.range = scalars
forward.mask_blocks = backward.mask_blocks = mask_blocks
_run = Launch.run


def _launch(launch, **tensors):
    kernel = launch.kernel
    if kernel.fn.__module__ not in (forward.__name__, backward.__name__):
        return _run(launch, **tensors)
    given = {name: tensors.get(name) for name in kernel.tensors}
    for name, describe in launch.tensors.items():
        if describe is not None and given[name] is not None:
            given[name] = Descriptor(given[name], describe)
    Barrier.states.clear()
    kernel.fn.__globals__["tl"] = tl  # which the interpreter looks for
    execute = interpreter.GridExecutor(kernel.fn, kernel.arg_names, launch.grid, [])
    return execute(**given, **launch.arguments)


def launched():
    """Inside, launches of forward, dQ, dK and dV run here; others are interpreted as they are."""
    return mock.patch.object(Launch, "run", _launch)
