"""Circular axes for backends that have none: keys and values are padded around.

The windows are then those of the middle of the padded layout
(:meth:`natten.neighborhood.Neighborhood.unrolled`), and gradients of what was added are added to
those of the tokens that it was copied from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..inputs import Gradients, Inputs
from ..neighborhood import Neighborhood, Rule
from .interface import Backend, Problem, Shape, padded_shape

Margins = Sequence[tuple[int, int]]


def runner_of(backend: Backend, problem: Problem) -> Backend:
    """The backend, or one around it that pads keys, for circular axes that it does not have."""
    return Rings(backend) if backend.pads(problem) else backend


def padded(x: Tensor, margins: Margins) -> Tensor:
    """``x [batch, *space, ...]`` with ``margins`` of every axis from its other end."""
    if not any(map(any, margins)):
        return x
    space = x.shape[1 : 1 + len(margins)]
    rest = x.shape[1 + len(margins) :]
    out = x.new_empty(len(x), *padded_shape(space, margins), *rest)
    _middle(out, space, margins).copy_(x)
    for axis, (length, (before, after)) in enumerate(zip(space, margins)):
        # Axes before this one are whole already, those after it are not.
        whole, dim = _middle(out, space, margins, first=axis + 1), 1 + axis
        whole.narrow(dim, 0, before).copy_(whole.narrow(dim, length, before))
        whole.narrow(dim, before + length, after).copy_(whole.narrow(dim, before, after))
    return out


def folded(x: Tensor, space: Shape, margins: Margins) -> Tensor:
    """The transpose of :func:`padded`: what was added goes back to where it was copied from.

    ``x [batch, *padded space, ...]`` is changed; the result has the layout ``space``.
    """
    for dim, (length, (before, after)) in enumerate(zip(space, margins), start=1):
        x.narrow(dim, length, before).add_(x.narrow(dim, 0, before))
        x.narrow(dim, before, after).add_(x.narrow(dim, before + length, after))
    return _middle(x, space, margins).contiguous()


def _middle(x: Tensor, space: Shape, margins: Margins, first: int = 0) -> Tensor:
    """What lies between the margins of a padded tensor's axes from ``first`` on."""
    for axis, (length, (before, _)) in enumerate(zip(space, margins)):
        x = x.narrow(1 + axis, before, length) if axis >= first else x
    return x


class Rings(Backend):
    """A backend with circular axes, made of one that has none."""

    circular = True

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.takes_tiles = backend.name, backend.takes_tiles

    def forward(
        self, inputs: Inputs, rule: Rule, scale: float, tiles: Shape = ()
    ) -> tuple[Tensor, Tensor]:
        inputs, rule, _ = _unrolled(inputs, rule)
        return self.backend.forward(inputs, rule, scale, *_given(tiles))

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        rule: Rule, scale: float, tiles: Shape = (),
    ) -> Gradients:  # fmt: skip
        space = inputs.key.shape[1:-2]
        inputs, rule, margins = _unrolled(inputs, rule)
        grads = self.backend.backward(
            grad_out, grad_lse, inputs, out, lse, rule, scale, *_given(tiles)
        )
        assert grads.key is not None and grads.value is not None
        key, value = (folded(x, space, margins) for x in (grads.key, grads.value))
        return grads._replace(key=key, value=value)

    def qk(self, query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
        rule, margins = rule.unrolled()
        return self.backend.qk(query, padded(key, margins), rule)

    def av(self, attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
        rule, margins = rule.unrolled()
        return self.backend.av(attn, padded(value, margins), rule)

    def av_transposed(
        self, attn: Tensor, x: Tensor, key_shape: Shape, rule: Neighborhood
    ) -> Tensor:
        rule, margins = rule.unrolled()
        out = self.backend.av_transposed(attn, x, padded_shape(key_shape, margins), rule)
        return folded(out, key_shape, margins)

    def rpb_bias(self, rpb: Tensor, shape: Shape, key_shape: Shape, rule: Neighborhood) -> Tensor:
        rule, margins = rule.unrolled()
        return self.backend.rpb_bias(rpb, shape, padded_shape(key_shape, margins), rule)

    def rpb_bias_transposed(self, grad: Tensor, key_shape: Shape, rule: Neighborhood) -> Tensor:
        rule, margins = rule.unrolled()
        return self.backend.rpb_bias_transposed(grad, padded_shape(key_shape, margins), rule)


def _unrolled(inputs: Inputs, rule: Any) -> tuple[Inputs, Neighborhood, Margins]:
    rule, margins = rule.unrolled()
    names = "key", "value", "key_mask"
    found = {name: getattr(inputs, name) for name in names}
    around = {name: padded(x, margins) for name, x in found.items() if x is not None}
    return inputs._replace(**around), rule, margins


def _given(tiles: Shape) -> tuple[Shape, ...]:
    return (tiles,) if tiles else ()
