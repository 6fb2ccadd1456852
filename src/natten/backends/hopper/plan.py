"""What a call's shapes decide, worked out once: views, tiles, grids, constants of its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from natten import tuning
from natten.backends.hopper import tiles as tiling
from natten.backends.hopper.descriptors import Boxes, box_layout, contiguous, view
from natten.backends.hopper.forward import forward_kernel
from natten.backends.triton.plan import modes, padded
from natten.neighborhood import Neighborhood

Shape = tuple[int, ...]
_LOG2E = math.log2(math.e)


class Launch:
    """A kernel with its grid, numbers and constants; call it with descriptors and tensors."""

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: Sequence[Any],
        constants: dict[str, Any],
        batches: int = 1,
    ) -> None:
        self.kernel, self.constants = kernel, constants
        self.grid, self.numbers = (programs, batches, 1), tuple(numbers)
        self.compiled: Any = None

    def __call__(self, *tensors: Any) -> None:
        """On the current device."""
        if self.compiled is not None:
            self.compiled(*tensors, *self.numbers)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        names = self.kernel.arg_names
        self.numbers += tuple(self.constants[name] for name in names if name in self.constants)
        self.compiled = compiled[self.grid]


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
        batch, *space, heads, dim = shapes[0]
        kv_heads, value_dim = shapes[2][-2:]
        tiles = tiling.choose("forward", rule, tuple(space), tuple(space), dim, value_dim)
        self.tiles, self.mask = tiles, tiling.mask(rule, tuple(space), tiles)
        out_shape = (*shapes[0][:-1], value_dim)
        views = [view(*x, rule.dilation) for x in zip(shapes, strides)]
        views.append(view(out_shape, contiguous(out_shape), rule.dilation))
        layouts = box_layout(dim, dtype), box_layout(value_dim, dtype)
        self.query = Boxes(views[0], [1, *tiles.query, dim], layouts[0])
        self.key = Boxes(views[1], [1, *tiles.key, dim], layouts[0])
        self.value = Boxes(views[2], [1, *tiles.key, value_dim], layouts[1])
        self.out = Boxes(views[3], [1, *tiles.query, value_dim], layouts[1])
        rows = math.prod(tiles.key)
        extra_keys, extra_values = (
            (batch, extra, kv_heads, dim),
            (batch, extra, kv_heads, value_dim),
        )
        self.extra_key, self.extra_value = (
            Boxes(view(x, contiguous(x), (1,)), [1, 1, 1, rows, x[-1]], layout)
            for x, layout in zip((extra_keys, extra_values), layouts)
        )
        self.groups = padded([n // d for n, d in zip(space, rule.dilation)], 1)
        self.numbers = (
            *(s for each in views for s in each.steps),
            dim, value_dim, *contiguous((batch, *padded(space, 1), heads))[:3], *self.groups,
            *padded(rule.kernel_size, 1), *padded(rule.stride, 1),
            *padded(rule.dilation, 1),
        )  # fmt: skip
        self.heads = (batch * heads, heads, heads // kv_heads)
        self.modes, self.space = modes(rule, space), tuple(space)
        self.own_out = tiling.own_out(tiles, self.mask, dim, value_dim)

    @cached_property
    def forward(self) -> Launch:
        """A program per place on the GPU takes tiles in turn; long tiles have one each."""
        tiles, mask = self.tiles, self.mask
        counts = [
            -(-n // (size * (tiles.groups if axis == tiles.split else 1)))
            for axis, (n, size) in enumerate(zip(self.groups, tiles.query))
        ]
        every, heads, per_kv = self.heads
        total = math.prod(counts) * math.prod(self.rule.dilation) * every
        start, registers, fetch = tiling.registers(tiles)
        constants = {
            "MODES": self.modes, "TILE": tiles.query, "BOX": tiles.key, "SPLIT": tiles.split,
            "STAGES": tiles.stages, "MASK": mask.kind, "CODE": mask.code, "BY_ROW": mask.by_row,
            "STEPS": mask.steps, "TABLES": mask.tables, "HAS_EXTRA": self.extra > 0,
            "OWN_OUT": self.own_out, "REGISTERS": registers, "FETCH": fetch, "GROUPS": tiles.groups,
            "DILATED": max(self.rule.dilation) > 1,
            "num_warps": 4, "maxnreg": start,
        }  # fmt: skip
        numbers = (
            *self.numbers, *counts, total, heads, per_kv, self.extra, self.scale * _LOG2E
        )  # fmt: skip
        pairs = tiling.computed_pairs("forward", self.rule, self.space, self.space, tiles)
        boxes = (
            pairs * every / total / (tiles.groups * math.prod(tiles.query) * math.prod(tiles.key))
        )
        places = _processors(self.device) * tiles.programs
        programs = total if boxes > _LONG else min(total, places)
        return Launch(forward_kernel, programs, numbers, constants)


# A program that takes tiles in turn begins the next one while it ends the last. Tiles of more boxes
# than this are long enough without, and are shared out better one by one (hopper-log.md).
_LONG = 48


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
    extra_keys: Tensor | None,
    rule: Neighborhood,
    scale: float,
) -> Plan:
    """The plan of a call; tensors are readable by TMA."""
    return _cached_plan(
        rule,
        scale,
        query.device,
        query.dtype,
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        0 if extra_keys is None else extra_keys.shape[1],
    )
