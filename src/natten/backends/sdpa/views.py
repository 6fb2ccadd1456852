"""A grid of tiles as PyTorch's kernel takes them: views of a call's tensors, or copies."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import cpu_attention, cpu_attention_backward
from ...caches import kept
from ...inputs import Inputs
from ...tuning import Bounded
from ..tiled.grids import Chunk, Looks, TileGrid, add_kv_blocks, geometry, make_mask

COPIED = 1 << 21  # the most numbers that are copied before a call; 8 MB in float32
OWN_MASK = 1 << 19  # bytes; a larger mask is the store's only
VIEWS = 16  # how many are kept for a grid of tiles; about 1 KB each


@kept(lambda mask: mask.nbytes)
def _mask(looks: Looks, dtype: torch.dtype, num_additional: int) -> Tensor:
    """The mask of tiles; the additional keys come last, and all queries attend them."""
    mask = make_mask(looks).to(dtype)
    return F.pad(mask, (0, num_additional)) if num_additional else mask


class Sizes(NamedTuple):
    """The sizes of a call's tensors."""

    batch: int
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    num_additional: int | None

    @classmethod
    def of(cls, shapes: Sequence[torch.Size | None]) -> Sizes:
        """The sizes of query, key, value and additional keys of these shapes."""
        query, key, value, additional = shapes
        assert query is not None and key is not None and value is not None
        batch, *shape, heads, dim = query
        return cls(
            batch, tuple(shape), tuple(key[1:-2]), heads, key[-2], dim, value[-1],
            None if additional is None else additional[1],
        )  # fmt: skip


class _View(NamedTuple):
    """Where a chunk of tiles, or of their blocks of keys, lies in a tensor of given strides."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    merged: tuple[int, ...] | None  # the kernel's shape if no view has it; then it takes a copy
    ready: bool  # whether the kernel takes the view as it is

    def of(self, x: Tensor) -> Tensor:
        return x.as_strided(self.shape, self.stride, x.storage_offset() + self.offset)


@functools.lru_cache
def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return (*[math.prod(shape[i:]) for i in range(1, len(shape))], 1)


def _as_one(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Size and stride of dimensions merged into one; None if they have no common stride."""
    size, stride = sizes[-1], strides[-1]
    for n, step in zip(sizes[-2::-1], strides[-2::-1]):
        if size == 1:
            stride = step
        elif n > 1 and step != size * stride:
            return None
        size *= n
    return size, stride


