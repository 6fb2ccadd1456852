"""Heads whose width 8 does not divide, where kernels can not read them in place: copies with zeros
beside them."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ... import tuning
from ...inputs import Gradients, Inputs
from ..interface import Shape
from ..triton.launch import Launch, readable
from .copies import copy_kernel
from .widths import aligned

_WORDS = torch.int64, torch.int32, torch.int16


def widened(x: Tensor) -> Tensor:
    """``x [batch, *space, heads, channels]`` with zeros beside the channels, up to a multiple of 8;
    itself if there is nothing to add."""
    width = aligned(x.shape[-1])
    return x if x.shape[-1] == width else _copied(x, width)


def narrowed(x: Tensor, channels: int) -> Tensor:
    """The first channels of ``x``."""
    return x if x.shape[-1] == channels else _copied(x, channels)


def widened_inputs(inputs: Inputs) -> Inputs:
    """The tensors with channels, each :func:`widened`."""
    query, key, value = map(widened, inputs[:3])
    others = inputs.additional_keys, inputs.additional_values
    keys, values = (None if x is None else widened(x) for x in others)
    return inputs._replace(
        query=query, key=key, value=value, additional_keys=keys, additional_values=values
    )


def narrowed_gradients(grads: Gradients, inputs: Inputs) -> Gradients:
    """Gradients of :func:`widened_inputs` as those of the inputs."""
    dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    widths = dim, dim, value_dim, None, dim, value_dim
    found = (
        x if x is None or width is None else narrowed(x, width) for x, width in zip(grads, widths)
    )
    return Gradients(*found)


def _copied(x: Tensor, width: int) -> Tensor:
    """The first ``width`` channels of ``x``, or all and zeros after them."""
    copy = x.new_empty(*x.shape[:-1], width)
    if copy.numel() == 0:
        return copy
    x = readable(x).flatten(1, -3)  # [batch, tokens, heads, channels]
    narrow, size = min(x.shape[-1], width), x.element_size()
    lengths = narrow, width, x.storage_offset(), *x.stride()[:-1]
    word = next(each for each in _WORDS if all(n * size % each.itemsize == 0 for n in lengths))
    x = x.view(word)
    per_word = word.itemsize // size
    rows, strides = x.shape[:3], x.stride()[:3]
    _launch(x.device, word, rows, strides, narrow // per_word, width // per_word).run(
        x=x, copy=copy.view(word)
    )
    return copy


@tuning.cached
def _launch(
    device: torch.device, word: torch.dtype, shape: Shape, strides: Shape, channels: int, width: int
) -> Launch:
    """Of tensors of that shape, without channels, and of those strides, all in words."""
    rows, block = math.prod(shape), triton.next_power_of_2(max(channels, width))
    per_program = max(1, 1024 // block)
    numbers = dict(zip(("x_b", "x_t", "x_h"), strides))
    numbers |= {"rows": rows, "tokens": shape[1], "heads": shape[2]}
    constants = {"C": channels, "WIDTH": width, "COLUMNS": block, "M": per_program}
    return Launch(copy_kernel, (-(-rows // per_program),), numbers | constants)
