"""What a call's shapes decide, worked out once: views, tiles, grids, constants of its kernels."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...neighborhood import Neighborhood
from ..triton import launch
from ..triton import plan as portable
from ..triton.launch import Trials
from ..triton.plan import modes, padded
from . import tiles as tiling
from .backward import pass_kernel
from .descriptors import Boxes, View, box_layout, contiguous, view
from .forward import forward_kernel
from .gluon_names import gl
from .terms import terms_kernel

Shape = tuple[int, ...]
_LOG2E = math.log2(math.e)


class Launch(launch.Launch):
    """A launch by position, until these kernels are launched by name."""

    def __init__(
        self, kernel: Any, grid: Sequence[int], numbers: Sequence[Any], constants: dict[str, Any],
        descriptors: Sequence[Any],
    ) -> None:  # fmt: skip
        count = len(descriptors)
        kernel.tensors = tuple(kernel.arg_names[:count])
        arguments = dict(zip(kernel.arg_names[count:], numbers)) | constants
        options = {name: arguments.pop(name) for name in ("num_warps", "maxnreg", "launch_pdl")}
        described = {name: x for name, x in zip(kernel.tensors, descriptors) if x is not None}
        super().__init__(kernel, grid, arguments, described, **options)

    def run_in_order(self, *tensors: Any) -> None:
        """Tensors must be on the current device, where TMA can read them."""
        self.run(**dict(zip(self.tensors, tensors)))


class Plan:
    """The kernels of one problem; see :func:`plan_for` for the arguments."""

    def __init__(
        self,
        rule: Neighborhood,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        extra: int,
    ) -> None:
        self.rule, self.scale, self.device, self.extra = rule, scale, device, extra
        self.shapes, self.strides = shapes, strides
        self.batch, *space, self.heads, self.dim = shapes[0]
        self.kv_heads, self.value_dim = shapes[2][-2:]
        self.dtype, self.space, self.modes = dtype, tuple(space), modes(rule, space)
        self.groups = padded([n // d for n, d in zip(space, rule.dilation)], 1)
        self.views = [view(*x, rule.dilation) for x in zip(shapes, strides)]

    def contiguous(self, heads: int, channels: int) -> View:
        """Of a tensor with the tokens of all."""
        shape = (self.batch, *self.space, heads, channels)
        return view(shape, contiguous(shape), self.rule.dilation)

    def rows(self, heads: int) -> Shape:
        """Rows of a contiguous tensor, which are its places, from a batch entry to the next, and
        from a token to the next along the first two axes."""
        return contiguous((self.batch, *padded(self.space, 1), heads))[:3]

    @cached_property
    def forward(self) -> Forward | Trials:
        return self._tiled("forward", partial(Forward, self))

    @cached_property
    def query(self) -> Gradient | Trials:
        """dQ."""
        return self._tiled("query", partial(Gradient, self, "query"))

    @cached_property
    def key(self) -> Gradient | Trials:
        """dK and dV."""
        return self._tiled("key", partial(Gradient, self, "key"))

    @cached_property
    def terms(self) -> dict[bool, launch.Launch]:
        """What the passes need per query; by whether the LSE has a gradient, too."""
        rows, dim = self.batch * math.prod(self.space) * self.heads, self.value_dim
        arguments = {"rows": rows, "DV": dim, "BLOCK_DV": tiling.native(dim), "M": 16}
        return {
            given: launch.Launch(
                terms_kernel, (-(-rows // 16),), arguments | {"HAS_GRAD_LSE": given}
            )
            for given in (False, True)
        }

    @cached_property
    def portable(self) -> portable.Plan:
        """The portable backend's: what every query reaches is as there."""
        return portable.Plan(
            self.rule, self.scale, self.device, self.dtype, self.shapes, self.strides,
            None, self.extra or None, None, (), False,
        )  # fmt: skip

    def _tiled(self, kind: str, make: Callable[[tiling.Tiles], Any]) -> Any:
        """A kernel with its tiles, or those among which the first call chooses."""
        problem = (
            kind, self.rule, self.space, self.space, self.dim, self.value_dim, self.dtype.itemsize,
        )  # fmt: skip
        name, count = tiling.key(*problem), tuning.wanted(backward=kind != "forward")
        if count > 1 and tuning.lookup(name) is None:
            return Trials(name, {each: make(each) for each in tiling.candidates(*problem)[:count]})
        return make(tiling.choose(*problem))


