"""Fused attention composed of differentiable maps, for what no kernel computes.

That is forward mode, second derivatives and programs for other runtimes. All weights are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import gather
from ..inputs import Gradients, Inputs, compute_dtype
from ..neighborhood import Dense, Rule, window_mask
from ..softmax import softmax_with_lse
from . import linear


class _Products:
    """``qk``, ``av`` and the bias for any rule, differentiable to any order; heads-first.

    With ``gathered`` they are made of PyTorch's operators only, in graphs where autograd is off.
    Slots that are not attended hold weights of 0 and may hold any score.
    """

    def __init__(
        self,
        inputs: Inputs,
        rule: Rule,
        gathered: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        query, key = inputs.query, inputs.key
        self.rule, self.mask = rule, mask
        self.shape, self.key_shape = query.shape[1:-2], key.shape[1:-2]
        self.additional_mask = inputs.additional_mask
        self.windows: gather.Windows | None = None
        if mask is not None:
            return
        if isinstance(rule, Dense):
            self.mask = window_mask(rule, self.shape, self.key_shape, query.device)
        elif gathered:
            self.windows = gather.Windows(rule, self.shape, self.key_shape, query.device)
            self.mask = self.windows.attended
        elif rule.has_empty_slots:
            self.mask = rule.attended_slots(self.shape, self.key_shape, query.device)
        if inputs.key_mask is not None:
            self._mask_keys(inputs.key_mask)

    def _mask_keys(self, key_mask: Tensor) -> None:
        """Let ``key_mask [batch or 1, *key_space]`` take away keys: ``mask`` gets a batch."""
        if isinstance(self.rule, Dense):
            own = key_mask[:, None, None]  # [B, 1, 1, keys]
        else:
            own = self.rule.in_slots(key_mask, self.shape)[:, None]  # [B, 1, *space, slots]
        self.mask = own if self.mask is None else own & self.mask

    def qk(self, query: Tensor, key: Tensor) -> Tensor:
        if isinstance(self.rule, Dense):
            return query @ key.transpose(-1, -2)
        return self.windows.qk(query, key) if self.windows else linear.qk(query, key, self.rule)

    def av(self, attn: Tensor, value: Tensor) -> Tensor:
        if isinstance(self.rule, Dense):
            return attn @ value
        return self.windows.av(attn, value) if self.windows else linear.av(attn, value, self.rule)

    def av_transposed(self, attn: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.rule, Dense):
            return attn.transpose(-1, -2) @ x
        if self.windows:
            return self.windows.av_transposed(attn, x)
        return linear.av_transposed(attn, x, tuple(self.key_shape), self.rule)

    def bias(self, rpb: Tensor) -> Tensor:
        if self.windows:
            return self.windows.rpb_bias(rpb)
        return linear.rpb_bias(rpb, tuple(self.shape), tuple(self.key_shape), self.rule)

    def bias_transposed(self, grad: Tensor) -> Tensor:
        if self.windows:
            return self.windows.rpb_bias_transposed(grad)
        return linear.rpb_bias_transposed(grad, tuple(self.key_shape), self.rule)

    def additional_qk(self, query: Tensor, additional_keys: Tensor) -> Tensor:
        """Products of every query with every additional key."""
        return self._space(self._tokens(query) @ additional_keys.transpose(-1, -2))

    def additional_av(self, attn: Tensor, additional_values: Tensor) -> Tensor:
        return self._space(self._tokens(attn) @ additional_values)

    def additional_av_transposed(self, attn: Tensor, x: Tensor) -> Tensor:
        """For every additional key, the sum of ``x`` over all queries, weighted."""
        return self._tokens(attn).transpose(-1, -2) @ self._tokens(x)

    def _tokens(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], math.prod(self.shape), x.shape[-1])

    def _space(self, x: Tensor) -> Tensor:
        """Undo :meth:`_tokens`, in a way that legacy vmap can batch."""
        return x.reshape(*x.shape[:2], *self.shape, x.shape[-1])

    def scores(self, inputs: Inputs) -> Tensor:
        """Scores of scaled queries in the window's slots, then those of additional keys."""
        slots = self.qk(inputs.query, inputs.key)
        if inputs.rpb is not None:
            slots = slots + self.bias(inputs.rpb.to(inputs.query.dtype))
        slots = self.masked(slots, -math.inf)
        if inputs.additional_keys is None:
            return slots
        additional = self.additional_qk(inputs.query, inputs.additional_keys)
        return torch.cat([slots, self.masked_additional(additional, -math.inf)], dim=-1)

    def masked_additional(self, attn: Tensor, fill: float) -> Tensor:
        """As :meth:`masked`, of additional keys."""
        mask = self.additional_mask
        if mask is None:
            return attn
        sizes = mask.shape[0], *(1 for _ in attn.shape[2:]), mask.shape[1]
        return attn.masked_fill(~mask.view(sizes), fill)

    def masked(self, attn: Tensor, fill: float) -> Tensor:
        return attn if self.mask is None else attn.masked_fill(~self.mask, fill)


