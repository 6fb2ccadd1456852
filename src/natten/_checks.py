"""Checks of public arguments.

Every message names the argument, says what is allowed, and shows what was given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._numbers import entries, integer, real
from ._ranks import SHAPES
from ._torch import may_autocast
from ._warnings import warn_once
from .errors import ArgumentError, UnsupportedError
from .neighborhood import Neighborhood


def check_tensors(**tensors: Any) -> None:
    """Raise an error unless each argument is a dense floating-point tensor."""
    for name, x in tensors.items():
        if isinstance(x, torch.fx.Proxy):
            raise UnsupportedError(
                f"`{name}` is a torch.fx.Proxy without a shape. Make the function one node of the "
                'graph by torch.fx.wrap, e.g. torch.fx.wrap("na2d") beside its import, or use '
                "torch.export.export."
            )
        if not isinstance(x, Tensor):
            raise ArgumentError(f"`{name}` must be a torch.Tensor, got {type(x)}.")
        if x.is_nested:
            raise UnsupportedError(
                f"`{name}` must not be a nested tensor; na*d_qk and na*d_av accept nested tensors, "
                "na*d_varlen accepts packed ones."
            )
        if x.layout is not torch.strided:
            raise UnsupportedError(f"`{name}` must be dense, got layout {x.layout}.")
        if not x.is_floating_point():
            raise ArgumentError(f"`{name}` must have a floating-point dtype, got {x.dtype}.")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ArgumentError unless both tensors have one dtype and one device."""
    if x.dtype != other.dtype:
        raise ArgumentError(
            f"`{name}` must have the dtype of `{other_name}`, got {x.dtype} and {other.dtype}."
        )
    if x.device != other.device:
        raise ArgumentError(
            f"`{name}` must be on the device of `{other_name}`, got {x.device} and {other.device}."
        )


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ArgumentError unless heads-last query, key and value fit each other.

    Whether the layouts of query and key fit is the rule's to say.
    """
    for name, x in (("key", key), ("value", value)):
        check_same(name, x, "query", query)
        if x.dim() != query.dim() or x.shape[0] != query.shape[0]:
            raise ArgumentError(
                f"`{name}` must have the rank and batch size of `query`, got {tuple(x.shape)} "
                f"and {tuple(query.shape)}."
            )
    check_value_layout(key, value)
    if key.shape[-1] != query.shape[-1]:
        raise ArgumentError(
            "`key` must have the head_dim (last dimension) of `query`, got "
            f"{key.shape[-1]} and {query.shape[-1]}."
        )
    if query.shape[-1] < 1 or value.shape[-1] < 1:
        raise ArgumentError(
            "the head_dim of `query` and `value` must be at least 1, got "
            f"{query.shape[-1]} and {value.shape[-1]}."
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ArgumentError(
            f"the heads of `query` must be a multiple of the heads of `key`, "
            f"got {heads} and {kv_heads}."
        )


def check_value_layout(key: Tensor, value: Tensor) -> None:
    """Raise ArgumentError unless values have the token layout and heads of keys."""
    if value.shape[1:-1] != key.shape[1:-1]:
        raise ArgumentError(
            "`value` must have the token layout and heads of `key`, got "
            f"{tuple(value.shape)} and {tuple(key.shape)}."
        )


def warn_of_heads_first(query: Tensor) -> None:
    """Warn once if the heads of a fused operator's query seem to come before its tokens.

    A query ``[batch, heads, *space, head_dim]`` is read with the heads as the first axis of tokens,
    and with the tokens of the last axis as heads. The warning looks for the results of this: there
    are more heads than any model has, or as many heads as the axis before has tokens, because
    images are square. In 3-D layouts the second may be a coincidence, so it takes larger numbers.
    """
    sizes = query.shape[1:-1]
    if torch.compiler.is_compiling() or any(type(n) is not int for n in sizes):
        return  # comparing a symbolic size would turn it into a constant
    first, *others, heads = sizes
    is_square = others[-1:] == [heads] and heads > (8, 32)[len(others) - 1]
    if first < heads and (is_square or heads > 64):
        warn_once(
            f"`query` of shape {tuple(query.shape)} is read as "
            f"[batch, {SHAPES[len(others) + 1]['space']}, heads, head_dim] with {heads} heads. If "
            "heads come first, q.movedim(1, -2) is the order of fused operators; na*d_qk and "
            "na*d_av take heads first."
        )


def check_additional(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, values: Tensor | None
) -> None:
    """Raise ArgumentError unless additional keys and values fit each other and the call.

    They are ``[batch, num_additional, heads_kv, channels]``, and both are given or neither.
    """
    if keys is None and values is None:
        return
    if keys is None or values is None:
        missing = "additional_keys" if keys is None else "additional_values"
        raise ArgumentError(
            "`additional_keys` and `additional_values` must be given together, "
            f"but `{missing}` is None."
        )
    check_tensors(additional_keys=keys, additional_values=values)
    for name, x, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        check_same(name, x, "query", query)
        wanted = (query.shape[0], like.shape[-2], like.shape[-1])
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != wanted:
            raise ArgumentError(
                f"`{name}` must be [batch, num_additional, heads_kv, head_dim] with batch, "
                f"heads_kv and head_dim {wanted}, got {tuple(x.shape)}."
            )
    if keys.shape[1] != values.shape[1]:
        raise ArgumentError(
            "`additional_keys` and `additional_values` must have as many tokens, got "
            f"{keys.shape[1]} and {values.shape[1]}."
        )


def check_masks(
    key: Tensor, additional_keys: Tensor | None, key_mask: Any, additional_mask: Any, first: int = 1
) -> None:
    """Raise an error unless masks are dense and fit keys and additional keys.

    They are bool ``[batch or 1, *space]`` and ``[batch or 1, num_additional]``.

    Args:
        key, additional_keys: the keys.
        key_mask, additional_mask: the masks, or None.
        first: the key's first dimension of tokens.
    """
    if additional_mask is not None and additional_keys is None:
        raise ArgumentError("`additional_mask` needs `additional_keys`, which is None.")
    batch, space = key.shape[0], tuple(key.shape[first : key.dim() - 3 + first])
    if key_mask is not None:
        form = "[batch or 1, *key space]"
        check_mask("key_mask", key_mask, "key", key, form, (batch, *space), (1, *space))
    if additional_mask is not None and additional_keys is not None:
        form, n = "[batch or 1, num_additional]", additional_keys.shape[first]
        check_mask("additional_mask", additional_mask, "key", key, form, (batch, n), (1, n))


def check_mask(
    name: str, mask: Any, other_name: str, other: Tensor, form: str, *allowed: tuple[int, ...]
) -> None:
    """Raise ArgumentError unless ``mask`` is bool, on the device of ``other``, of an allowed shape.

    ``form`` says in words what the allowed shapes are.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask)
        raise ArgumentError(
            f"`{name}` must be a tensor of torch.bool, True where a key may be attended, got {got}."
        )
    if mask.is_nested or mask.layout is not torch.strided:
        raise UnsupportedError(f"`{name}` must be dense, not nested or sparse.")
    if mask.device != other.device:
        raise ArgumentError(
            f"`{name}` must be on the device of `{other_name}`, got {mask.device} and "
            f"{other.device}."
        )
    # Not "in", which torch.compile answers wrongly for symbolic sizes.
    if not any([tuple(mask.shape) == shape for shape in allowed]):
        raise ArgumentError(
            f"`{name}` must be {form} = {' or '.join(map(str, allowed))}, got {tuple(mask.shape)}."
        )


