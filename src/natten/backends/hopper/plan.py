"""What a call's shapes decide, worked out once: views, tiles, grids, constants of its kernels."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...neighborhood import Neighborhood, group_length
from ...tiling import padded
from ..interface import KINDS, Shape, Tiles
from ..triton import plan as portable
from ..triton.launch import Launch, Trials, per_axis
from ..triton.primitives import LOG2E
from ..triton.windows import modes
from . import tiles as tiling
from .backward import backward_kernel
from .descriptors import Describe, View, block_layout, contiguous_strides, view
from .forward import forward_kernel
from .gluon_names import gl
from .lse_delta import lse_delta_kernel


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
        num_additional: int,
    ) -> None:
        self._first: Plan | None = None  # whose kernels these are, with another offset
        self.rule, self.scale, self.device, self.dtype = rule, scale, device, dtype
        self.shapes, self.strides, self.num_additional = shapes, strides, num_additional
        self.batch, *space, self.heads, self.dim = shapes[0]
        self.kv_heads, self.value_dim = shapes[2][-2:]
        self.space, self.key_space = tuple(space), tuple(shapes[1][1:-2])
        self.queries = tiling.queries(rule, self.space)
        self.modes = modes(rule, self._units())
        self.query, self.key, self.value = [view(*x, rule.dilation) for x in zip(shapes, strides)]

    def moved(self, rule: Neighborhood) -> Plan:
        """The same with another offset: the kernels of this plan, with other numbers."""
        found = object.__new__(Plan)
        found.__dict__.update(self.__dict__)
        for kind in KINDS:
            found.__dict__.pop(kind, None)
        found.rule, found._first = rule, self
        return found

    def _units(self) -> list[int]:
        """Per axis, 1 if there is one token now and always."""
        if self.queries == tiling.OWN:
            return list(self.space)
        # A window of more than one key is of a cache that grows.
        return [max(each) for each in zip(self.space, self.key_space, self.rule.kernel_size)]

    def _contiguous(self, space: Shape, heads: int, channels: int) -> View:
        """Of a tensor that a kernel writes, and of what goes with it."""
        shape = (self.batch, *space, heads, channels)
        return view(shape, contiguous_strides(shape), self.rule.dilation)

    @cached_property
    def forward(self) -> Launch | Trials:
        return self._tiled("forward")

    @cached_property
    def dq(self) -> Launch | Trials:
        return self._tiled("dq")

    @cached_property
    def dkdv(self) -> Launch | Trials:
        return self._tiled("dkdv")

    @cached_property
    def lse_delta(self) -> dict[bool, Launch]:
        """What the passes need per query; by whether the LSE has a gradient, too."""
        if self._first is not None:
            return self._first.lse_delta
        rows, dim = self.batch * math.prod(self.space) * self.heads, self.value_dim
        arguments = {"rows": rows, "DV": dim, "BLOCK_DV": tiling.native(dim), "M": 16}
        make = partial(Launch, lse_delta_kernel, (-(-rows // 16),))
        return {
            given: make(
                arguments | {"HAS_GRAD_LSE": given},
                kernels=compiled("lse_delta", self.device, self.dtype, dim, given),
            )
            for given in (False, True)
        }

    @cached_property
    def portable(self) -> portable.Plan:
        """The portable backend's: what every query reaches is as there."""
        if self._first is not None:
            return self._first.portable
        return portable.Plan(
            self.rule, self.scale, self.device, self.dtype, self.shapes, self.strides,
            None, self.num_additional or None, None, (), False,
        )  # fmt: skip

    def _tiled(self, kind: str) -> Launch | Trials:
        """A kernel with its tiles, or those among which the first call chooses."""
        if self._first is not None:
            launch = getattr(self._first, kind)
            assert isinstance(launch, Launch)
            return launch.moved(launch.grid, self._offset())
        problem = (
            kind, self.rule, self.space, self.key_space, self.dim, self.value_dim,
            self.dtype.itemsize,
        )  # fmt: skip
        count = tuning.wanted(backward=kind != "forward")
        if count > 1 and tuning.lookup(name := tiling.key(*problem)) is None:
            candidates = tiling.candidates(*problem)[:count]
            return Trials(name, {tiles: self._launch(kind, tiles) for tiles in candidates})
        return self._launch(kind, tiling.choose(*problem))

    def _launch(self, kind: str, tiles: Tiles) -> Launch:
        rule, of_keys = self.rule, kind == "dkdv"
        work = tiling.work(kind, self.dim, self.value_dim)
        mask = tiling.mask(kind, rule, self.space, tiles, work)
        tile, block = tiling.tile_and_block(tiles, of_keys)
        warpgroups = tiling.warpgroups(tiles)
        registers, compute_registers, fetch_registers = tiling.registers(tiles, work)
        space = self.key_space if of_keys else self.space
        counts = [
            -(-n // (size * (warpgroups if axis == tiles.split_axis else 1)))
            for axis, (n, size) in enumerate(zip(self._positions(space), tile))
        ]
        heads = self.kv_heads if of_keys else self.heads
        num_tiles = math.prod(counts) * math.prod(rule.dilation) * self.batch * heads
        num_additional = 0 if of_keys else self.num_additional
        numbers = {
            **_steps("q", self.query.steps),
            **_steps("k", self.key.steps),
            **_steps("v", self.value.steps),
            "additional_b": self.num_additional * self.kv_heads,
            **per_axis("N", self._positions(self.key_space)),
            **per_axis("K", rule.kernel_size),
            **per_axis("S", rule.stride),
            **per_axis("D", rule.dilation),
            **per_axis("T", counts),
            **self._part(),
            "num_tiles": num_tiles,
            "heads": heads,
            "heads_per_kv": self.heads // self.kv_heads,
            "num_additional": num_additional,
            "scale_log2": _exact_thrice(self.scale * LOG2E.value),
        }
        constants = {
            "MODES": self.modes,
            "TILE": tile,
            "BLOCK": block,
            "SPLIT_AXIS": tiles.split_axis,
            "WARPGROUPS": warpgroups,
            "STAGES": tiles.num_stages,
            "MASK": mask.kind,
            "ENDS": mask.ends,
            "BY_ROW": mask.by_row,
            "STEPS": mask.steps,
            "TABLES": mask.tables,
            "HAS_ADDITIONAL": num_additional > 0,
            "OWN_OUT": tiling.own_out(tiles, mask, work),
            "REGISTERS": compute_registers,
            "FETCH_REGISTERS": fetch_registers,
            "DILATED": max(rule.dilation) > 1,
            "QUERIES": self.queries,
        }
        # What a kernel stores is contiguous, so its bases are rows.
        rows = contiguous_strides((self.batch, *padded(space, 1), heads))[:3]
        kernel = forward_kernel if kind == "forward" else backward_kernel
        if kind == "forward":
            numbers |= _steps("o", rows)
        else:
            of_queries = self.space, self.heads
            numbers |= _steps("g", self._contiguous(*of_queries, self.value_dim).steps)
            numbers |= _steps("l", self._contiguous(*of_queries, 4).steps)
            numbers |= _steps("d", rows)
            constants["OF_KEYS"] = of_keys
        kept = compiled(
            kind, self.device, self.dtype, tiling.native(self.dim), tiling.native(self.value_dim),
            registers, *constants.values(),
        )  # fmt: skip
        return Launch(
            kernel, (self._programs(kind, tiles, heads, num_tiles),), numbers | constants,
            self._descriptors(kind, tiles), kept, num_warps=tiling.WARPS, maxnreg=registers,
            launch_pdl=_can_overlap(),
        )  # fmt: skip

    def _positions(self, space: Shape) -> Sequence[int]:
        """Tokens of the longest dilation group, per axis."""
        return padded([group_length(n, d, 0) for n, d in zip(space, self.rule.dilation)], 1)

    def _part(self) -> dict[str, int]:
        """Where the queries are, :class:`geometry.Part`'s numbers."""
        dilation = self.rule.dilation
        return {
            **per_axis("Q", self._positions(self.space)),
            **per_axis("SQ", [n % d or d for n, d in zip(self.space, dilation)]),
            **per_axis("SN", [n % d or d for n, d in zip(self.key_space, dilation)]),
            **per_axis("R", self.rule.queries_per_key),
            **self._offset(),
        }

    def _offset(self) -> dict[str, int]:
        """Where the first query is."""
        axes = list(zip(self.rule.offset, self.rule.dilation))
        return {
            **per_axis("O", [o // d for o, d in axes], 0),
            **per_axis("G", [o % d for o, d in axes], 0),
        }

    def _descriptors(self, kind: str, tiles: Tiles) -> dict[str, Describe]:
        """Of the tensors of a kernel: of queries and of keys, in blocks of these."""

        def of_queries(view: View) -> Describe:
            return self._describe(view, tiles.q_block)

        def of_keys(view: View) -> Describe:
            return self._describe(view, tiles.kv_block)

        def written(heads: int, channels: int) -> View:
            return self._contiguous(self.space, heads, channels)

        found = {
            "query": of_queries(self.query), "key": of_keys(self.key), "value": of_keys(self.value),
        }  # fmt: skip
        if kind == "forward":
            found["out"] = of_queries(written(self.heads, self.value_dim))
        else:
            found["grad_out"] = of_queries(written(self.heads, self.value_dim))
            layout = gl.NVMMASharedLayout(0, 32, rank=5)
            found["lse_delta"] = Describe(written(self.heads, 4), [1, *tiles.q_block, 4], layout)
        if kind == "dkdv":
            for name, dim in (("grad_key", self.dim), ("grad_value", self.value_dim)):
                found[name] = of_keys(self._contiguous(self.key_space, self.kv_heads, dim))
        elif kind == "dq":
            found["grad_query"] = of_queries(written(self.heads, self.dim))
        if self.num_additional and kind != "dkdv":
            for name, dim in (("keys", self.dim), ("values", self.value_dim)):
                shape = (self.batch, self.num_additional, self.kv_heads, dim)
                tokens = view(shape, contiguous_strides(shape), (1,))
                block = (1, 1, math.prod(tiles.kv_block))
                found[f"additional_{name}"] = self._describe(tokens, block)
        return found

    def _describe(self, view: View, block: Shape) -> Describe:
        """Descriptors of blocks with the channels that kernels have."""
        channels = tiling.native(view.shape[-1])
        return Describe(view, [1, *block, channels], block_layout(channels, self.dtype))

    def _programs(self, kind: str, tiles: Tiles, heads: int, num_tiles: int) -> int:
        """How many programs there are: as many as run at once, which take tiles in turn, or each
        tile has one of its own."""
        excess = tiling.excess(kind, self.rule, self.space, self.key_space, tiles)
        # A key head's tile walks the blocks of all heads that share it.
        uneven = excess * (self.heads // heads)
        if uneven >= _UNEVEN:
            return num_tiles
        return min(num_tiles, _processors(self.device) * tiles.resident_programs)


def _steps(name: str, steps: Sequence[int]) -> dict[str, int]:
    """Arguments ``name_b``, ``name_0`` to ``name_2`` and ``name_h``, or the first of them."""
    return {f"{name}_{axis}": step for axis, step in zip("b012h", steps)}


def _exact_thrice(x: float) -> float:
    """``x`` in float32 with two bits less: three times as much is exact, as ``masks.py`` needs."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return float(struct.unpack("<f", struct.pack("<I", bits & ~3))[0])


# A program that takes tiles in turn begins the next one while it ends the last, but may get long
# ones only. So where the longest has that many blocks more than usual, programs take one tile each
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


@tuning.cached
def compiled(*constants: Any) -> list[Any]:
    """Where the kernel of these constants is kept, once it is compiled."""
    return []


# Calls of one shape come again: a model has few.
@tuning.cached
def _plan(rule: Neighborhood, *problem: Any) -> Plan:
    is_timed = tuning.wanted(backward=False) or tuning.wanted(backward=True)
    if rule.query_offset is None or is_timed:
        return Plan(rule, *problem)
    # Tiles do not depend on an offset, nor does anything but two numbers of each axis.
    known = _known(replace(rule, query_offset=None), *problem)
    if not known:
        known.append(Plan(rule, *problem))
    return known[0].moved(rule)


@tuning.cached
def _known(*problem: Any) -> list[Plan]:
    return []


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    rule: Neighborhood,
    scale: float,
) -> Plan:
    """The plan of a call; tensors are readable by TMA."""
    return _plan(
        rule,
        scale,
        query.device,
        query.dtype,
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        0 if additional_keys is None else additional_keys.shape[1],
    )
