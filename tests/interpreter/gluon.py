"""Gluon without layouts, so that Triton's interpreter runs what the Hopper kernels share, and the
kernel of small windows.

Importing this module puts other things in the place of Gluon's names, in ``gluon_names`` and for
those who import Gluon later. It must be imported before the modules of these kernels, in a process
that does nothing else. Functions
and methods are Python's own, aggregates are data classes, and what Gluon's language says is said in
Triton's.
"""

import sys
from dataclasses import dataclass
from types import ModuleType

import triton
import triton.language as tl
from triton import experimental

from natten.backends.hopper import gluon_names


class Memory:
    """Shared memory: an array of parts, or what was stored."""

    def __init__(self, shape):
        self.shape, self._parts = shape, {}

    def index(self, i):
        return self._parts.setdefault(int(i), Memory(self.shape[1:]))

    def store(self, value):
        assert list(map(int, value.shape)) == list(self.shape)
        self._value = value

    def load(self, layout=None):
        return self._value

    def permute(self, order):
        return tl.permute(self._value, order)


class Language:
    """``gl``: layouts are None, and functions ignore them."""

    static_range = range
    shared_memory_descriptor = Memory

    def __getattr__(self, name):
        return (lambda *_, **__: None) if name.endswith("Layout") else getattr(tl, name)

    def arange(self, start, end, layout=None):
        return tl.arange(start, end)

    def full(self, shape, value, dtype, layout=None):
        return tl.full(shape, value, dtype)

    def zeros(self, shape, dtype, layout=None):
        return tl.full(shape, 0, dtype)

    def convert_layout(self, x, layout):
        return x

    def multiple_of(self, x, values):
        return x

    def allocate_shared_memory(self, dtype, shape, layout=None):
        return Memory(shape)


class Gluon:
    """``gluon``: kernels are Triton's, with options; other functions are plain ones."""

    @staticmethod
    def jit(function=None, **options):
        return triton.jit(**options) if function is None else function

    @staticmethod
    def constexpr_function(function):
        return function


def _product(a, b, acc, use_acc=True, is_async=False):
    """``acc + A B``, exact for the numbers that masks are made of."""
    a, b = (x if isinstance(x, tl.tensor) else x.load() for x in (a, b))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


gluon_names.gl, gluon_names.gluon = Language(), Gluon()
gluon_names.aggregate = dataclass
gluon_names.warpgroup_mma = _product
gluon_names.fence_async_shared = lambda: None
gluon_names.gdc_wait = gluon_names.gdc_launch_dependents = lambda: None
tl.block_type.layout = None


def _module(name, **names):
    made = sys.modules[f"triton.experimental.gluon{name}"] = ModuleType(name)
    vars(made).update(names)
    return made


experimental.gluon = _module(
    "", jit=Gluon.jit, constexpr_function=Gluon.constexpr_function, language=gluon_names.gl
)
_module(".language")
_module(".language.nvidia")
_module(
    ".language.nvidia.ampere", async_copy=None,
    mma_v2=lambda a, b, acc, input_precision: _product(a, b, acc),
)  # fmt: skip


def masked_factor(key_mask, allowed):
    """A block's factor ``[N, C]`` as the warp that masks blocks leaves it, which is no code for an
    interpreter."""
    factor = key_mask.factors[0].index(0).load()
    own = tl.arange(0, factor.shape[1])[None, :] >= factor.shape[1] - 2
    lowered = tl.where(allowed != 0, 0.0, -(2.0**49))[:, None]
    return tl.where(own, lowered, factor.to(tl.float32)).to(tl.bfloat16)