class _Kernel:
    """Tiles of one kernel of a plan, and what its launch is made of."""

    def __init__(self, plan: Plan, kind: str, tiles: tiling.Tiles) -> None:
        self.plan, self.kind, self.tiles = plan, kind, tiles
        self.work = tiling.work(kind, plan.dim, plan.value_dim)
        self.mask = tiling.mask(kind, plan.rule, plan.space, tiles, self.work)
        self.own_out = tiling.own_out(tiles, self.mask, self.work)

    def boxes(self, view: View, shape: Shape) -> Boxes:
        """Descriptors of tiles or boxes of that shape, with the channels that kernels have."""
        channels = tiling.native(view.shape[-1])
        return Boxes(view, [1, *shape, channels], box_layout(channels, self.plan.dtype))

    def extra(self, channels: int) -> Boxes:
        """Descriptors of boxes of additional tokens."""
        shape = (self.plan.batch, self.plan.extra, self.plan.kv_heads, channels)
        box = (1, 1, math.prod(self.tiles.box))
        return self.boxes(view(shape, contiguous(shape), (1,)), box)

    def launch(
        self, kernel: Any, descriptors: Sequence[Boxes | None], numbers: Sequence[Any],
        heads: int, extra: int, **constants: Any,
    ) -> Launch:  # fmt: skip
        """``numbers`` and ``constants``, and what all kernels have; a program per place on the GPU
        takes tiles in turn, or each tile has one of its own."""
        plan, tiles, mask, rule = self.plan, self.tiles, self.mask, self.plan.rule
        counts = [
            -(-n // (size * (tiles.groups if axis == tiles.split else 1)))
            for axis, (n, size) in enumerate(zip(plan.groups, tiles.tile))
        ]
        every = plan.batch * heads
        total = math.prod(counts) * math.prod(rule.dilation) * every
        start, registers, fetch = tiling.registers(tiles, self.work)
        constants |= {
            "MODES": plan.modes, "TILE": tiles.tile, "BOX": tiles.box, "SPLIT": tiles.split,
            "STAGES": tiles.stages, "MASK": mask.kind, "CODE": mask.code, "BY_ROW": mask.by_row,
            "STEPS": mask.steps, "TABLES": mask.tables, "HAS_EXTRA": extra > 0,
            "OWN_OUT": self.own_out, "REGISTERS": registers, "FETCH": fetch, "GROUPS": tiles.groups,
            "DILATED": max(rule.dilation) > 1, "num_warps": 4, "maxnreg": start,
            "launch_pdl": _can_overlap(),
        }  # fmt: skip
        numbers = (
            *numbers, *plan.groups, *padded(rule.kernel_size, 1), *padded(rule.stride, 1),
            *padded(rule.dilation, 1), *counts, total, heads, plan.heads // plan.kv_heads, extra,
            _exact_thrice(plan.scale * _LOG2E),
        )  # fmt: skip
        pairs = tiling.computed_pairs(self.kind, rule, plan.space, plan.space, tiles) * every
        usual = pairs / total / (tiles.groups * math.prod(tiles.tile) * math.prod(tiles.box))
        # A key head's tile walks the boxes of all heads that share it.
        uneven = (tiling.longest(self.kind, rule, plan.space, tiles) - usual) * (
            plan.heads // heads
        )
        places = _processors(plan.device) * tiles.programs
        programs = total if uneven >= _UNEVEN else min(total, places)
        return Launch(kernel, (programs,), numbers, constants, descriptors)


def _exact_thrice(x: float) -> float:
    """``x`` in float32 with two bits less: three times as much is exact, as ``masks.py`` needs."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return float(struct.unpack("<f", struct.pack("<I", bits & ~3))[0])


class Forward(_Kernel):
    """Output and LSE."""

    def __init__(self, plan: Plan, tiles: tiling.Tiles) -> None:
        super().__init__(plan, "forward", tiles)
        dim, value_dim = plan.dim, plan.value_dim
        out = plan.contiguous(plan.heads, value_dim)
        descriptors = [
            self.boxes(plan.views[0], tiles.tile),
            self.boxes(plan.views[1], tiles.box),
            self.boxes(plan.views[2], tiles.box),
            self.boxes(out, tiles.tile),
            *((self.extra(dim), self.extra(value_dim)) if plan.extra else (None, None)),
            None,
        ]
        numbers = (
            *(step for each in plan.views for step in each.steps),
            *plan.rows(plan.heads), plan.extra * plan.kv_heads,
        )  # fmt: skip
        self.kernel = self.launch(forward_kernel, descriptors, numbers, plan.heads, plan.extra)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor], out: Tensor,
        lse: Tensor,
    ) -> None:  # fmt: skip
        self.kernel.run_in_order(query, key, value, out, *(more or (None, None)), lse)


class Gradient(_Kernel):
    """dQ, from tiles of queries and boxes of keys, or dK and dV, from the reverse."""

    def __init__(self, plan: Plan, kind: str, tiles: tiling.Tiles) -> None:
        super().__init__(plan, kind, tiles)
        of_keys, dim, value_dim = kind == "key", plan.dim, plan.value_dim
        heads = plan.kv_heads if of_keys else plan.heads
        query, key, value = plan.views
        queries = query, plan.contiguous(plan.heads, value_dim)
        fixed, walked = ((key, value), queries) if of_keys else (queries, (key, value))
        grads = [plan.contiguous(heads, n) for n in (dim, value_dim if of_keys else dim)]
        terms = plan.contiguous(plan.heads, 4)
        outer = [self.boxes(each, tiles.tile) for each in fixed]
        inner = [self.boxes(each, tiles.box) for each in walked]
        rows = self.tiles.box if of_keys else self.tiles.tile
        extra = 0 if of_keys else plan.extra
        descriptors = [
            *outer, *inner, Boxes(terms, [1, *rows, 4], gl.NVMMASharedLayout(0, 32, rank=5)),
            *([self.extra(dim), self.extra(value_dim)] if extra else inner),
            *(self.boxes(each, tiles.tile) for each in grads),
        ]  # fmt: skip
        numbers = (
            *(step for each in (*fixed, *walked, terms) for step in each.steps),
            *plan.rows(heads), plan.extra * plan.kv_heads,
        )  # fmt: skip
        self.kernel = self.launch(pass_kernel, descriptors, numbers, heads, extra, OF_KEYS=of_keys)

    def run(
        self, outer: Sequence[Tensor], inner: Sequence[Tensor], terms: Tensor,
        more: Sequence[Tensor], grads: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Sum over ``inner`` for the tiles of ``outer``, into ``grads``."""
        # What is missing is never read.
        self.kernel.run_in_order(*outer, *inner, terms, *(more or inner), grads[0], grads[-1])


# A program that takes tiles in turn begins the next one while it ends the last, but may get long
# ones only. So where the longest has that many boxes more than usual, programs take one tile each
# (measured: hopper-log.md).
_UNEVEN = 12


@lru_cache(maxsize=1)
def _can_overlap() -> bool:
    """Whether a kernel may be set up while the one before ends: CUDA graphs can since CUDA 12.3."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return False
    return version.value >= 12030


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H100's, for who compiles without one
    return torch.cuda.get_device_properties(device).multi_processor_count


# Calls of one shape come again: a model has few.
_cached_plan = tuning.cached(Plan)


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more: Sequence[Tensor],
    rule: Neighborhood,
    scale: float,
) -> Plan:
    """The plan of a call; tensors are readable by TMA. ``more``: additional keys and values."""
    return _cached_plan(
        rule,
        scale,
        query.device,
        query.dtype,
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        more[0].shape[1] if more else 0,
    )
