"""What a call's shapes decide, worked out once: tiles, grids, numbers and constants of its kernels.

An eager call must not cost more on the host than its kernels on the GPU. So everything but
addresses is kept in a plan, found by one lookup, and a kernel that has run before is launched
through its compiled object.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...documents import Documents
from ...inputs import Inputs
from ...neighborhood import Dense, Rule
from ...tiling import padded
from . import tiles as tiling
from .backward import (
    bias_kernel,
    bias_sum_kernel,
    extra_kernel,
    key_kernel,
    query_kernel,
)
from .forward import forward_kernel
from .launching import Launcher, described, launcher
from .primitives import (
    CAUSAL,
    CAUSAL_STRIDED,
    FULL,
    FULL_CAUSAL,
    SLIDING,
    STRIDED,
    UNIT,
)

_log = logging.getLogger("natten")

# Of the bias's gradient, between its two kernels: 256 MiB, or one head's.
_MOST_SUMS = 2**26

# Of packed documents: how many, and the longest of each axis, queries and keys.
_Sizes = tuple[int, tuple[int, ...], tuple[int, ...]]


class Launch:
    """A kernel with its grid, numbers and constants; call it with the tensors.

    ``descriptors``: for each tensor, what makes a descriptor of it, or None; empty if none has one.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Iterable[int],
        numbers: Iterable[Any],
        constants: dict[str, Any],
        descriptors: Sequence[Any] = (),
    ) -> None:
        self.kernel, self.descriptors = kernel, descriptors
        # Triton 3.10 fuses products and sums only where it is asked to.
        self.constants = {"enable_fp_fusion": True, **constants}
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = tuple(numbers)
        self.compiled: Launcher | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Tensors must be on the current device."""
        addresses = [x.data_ptr() for x in tensors]
        # Triton compiles for addresses that 16 divides, which only views can lack.
        aligned = reduce(or_, addresses) % 16 == 0
        if aligned and self.compiled is not None:
            self.compiled(addresses)
        else:
            self.compile(tensors, aligned)

    def arguments(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Tensors as Triton takes them."""
        return described(self.descriptors, tensors)

    def compile(self, tensors: Sequence[Any], keep: bool) -> None:
        """Launch through Triton, which compiles at the first call; ``keep`` what it compiled."""
        arguments = self.arguments(tensors)
        compiled = self.kernel[self.grid](*arguments, *self.numbers, **self.constants)
        if keep and compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names
            constants = (self.constants[name] for name in names if name in self.constants)
            last = (*self.numbers, *constants)
            self.compiled = launcher(compiled, self.grid, last, self.descriptors)


def contiguous(x: Tensor) -> Tensor:
    """A tensor as it lies in memory: views can negate what they show."""
    return x.resolve_neg().contiguous()


def readable(x: Tensor) -> Tensor:
    """Kernels read channels one after another, as they lie in memory."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor) -> Any:
    """Kernels launch on the current device: make it the tensor's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


class Trials:
    """Launches that do the same with different tiles; the first call keeps the fastest."""

    def __init__(self, key: str, launches: Mapping[Any, Callable[..., None]]) -> None:
        self.key, self.launches = key, launches
        self.chosen, *_ = launches.values()

    def __call__(self, *tensors: Any) -> None:
        if self.launches and not torch.cuda.is_current_stream_capturing():
            times = tuning.times(
                self.key, self.launches, lambda each: _time(self.launches[each], tensors)
            )
            tiles = min(times, key=times.__getitem__)
            self.chosen, self.launches = self.launches[tiles], {}
            _log.debug("%s: %s", self.key, tiles)
            try:
                tuning.remember(self.key, list(tiles), forget=False)
            except OSError as error:
                _log.debug("%s is not remembered: %s", self.key, error)
        self.chosen(*tensors)


def _time(launch: Callable[..., None], tensors: Sequence[Any]) -> float:
    """Milliseconds of a launch, the median of five."""
    launch(*tensors)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(*tensors)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2]


