"""Hopper kernels (sm_90) in Gluon: TMA boxes, wgmma, warp specialisation.

The fastest way for fp16 and bf16 without relative positional bias; what it can not run,
:func:`unsupported` says. Compile-time constants: dtype, head dims, which axes are causal or
strided or have one token, tile shapes and the kind of mask, whether there are additional tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.backends import Problem
from natten.backends.hopper.descriptors import (
    View,
    box_layout,
    readable,
    tile_count,
    too_wide,
    view,
)
from natten.backends.hopper.forward import forward_kernel
from natten.backends.hopper.gluon_names import KNOWN, release
from natten.backends.hopper.tiles import Shape, Tiles, choose
from natten.backends.triton import primitives
from natten.neighborhood import Neighborhood, Rule

HEAD_DIMS = (32, 64, 128, 256)
_LOG2E = math.log2(math.e)


def _padded(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Three axes: the missing ones come first."""
    return (*(fill,) * (3 - len(values)), *values)


def _modes(rule: Neighborhood, shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go, in the terms of ``primitives.window``."""
    modes = []
    for length, stride, causal in zip(shape, rule.stride, rule.is_causal):
        if length == 1:
            mode = primitives.UNIT
        elif causal:
            mode = primitives.CAUSAL if stride == 1 else primitives.CAUSAL_STRIDED
        else:
            mode = primitives.SLIDING if stride == 1 else primitives.STRIDED
        modes.append(mode.value)
    return _padded(modes, primitives.UNIT.value)


def unsupported(problem: Problem) -> str | None:
    """Why these kernels can not run a problem whose dtype and head dims they can, or None."""
    if not 1e-20 < problem.scale < 1e6:
        return "masks scores that are scaled by a positive number of usual size"
    if release() not in KNOWN:
        return f"is checked with Triton {KNOWN}, not with {release()}"
    if problem.rule is None:
        return None
    shape, dilation = problem.shape, problem.rule.dilation
    if any(n % d for n, d in zip(shape[1:-2], dilation)):
        return f"needs dilations that divide the token layout, {tuple(shape[1:-2])}"
    if too_wide((*shape[:-1], max(problem.head_dim, problem.value_dim)), dilation):
        return "needs dilation groups that begin within 2^31 elements"
    return None


class _Plan(NamedTuple):
    """What a forward call of given shapes and strides needs, beside its tensors."""

    query: View
    key: View
    value: View
    out: View
    query_box: list[int]
    key_box: list[int]
    value_box: list[int]
    out_box: list[int]
    numbers: tuple[int, ...]
    options: dict[str, Any]
    programs: int


@lru_cache(maxsize=256)
def _plan(
    query: tuple[Shape, Shape],
    key: tuple[Shape, Shape],
    value: tuple[Shape, Shape],
    extra: int,
    rule: Neighborhood,
    tiles: Tiles | None,
) -> _Plan:
    """From shapes and strides of the inputs."""
    batch, *space, heads, dim = query[0]
    kv_heads, value_dim = value[0][-2:]
    tiles = tiles or choose(rule, tuple(space), dim, value_dim)
    out_shape = (*query[0][:-1], value_dim)
    q, k, v = (view(*x, rule.dilation) for x in (query, key, value))
    out = view(out_shape, torch.empty(out_shape, device="meta").stride(), rule.dilation)
    groups = _padded([n // d for n, d in zip(space, rule.dilation)], 1)
    dilation = _padded(rule.dilation, 1)
    counts = [
        tile_count(n, size * (tiles.groups if axis == tiles.split else 1))
        for axis, (n, size) in enumerate(zip(groups, tiles.query))
    ]
    has_extra = extra > 0
    numbers = (
        *(s for each in (q, k, v, out) for s in each.steps),
        dim, value_dim,
        *groups, *_padded(rule.kernel_size, 1), *_padded(rule.stride, 1), *dilation, *counts,
        heads, heads // kv_heads, extra,
    )  # fmt: skip
    # What the producer's four warps (three of them idle) leave goes to the other warpgroups.
    limit = 65536 // tiles.programs // (128 * tiles.groups + 128) // 8 * 8
    options = {
        "MODES": _modes(rule, space), "WQ": tiles.query, "TK": tiles.key, "SPLIT": tiles.split,
        "STAGES": tiles.stages, "MASK": tiles.mask, "MASKED": tiles.masked,
        "PHASED": tiles.phased,
        "CORE": tuple(m and axis != tiles.split for axis, m in enumerate(tiles.masked)),
        "AHEAD": tiles.ahead, "CODE": tiles.code,
        "BY_ROW": tiles.by_row, "STEPS": tiles.steps, "TABLES": tiles.tables,
        "HAS_EXTRA": has_extra, "GROUPS": tiles.groups,
        "REGISTERS": (limit * (tiles.groups + 1) - 24) // tiles.groups // 8 * 8,
        "num_warps": 4, "maxnreg": limit,
    }  # fmt: skip
    return _Plan(
        q, k, v, out,
        [1, *tiles.query, dim], [1, *tiles.key, dim], [1, *tiles.key, value_dim],
        [1, *tiles.query, value_dim], numbers, options,
        math.prod(counts) * math.prod(dilation) * batch * heads,
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    rule: Rule,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    assert isinstance(rule, Neighborhood) and rpb is None
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = (readable(x, rule.dilation) for x in (query, key, value))
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    plan = _plan(
        (query.shape, query.stride()), (key.shape, key.stride()), (value.shape, value.stride()),
        extra, rule, tiles,
    )  # fmt: skip
    layout = box_layout(query.shape[-1], query.dtype)
    value_layout = box_layout(value.shape[-1], query.dtype)
    keys = plan.key.boxes(key, plan.key_box, layout)
    values = plan.value.boxes(value, plan.value_box, value_layout)
    more_keys, more_values = keys, values
    if extra_keys is not None and extra_values is not None and extra > 0:
        more_keys = _extra_boxes(extra_keys, plan.key_box, layout)
        more_values = _extra_boxes(extra_values, plan.value_box, value_layout)
    with torch.cuda.device(query.device):
        forward_kernel[(plan.programs,)](
            plan.query.boxes(query, plan.query_box, layout), keys, values,
            plan.out.boxes(out, plan.out_box, value_layout), more_keys, more_values, lse,
            *plan.numbers, scale * _LOG2E, **plan.options,
        )  # fmt: skip
    return out, lse


def _extra_boxes(x: Tensor, box: list[int], layout: Any) -> Any:
    """Additional tokens ``[batch, extra, heads, channels]`` in boxes of as many tokens."""
    x = readable(x.contiguous(), (1,))
    rows = math.prod(box[1:-1])
    return view(x.shape, x.stride(), (1,)).boxes(x, [1, 1, 1, rows, box[-1]], layout)
