"""What a call's shapes decide, worked out once: tiles, grids, numbers and constants of its kernels.

An eager call must not cost more on the host than its kernels on the GPU. So everything but
addresses is kept in a plan, found by one lookup, and a kernel that has run before is launched
through its compiled object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ..._torch import allows_tf32
from ...documents import Documents, Sizes
from ...neighborhood import Dense, Neighborhood, Rule, queries_before
from ...tiling import padded
from ...tuning import Bounded
from ..interface import Shape
from . import band_tiles, small_tiles
from . import tiles as tiling
from .backward import (
    additional_kernel,
    dkdv_kernel,
    dq_kernel,
    rpb_grad_kernel,
    rpb_grad_sum_kernel,
)
from .forward import forward_kernel
from .launch import Launch, Split, Trials, per_axis, strides_of
from .windows import modes, per_key

# Of the bias's gradient, between its two kernels: 256 MiB, or one head's.
MOST_SUMS = 2**26

# Of masks of keys and of additional ones, where there are such.
MaskStrides = tuple[tuple[int, ...] | None, tuple[int, ...] | None]


def sizes(rule: Rule, space: Sequence[int], key_space: Sequence[int]) -> dict[str, int]:
    """Arguments for queries, keys, queries before the first one, window, stride and dilation per
    axis."""
    kernel_size, stride = ((), ()) if isinstance(rule, Dense) else (rule.kernel_size, rule.stride)
    # A window that is truncated may exceed what an axis ever has, but not numbers of 32 bits.
    kernel_size, stride = (tuple(min(n, 2**30) for n in each) for each in (kernel_size, stride))
    return (
        per_axis("L", space)
        | per_axis("KEY_L", key_space)
        | per_axis("P", rule.offset, 0)
        | per_axis("K", kernel_size)
        | per_axis("S", stride)
        | per_axis("D", rule.dilation)
    )


def tile_counts(rule: Rule, space: Sequence[int], tile: Shape, of_keys: bool = False) -> Shape:
    """How many tiles the longest dilation group has, per axis, of queries or ``of_keys``."""
    fine = (1,) * len(space) if of_keys else rule.queries_per_key
    return _tile_counts(tuple(space), rule.dilation, fine, tile)


@lru_cache(maxsize=1024)
def _tile_counts(space: Shape, dilation: Shape, fine: Shape, tile: Shape) -> Shape:
    axes = zip(padded(space, 1), padded(dilation, 1), padded(fine, 1), tile)
    return tuple(-(-queries_before(length, 0, d, r) // size) for length, d, r, size in axes)


def _splits(work: int, least: int, most: int) -> tuple[int, int]:
    """How many programs share ``work`` items, at least ``least`` each, and how many each takes."""
    splits = max(1, min(most, work // least))
    return splits, -(-work // splits)


# Of dK and dV: programs per multiprocessor where several share a tile, two waves of the two that
# registers have room for; what a program visits at least, so that its own tile and sums cost little
# beside it; and what a tile has to visit, so that it pays to launch a few kernels more.
_SHARING_PROGRAMS, _LEAST_BLOCKS, _WORTH_SHARING = 4, 8, 32


def shares(blocks: float, heads: int, most: int, least_tiles: int, tiles: int) -> tuple[int, int]:
    """Among how many programs a tile of keys shares its blocks of queries, and its query heads.

    With few tiles, most of a GPU would wait for them. As there are at most ``most`` programs, the
    sums that they store take no more than some 70 MB.

    Args:
        blocks: how many a tile visits of each head.
        heads: query heads of a key head; to share them first costs nothing.
        most: programs.
        least_tiles: how many ``tiles`` are counted at least.
    """
    splits = min(most // max(tiles, least_tiles), int(blocks * heads) // _LEAST_BLOCKS)
    if splits < 2 or blocks * heads < _WORTH_SHARING:
        return 1, 1
    of_heads, _ = _splits(heads, -(-heads // splits), heads)
    return splits // of_heads, of_heads


class Plan:
    """The kernels of one problem; see :func:`plan_for` for the arguments."""

    def __init__(
        self,
        rule: Rule,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[Sequence[int]],
        bias_dtype: torch.dtype | None,
        num_additional: int | None,
        packed: Sizes | None,
        tiles: tuple[int, ...],
        tf32: bool,
        masks: MaskStrides = (None, None),
    ) -> None:
        query, key, value = shapes
        self.rule, self.scale, self.device = rule, scale, device
        self.itemsize, self.packed = dtype.itemsize, packed is not None
        own = query[0], tuple(query[1:-2]), tuple(key[1:-2])
        self.batch, self.space, self.key_space = packed or own
        self.heads, self.kv_heads = query[-2], key[-2]
        self.per_kv = self.heads // self.kv_heads
        self.dim, self.value_dim = query[-1], value[-1]
        self.modes = modes(rule, self.key_space if packed is None else [2] * len(self.space))
        self.query_strides, *others = map(strides_of, "qkv", strides)
        self.strides = self.query_strides | others[0] | others[1]
        key_mask, additional_mask = masks
        self.all_strides = with_mask(strides, key_mask)
        self.has_key_mask = key_mask is not None
        self.has_additional_mask = additional_mask is not None and bool(num_additional)
        self.key_mask_strides = strides_of_mask(key_mask or (0,))
        self.additional_mask_strides = dict(zip(("a_b", "a_0"), additional_mask or (0, 0)))
        self.sizes = sizes(rule, self.space, self.key_space)
        self.numbers = {"per_kv": self.per_kv, "scale": scale}
        # Tile shapes asked for, of queries and keys: of the forward pass, then of the backward.
        rank = len(self.space)
        asked = [tiles[i : i + rank] for i in range(0, 4 * rank, rank)]
        self.asked = {"forward": asked[:2], "dq": asked[2:], "dkdv": asked[2:]}
        self.bias, self.num_additional = bias_dtype is not None, num_additional
        self.constants = {
            "PER_KEY": per_key(rule),
            "ALIGN": math.gcd(16, *self.strides.values()),
            "D": self.dim,
            "DV": self.value_dim,
            "BLOCK_D": tiling.padded_channels(self.dim),
            "BLOCK_DV": tiling.padded_channels(self.value_dim),
            "PRECISION": "tf32" if tf32 else "ieee",
        }

    def _problem(self, kind: str, bias: bool) -> tuple[Any, ...]:
        """What decides the tiles of a kind of kernel."""
        sizes = self.space, self.key_space, self.dim, self.value_dim, self.itemsize
        return (kind, self.rule, *sizes, bias)

    def _tiled(self, kernel: Any, kind: str, **arguments: Any) -> Launch | Split | Trials:
        """A kernel with a program per tile; ``arguments`` are those that not all such have."""
        problem = self._problem(kind, self.bias)

        def launch(tiles: tiling.Tiles) -> Launch | Split:
            return self._launch(kernel, kind, tiles, arguments)

        name, count = tiling.key(*problem), tuning.wanted(backward=kind != "forward")
        if count > 1 and not any(map(any, self.asked[kind])) and tuning.lookup(name) is None:
            return Trials(
                name, {each: launch(each) for each in tiling.candidates(*problem)[:count]}
            )
        return launch(tiling.choose(*problem, *self.asked[kind]))

    def programs(self, kind: str, tile: Shape, space: Sequence[int]) -> tuple[int, Shape]:
        """How many programs a kind of kernel has, and how many tiles of queries or of keys
        ``space`` has per axis."""
        of_keys = kind == "dkdv"
        counts = tile_counts(self.rule, space, tile, of_keys)
        heads = self.kv_heads if of_keys else self.heads
        return math.prod(counts) * math.prod(self.rule.dilation) * self.batch * heads, counts

    def splits_of_additional(self, space: Sequence[int]) -> tuple[int, int]:
        """In how many splits additional tokens' gradients are summed, and queries of each."""
        return _splits(math.prod(space), 512, 64)

    def splits_of_rpb(self, tile: Shape, space: Sequence[int], sums: int) -> int:
        """In how many splits of tiles of queries the bias's gradient is summed, ``sums`` each."""
        counts = tile_counts(self.rule, space, tile)
        num_tiles = math.prod(counts) * math.prod(self.rule.dilation) * self.batch
        splits, _ = _splits(num_tiles, 4, 2048 // sums)
        return splits

    def _launch(
        self, kernel: Any, kind: str, tiles: tiling.Tiles, arguments: dict[str, Any]
    ) -> Launch | Split:
        found = None
        if kind == "dkdv":
            programs, counts = self.programs(kind, tiles.kv_block, self.key_space)
            found = self._shares(tiles)
            arguments = {**arguments, "SPLIT": found is not None}
            if found is not None:  # without the loop over heads, ptxas has products wait then
                arguments["SINGLE"] = False
        else:
            programs, counts = self.programs(kind, tiles.q_block, self.space)
        arguments = {
            **self.strides, **self.key_mask_strides, **self.sizes, **per_axis("T", counts),
            **self.numbers, **arguments, **self.constants, "MODES": self.modes,
            "Q_BLOCK": tiles.q_block, "KV_BLOCK": tiles.kv_block, "HAS_RPB": self.bias,
            "HAS_KEY_MASK": self.has_key_mask, "PACKED": self.packed,
        }  # fmt: skip
        grid = (programs,) if found is None else (programs, *found(programs))
        options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        if self.has_key_mask:
            sizes = self.dim, self.value_dim, self.itemsize
            options |= tiling.register_limit(kind, *sizes, tiles.num_warps)
        made = Launch(kernel, grid, arguments, **options)
        return made if found is None else Split(made, ("grad_key", "grad_value"), found)

    def _shares(self, tiles: tiling.Tiles) -> Callable[[int], tuple[int, int]] | None:
        """:func:`shares` of a number of tiles of keys; None where none is shared.

        Of a part, this is up to the problem that has its tiles, so that no part is another kernel.
        """
        rule, _, key_space = problem = tiling.typical(self.rule, self.space, self.key_space)
        count = math.prod(tile_counts(rule, key_space, tiles.kv_block, of_keys=True))
        programs = count * math.prod(self.rule.dilation) * self.batch * self.kv_heads
        most = _SHARING_PROGRAMS * tiling.gpu().multiprocessors
        if 2 * programs > most:
            return None
        pairs = math.prod(tiles.q_block) * math.prod(tiles.kv_block)
        blocks = tiling.computed_pairs("dkdv", *problem, tiles) / pairs
        blocks /= count * math.prod(rule.dilation)
        found = partial(shares, blocks, self.per_kv, most, programs)
        return None if found(programs) == (1, 1) else found

    @cached_property
    def forward(self) -> Launch | Split | Trials:
        return self._of_queries(forward_kernel, "forward")

    @cached_property
    def small(self) -> Launch | None:
        """The forward of small windows, where it runs in the place of :attr:`forward`."""
        is_asked = any(map(any, self.asked["forward"]))
        if is_asked or self.packed or self.num_additional:
            return None
        # Rows are copied 16 bytes at once, or 8 or 4 where heads lie no further apart.
        if self.itemsize * math.gcd(16, *self.strides.values()) < 4:
            return None
        sizes = self.space, self.key_space, self.dim, self.value_dim, self.itemsize
        found = small_tiles.choose(self.rule, *sizes, self.bias, self.scale)
        if found is None:
            return None
        assert isinstance(self.rule, Neighborhood)
        tiles, constants = found[1], self.constants
        windows = small_tiles.windows_of(self.rule)
        halo = tiles.halo(windows)
        self.small_shapes = tiles.program(), halo  # queries and keys of a program
        where = self.small_grid(self.space, self.key_space, self.all_strides)
        if where is None:
            return None
        grid, counts = where
        from .small import small_forward_kernel  # Triton must have Gluon

        known = {
            **self.strides, **self.key_mask_strides, **self.sizes, **per_axis("T", counts),
            **self.numbers, "heads": self.heads, "MODES": self.modes, "DILATED": grid[1] > 1,
            "PART": self.rule.query_offset is not None,
            "WARPS": tiles.warps, "Q_BLOCK": tiles.q_block, "KV_BLOCK": tiles.kv_block,
            "BLOCKS": tiles.blocks(windows), "HALO": halo,
            "CHUNK": small_tiles.rows_of_copy(math.prod(halo), self.itemsize),
            "ALIGN": constants["ALIGN"], "C": self.dim, "D": small_tiles.width(self.dim),
            "HAS_RPB": self.bias, "HAS_KEY_MASK": self.has_key_mask,
        }  # fmt: skip
        kernel = small_forward_kernel
        arguments = {name: known[name] for name in kernel.arg_names[len(kernel.tensors) :]}
        return Launch(
            kernel, grid, arguments, num_warps=math.prod(tiles.warps),
            maxnreg=small_tiles.REGISTERS,
        )  # fmt: skip

    def small_grid(
        self, space: Shape, key_space: Shape, strides: Sequence[Sequence[int]]
    ) -> tuple[Shape, Shape] | None:
        """The grid of :attr:`small`, and how many programs there are per axis; None where numbers
        of 32 bits do not do."""
        assert isinstance(self.rule, Neighborhood)
        program, halo = self.small_shapes
        counts = tile_counts(self.rule, space, program)
        grid = math.prod(counts), math.prod(self.rule.dilation), self.batch * self.heads
        farthest = [max(along) for along in zip(*(each[1:-2] for each in strides))]
        has_room = small_tiles.has_room(halo, self.rule, key_space, farthest, grid)
        return (grid, counts) if has_room else None

    @cached_property
    def bands_forward(self) -> Launch | None:
        """The forward of bands, where it runs in the place of :attr:`forward`."""
        return self._bands("forward")

    @cached_property
    def bands_dq(self) -> Launch | None:
        """dQ and ``lse_delta`` by bands, where it runs in the place of :attr:`dq`."""
        return self._bands("dq")

    @cached_property
    def bands_dkdv(self) -> Launch | None:
        """dK and dV by bands, where it runs in the place of :attr:`dkdv`."""
        return self._bands("dkdv")

    def _bands(self, kind: str) -> Launch | None:
        is_asked = any(map(any, self.asked[kind]))
        if is_asked or self.packed or self.num_additional:
            return None
        if math.gcd(4, *self.strides.values()) < 4:  # rows are copied 16 bytes at once
            return None
        sizes = self.space, self.key_space, self.dim, self.value_dim, self.itemsize
        tiles = band_tiles.choose(kind, self.rule, *sizes, self.bias, self.scale)
        if tiles is None:
            return None
        if kind == "dkdv" and self._shares(tiling.choose(*self._problem(kind, self.bias))):
            return None
        assert isinstance(self.rule, Neighborhood)
        heads = self.batch * (self.kv_heads if kind == "dkdv" else self.heads)
        grid, counts = band_tiles.grid(self.rule, self.space, tiles.program(), heads)
        if not self._has_room_for_lines(tiles.halo, grid):
            return None
        from .bands import KERNELS  # Triton must have Gluon

        known = {
            **self.strides, **self.sizes, **per_axis("T", counts), **self.numbers,
            "heads": self.heads, "MODES": self.modes, "DILATED": grid[1] > 1,
            "W": band_tiles.WARPS, "TILE": tiles.tile, "BLOCK": tiles.block, "HALO": tiles.halo,
            "ALIGN": self.constants["ALIGN"], "D": self.dim,
            **self.key_mask_strides, "HAS_KEY_MASK": self.has_key_mask,
        }  # fmt: skip
        kernel = KERNELS[kind]
        arguments = {name: known[name] for name in kernel.arg_names[len(kernel.tensors) :]}
        return Launch(
            kernel, grid, arguments, num_warps=band_tiles.WARPS,
            maxnreg=band_tiles.registers(kind, self.dim),
        )  # fmt: skip

    def _has_room_for_lines(self, halo: int, grid: Shape) -> bool:
        """Whether numbers of 32 bits say where in a line a token is, of ``dO``, too, and where an
        entry of the batch has a row of ``lse_delta``, or a mask a key."""
        assert isinstance(self.rule, Neighborhood)
        farthest = [max(along) for along in zip(*(each[1:-2] for each in self.all_strides))]
        line = 1, 1, halo
        has_room = small_tiles.has_room(line, self.rule, self.key_space, farthest, grid)
        steps = list(self.key_mask_strides.values())[1:]
        if sum((n - 1) * step for n, step in zip(padded(self.key_space, 1), steps)) >= 2**31:
            return False
        return has_room and 4 * self.dim * self.heads * math.prod(self.space) < 2**31

    @cached_property
    def dq(self) -> Launch | Split | Trials:
        """dQ and ``lse_delta``."""
        return self._of_queries(dq_kernel, "dq", HAS_GRAD_LSE=False)

    @cached_property
    def dq_with_grad_lse(self) -> Launch | Split | Trials:
        """As :attr:`dq`, where the LSE has a gradient, too."""
        return self._of_queries(dq_kernel, "dq", HAS_GRAD_LSE=True)

    def _of_queries(self, kernel: Any, kind: str, **arguments: Any) -> Launch | Split | Trials:
        return self._tiled(
            kernel, kind, heads=self.heads, num_additional=self.num_additional or 0,
            HAS_ADDITIONAL=bool(self.num_additional), **self.additional_mask_strides,
            HAS_ADDITIONAL_MASK=self.has_additional_mask, **arguments,
        )  # fmt: skip

    @cached_property
    def dkdv(self) -> Launch | Split | Trials:
        # Without the loop over heads, ptxas spills what it then keeps beside two sums of 128
        # channels; narrower ones are up to a quarter faster (benchmarks/results/h200.md).
        single = self.per_kv == 1 and max(self.dim, self.value_dim) <= 64
        fine = zip(self.rule.queries_per_key, self.rule.dilation)
        even = "circular" not in self.rule.boundary and all(r == 1 or d == 1 for r, d in fine)
        return self._tiled(dkdv_kernel, "dkdv", kv_heads=self.kv_heads, SINGLE=single, EVEN=even)

    @cached_property
    def additional(self) -> tuple[int, Launch]:
        """The additional tokens' gradients in splits: how many, and the kernel."""
        assert self.num_additional is not None
        splits, per_split = self.splits_of_additional(self.space)
        constants = {name: x for name, x in self.constants.items() if name != "PER_KEY"}
        arguments = {
            **self.query_strides, **self.additional_mask_strides, **per_axis("L", self.space),
            "kv_heads": self.kv_heads, **self.numbers, "num_additional": self.num_additional,
            "per_split": per_split, "HAS_ADDITIONAL_MASK": self.has_additional_mask,
            **constants, "M": 32, "N": 16,
        }  # fmt: skip
        grid = (self.batch * self.kv_heads, -(-self.num_additional // 16), splits)
        return splits, Launch(additional_kernel, grid, arguments)

    @cached_property
    def rpb(self) -> tuple[tuple[int, ...], list[tuple[Launch, Launch]]]:
        """The bias's gradient: the shape of the sums between its two kernels, and these, for as
        many heads at once as their sums have room for."""
        assert not isinstance(self.rule, Dense)
        kernel_size = padded(self.rule.kernel_size, 1)
        # As of dQ without a bias, also where those were tuned: a program loads its biases once.
        tiles = tiling.choose(*self._problem("dq", False), *self.asked["dq"])
        # A window begins half of it before its query, at the ends of an axis up to all of it.
        apart, blocks = [], []
        for k, rows, columns in zip(kernel_size, tiles.q_block, tiles.kv_block):
            apart.append(-(k // 2) - math.ceil((k - 1 - k // 2) / columns) * columns)
            blocks.append(math.ceil((rows + k - 1 - apart[-1]) / columns))
        num_blocks = math.prod(blocks)
        pairs = math.prod(tiles.q_block), math.prod(tiles.kv_block)
        heads = max(1, min(self.heads, MOST_SUMS // (num_blocks * math.prod(pairs))))
        splits = self.splits_of_rpb(tiles.q_block, self.space, num_blocks * heads)
        of_blocks = {
            **per_axis("O", apart), "B1": blocks[1], "B2": blocks[2],
            "Q_BLOCK": tiles.q_block, "KV_BLOCK": tiles.kv_block,
        }  # fmt: skip
        arguments = {
            **self.strides, **self.key_mask_strides, **self.sizes, "heads": self.heads,
            **self.numbers, "batches": self.batch, **of_blocks, **self.constants,
            "MODES": self.modes, "HAS_KEY_MASK": self.has_key_mask,
        }  # fmt: skip
        stages = tiling.stages_of_both(tiles, self.dim, self.value_dim, self.itemsize)
        options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": stages}
        launches = []
        for first in range(0, self.heads, heads):
            count, these = min(heads, self.heads - first), {"first_head": first}
            grid = num_blocks, splits, count
            each = Launch(rpb_grad_kernel, grid, arguments | these, **options)
            add_up = sum_of_bias(
                kernel_size, tiles.q_block, tiles.kv_block, apart, blocks, splits, count, first
            )
            launches.append((each, add_up))
        return (splits, heads, num_blocks, *pairs), launches


def sum_of_bias(
    kernel_size: Shape,
    tile: Shape,
    block: Shape,
    apart: Sequence[int],
    blocks: Sequence[int],
    splits: int,
    heads: int,
    first_head: int = 0,
) -> Launch:
    """What adds up ``sums`` of dS to the gradient of the bias of so many heads.

    Args:
        kernel_size: of the problem, of three axes.
        tile, block: queries and keys of a sum.
        apart: how far the first block is from its tile, per axis.
        blocks: how many there are, per axis.
        splits: how many sums there are of each block.
    """
    offsets = math.prod(2 * k - 1 for k in kernel_size)
    at_once, warps = (16, 8) if splits > 16 else (8, 4)
    arguments = {
        **per_axis("K", kernel_size), **per_axis("O", apart), "B1": blocks[1], "B2": blocks[2],
        "first_head": first_head, "blocks": math.prod(blocks), "splits": splits,
        "offsets": offsets, "Q_BLOCK": tile, "KV_BLOCK": block, "BLOCK": 4, "SPLITS": at_once,
    }  # fmt: skip
    return Launch(rpb_grad_sum_kernel, (-(-offsets // 4), heads), arguments, num_warps=warps)


def strides_of_mask(strides: Sequence[int]) -> dict[str, int]:
    """Arguments ``m_b`` and ``m_0`` to ``m_2``: strides of a mask ``[batch or 1, *key_space]``."""
    batch, *space = strides
    return dict(zip(("m_b", "m_0", "m_1", "m_2"), (batch, *padded(space, 0))))


def with_mask(
    strides: Sequence[Sequence[int]], key_mask: Sequence[int] | None
) -> list[Sequence[int]]:
    """Strides of all tensors ``[batch, *space, heads, channels]``, and of a mask as of such."""
    return [*strides, *([] if key_mask is None else [(*key_mask, 0, 0)])]


class Part:
    """The plan of a part of a layout: that of another part, whose kernels have other numbers. Those
    that differ are a kernel's first ones.

    So what a new offset, a longer cache of keys or a part of another size costs on the host is
    little more than a call that was made before, and no kernel is compiled.

    Args:
        plan: the other part's.
        offset: queries before the first one.
        shapes, strides: of query, key and value.
        key_mask: strides of a mask of keys.
    """

    def __init__(
        self,
        plan: Plan,
        offset: Shape,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        key_mask: Shape | None,
    ) -> None:
        self.plan, self.offset = plan, offset
        self._strides, self._key_mask = strides, key_mask
        self.space, self.key_space = shapes[0][1:-2], shapes[1][1:-2]
        missing = 3 - len(self.space)
        none, one = (0,) * missing, (1,) * missing
        numbers = [*none, *offset]
        for batch, *space, heads, _ in strides:
            numbers += (batch, *none, *space, heads)
        numbers += (*one, *self.space, *one, *self.key_space)
        # ``P``, the strides ``q``, ``k`` and ``v``, then ``L`` and ``KEY_L``.
        self._numbers = numbers
        self._mask_strides = () if key_mask is None else (*strides_of_mask(key_mask).values(),)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def _moved(self, launch: Any, kind: str) -> Any:
        """A kernel with a program per tile."""
        plan, of_keys = self.plan, kind == "dkdv"
        space, own = (self.key_space, plan.key_space) if of_keys else (self.space, plan.space)
        if space == own:
            grid, counts = launch.grid, launch.values[len(self._numbers) :][:3]
        else:
            tile = launch.arguments["KV_BLOCK" if of_keys else "Q_BLOCK"]
            programs, counts = plan.programs(kind, tile, space)
            grid = programs, *(launch.shares(programs) if isinstance(launch, Split) else ())
        return launch.moved(grid, (*self._numbers, *counts, *self._mask_strides))

    @cached_property
    def forward(self) -> Launch:
        return self._moved(self.plan.forward, "forward")

    @cached_property
    def small(self) -> Launch | None:
        launch = self.plan.small
        if launch is None:
            return None
        strides = with_mask(self._strides, self._key_mask)
        found = self.plan.small_grid(self.space, self.key_space, strides)
        if found is None:
            return None
        grid, counts = found
        return launch.moved(grid, (*self._numbers, *counts, *self._mask_strides))

    @cached_property
    def dq(self) -> Launch:
        return self._moved(self.plan.dq, "dq")

    @cached_property
    def dq_with_grad_lse(self) -> Launch:
        return self._moved(self.plan.dq_with_grad_lse, "dq")

    @cached_property
    def dkdv(self) -> Launch | Split:
        return self._moved(self.plan.dkdv, "dkdv")

    @cached_property
    def additional(self) -> tuple[int, Launch]:
        _, launch = self.plan.additional
        splits, per_split = self.plan.splits_of_additional(self.space)
        numbers = *self._numbers[3:8], *padded(self.space, 1), per_split  # strides of queries
        return splits, launch.moved((*launch.grid[:2], splits), numbers)

    @cached_property
    def rpb(self) -> tuple[tuple[int, ...], list[tuple[Launch, Launch]]]:
        (_, heads, blocks, *pairs), launches = self.plan.rpb
        tile = launches[0][0].arguments["Q_BLOCK"]
        splits = self.plan.splits_of_rpb(tile, self.space, blocks * heads)
        numbers, moved = (*self._numbers, *self._mask_strides), []
        for each, add_up in launches:
            grid = blocks, splits, each.grid[2]
            moved.append((each.moved(grid, numbers), add_up.moved(add_up.grid, (splits,))))
        return (splits, heads, blocks, *pairs), moved


class OtherQueries:
    """The plan of other queries of a ``part``'s layout: its kernels' first numbers are others."""

    def __init__(self, part: Any, numbers: tuple[int, ...]) -> None:
        self.part, self._numbers = part, numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def _moved(self, launch: Any) -> Any:
        return launch.moved(launch.grid, self._numbers)

    @cached_property
    def forward(self) -> Any:
        return self._moved(self.part.forward)

    @cached_property
    def dq(self) -> Any:
        return self._moved(self.part.dq)


class Moved(OtherQueries):
    """The plan of a ``part``'s queries from ``offset`` on."""

    def __init__(self, part: Part, offset: Shape) -> None:
        super().__init__(part, padded(offset, 0))

    @cached_property
    def small(self) -> Launch | None:
        return None if self.part.small is None else self._moved(self.part.small)

    @cached_property
    def dq_with_grad_lse(self) -> Launch:
        return self._moved(self.part.dq_with_grad_lse)

    @cached_property
    def dkdv(self) -> Launch | Split:
        return self._moved(self.part.dkdv)

    @cached_property
    def rpb(self) -> tuple[tuple[int, ...], list[tuple[Launch, Launch]]]:
        shape, launches = self.part.rpb
        return shape, [(self._moved(each), add_up) for each, add_up in launches]


# Of one kind, layouts, as the lengths of a growing cache of keys come again in all layers and with
# the next stream; and parts of these that take turns.
KEPT_LAYOUTS, KEPT_PARTS = 128, 256


class Parts(Bounded):
    """Plans of parts of one kind, one for each layout, by how their tensors lie.

    Attributes:
        plans: those that parts are made of, by what decides what their kernels are compiled for.
        moved: of these parts, other queries, by the part and their offset.
    """

    def __init__(self) -> None:
        super().__init__(KEPT_LAYOUTS)
        self.plans, self.moved = Bounded(KEPT_LAYOUTS), Bounded(KEPT_PARTS)

    def at(self, part: Any, offset: Shape | None, move: Callable[[], Any]) -> Any:
        """A part, or if its queries have another offset, what ``move`` makes of it."""
        if part.offset == offset:
            return part
        return self.moved.find((part, offset), move)


@tuning.cached
def parts_of(*kind: Any) -> Parts:
    """What parts share that differ in where they are; ``kind`` says what else they are."""
    return Parts()


def windows_of(rule: Neighborhood) -> tuple[Any, ...]:
    """A rule but its offset."""
    return (
        rule.kernel_size, rule.stride, rule.dilation, rule.is_causal, rule.boundary,
        rule.queries_per_key,
    )  # fmt: skip


def has_shared_kernels(rule: Rule, *strides: Sequence[int]) -> bool:
    """Whether a problem's kernels may be those of another part."""
    if isinstance(rule, Dense) or rule.query_offset is None:
        return False
    # Triton compiles for numbers of 64 bits. Tiles are timed problem by problem.
    timed = tuning.wanted(backward=False) or tuning.wanted(backward=True)
    return not timed and max(map(max, strides), default=0) < 2**31


# Calls of one shape come again: a model has few.
_cached_plan = tuning.cached(Plan)


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
    masks: Sequence[Tensor | None] = (None, None),
) -> Plan | Part | Moved:
    """The plan of a call; tensors have channels one after another. ``masks``: of keys and of
    additional ones."""
    shapes = query.shape, key.shape, value.shape
    strides = query.stride(), key.stride(), value.stride()
    others = (
        None if rpb is None else rpb.dtype,
        None if additional_keys is None else additional_keys.shape[1],
        None if documents is None else documents.sizes,
        tiles,
        query.dtype == torch.float32 and allows_tf32(),
    )
    of_masks = mask_strides(masks[0]), mask_strides(masks[1])
    what = scale, query.device, query.dtype, shapes, strides, *others, of_masks
    if isinstance(rule, Dense) or not has_shared_kernels(rule, *strides, of_masks[0] or (0,)):
        return _cached_plan(rule, *what)
    assert rule.query_offset is not None
    batch, *space, heads, dim = query.shape
    parts = parts_of(
        *windows_of(rule), scale, query.device, query.dtype, batch, tiling.part_size(tuple(space)),
        heads, dim, key.shape[-2], value.shape[-1],
        math.gcd(16, *strides[0][:-1], *strides[1][:-1], *strides[2][:-1]), *others,
        of_masks[0] is not None, of_masks[1],
    )  # fmt: skip
    lie, offset = (shapes, strides, of_masks[0]), rule.query_offset

    def make() -> Part:
        return Part(parts.plans.find((), Plan, rule, *what), offset, *lie)

    part: Part = parts.find(lie, make)
    found: Part | Moved = parts.at(part, offset, lambda: Moved(part, offset))
    return found


def mask_strides(mask: Tensor | None) -> tuple[int, ...] | None:
    """Strides of a mask, that of the batch 0 where all entries have the same."""
    if mask is None:
        return None
    batch, *others = mask.stride()
    return (batch if mask.shape[0] > 1 else 0, *others)