def modes(rule: Rule, shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go."""
    if isinstance(rule, Dense):
        return UNIT.value, UNIT.value, (FULL_CAUSAL if rule.causal else FULL).value
    found = []
    for length, stride, causal in zip(shape, rule.stride, rule.is_causal):
        if length == 1:
            mode = UNIT
        elif causal:
            mode = CAUSAL if stride == 1 else CAUSAL_STRIDED
        else:
            mode = SLIDING if stride == 1 else STRIDED
        found.append(mode.value)
    return padded(found, UNIT.value)


def _strides(strides: Sequence[int]) -> tuple[int, ...]:
    """Batch, three axes, heads, of ``[batch, *space, heads, channels]``."""
    batch, *space, heads, _ = strides
    return (batch, *padded(space, 0), heads)


def _parts(work: int, least: int, most: int) -> tuple[int, int]:
    """How many programs share ``work`` items, at least ``least`` each, and how many each takes."""
    parts = max(1, min(most, work // least))
    return parts, -(-work // parts)


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
        extra: int | None,
        packed: _Sizes | None,
        tiles: tuple[int, ...],
        tf32: bool,
    ) -> None:
        query, key, value = shapes
        self.rule, self.scale, self.device = rule, scale, device
        self.itemsize, self.packed = dtype.itemsize, packed is not None
        own = query[0], tuple(query[1:-2]), tuple(key[1:-2])
        self.batch, self.space, self.key_space = packed or own
        self.shape = padded(self.space, 1)
        self.heads, self.kv_heads = query[-2], key[-2]
        self.per_kv = self.heads // self.kv_heads
        self.dim, self.value_dim = query[-1], value[-1]
        self.dilation = padded(rule.dilation, 1)
        if isinstance(rule, Dense):
            self.window = (1, 1, 1, 1, 1, 1, *self.dilation)
        else:
            self.window = (*padded(rule.kernel_size, 1), *padded(rule.stride, 1), *self.dilation)
        self.modes = modes(rule, self.space if packed is None else [2] * len(self.space))
        self.strides = tuple(s for each in strides for s in _strides(each))
        # Tile shapes asked for, of queries and keys: of the forward pass, then of the backward.
        rank = len(self.space)
        asked = [tiles[i : i + rank] for i in range(0, 4 * rank, rank)]
        self.asked = {"forward": asked[:2], "query": asked[2:], "key": asked[2:]}
        self.bias, self.extra = bias_dtype is not None, extra
        self.channels = {
            "ALIGN": math.gcd(16, *self.strides),
            "D": self.dim,
            "DV": self.value_dim,
            "BLOCK_D": tiling.block(self.dim),
            "BLOCK_DV": tiling.block(self.value_dim),
        }
        self.precision = {"PRECISION": "tf32" if tf32 else "ieee"}

    def _problem(self, kind: str, bias: bool) -> tuple[Any, ...]:
        """What decides the tiles of a kind of kernel."""
        sizes = self.space, self.key_space, self.dim, self.value_dim, self.itemsize
        return (kind, self.rule, *sizes, bias)

    def _tiled(
        self, kernel: Any, kind: str, heads: int, tail: Sequence[Any], **constants: Any
    ) -> Launch | Trials:
        """A kernel with a program per tile; ``tail``: its numbers after the sizes."""
        problem = self._problem(kind, self.bias)

        def launch(tiles: tiling.Tiles) -> Launch:
            return self._launch(kernel, kind, heads, tail, tiles, constants)

        name, count = tiling.key(*problem), tuning.wanted(backward=kind != "forward")
        if count > 1 and not any(map(any, self.asked[kind])) and tuning.lookup(name) is None:
            return Trials(
                name, {each: launch(each) for each in tiling.candidates(*problem)[:count]}
            )
        return launch(tiling.choose(*problem, *self.asked[kind]))

    def _launch(
        self, kernel: Any, kind: str, heads: int, tail: Sequence[Any], tiles: tiling.Tiles,
        constants: dict[str, Any],
    ) -> Launch:  # fmt: skip
        keys = kind == "key"
        counts = self._counts(*((tiles.key, self.key_space) if keys else (tiles.query, self.space)))
        programs = math.prod(counts) * math.prod(self.dilation) * self.batch * heads
        constants = constants | {
            "MODES": self.modes,
            "TQ": tiles.query,
            "TK": tiles.key,
            "HAS_RPB": self.bias,
            "PACKED": self.packed,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            **self.channels,
            **self.precision,
        }
        if not keys:
            constants["HAS_EXTRA"] = bool(self.extra)
        numbers = (*self.strides, *self.shape, self.key_space[-1], *self.window, *counts, *tail)
        return Launch(kernel, (programs,), numbers, constants)

    def _counts(self, tile: tiling.Shape, space: tuple[int, ...]) -> list[int]:
        """How many tiles the longest dilation group has, per axis."""
        lengths = zip(padded(space, 1), self.dilation, tile)
        return [math.ceil(math.ceil(length / d) / size) for length, d, size in lengths]

    @cached_property
    def forward(self) -> Launch | Trials:
        tail = (self.heads, self.per_kv, self.extra or 0, self.scale)
        return self._tiled(forward_kernel, "forward", self.heads, tail)

    @cached_property
    def query(self) -> Launch | Trials:
        """dQ, and terms."""
        return self._query(False)

    @cached_property
    def query_of_both(self) -> Launch | Trials:
        """As :attr:`query`, where the LSE has a gradient, too."""
        return self._query(True)

    def _query(self, has_grad_lse: bool) -> Launch | Trials:
        tail = (self.heads, self.per_kv, self.extra or 0, self.scale)
        return self._tiled(query_kernel, "query", self.heads, tail, HAS_GRAD_LSE=has_grad_lse)

    @cached_property
    def key(self) -> Launch | Trials:
        """dK and dV."""
        tail = (self.kv_heads, self.per_kv, self.scale)
        # Without the loop over heads, ptxas spills what it then keeps beside two sums of 128
        # channels; narrower ones are up to a quarter faster (benchmarks/results/h200.md).
        single = self.per_kv == 1 and max(self.dim, self.value_dim) <= 64
        return self._tiled(key_kernel, "key", self.kv_heads, tail, SINGLE=single)

    @cached_property
    def extra_tokens(self) -> tuple[int, Launch]:
        """The additional tokens' gradients in parts: how many, and the kernel."""
        assert self.extra is not None
        parts, per_part = _parts(math.prod(self.shape), 512, 64)
        numbers = (
            *self.strides[:5], *self.shape, self.kv_heads, self.per_kv, self.extra, per_part,
            self.scale,
        )  # fmt: skip
        grid = (self.batch * self.kv_heads, -(-self.extra // 16), parts)
        constants = {"M": 32, "N": 16, **self.channels, **self.precision}
        return parts, Launch(extra_kernel, grid, numbers, constants)

    @cached_property
    def rpb(self) -> tuple[tuple[int, ...], list[tuple[Launch, Launch]]]:
        """The bias's gradient: the shape of the sums between its two kernels, and these, for as
        many heads at once as their sums have room for."""
        kernel_size = self.window[:3]
        # As of dQ without a bias, also where those were tuned: a program loads its biases once.
        tiles = tiling.choose(*self._problem("query", False), *self.asked["query"])
        counts = self._counts(tiles.query, self.space)
        # A window begins half of it before its query, at the ends of an axis up to all of it.
        apart, boxes = [], []
        for k, rows, columns in zip(kernel_size, tiles.query, tiles.key):
            apart.append(-(k // 2) - math.ceil((k - 1 - k // 2) / columns) * columns)
            boxes.append(math.ceil((rows + k - 1 - apart[-1]) / columns))
        every, total = math.prod(boxes), math.prod(counts) * math.prod(self.dilation) * self.batch
        pairs = math.prod(tiles.query), math.prod(tiles.key)
        heads = max(1, min(self.heads, _MOST_SUMS // (every * math.prod(pairs))))
        parts, _ = _parts(total, 4, 2048 // (every * heads))
        offsets = math.prod(2 * k - 1 for k in kernel_size)
        shapes = {"TQ": tiles.query, "TK": tiles.key}
        constants = {"MODES": self.modes, **shapes, **self.channels, **self.precision}
        constants |= {
            "num_warps": tiles.num_warps,
            "num_stages": tiling.stages_of_both(tiles, self.dim, self.value_dim, self.itemsize),
        }
        launches = []
        for first in range(0, self.heads, heads):
            count = min(heads, self.heads - first)
            places = (*apart, *boxes[1:], first)
            numbers = (
                *self.strides, *self.shape, *self.window, self.heads, self.per_kv, self.batch,
                *places, self.scale,
            )  # fmt: skip
            last = (*kernel_size, *places, every, parts, offsets)
            sums = Launch(bias_sum_kernel, (-(-offsets // 32), count), last, shapes | {"BLOCK": 32})
            launches.append((Launch(bias_kernel, (every, parts, count), numbers, constants), sums))
        return (parts, heads, every, *pairs), launches


# Calls of one shape come again: a model has few.
_cached_plan = tuning.cached(Plan)


def plan_for(
    inputs: Inputs,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> Plan:
    """The plan of a call; tensors have channels one after another."""
    query, key, value, rpb, additional_keys, _ = inputs
    return _cached_plan(
        rule,
        scale,
        query.device,
        query.dtype,
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        None if rpb is None else rpb.dtype,
        None if additional_keys is None else additional_keys.shape[1],
        None if documents is None else documents[1:],
        tiles,
        query.dtype == torch.float32 and allows_tf32(),
    )


def allows_tf32() -> bool:
    """Whether float32 products may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # 2.9's, which also knows what allow_tf32 was set to
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
