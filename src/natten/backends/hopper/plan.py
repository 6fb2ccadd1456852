"""What a call's shapes decide, worked out once: tiles, grids, constants of its kernels."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from operator import floordiv, mod
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...documents import Documents, Sizes
from ...neighborhood import Dense, Neighborhood, Rule
from ...tiling import padded
from ..interface import Shape, Tiles
from ..triton import plan as portable
from ..triton.launch import Launch, Trials, per_axis
from ..triton.plan import MaskStrides, mask_strides
from ..triton.primitives import LOG2E
from ..triton.windows import modes
from . import bias_tables, costs, ds_plan, sets_plan, widths
from . import tiles as tiling
from .backward import backward_kernel
from .bias_gradient import bias_gradient_kernel
from .bias_plan import Biased, BiasGradient
from .cuts import OWN, WARPS, cuts, queries, tile_and_block, tile_sizes, tiled, warpgroups
from .descriptors import View, contiguous_strides
from .documents_plan import Packed, most_tiles
from .ds_plan import ThroughMemory
from .flat import Flat, columns_of_rule
from .flat_plan import NAMES, FlatColumns, row_of, row_of_mask
from .forward import forward_kernel
from .lse_delta import lse_delta_kernel
from .passes import Passes, compiled
from .programs import programs_of
from .views import Views

# The passes of the kinds of kernels that sum gradients.
PASSES = {"dq": costs.DQ, "dkdv": costs.DKDV, "dk": costs.DK, "dv": costs.DV}

_Launches = Launch | Passes | Biased | Packed | Trials


class Plan:
    """The kernels of one problem; see :func:`plan_for` for the arguments."""

    def __init__(
        self,
        rule: Rule,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        num_additional: int,
        bias_dtype: torch.dtype | None = None,
        packed: Sizes | None = None,
        masks: MaskStrides = (None, None),
    ) -> None:
        self.packed = packed
        self.scale, self.device, self.dtype = scale, device, dtype
        self.num_additional, self.bias_dtype = num_additional, bias_dtype
        self.batch, *_, self.heads, self.dim = shapes[0]
        self.kv_heads, self.value_dim = shapes[2][-2:]
        key_mask, self.additional_mask_strides = masks
        self._lay(rule, shapes, strides, key_mask)
        # By kind: the kernel's tiles, and how many programs take them in turn at most; None if each
        # tile has a program of its own.
        self.cuts: dict[str, tuple[Tiles, int | None]] = {}
        self.queries = queries(rule, self.space)
        self.dilation = padded(rule.dilation, 1)
        self.modes = modes(rule, self._units() if packed is None else [2] * rule.rank)
        self.kept = dict(self.__dict__)  # without kernels

    def _lay(
        self,
        rule: Rule,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        key_mask: Shape | None,
    ) -> None:
        """Where the queries are, how large the layouts are, and how the tensors lie, the last of
        which may be a mask of keys."""
        self.key_mask_strides = key_mask
        self.rule, self.shapes, self.strides = rule, shapes, strides
        self.tokens, self.key_tokens = shapes[0][1:-2], shapes[1][1:-2]
        self.space, self.key_space = self.tokens, self.key_tokens
        if self.packed is not None:
            _, self.space, self.key_space = self.packed
        others = self.dtype, self.num_additional, self.packed, key_mask
        self.views = Views(rule, shapes, strides, *others)

    def _cleared(self) -> dict[str, Shape]:
        """What kernels set to zero of the channels of queries and keys, and of values."""
        dims = (0, 0) if self.packed is not None else (self.dim, self.value_dim)
        return dict(zip(("QK_CLEARED", "V_CLEARED"), map(widths.cleared, dims)))

    def _units(self) -> list[int]:
        """Per axis, 1 if there is one token now and always."""
        if self.queries == OWN or isinstance(self.rule, Dense):
            return list(self.space)
        # A window of more than one key is of a cache that grows.
        return [max(each) for each in zip(self.space, self.key_space, self.rule.kernel_size)]

    @cached_property
    def forward(self) -> _Launches:
        return self._tiled("forward")

    @cached_property
    def dq(self) -> _Launches:
        return self._tiled("dq")

    @cached_property
    def dkdv(self) -> _Launches:
        return self._tiled("dkdv")

    @cached_property
    def dkdv_of_additional(self) -> Launch | Passes | Trials | None:
        """Of additional tokens, which are the keys of plain attention of all queries; None where
        the portable kernel is faster: it has smaller tiles, and splits the queries."""
        query = torch.empty_strided(self.shapes[0], self.strides[0], device="meta").flatten(1, -3)
        keys, values = (
            (self.batch, self.num_additional, self.kv_heads, dim)
            for dim in (self.dim, self.value_dim)
        )
        plan = _plan(
            Dense(), self.scale, self.device, self.dtype, (query.shape, keys, values),
            (query.stride(), contiguous_strides(keys), contiguous_strides(values)), 0, None,
            None, (self.additional_mask_strides, None),
        )  # fmt: skip
        tiles = tiling.choose(*plan._problem("dkdv"))
        size = math.prod(tile_sizes(tiles, True))
        # With each query, a processor computes the pairs of so many tokens.
        processors, heads = _processors(self.device), self.batch * self.kv_heads
        programs, resident = heads * -(-self.num_additional // size), tiles.resident_programs
        ours = -(-programs // (processors * resident)) * resident * size
        theirs = heads * -(-self.num_additional // 16) * 16 / processors
        dkdv = plan.dkdv
        assert not isinstance(dkdv, Biased | Packed)
        return dkdv if ours < _PORTABLE_TIME * theirs else None

    @cached_property
    def lse_delta(self) -> dict[bool, Launch]:
        """What the passes need per query, and zeros where they store nothing; by whether the LSE
        has a gradient, too."""
        dim, (programs, numbers) = self.value_dim, self.before_passes(self.key_spans)
        names = lse_delta_kernel.arg_names[len(lse_delta_kernel.tensors) :]
        arguments = {
            **dict(zip(names, numbers)), "DV": dim, "BLOCK_DV": widths.native(dim),
            "M": _ROWS_AT_ONCE, "TOKENS": _KEYS_AT_ONCE,
        }  # fmt: skip
        return {
            given: Launch(
                lse_delta_kernel, (programs,), arguments | {"HAS_GRAD_LSE": given},
                kernels=compiled("lse_delta", self.device, self.dtype, dim, given),
            )
            for given in (False, True)
        }  # fmt: skip

    def before_passes(self, key_spans: Sequence[tuple[int, int]]) -> tuple[int, tuple[int, ...]]:
        """Programs and numbers of :attr:`lse_delta`: queries of all heads, keys that may have no
        tile, the layout of keys, which of them have, and channels of all heads, by eights."""
        rows = self.batch * math.prod(self.tokens) * self.heads
        layout, attended = self.key_tokens, [(0, n) for n in self.key_tokens]
        if self.packed is None:  # else every key of a document is in a tile
            attended = self.attended(key_spans)
        is_all = attended == [(0, n) for n in layout]
        tokens = 0 if is_all else self.batch * math.prod(layout)
        programs = -(-rows // _ROWS_AT_ONCE) + -(-tokens // _KEYS_AT_ONCE)
        return programs, (
            rows, tokens, *padded(layout, 1), *padded([first for first, _ in attended], 0),
            *padded([end for _, end in attended], 1), self.kv_heads * self.dim // 8,
            self.kv_heads * self.value_dim // 8,
        )  # fmt: skip

    @cached_property
    def through_memory(self) -> ThroughMemory | None:
        """The backward of plain attention that makes dQ of dS in memory, if that takes less."""
        row = self.in_a_row("gradient")
        if row is not None:
            return row.through_memory
        rule, width = self.rule, widths.native(self.value_dim)
        if not isinstance(rule, Dense) or rule.causal or widths.are_half_aligned(self.dim):
            return None
        if widths.chunks(self.dim) != (_THROUGH_MEMORY,) or width != _THROUGH_MEMORY:
            return None
        dkdv = self.dkdv
        if self.packed is not None or self.num_additional or not isinstance(dkdv, Launch):
            return None
        lengths, sets = (self.space[0], self.key_space[0]), self.batch * self.kv_heads
        processors = _processors(self.device)
        share = ds_plan.share_of(*lengths, sets, self.heads // self.kv_heads, processors)
        if share is None:
            return None
        tiles, _ = self.cuts["dkdv"]
        work = costs.work("dkdv", self.dim, self.value_dim, columns_of_rule(rule))
        mask = costs.mask("dkdv", rule, self.space, self.key_space, tiles, work)
        tiles, views = ds_plan.with_room_for_ds(tiles, mask, work), self.views
        return ThroughMemory(
            dkdv, tiles, views.key, views.grad_query, self.device, self.dtype, share
        )  # fmt: skip

    def in_a_row(self, pass_: str) -> Plan | None:
        """The plan of all tokens in a row, if that is faster (``flat.py``): "forward", or of the
        "gradient"."""
        return self._rows[pass_ == "forward"]

    @cached_property
    def _rows(self) -> tuple[Plan | None, Plan | None]:
        return self._row("dq", "dkdv"), self._row("forward")

    def _row(self, *kinds: str) -> Plan | None:
        others = self.packed, self.bias_dtype, self.num_additional or None
        if any(each is not None for each in others):
            return None
        dims = widths.aligned(self.dim), widths.aligned(self.value_dim)
        rule = tiling.in_a_row(kinds, self.rule, self.space, *dims)
        shapes, strides = zip(*map(row_of, self.shapes, self.strides))
        mask = self.key_mask_strides and row_of_mask(self.key_space, self.key_mask_strides)
        if rule is None or None in strides or (mask is None) != (self.key_mask_strides is None):
            return None
        if any(tuning.lookup(tiling.key(*self._problem(kind))) is not None for kind in kinds):
            return None  # tiles of windows were measured
        found: Plan = _plan(
            rule, self.scale, self.device, self.dtype, shapes, strides, 0, None, None, (mask, None)
        )  # fmt: skip
        return found

    @cached_property
    def columns(self) -> FlatColumns | None:
        """What makes the factors of a flat rule's mask."""
        return FlatColumns(self.rule, self.tokens[0]) if isinstance(self.rule, Flat) else None

    def made_columns(self, pass_: str) -> dict[str, Tensor | None]:
        """The factors of masks that kernels of a pass read, None if there are none."""
        row = self.in_a_row(pass_)
        if row is None or row.columns is None:
            return dict.fromkeys(NAMES)
        return row.columns.make(self.device)

    @cached_property
    def portable(self) -> portable.Plan | portable.Part:
        """The portable backend's: what every query reaches is as there."""
        return portable.Plan(
            self.rule, self.scale, self.device, self.dtype, self.shapes, self.strides,
            None, self.num_additional or None, None, (), False,
            (self.key_mask_strides, self.additional_mask_strides),
        )  # fmt: skip

    def _tiled(self, kind: str) -> _Launches:
        """A kernel with its tiles, or those among which the first call chooses."""
        row = self.in_a_row("forward" if kind == "forward" else "gradient")
        if row is not None:
            return getattr(row, kind)  # of the same tensors, whose tokens it sees in a row
        problem = self._problem(kind)
        count = tuning.wanted(backward=kind != "forward")
        if count > 1 and tuning.lookup(name := tiling.key(*problem)) is None:
            candidates = tiling.candidates(*problem)[:count]
            launches = {tiles: self._launch(kind, tiles, is_trial=True) for tiles in candidates}
            return Trials(name, launches)
        own = *problem, self.bias_dtype is not None
        return self._launch(kind, tiling.choose(*own))

    def _problem(self, kind: str) -> tuple[Any, ...]:
        """What decides the tiles of a kernel."""
        sizes = self.space, self.key_space, self.dim, self.value_dim, self.dtype.itemsize
        return (kind, self._typical_rule, *sizes, self.packed is not None)

    @cached_property
    def _typical_rule(self) -> Rule:
        """The rule for which tiles are chosen: of packed documents, that of the longest."""
        if self.packed is None or isinstance(self.rule, Dense):
            return self.rule
        return self.rule.fitted(self.space)

    def _launch(
        self, kind: str, tiles: Tiles, is_trial: bool = False
    ) -> Launch | Passes | Biased | Packed:
        rule, of_keys = self.rule, kind == "dkdv"
        work = costs.work(kind, self.dim, self.value_dim, columns_of_rule(rule))
        is_packed = self.packed is not None
        mask = costs.mask(kind, rule, self.space, self.key_space, tiles, work, is_packed)
        heads_at_once = self._heads_at_once(work)
        if kind == "forward" and not is_trial:
            tiles = self._paired(tiles, mask, work)
        if self.key_mask_strides is not None and not of_keys:
            tiles, mask, work = costs.masked(tiles, mask, work)
        pieces = costs.pieces(kind, rule, self.space, tiles, is_packed)
        boxes = costs.boxes(tiles, of_keys, pieces.piece, is_packed)
        tile, block = tile_and_block(tiles, of_keys)
        registers, compute_registers, fetch_registers = costs.registers(tiles, work)
        heads = self.kv_heads if of_keys else self.heads
        each_cycles = costs.cycles(tiles, mask, work)
        self.cuts[kind] = tiles, self._most_programs(kind, tiles, each_cycles, heads_at_once)
        programs, of_tiles = self.programs(kind, self.key_spans)
        num_additional = 0 if of_keys else self.num_additional
        kernel = forward_kernel if kind == "forward" else backward_kernel
        first = *self.location(rule), *of_tiles, *self.views.steps_of_stored(kind)
        kernel_size, stride = (
            ((), ()) if isinstance(rule, Dense) else (rule.kernel_size, rule.stride)
        )
        numbers = {
            **dict(zip(kernel.arg_names[len(kernel.tensors) :], first)),
            "additional_b": self.num_additional * self.kv_heads,
            **per_axis("K", kernel_size),
            **per_axis("S", stride),
            **per_axis("D", rule.dilation),
            **per_axis("R", rule.queries_per_key),
            "heads": heads,
            "heads_per_kv": self.heads // self.kv_heads,
            "heads_at_once": heads_at_once,
            "num_additional": num_additional,
            "scale_log2": _exact_thrice(self.scale * LOG2E.value),
            "bias_size": 0,
            "bias_middle": 0,
            **dict(zip(("a_b", "a_0"), self.additional_mask_strides or (0, 0))),
        }
        if kind != "forward":
            numbers["first_tile"] = 0
        constants = {
            "MODES": self.modes,
            "TILE": tile,
            "BLOCK": block,
            "SPLIT_AXIS": tiles.split_axis,
            "WARPGROUPS": warpgroups(tiles),
            "STAGES": tiles.num_stages,
            "MASK": mask.kind,
            "ENDS": mask.ends,
            "BY_ROW": mask.by_row,
            "STEPS": mask.steps,
            "TABLES": mask.tables,
            "HAS_ADDITIONAL": num_additional > 0,
            "OWN_OUT": costs.own_out(tiles, mask, work),
            "REGISTERS": compute_registers,
            "FETCH_REGISTERS": fetch_registers,
            "DILATED": max(rule.dilation) > 1,
            "QUERIES": self.queries,
            "PIECE": pieces.piece,
            "SEAM_PIECE": pieces.at_seam,
            "HEADS_FIRST": isinstance(rule, Dense) or heads_at_once > 1,
            "PACKED": is_packed,
            "BIAS_STRIDES": (),
            "HAS_KEY_MASK": self.key_mask_strides is not None,
            "HAS_ADDITIONAL_MASK": self.additional_mask_strides is not None and not of_keys,
            **self._cleared(),
        }
        table = None
        if self.bias_dtype is not None:
            table = self._table(kernel_size, tiles, of_keys, pieces.at_seam)
            numbers |= {"bias_size": table.size, "bias_middle": table.middle}
            constants["BIAS_STRIDES"] = table.strides
        launches = []
        for each in self._passes(kind):
            slices, width = self._slices(each)
            constants["SLICES"] = slices
            constants["QK_CHUNKS"] = widths.chunks(self.dim)
            whole = widths.chunks(self.value_dim)
            constants["V_CHUNKS"] = (width,) if slices > 1 else whole
            if each != "forward":
                # Between passes of packed documents, tables of their tiles are made, and between
                # those on trial, which differ in their tiles, tables of the bias.
                constants["OVERLAP"] = not is_packed and (table is None or not is_trial)
                constants["PASS"] = PASSES[each]
                constants["LEAVE_DS"] = False
            if each == "dv":  # it has no values in shared memory, which would be as wide
                constants["OWN_OUT"] = True
            kept = compiled(
                each, self.device, self.dtype, widths.native(self.dim), width, registers,
                *constants.values(),
            )  # fmt: skip
            descriptors = self.views.descriptors(each, boxes, width)
            descriptors |= self.views.additional(each, tiles, width)
            if pieces.at_seam != pieces.piece:
                small = costs.boxes(tiles, of_keys, pieces.at_seam, is_packed)
                descriptors |= self.views.at_seam(each, small, width)
            if self.columns is not None:
                descriptors |= self.columns.descriptors(tiles)
            launches.append(
                Launch(
                    kernel,
                    (programs, slices),
                    numbers | constants,
                    descriptors,
                    kept,
                    num_warps=WARPS,
                    maxnreg=registers,
                    launch_pdl=_can_overlap(),
                )
            )
        launch = launches[0] if len(launches) == 1 else Passes(launches)
        if self.packed is not None:
            is_causal = isinstance(rule, Dense) and rule.causal
            sizes = tile_sizes(tiles, of_keys)
            return Packed(
                launch, self._most_tiles(kind), self.packed.number, sizes, of_keys,
                from_the_end=is_causal and not of_keys,  # later queries attend more keys
            )  # fmt: skip
        if table is None:
            return launch
        others = kernel_size, self.heads, self.scale, of_keys
        at_end = kind != "forward" and not is_trial
        return Biased(launch, table, *others, waits_at_end=at_end, overlap=_can_overlap())

    def _paired(self, tiles: Tiles, mask: costs.Mask, work: costs.Work) -> Tiles:
        """:func:`costs.paired` of plain attention whose tiles are alike and fill all processors."""
        rule, (tokens, *_), (keys, *_) = self.rule, self.space, self.key_space
        is_alike = isinstance(rule, Dense) and not rule.causal and self.columns is None
        if not is_alike or self.packed is not None:
            return tiles
        if tuning.lookup(tiling.key(*self._problem("forward"))) is not None:
            return tiles  # that were measured
        count = self.batch * self.heads * -(-tokens // (2 * costs.ROWS))
        if count < _processors(self.device):
            return tiles
        blocks = -(-keys // math.prod(tiles.kv_block))
        return costs.paired(tiles, mask, work, tokens, blocks)

    def _passes(self, kind: str) -> tuple[str, ...]:
        """What a kind of kernel runs: itself, or a pass for each of two gradients."""
        apart = kind == "dkdv" and not widths.are_together(self.dim, self.value_dim)
        return ("dk", "dv") if apart else (kind,)

    def _slices(self, each: str) -> tuple[int, int]:
        """In how many slices one of :meth:`_passes` takes values, and how wide their blocks are."""
        if each in ("forward", "dv"):
            return widths.slices(self.dim, self.value_dim)
        return 1, widths.native(self.value_dim)

    def _table(
        self, kernel_size: Shape, tiles: Tiles, of_keys: bool, piece: Shape
    ) -> bias_tables.Table:
        """The table of the bias for a kernel's tiles."""
        _, block = tile_and_block(tiles, of_keys)
        # On a ring blocks may begin up to a piece earlier.
        boundary = padded(self.rule.boundary, "shift")
        earlier = [n if each == "circular" else 1 for n, each in zip(piece, boundary)]
        return bias_tables.table(kernel_size, tile_sizes(tiles, of_keys), block, earlier)

    @cached_property
    def bias_gradient(self) -> BiasGradient | None:
        """The gradient of the bias; None if it is left to the portable backend."""
        rule, dims = self._rule_of_sets, (self.dim, self.value_dim)
        if rule is None:
            return None
        sizes = self.space, self._sets, self.heads, dims, _processors(self.device)
        found = sets_plan.block_by_block(rule, *sizes)
        return None if found is None else self._bias_gradient(found, has_dq=False)

    @cached_property
    def dq_and_bias(self) -> BiasGradient | None:
        """What makes dQ and the gradient of the bias, if one kernel does; not if tiles of dQ alone
        are to be measured, or were."""
        rule = self._rule_of_sets
        if rule is None or self.bias_dtype is None or self.num_additional:
            return None
        if max(widths.native(self.dim), widths.native(self.value_dim)) > sets_plan.WHOLE_CHANNELS:
            return None
        is_measured = tuning.lookup(tiling.key(*self._problem("dq"))) is not None
        if is_measured or tuning.wanted(backward=True) > 1:
            return None
        sizes = self.space, self._sets, self.heads, _processors(self.device)
        found = sets_plan.all_blocks(rule, *sizes)
        return None if found is None else self._bias_gradient(found, has_dq=True)

    @property
    def _rule_of_sets(self) -> Neighborhood | None:
        """The rule, if a tile looks alike in all dilation groups."""
        rule, is_own = self.rule, self.queries == OWN and self.packed is None
        if isinstance(rule, Dense) or not is_own or "circular" in rule.boundary:
            return None
        return rule

    @property
    def _sets(self) -> int:
        """Batch entries and dilation groups."""
        return self.batch * math.prod(self.rule.dilation)

    def _bias_gradient(self, found: sets_plan.InSets, has_dq: bool) -> BiasGradient:
        kernel, rule, cut, table = bias_gradient_kernel, found.rule, found.cut, found.table
        views = self.views
        of_grad_out, rows = views.steps_of_stored("dq")[:6], views.steps_of_stored("forward")
        read = *views.steps, *views.mask_steps, *views.lengths[:3]
        first = *read, *of_grad_out, *rows
        numbers = {
            **dict(zip(kernel.arg_names[len(kernel.tensors) :], first)),
            **per_axis("K", rule.kernel_size),
            **per_axis("S", rule.stride),
            **per_axis("D", rule.dilation),
            **per_axis("A", cut.apart),
            **dict(zip(("B1", "B2"), found.programs_of_tile[1:])),
            "batches": self.batch,
            "heads_per_kv": self.heads // self.kv_heads,
            "scale_log2": _exact_thrice(self.scale * LOG2E.value),
            "bias_size": table.size,
            "bias_middle": table.middle,
        }
        constants = {
            "MODES": self.modes,
            "TILE": cut.tile,
            "BLOCK": cut.block,
            "BLOCKS": found.blocks,
            "STAGES": found.stages[0],
            "BLOCK_STAGES": found.stages[1],
            "FETCH_REGISTERS": found.fetch_registers,
            "BIAS_STRIDES": table.strides,
            "QK_CHUNKS": widths.chunks(self.dim),
            "V_CHUNKS": widths.chunks(self.value_dim),
            "HAS_KEY_MASK": self.key_mask_strides is not None,
            **self._cleared(),
            "HAS_DQ": has_dq,
        }
        tiles = Tiles(cut.tile, cut.block, WARPS, found.stages[0])
        descriptors = views.descriptors("dq", tiles, self._slices("dq")[1])
        del descriptors["lse_delta"]
        if not has_dq:
            del descriptors["grad_query"]
        grid = math.prod(found.programs_of_tile), found.splits, self.heads
        launch = Launch(
            kernel, grid, numbers | constants, descriptors, num_warps=WARPS,
            maxnreg=65536 // found.programs // 256 // 8 * 8, launch_pdl=_can_overlap(),
        )  # fmt: skip
        others = rule.kernel_size, self.heads, self.scale
        biased = Biased(launch, table, *others, waits_at_end=True, overlap=_can_overlap())
        return BiasGradient(found, biased)

    @cached_property
    def key_spans(self) -> list[tuple[int, int]]:
        """Between which positions of a dilation group there are tiles of keys, per axis."""
        return tiled(self.rule, self.space, self.key_space, True)

    def attended(self, key_spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Per axis, the first and one-past-last key that has a tile; the others have no query."""
        axes = zip(key_spans, self.rule.dilation, self.key_tokens)
        return [(first * d, min(end * d, n)) for (first, end), d, n in axes]

    def location(self, rule: Rule) -> tuple[int, ...]:
        """The first numbers of all kernels: where the queries are, how tensors lie, how long axes
        are."""
        views = self.views
        return *self.first_query(rule), *views.steps, *views.mask_steps, *views.lengths

    def first_query(self, rule: Rule) -> tuple[int, ...]:
        """Per axis, how many queries of its dilation group come before the first one; then that
        group."""
        offset, dilation = padded(rule.offset, 0), self.dilation
        return *map(floordiv, offset, dilation), *map(mod, offset, dilation)

    def programs(
        self, kind: str, key_spans: Sequence[tuple[int, int]]
    ) -> tuple[int, tuple[int, ...]]:
        """How many programs there are, and the numbers that say which tiles: how many along each
        axis, how many in all, and of keys, where they begin: between positions that ``key_spans``
        says.

        As many programs as run at once take tiles in turn, or each tile has one of its own.
        """
        of_keys, (tiles, in_turn) = kind == "dkdv", self.cuts[kind]
        heads = self.kv_heads if of_keys else self.heads
        if self.packed is not None:  # how many there are is known to the GPU
            most, none = self._most_tiles(kind) * heads, (0,) * (4 if kind == "forward" else 7)
            return min(most, in_turn or most), none
        sizes = tile_sizes(tiles, of_keys)
        spans = key_spans if of_keys else tiled(self.rule, self.space, self.key_space, False)
        firsts, counts = [], []
        for (first, end), size in zip(padded(spans, (0, 1)), sizes):
            first = first // size * size
            firsts.append(first)
            counts.append(-(-(end - first) // size))
        num_tiles = math.prod(counts) * math.prod(self.rule.dilation) * self.batch * heads
        numbers = *counts, num_tiles, *(firsts if kind != "forward" else ())
        return min(num_tiles, in_turn or num_tiles), numbers

    def _most_programs(
        self, kind: str, tiles: Tiles, cycles: costs.Cycles, heads_at_once: int
    ) -> int | None:
        """How many programs take tiles in turn at most; None if each tile has its own.

        Of parts and of packed documents, tiles change from call to call, and what divides them.
        """
        processors, resident = _processors(self.device), tiles.resident_programs
        if self.queries != OWN or self.packed is not None:
            return None if self._is_uneven(kind, tiles) else processors * resident
        of_keys = kind == "dkdv"
        blocks = cuts(of_keys, self.rule, self.space, self.space).blocks_of_tiles(tiles)
        heads = self.kv_heads if of_keys else self.heads
        sets = self.batch * heads * math.prod(self.rule.dilation)
        # A key head's tile walks the blocks of all heads that share it.
        each = cycles.block * (self.heads // heads), cycles.tile
        return programs_of(blocks, each, sets, heads_at_once, processors, resident)

    def _most_tiles(self, kind: str) -> int:
        """How many tiles packed documents have at most."""
        assert self.packed is not None
        of_keys = kind == "dkdv"
        tokens, sizes = self.key_tokens if of_keys else self.tokens, self.cuts[kind][0]
        return most_tiles(self.packed, tile_sizes(sizes, of_keys), math.prod(tokens), of_keys)

    def _heads_at_once(self, work: costs.Work) -> int:
        """Of how many heads tiles at one position follow one another.

        Of plain attention, as many as the cache holds blocks of. Of windows, those that share lines
        of the cache, where it would lose the lines from one head to the next; of a part, also where
        it would not, so that a longer one runs the same kernels.
        """
        per_kv = self.heads // self.kv_heads
        if isinstance(self.rule, Dense):
            if work.of_keys:
                count, tokens, shared = self.batch * self.kv_heads, self.space[0] * per_kv, 1
            else:
                count, tokens, shared = self.batch * self.heads, self.key_space[0], per_kv
            most = max(1, _CACHED * shared // (2 * tokens * work.block_channels))
            return next(n for n in range(min(most, count), 0, -1) if count % n == 0)
        if self.packed is not None:
            return self.kv_heads if work.of_keys else self.heads
        side_by_side = self.strides[1][-2] == self.dim and self.strides[2][-2] == self.value_dim
        is_lost = widths.overflows_cache(self.key_space, self.dim, self.value_dim)
        is_part = self.queries != OWN and widths.split_lines(self.dim) > 0
        if not side_by_side or not (is_lost or is_part):
            return 1
        heads = self.kv_heads if work.of_keys else self.heads
        return math.gcd(heads, widths.heads_of_lines(self.dim))

    def _is_uneven(self, kind: str, tiles: Tiles) -> bool:
        """Whether the longest tile has so many blocks that each tile has its own program."""
        if self.packed is not None and isinstance(self.rule, Dense):
            # The longest document's tiles beside short ones'.
            length = self.space[0] if kind == "dkdv" else self.key_space[0]
            _, block = tile_and_block(tiles, kind == "dkdv")
            excess = length / block[2]
        else:
            excess = tiling.excess(kind, self._typical_rule, self.space, self.key_space, tiles)
        # A key head's tile walks the blocks of all heads that share it.
        return excess * (self.heads // self.kv_heads if kind == "dkdv" else 1) >= _UNEVEN


class Part(Plan):
    """The plan of a part of a layout: that of another part, whose kernels have other numbers and
    descriptors.

    So what a new offset, a longer cache of keys or a part of another size costs on the host is
    little more than a call that was made before, and no kernel is compiled.

    Args:
        plan: the other part's.
        rule: with the part's offset.
        shapes, strides: of query, key and value.
        key_mask: strides of a mask of keys.
    """

    def __init__(
        self,
        plan: Plan,
        rule: Neighborhood,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        key_mask: Shape | None,
    ) -> None:
        self.plan, self.offset, self.packed = plan, rule.offset, None
        self._lay(rule, shapes, strides, key_mask)

    def __getattr__(self, name: str) -> Any:
        """What both plans share."""
        kept = self.plan.kept
        if name not in kept:
            raise AttributeError(name)
        return kept[name]

    def _tiled(self, kind: str) -> Launch | Passes | Biased:
        plan, launch = self.plan, getattr(self.plan, kind)
        grid, numbers = launch.grid, self.location(self.rule)
        if kind == "dkdv" or self.space != plan.space:
            programs, of_tiles = self.programs(kind, self.key_spans)
            grid = programs, *grid[1:]
            numbers = *numbers, *of_tiles, *self.views.steps_of_stored(kind)
        # Views of tensors that lie alike are one object.
        own, others = self.views, plan.views
        views: dict[str, View] = {}
        if own.query is not others.query:
            views |= own.of_queries(kind)
        if own.key is not others.key or own.value is not others.value:
            views |= own.of_keys(kind)
        return launch.moved(grid, numbers, views)

    @cached_property
    def lse_delta(self) -> dict[bool, Launch]:
        return _moved_each(self.plan.lse_delta, *self.before_passes(self.key_spans))

    @cached_property
    def portable(self) -> portable.Part:
        plan = self.plan.portable
        assert isinstance(plan, portable.Plan)
        where = self.shapes, self.strides, self.key_mask_strides
        return portable.Part(plan, self.rule.offset, *where)


class Moved(portable.OtherQueries):
    """The plan of a ``part``'s queries that ``rule``'s offset says, which have tiles of other
    keys."""

    def __init__(self, part: Part, rule: Neighborhood) -> None:
        super().__init__(part, part.first_query(rule))
        self.rule = rule

    @cached_property
    def dkdv(self) -> _Launches:
        launch: Any = self.part.dkdv
        programs, of_tiles = self.part.programs("dkdv", self.key_spans)
        numbers = *self.part.location(self.rule), *of_tiles
        return launch.moved((programs, *launch.grid[1:]), numbers)

    @cached_property
    def key_spans(self) -> list[tuple[int, int]]:
        return tiled(self.rule, self.part.space, self.part.key_space, True)

    @cached_property
    def lse_delta(self) -> dict[bool, Launch]:
        return _moved_each(self.part.lse_delta, *self.part.before_passes(self.key_spans))

    @cached_property
    def portable(self) -> portable.Moved:
        return portable.Moved(self.part.portable, self.rule.offset)


def _moved_each(
    launches: dict[bool, Launch], programs: int, numbers: tuple[int, ...]
) -> dict[bool, Launch]:
    """:attr:`Plan.lse_delta` for another part."""
    return {given: launch.moved((programs,), numbers) for given, launch in launches.items()}


def _exact_thrice(x: float) -> float:
    """``x`` in float32 with two bits less: three times as much is exact, as ``masks.py`` needs."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return float(struct.unpack("<f", struct.pack("<I", bits & ~3))[0])


# How much longer the portable kernel takes for a pair of a query and an additional token, where all
# processors have work (measured: hopper-log.md).
_PORTABLE_TIME = 8.0

# Channels of products for which dQ through memory takes less. With fewer of them, dS takes longer
# to store and to load than what is saved (measured: hopper-log.md).
_THROUGH_MEMORY = 128

# Of the kernel before the passes, queries and keys of a program (measured: hopper-log.md).
_ROWS_AT_ONCE, _KEYS_AT_ONCE = 32, 64

# Bytes of blocks that stay in the L2 cache, of 50 MB, while other tensors pass.
_CACHED = 2**24

# A program that takes tiles in turn begins the next one while it ends the last, but may get long
# ones only. So of parts, packed documents and plain attention, whose tiles are not counted one by
# one, programs take one tile each where the longest has that many blocks more than usual (measured:
# hopper-log.md).
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
_plan = tuning.cached(Plan)


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    rule: Rule,
    scale: float,
    bias_dtype: torch.dtype | None = None,
    documents: Documents | None = None,
    masks: Sequence[Tensor | None] = (None, None),
) -> Plan | Moved:
    """The plan of a call; tensors but ``masks``, of keys and of additional ones, are readable by
    TMA."""
    shapes = query.shape, key.shape, value.shape
    strides = query.stride(), key.stride(), value.stride()
    others = scale, query.device, query.dtype
    num_additional = 0 if additional_keys is None else additional_keys.shape[1]
    of_masks = mask_strides(masks[0]), mask_strides(masks[1])
    if isinstance(rule, Dense) or not portable.has_shared_kernels(rule, of_masks[0] or (0,)):
        packed = None if documents is None else documents.sizes
        return _plan(rule, *others, shapes, strides, num_additional, bias_dtype, packed, of_masks)
    batch, *space, heads, dim = query.shape
    key_mask, additional_mask = of_masks
    parts = portable.parts_of(
        "hopper", *portable.windows_of(rule), *others, batch, heads, dim, key.shape[-2],
        value.shape[-1], num_additional, bias_dtype, key_mask is not None, additional_mask,
    )  # fmt: skip
    lie, offset = (shapes, strides, key_mask), rule.query_offset

    def make() -> Part:
        # Nothing that kernels are compiled for depends on more than these sizes.
        sizes = tiling.model_sizes(rule, space, key.shape[1:-2])
        what = rule, *others, shapes, strides, num_additional, bias_dtype, None, of_masks
        return Part(parts.plans.find(sizes, Plan, *what), rule, *lie)

    part: Part = parts.find(lie, make)
    found: Part | Moved = parts.at(part, offset, lambda: Moved(part, rule))
    return found
