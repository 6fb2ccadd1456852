"""What a call's shapes decide, worked out once: views, tiles, grids, constants of its kernels."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from ... import tuning
from ...neighborhood import Neighborhood
from ...tiling import padded
from ..interface import Shape, Tiles
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
        self.rule, self.scale, self.device, self.dtype = rule, scale, device, dtype
        self.shapes, self.strides, self.num_additional = shapes, strides, num_additional
        self.batch, *space, self.heads, self.dim = shapes[0]
        self.kv_heads, self.value_dim = shapes[2][-2:]
        self.space, self.modes = tuple(space), modes(rule, space)
        self.lengths = padded([n // d for n, d in zip(space, rule.dilation)], 1)
        self.query, self.key, self.value = [view(*x, rule.dilation) for x in zip(shapes, strides)]

    def _contiguous(self, heads: int, channels: int) -> View:
        """Of a tensor with the tokens of all."""
        shape = (self.batch, *self.space, heads, channels)
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
        rows, dim = self.batch * math.prod(self.space) * self.heads, self.value_dim
        arguments = {"rows": rows, "DV": dim, "BLOCK_DV": tiling.native(dim), "M": 16}
        make = partial(Launch, lse_delta_kernel, (-(-rows // 16),))
        return {given: make(arguments | {"HAS_GRAD_LSE": given}) for given in (False, True)}

    @cached_property
    def portable(self) -> portable.Plan:
        """The portable backend's: what every query reaches is as there."""
        return portable.Plan(
            self.rule, self.scale, self.device, self.dtype, self.shapes, self.strides,
            None, self.num_additional or None, None, (), False,
        )  # fmt: skip

    def _tiled(self, kind: str) -> Launch | Trials:
        """A kernel with its tiles, or those among which the first call chooses."""
        problem = (
            kind, self.rule, self.space, self.space, self.dim, self.value_dim, self.dtype.itemsize,
        )  # fmt: skip
        name, count = tiling.key(*problem), tuning.wanted(backward=kind != "forward")
        if count > 1 and tuning.lookup(name) is None:
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
        counts = [
            -(-n // (size * (warpgroups if axis == tiles.split_axis else 1)))
            for axis, (n, size) in enumerate(zip(self.lengths, tile))
        ]
        heads = self.kv_heads if of_keys else self.heads
        num_tiles = math.prod(counts) * math.prod(rule.dilation) * self.batch * heads
        num_additional = 0 if of_keys else self.num_additional
        arguments = {
            **_steps("q", self.query.steps),
            **_steps("k", self.key.steps),
            **_steps("v", self.value.steps),
            "additional_b": self.num_additional * self.kv_heads,
            **per_axis("N", self.lengths),
            **per_axis("K", rule.kernel_size),
            **per_axis("S", rule.stride),
            **per_axis("D", rule.dilation),
            **per_axis("T", counts),
            "num_tiles": num_tiles,
            "heads": heads,
            "heads_per_kv": self.heads // self.kv_heads,
            "num_additional": num_additional,
            "scale_log2": _exact_thrice(self.scale * LOG2E.value),
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
        }
        # What a kernel stores is contiguous, so its bases are rows.
        rows = contiguous_strides((self.batch, *padded(self.space, 1), heads))[:3]
        kernel = forward_kernel if kind == "forward" else backward_kernel
        if kind == "forward":
            arguments |= _steps("o", rows)
        else:
            arguments |= _steps("g", self._contiguous(self.heads, self.value_dim).steps)
            arguments |= _steps("l", self._contiguous(self.heads, 4).steps)
            arguments |= _steps("d", rows) | {"OF_KEYS": of_keys}
        return Launch(
            kernel, (self._programs(kind, tiles, heads, num_tiles),), arguments,
            self._descriptors(kind, tiles), num_warps=tiling.WARPS, maxnreg=registers,
            launch_pdl=_can_overlap(),
        )  # fmt: skip

    def _descriptors(self, kind: str, tiles: Tiles) -> dict[str, Describe]:
        """Of the tensors of a kernel: of queries and of keys, in blocks of these."""

        def of_queries(view: View) -> Describe:
            return self._describe(view, tiles.q_block)

        def of_keys(view: View) -> Describe:
            return self._describe(view, tiles.kv_block)

        own = self._contiguous
        found = {
            "query": of_queries(self.query), "key": of_keys(self.key), "value": of_keys(self.value),
        }  # fmt: skip
        if kind == "forward":
            found["out"] = of_queries(own(self.heads, self.value_dim))
        else:
            found["grad_out"] = of_queries(own(self.heads, self.value_dim))
            layout = gl.NVMMASharedLayout(0, 32, rank=5)
            found["lse_delta"] = Describe(own(self.heads, 4), [1, *tiles.q_block, 4], layout)
        if kind == "dkdv":
            found["grad_key"] = of_keys(own(self.kv_heads, self.dim))
            found["grad_value"] = of_keys(own(self.kv_heads, self.value_dim))
        elif kind == "dq":
            found["grad_query"] = of_queries(own(self.heads, self.dim))
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
        pairs = tiling.computed_pairs(kind, self.rule, self.space, self.space, tiles)
        per_block = tiling.warpgroups(tiles) * math.prod(tiles.q_block + tiles.kv_block)
        usual = pairs * self.batch * heads / num_tiles / per_block
        longest = tiling.longest(kind, self.rule, self.space, tiles)
        # A key head's tile walks the blocks of all heads that share it.
        uneven = (longest - usual) * (self.heads // heads)
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


# Calls of one shape come again: a model has few.
_cached_plan = tuning.cached(Plan)


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
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
        0 if additional_keys is None else additional_keys.shape[1],
    )