def _heads_first(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[batch, heads, *space, channels]``, kv heads repeated."""
    x = x.movedim(-2, 1).to(dtype)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _prepared(inputs: Inputs | Gradients, like: Inputs, scale: float) -> Any:
    """Inputs, or tangents of inputs ``like`` these, heads first; queries are scaled."""
    heads, dtype = like.query.shape[-2], compute_dtype(like.query.dtype)

    def first(x: Tensor | None) -> Any:
        return None if x is None else _heads_first(x, heads, dtype)

    def attended(x: Tensor | None, mask: Tensor | None) -> Any:
        # Masked keys and values may hold NaN, which a weight of 0 would not take away.
        if x is not None and mask is not None:
            x = x.masked_fill(~mask[..., None, None], 0.0)
        return first(x)

    query, key, value, rpb, additional_keys, additional_values, *_ = inputs
    q, kind = first(query), cast(Any, type(inputs))
    return kind(
        None if q is None else q * scale, attended(key, like.key_mask),
        attended(value, like.key_mask), rpb, attended(additional_keys, like.additional_mask),
        attended(additional_values, like.additional_mask), *inputs[len(Gradients._fields) :],
    )  # fmt: skip


def composed_attention(
    inputs: Inputs, rule: Rule, scale: float, gathered: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``attention`` composed of differentiable maps; stores all weights.

    ``mask [queries, keys]`` says who attends whom in plain attention, instead of the rule.
    """
    products = _Products(inputs, rule, gathered, mask)
    dtype = inputs.query.dtype
    inputs = _prepared(inputs, inputs, scale)
    weights, lse = softmax_with_lse(products.scores(inputs))
    windowed = weights.shape[-1]
    if inputs.additional_keys is not None:
        windowed -= inputs.additional_keys.shape[2]
    out = products.av(weights[..., :windowed], inputs.value)
    if inputs.additional_values is not None:
        out = out + products.additional_av(weights[..., windowed:], inputs.additional_values)
    return out.movedim(1, -2).to(dtype), lse.movedim(1, -1)


def gathered_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, rule: Rule, scale: float,
    mask: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of the inputs of ``attention``, gathered."""
    products = _Products(inputs, rule, True, mask)

    def finish(grad: Tensor, like: Tensor) -> Tensor:
        return grad.movedim(1, -2).to(like.dtype)

    def finish_kv(grad: Tensor, like: Tensor) -> Tensor:
        return finish(grad.unflatten(1, (like.shape[-2], -1)).sum(2), like)

    q, k, v, _, ak, av, *_ = prepared = _prepared(inputs, inputs, scale)
    do = _heads_first(grad_out, inputs.query.shape[-2], q.dtype)
    weights, lse = softmax_with_lse(products.scores(prepared))
    empty = lse == -math.inf  # rows whose gradients may be NaN, as of an LSE of -inf
    do = do.masked_fill(empty[..., None], 0.0)
    dp = products.qk(do, v)  # dP = dO V^T
    windowed = dp.shape[-1]
    if av is not None:
        dp = torch.cat([dp, products.additional_qk(do, av)], dim=-1)
    delta = (weights * dp).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.movedim(-1, 1).masked_fill(empty, 0.0)
    ds = weights * (dp - delta[..., None])  # dS = P * (dP - delta)
    slots, dq = ds[..., :windowed], products.av(ds[..., :windowed], k)
    grad_rpb = grad_keys = grad_values = None
    if inputs.rpb is not None:
        grad_rpb = products.bias_transposed(slots.sum(0)).to(inputs.rpb.dtype)
    if inputs.additional_keys is not None and inputs.additional_values is not None:
        dq = dq + products.additional_av(ds[..., windowed:], ak)
        grad_keys = products.additional_av_transposed(ds[..., windowed:], q)
        grad_values = products.additional_av_transposed(weights[..., windowed:], do)
        grad_keys = finish_kv(grad_keys, inputs.additional_keys)
        grad_values = finish_kv(grad_values, inputs.additional_values)
    dk = finish_kv(products.av_transposed(slots, q), inputs.key)
    dv = finish_kv(products.av_transposed(weights[..., :windowed], do), inputs.value)
    dq = finish(dq * scale, inputs.query)
    return Gradients(dq, dk, dv, grad_rpb, grad_keys, grad_values)


def composed_tangent(
    primals: Inputs, tangents: Gradients, rule: Rule, scale: float
) -> tuple[Tensor, Tensor]:
    """Tangents of ``attention``'s output and LSE; None stands for a zero tangent."""
    products, dtype = _Products(primals, rule), primals.query.dtype
    tangents = _prepared(tangents, primals, scale)
    primals = _prepared(primals, primals, scale)
    q, k, v, _, ak, av, *_ = primals

    def product_rule(product: Any, a: Any, b: Any, da: Any, db: Any) -> Any:
        """Tangent of ``product(a, b)``."""
        change = torch.zeros_like(product(a, b))
        change = change if da is None else change + product(da, b)
        return change if db is None else change + product(a, db)

    def weighted(attn: Tensor, values: Tensor | None, additional: Tensor | None) -> Any:
        # Not slices: one of everything is an alias, which legacy vmap can not batch.
        slots, others = attn.split([windowed, attn.shape[-1] - windowed], -1)
        out = 0 if values is None else products.av(slots, values)
        return out if additional is None else out + products.additional_av(others, additional)

    scores = products.scores(primals)
    change = product_rule(products.qk, q, k, tangents.query, tangents.key)
    if tangents.rpb is not None:
        change = change + products.bias(tangents.rpb.to(change.dtype))
    change, windowed = products.masked(change, 0.0), change.shape[-1]
    if ak is not None:
        additional_change = product_rule(
            products.additional_qk, q, ak, tangents.query, tangents.additional_keys
        )
        additional_change = products.masked_additional(additional_change, 0.0)
        change = torch.cat([change, additional_change], dim=-1)
    weights, _ = softmax_with_lse(scores)
    lse_tangent = (weights * change).sum(-1)
    weight_tangent = weights * (change - lse_tangent[..., None])
    out = weighted(weight_tangent, v, av)
    out = out + weighted(weights, tangents.value, tangents.additional_values)
    return out.movedim(1, -2).to(dtype), lse_tangent.movedim(1, -1)


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of a function that can be differentiated themselves, outside of transforms.

    ``torch.func.vjp`` serves transforms, too, but its first call imports ``torch._dynamo``, which
    takes seconds and leaves the tensors of all callers in a reference cycle.
    """

    def view(x: Tensor) -> Tensor:
        # Inputs may be one tensor, or be made of each other; after a transform what was wrapped by
        # it may need no gradient any more.
        x = x.view_as(x)
        return x if x.requires_grad else x.detach().requires_grad_()

    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [view(x) if need else x for x, need in zip(inputs, needed)]
        results = zip(function(*views), grads)
    # The LSE depends on no value.
    reached = [(y, g) for y, g in results if g is not None and y.requires_grad]
    leaves = [x for x, need in zip(views, needed) if need]
    if not reached:
        return [None for _ in needed]
    outputs, given = zip(*reached)
    found = iter(
        torch.autograd.grad(outputs, leaves, given, create_graph=create_graph, allow_unused=True)
    )
    return [next(found) if need else None for need in needed]
