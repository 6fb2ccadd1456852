"""The tensors of a call: how each looks to TMA, and descriptors of the blocks that kernels load and
store.

A kernel's ``kind`` is "forward", "dq" or "dkdv". Wide values have "dk" and "dv" in the place of
"dkdv": so five names say which kernel it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...documents import Sizes
from ...neighborhood import Rule
from ...tiling import padded
from ..interface import Shape, Tiles
from ..triton.plan import strides_of_mask
from .cuts import rows_held
from .descriptors import (
    Describe,
    View,
    contiguous_strides,
    contiguous_view,
    describe,
    packed_view,
    view,
)
from .widths import are_half_aligned, is_joined, native

_STORED = "out", "grad_query", "grad_key", "grad_value"
_OF_KEYS = frozenset(("key", "value", "grad_key", "grad_value"))
_AS_WIDE_AS_QUERIES = frozenset(("query", "key", "grad_query", "grad_key"))


class Views:
    """The views of a call's tensors.

    Args:
        rule: its dilation decides where groups of tokens begin.
        shapes, strides: of query, key and value.
        dtype: of these.
        num_additional: how many additional tokens there are.
        packed: of packed documents, the sizes.
        key_mask: strides of a mask of keys.

    Attributes:
        query, key, value: of the tensors that are read.
        steps: the steps of these three, which are numbers of all kernels.
        mask_steps: how far apart a mask's batch entries and tokens are, and where its last one is.
        lengths: of keys and of queries, positions of the longest dilation group per axis; then of
            both, how many groups are as long.
    """

    def __init__(
        self,
        rule: Rule,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        dtype: torch.dtype,
        num_additional: int,
        packed: Sizes | None,
        key_mask: Shape | None,
    ) -> None:
        self._dilation, self._dtype = rule.dilation, dtype
        self._packed, self._num_additional = packed, num_additional
        self._batch, *_, self._heads, self._dim = shapes[0]
        self._kv_heads, self._value_dim = shapes[2][-2:]
        self._tokens, self._key_tokens = shapes[0][1:-2], shapes[1][1:-2]
        self.query, self.key, self.value = map(self._read, shapes, strides)
        self.steps = *self.query.steps, *self.key.steps, *self.value.steps
        self.mask_steps: tuple[int, ...] = (0,) * 5
        if key_mask is not None:
            space = self._key_tokens if packed is None else packed.key_space
            last = sum((n - 1) * step for n, step in zip(space, key_mask[1:]))
            self.mask_steps = *strides_of_mask(key_mask).values(), last
        key, query = self.key, self.query
        lengths = *key.shape[1:4], *query.shape[1:4]
        if packed is not None:
            lengths = *padded(self._key_tokens, 1), *padded(self._tokens, 1)
        self.lengths = *lengths, *key.long_groups, *query.long_groups

    def _read(self, shape: Shape, stride: Shape) -> View:
        """Of a tensor that kernels read."""
        if self._packed is not None:
            return packed_view(shape, stride)
        return view(shape, stride, self._dilation, is_joined(shape[-1]))

    def stored(self, tokens: Shape, heads: int, channels: int) -> View:
        """Of a tensor that a kernel writes, which is contiguous, and of LSE and delta."""
        shape = self._batch, *tokens, heads, channels
        if self._packed is not None:
            return packed_view(shape, contiguous_strides(shape))
        return contiguous_view(shape, self._dilation)

    @property
    def _grad_out(self) -> View:
        shape = self._batch, *self._tokens, self._heads, self._value_dim
        return self._read(shape, contiguous_strides(shape))

    @property
    def _lse_delta(self) -> View:
        return self.stored(self._tokens, self._heads, 4)

    @property
    def grad_query(self) -> View:
        return self.stored(self._tokens, self._heads, self._dim)

    def of_queries(self, kind: str) -> dict[str, View]:
        """Of a kind of kernel, the views of the tensors that have the layout of queries."""
        found = {"query": self.query}
        if kind == "forward":
            found["out"] = self.stored(self._tokens, self._heads, self._value_dim)
        else:
            found["grad_out"] = self._grad_out
            found["lse_delta"] = self._lse_delta
        if kind == "dq":
            found["grad_query"] = self.grad_query
        return found

    def of_keys(self, kind: str) -> dict[str, View]:
        """As :meth:`of_queries`, of keys."""
        found = {"key": self.key, "value": self.value}
        if kind == "dkdv":
            found["grad_key"] = self.stored(self._key_tokens, self._kv_heads, self._dim)
            found["grad_value"] = self.stored(self._key_tokens, self._kv_heads, self._value_dim)
        return found

    def steps_of_stored(self, kind: str) -> tuple[int, ...]:
        """Numbers that follow: how the tensors lie that kernels made, all of them contiguous."""
        tokens, heads = self._tokens, self._heads
        if kind == "dkdv":
            tokens, heads = self._key_tokens, self._kv_heads
        # Of what a kernel stores, bases are rows.
        rows = contiguous_strides((self._batch, *padded(tokens, 1), heads))[:3]
        if kind == "forward":
            return rows
        return *self._grad_out.steps, *self._lse_delta.steps, *rows

    def descriptors(self, kernel: str, boxes: Tiles, width: int) -> dict[str, Describe]:
        """Descriptors of the tensors that a kernel loads and stores by TMA, in blocks of these
        tiles.

        Args:
            kernel: which one of five.
            boxes: what it loads and stores at once.
            width: channels of a block of values, which may be more than there are.
        """
        kind = kernel if kernel in ("forward", "dq") else "dkdv"
        dim = native(self._dim)
        others = {"dk": ("grad_value",), "dv": ("value", "grad_key")}.get(kernel, ())
        if are_half_aligned(self._dim):
            others = _STORED  # without TMA
        found = {}
        for name, shown in (self.of_queries(kind) | self.of_keys(kind)).items():
            block = boxes.kv_block if name in _OF_KEYS else boxes.q_block
            if name == "lse_delta":
                found[name] = describe(shown, (1, *block, 4), torch.float32)
            elif name not in others:
                channels = dim if name in _AS_WIDE_AS_QUERIES else width
                found[name] = describe(shown, (1, *block, channels), self._dtype)
        return found

    def at_seam(self, kernel: str, boxes: Tiles, width: int) -> dict[str, Describe]:
        """As :meth:`descriptors`, of the tensors that have blocks, in smaller pieces."""
        found = self.descriptors(kernel, boxes, width)
        if kernel == "forward":
            return {f"{name}_at_seam": found[name] for name in ("key", "value")}
        names = ("key", "value", "") if kernel == "dq" else ("query", "grad_out", "lse_delta")
        at_seam = zip(("qk", "gv", "lse_delta"), names)
        return {f"{one}_at_seam": found[name] for one, name in at_seam if name}

    def additional(self, kernel: str, tiles: Tiles, width: int) -> dict[str, Describe]:
        """As :meth:`descriptors`, of additional tokens."""
        if not self._num_additional or kernel not in ("forward", "dq"):
            return {}
        found = {}
        dims, widths = (self._dim, self._value_dim), (native(self._dim), width)
        for name, dim, channels in zip(("keys", "values"), dims, widths):
            shape = self._batch, self._num_additional, self._kv_heads, dim
            block = 1, 1, 1, rows_held(tiles.kv_block), channels
            found[f"additional_{name}"] = describe(contiguous_view(shape, (1,)), block, self._dtype)
        return found