class TileViews:
    """A grid of tiles as PyTorch's kernel takes them, with all that is the same in every call.

    The kernel's tensors are ``[matrices, heads, tokens, channels]``. Those that it makes itself lie
    in memory as ``[matrices, tokens, heads, channels]``. Inputs are views of the call's tensors
    where such views exist: where the tokens of a tile, and of its block of keys, are equally far
    apart.
    """

    def __init__(
        self, grid: TileGrid, sizes: Sizes, dtype: torch.dtype, scale: float, grad_lse: bool
    ) -> None:
        self.grid, self.rank, self.dtype, self.scale = grid, len(grid.runs), dtype, scale
        self.kv_heads, self.per_kv = sizes.kv_heads, sizes.heads // sizes.kv_heads
        self.cols = math.prod(grid.key_sizes)
        self.width = max(sizes.dim, sizes.value_dim)
        if grad_lse and self.width == sizes.value_dim:
            self.width += 8  # one is needed, but rows are read faster at multiples of 32 bytes
        self.num_additional = sizes.num_additional or 0
        # Whether one tile holds all queries, and its block holds all keys.
        self.alone = grid.query_sizes == sizes.shape and grid.key_sizes == sizes.key_shape
        self.causal = grid.triangular and not self.num_additional
        self.masked = not (self.causal or grid.full)
        # How many lead dimensions are the kernel's matrices. If there is one head, the batch may be
        # the kernel's heads, so that tiles may be its matrices. The result of a single tile is
        # returned as the kernel writes it, with the batch entries as matrices.
        self.matrices = 2 * self.rank + (
            self.alone or sizes.heads > 1 or sizes.num_additional is not None
        )
        self._views, self._known = Bounded(VIEWS), Bounded(VIEWS)
        # Small masks are kept here, too, because asking the store takes a part of a small call.
        mask_bytes = math.prod(grid.query_sizes) * (self.cols + self.num_additional)
        mask_bytes *= dtype.itemsize * self.masked
        self._mask_bytes = mask_bytes if mask_bytes <= OWN_MASK else 0
        self._mask: Tensor | None = None
        self.chunks: list[Chunk | None] = [None]
        if not (self.alone or self._all_views(sizes)):
            self.chunks = list(self._chunks(sizes))
            if self.chunks != [None]:
                self._views.clear()

    def bytes(self) -> int:
        """About how many bytes the views take, with their mask."""
        return 1024 * (1 + 2 * VIEWS) + 512 * len(self.chunks) + self._mask_bytes

    def _chunks(self, sizes: Sizes) -> Iterable[Chunk | None]:
        """Slices of tiles for which no more numbers are copied than the inputs hold."""
        rows, heads = math.prod(self.grid.query_sizes), sizes.batch * self.kv_heads
        each = self.width * self.per_kv * (rows + 2 * self.cols)
        queries = math.prod(sizes.shape) * sizes.heads * sizes.dim
        keys = math.prod(sizes.key_shape) * self.kv_heads * sizes.dim
        room = min(COPIED, sizes.batch * (queries + 2 * keys)) // each
        tiles = math.prod(run.groups * run.repeats for run in self.grid.runs)
        if tiles == 2:
            room = min(room, heads)  # a single tile at a time may be a view
        if room >= tiles * heads:
            return [None]
        return self.grid.slices(sizes.batch, self.kv_heads, room)

    def _all_views(self, sizes: Sizes) -> bool:
        """Whether views serve for all tiles and blocks of keys, if the inputs are contiguous."""
        if self.num_additional or self.per_kv > 1:
            return False
        layouts = (sizes.shape, sizes.heads, self.kv_heads), (sizes.key_shape, self.kv_heads, None)
        for space, heads, kv_heads in layouts:
            shape = torch.Size((sizes.batch, *space, heads, self.width))
            if self._view_of(0, kv_heads, shape, contiguous(shape)).merged is not None:
                return False
        return True

    @property
    def mask(self) -> Tensor | None:
        """The mask that is added to the scores; the store of masks is bounded and may drop it."""
        if self._mask is None and self.masked:
            mask: Tensor = _mask(self.grid.looks, self.dtype, self.num_additional)
            if not self._mask_bytes:
                return mask
            self._mask = mask
        return self._mask

    def load_all(self, inputs: Inputs, index: int, *queries: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of a chunk, with the same numbers of heads and channels, and
        what :meth:`load` makes of ``queries``."""
        # Where all of them are views, which is the rule, they are looked up together, in one
        # function. The calls before have driven Python's code out of the processor's caches, so
        # that a small call waits for each further function.
        query, key, value, *_ = inputs
        tensors = query, key, value, *queries
        strides: tuple[Any, ...] = (index,)
        for x in tensors:
            strides += (x.stride(),)
        known: list[_View] = self._known.find(strides, self._known_views, index, tensors)
        if known:
            found = []
            for x, view in zip(tensors, known):
                shape, stride, offset, *_ = view
                # Without an offset it keeps the tensor's own.
                at = x.storage_offset() + offset if offset else None
                found.append(x.as_strided(shape, stride, at))
            return found
        return (
            self.load(inputs.query, index),
            self._keys(inputs.key, inputs.additional_keys, index),
            self._keys(inputs.value, inputs.additional_values, index),
            *[self.load(x, index) for x in queries],
        )

    def _known_views(self, index: int, tensors: Sequence[Tensor]) -> list[_View]:
        """Views of query, key, value and further tensors of queries; none if any is a copy."""
        views = [
            self._view(x, index, None if 1 <= i <= 2 else self.kv_heads)
            for i, x in enumerate(tensors)
        ]
        return views if all(view.ready for view in views) else []

    def _keys(self, x: Tensor, additional: Tensor | None, index: int) -> Tensor:
        view = self._view(x, index, None)
        keys = view.of(x)
        if view.ready:
            return keys
        keys = keys if view.merged is None else keys.reshape(view.merged)
        if additional is not None:
            own = additional.transpose(1, 2)
            own = own if (chunk := self.chunks[index]) is None else own[chunk[-2:]]
            own = own.expand(len(keys) // len(own), *own.shape).flatten(0, 1)
            keys = torch.cat([keys, own], dim=2)
        if self.per_kv > 1:
            keys = keys.repeat_interleave(self.per_kv, dim=1)
        return self._fit(keys)

    def load(self, x: Tensor, index: int) -> Tensor:
        """A chunk of ``x [batch, *space, heads, channels]``, a tensor of queries.

        ``x [batch, *space, heads]``, with one number per query and head, gives a chunk without
        channels.
        """
        view = self._view(x, index, self.kv_heads)
        part = view.of(x)
        if view.ready:
            return part
        part = part if view.merged is None else part.reshape(view.merged)
        return self._fit(part) if part.ndim == 4 else part

    def store(self, target: Tensor, index: int, x: Tensor) -> None:
        """Undo :meth:`load`."""
        view = self._view(target, index, self.kv_heads)
        part = view.of(target)
        if x.ndim == 4 and x.shape[-1] > target.shape[-1]:
            x = x[..., : target.shape[-1]]
        part.copy_(x if view.merged is None else x.reshape(view.shape))

    def add(self, target: Tensor, index: int, grad: Tensor) -> None:
        """Add a chunk's gradients of keys or values to ``target``, which has all of them.

        They are ``[matrices, heads, tokens, channels]``, and channels that ``target`` does not have
        are dropped.
        """
        if grad.shape[-1] > target.shape[-1]:
            grad = grad[..., : target.shape[-1]]
        if len(self.chunks) == 1 and all(run.repeats == 1 for run in self.grid.runs):
            view = self._view(target, index, None)
            view.of(target).add_(grad if view.merged is None else grad.reshape(view.shape))
        else:
            chunk = self.chunks[index]
            everything = (slice(None),) * (2 * self.rank + 2)
            add_kv_blocks(self.grid, self.grid.keys(target), chunk or everything, grad)

    def _view(self, x: Tensor, index: int, kv_heads: int | None) -> _View:
        """Where the tiles of queries lie, or the blocks of keys if ``kv_heads`` is None."""
        return self._view_of(index, kv_heads, x.shape, x.stride())

    def _view_of(
        self, index: int, kv_heads: int | None, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> _View:
        key = index, kv_heads, shape, stride
        view: _View = self._views.find(key, self._find_view, *key)
        return view

    def _find_view(
        self, index: int, kv_heads: int | None, shape: Sequence[int], stride: Sequence[int]
    ) -> _View:
        numbers = len(shape) == self.rank + 2
        if numbers:
            shape, stride = (*shape, 1), (*stride, 1)
        sizes, steps, offset = geometry(self.grid, kv_heads, shape, stride)
        chunk = self.chunks[index]
        if chunk is not None:
            offset += sum(part.start * step for part, step in zip(chunk, steps))
            lead = tuple(part.stop - part.start for part in chunk)
            sizes = (*lead, *sizes[len(lead) :])
        heads, tokens = self.matrices, len(sizes) - 1 - self.rank
        cuts = [slice(0, heads), slice(heads, tokens), slice(tokens, -1)]
        parts = [_as_one(sizes[cut], steps[cut]) for cut in cuts]
        end = len(sizes) - numbers
        channels = slice(-1, end)  # numbers have none
        if None in parts:
            merged = *[math.prod(sizes[cut]) for cut in cuts], *sizes[channels]
            return _View(sizes[:end], steps[:end], offset, merged, False)
        parts += zip(sizes[channels], steps[channels])
        sizes, steps = zip(*(part for part in parts if part is not None))
        ready = numbers or (
            self._fits(sizes, steps)
            and (kv_heads is not None or (not self.num_additional and self.per_kv == 1))
        )
        return _View(sizes, steps, offset, None, ready)

    def _fits(self, shape: Sequence[int], stride: Sequence[int]) -> bool:
        # The kernel relies on this. Expanded tokens, with a stride of 0, do not fulfil it.
        return shape[-1] == self.width and stride[-1] == 1 and stride[-2] >= self.width

    def _fit(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.width:
            return F.pad(x, (0, self.width - x.shape[-1]))
        return x if self._fits(x.shape, x.stride()) else x.contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and LSE of a chunk."""
        out, lse = cpu_attention(q, k, v, 0.0, self.causal, attn_mask=self.mask, scale=self.scale)
        return out, lse

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values.

        Args:
            tensors: gradient of the output, queries, keys, values, output and LSE.
        """
        dq, dk, dv = cpu_attention_backward(
            *tensors, 0.0, self.causal, attn_mask=self.mask, scale=self.scale
        )
        if self.per_kv > 1:
            dk, dv = (x.unflatten(1, (-1, self.per_kv)).sum(2) for x in (dk, dv))
        return dq, dk, dv