def check_rpb(rpb: Tensor | None, query: Tensor, rule: Neighborhood, heads: int) -> None:
    """Raise ArgumentError unless ``rpb`` is ``[heads, 2 * kernel_size - 1, ...]`` or None."""
    if rpb is None:
        return
    check_tensors(rpb=rpb)
    wanted = (heads, *(2 * k - 1 for k in rule.kernel_size))
    if tuple(rpb.shape) != wanted:
        raise ArgumentError(
            f"`rpb` must be [heads, 2 * kernel_size - 1, ...] = {wanted}, got {tuple(rpb.shape)}."
        )
    if rpb.device != query.device:
        raise ArgumentError(
            f"`rpb` must be on the device of `query`, got {rpb.device} and {query.device}."
        )


# torch.compile of PyTorch 2.7 can not read it inside of a function.
_LARGEST = sys.float_info.max


def check_scale(scale: Any, head_dim: int, name: str = "scale") -> float:
    """The factor on the scores as a float; None means ``head_dim ** -0.5``."""
    if scale is None:
        return float(head_dim) ** -0.5
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"`{name}` is a number to the operators, so no gradient would reach it: multiply the "
            "query by the tensor, and give 1.0 here."
        )
    number = real(scale)
    if number is None:
        raise ArgumentError(f"`{name}` must be None or a number, got {type(scale)}: {scale!r}.")
    if not -_LARGEST <= number <= _LARGEST:  # NaN fails this, too
        raise ArgumentError(f"`{name}` must be None or a finite number, got {scale!r}.")
    return float(number)


def check_tiles(rank: int, **shapes: Any) -> tuple[int, ...]:
    """All tile shapes in one tuple, with 0 for those not given; () if none is given."""
    if all(shape is None for shape in shapes.values()):
        return ()
    flat: list[int] = []
    for name, shape in shapes.items():
        given = (0,) * rank if shape is None else entries(shape)
        sizes = [integer(n) for n in ((shape,) if given is None else given)]
        if len(sizes) != rank or None in sizes or (shape is not None and min(sizes) < 1):
            raise ArgumentError(
                f"`{name}` must be None or {rank} positive integers, one per axis, got {shape!r}."
            )
        flat.extend(sizes)
    return tuple(flat)


def check_hints(attention_kwargs: Any) -> None:
    """Raise ArgumentError for what has a wrong type, although it has no effect."""
    if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
        raise ArgumentError(
            f"`attention_kwargs` must be None or a dict, got {type(attention_kwargs)}."
        )


def check_same_shape(name: str, shape: Sequence[int], other: str, wanted: Sequence[int]) -> None:
    """Raise ArgumentError unless two shapes agree, and name the first dimension that differs."""
    if tuple(shape) == tuple(wanted):
        return
    where = next((i for i, (a, b) in enumerate(zip(shape, wanted)) if a != b), "count")
    raise ArgumentError(
        f"`{name}` must match `{other}`, got {tuple(shape)} and {tuple(wanted)}: "
        f"they differ at dimension {where}."
    )


# Worked out at import, because some versions of torch.compile can not trace the question.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia")
_AUTOCAST = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def autocast_tensors(*tensors: Any) -> tuple[Any, ...]:
    """Cast tensors to autocast's dtype where it is on, as scaled_dot_product_attention does.

    Tensors of float64 stay as they are, and so do tensors on another device.
    """
    if not may_autocast():
        return tensors
    for first in tensors:
        if isinstance(first, Tensor):
            break
    else:
        return tensors
    kind = first.device.type
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible and x.device.type == kind else x

    return tuple(cast(x) for x in tensors)
