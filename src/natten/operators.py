"""The operators and their derivatives, and the one door to the backends.

Every operator has two faces. Compiled, exported and traced code sees the torch.library operator,
with a fake implementation and a gradient formula. Eager code goes through a
``torch.autograd.Function`` around the same operator, because only a Function supports forward mode,
double backward and ``torch.func`` transforms. ONNX, which knows neither, gets plain PyTorch.

Fused attention is ``attention``. Unfused attention is made of maps that are linear in each
argument, and whose derivatives are each other, so derivatives of any order exist:

* ``qk(query, key)``: products of each query with the keys of its window;
* ``av(attn, value)``: weighted sums of each window's values;
* ``av_transposed(attn, x)``: for each key, the weighted sum over the queries that attend it;
* ``rpb_bias(rpb)`` and ``rpb_bias_transposed(grad)``: the bias in every window slot, and back.

Second derivatives and forward mode of ``attention`` are composed of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import _tracing, backends, gather
from ._library import define, differentiate, implement, ops
from ._torch import (
    PLAIN_TYPES,
    dispatch_modes,
    in_forward_mode,
    in_nested_forward_mode,
    is_legacy_batch,
    is_transformed,
    pre_dispatch_modes,
)
from .errors import UnsupportedError
from .inputs import Gradients, Inputs, compute_dtype
from .neighborhood import Dense, Neighborhood, Rule, window_mask
from .softmax import softmax_with_lse

# Lists of integers that are never empty, which every consumer of a schema takes: torch.jit.trace
# knows no bool[], AOTInductor passes None for an empty list. _pack and unpack know what is in them.
_RULE = "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, SymInt[] is_causal"
_CHOICE = "str backend, SymInt[] tiles"
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, "
    "Tensor? additional_values"
)

define(f"attention({_INPUTS}, {_RULE}, float scale, {_CHOICE}) -> (Tensor, Tensor)")
define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, "
    f"{_RULE}, float scale, {_CHOICE}) -> Tensor[]"
)
define(f"qk(Tensor query, Tensor key, {_RULE}) -> Tensor")
define(f"av(Tensor attn, Tensor value, {_RULE}) -> Tensor")
define(f"av_transposed(Tensor attn, Tensor x, {_RULE}) -> Tensor")
define(f"rpb_bias(Tensor rpb, SymInt[] shape, {_RULE}) -> Tensor")
define(f"rpb_bias_transposed(Tensor grad, {_RULE}) -> Tensor")


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether nothing watches what an eager call does, so that it needs no operator.

    The dispatcher costs as much time on the host as a small kernel takes on a GPU.
    """
    return not (
        torch.jit.is_tracing()
        or is_transformed()
        or dispatch_modes()
        or pre_dispatch_modes()
        or not PLAIN_TYPES.issuperset(map(type, tensors))
    )


def is_composed(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass must be made of differentiable maps, not by a kernel.

    It is differentiated itself, carries tangents, or its gradients are a batch of which no kernel
    knows (``is_grads_batched``, ``torch.autograd.functional``).
    """
    return (
        torch.is_grad_enabled()
        or in_forward_mode()
        or any(x is not None and is_legacy_batch(x) for x in grads)
    )


def _pack(rule: Rule) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    """A rule as operator arguments; plain attention has the window 0."""
    if isinstance(rule, Dense):
        return [0], [0], [0], [int(rule.causal)]
    return rule.kernel_size, rule.stride, rule.dilation, [int(c) for c in rule.is_causal]


def unpack(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Any:
    """The rule of operator arguments."""
    causal = tuple(map(bool, is_causal))
    if not has_window(kernel_size):
        return Dense(causal[0])
    return Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), causal)


def has_window(kernel_size: Sequence[int]) -> bool:
    """Whether an operator's argument is that of a neighborhood, not of plain attention."""
    return any(kernel_size)


def _unfused_backend(x: Tensor) -> backends.Backend:
    """The backend that runs the unfused maps."""
    return backends.choose("", backends.Problem("unfused", x.device, x.dtype))


class Choice(NamedTuple):
    """Which backend is asked for, and with which tiles; "" and () leave the choice.

    ``tiles`` are sizes along every axis, of tiles of queries and of keys in the forward pass, and
    of both in the backward pass; 0 leaves the choice.
    """

    backend: str = ""
    tiles: tuple[int, ...] = ()


_ANY = Choice()


def _pack_choice(choice: Choice) -> tuple[str, Sequence[int]]:
    return choice.backend, choice.tiles or [0]


def _unpack_choice(backend: str, tiles: Sequence[int]) -> Choice:
    return Choice(backend, tuple(tiles) if any(tiles) else ())


# --- unfused: maps that are linear in each tensor, [batch, heads, *space, channels] ------------


def _unfused(name: str) -> Callable[..., Tensor]:
    def real(a: Tensor, b: Tensor, *packed: Any) -> Tensor:
        backend, rule = _unfused_backend(b), unpack(*packed)
        rule.check(b.shape[2:-1])  # a trace may see smaller tensors than those it was made with
        out = getattr(backend, name)(a.movedim(1, -2), b.movedim(1, -2), rule)
        return out.movedim(-2, 1).contiguous()

    return real


def _fake_qk(query: Tensor, key: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], math.prod(kernel_size))


def _fake_av(attn: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(value.shape)


def _bias(rpb: Tensor, shape: Sequence[int], *rule: Any) -> Tensor:
    backend = _unfused_backend(rpb)
    return backend.rpb_bias(rpb, shape, unpack(*rule)).movedim(-2, 0).contiguous()


def _fake_bias(rpb: Tensor, shape: Sequence[int], kernel_size: Sequence[int], *_: Any) -> Tensor:
    return rpb.new_empty(rpb.shape[0], *shape, math.prod(kernel_size))


def _bias_transposed(grad: Tensor, *rule: Any) -> Tensor:
    backend = _unfused_backend(grad)
    return backend.rpb_bias_transposed(grad.movedim(0, -2), unpack(*rule)).contiguous()


def _fake_bias_transposed(grad: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], *(2 * k - 1 for k in kernel_size))


def _refuse_forward_mode() -> None:
    """Raise where a torch.library operator would be differentiated in forward mode.

    PyTorch takes its tangent for zero. Without ``fullgraph`` raising makes the caller run eagerly.
    """
    if in_forward_mode():
        raise UnsupportedError(
            "natten's operators can be differentiated in forward mode in eager mode only, not "
            "inside torch.compile or torch.export."
        )


def _refuse_nested_forward_mode() -> None:
    """Raise for ``jvp`` of ``jvp``, where PyTorch takes a Function's second tangent for zero."""
    if in_nested_forward_mode():
        raise UnsupportedError(
            "natten's operators can not be differentiated twice in forward mode; nest forward mode "
            "and reverse mode instead, as torch.func.hessian does."
        )


def _merge(x: Any, dim: int | None, size: int, into: int) -> Any:
    """Merge a mapped dimension, or copies of what has none, into dimension ``into`` of the rest."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    into %= x.ndim - 1
    x = x.movedim(0, into)
    return x.reshape(*x.shape[:into], size * x.shape[into + 1], *x.shape[into + 2 :])


def _split(x: Tensor, size: int, out_of: int) -> Tensor:
    """Undo :func:`_merge`: the mapped dimension comes first."""
    out_of %= x.ndim
    rest = x.shape[out_of] // size
    return x.reshape(*x.shape[:out_of], size, rest, *x.shape[out_of + 1 :]).movedim(out_of, 0)


def _linear(
    name: str,
    real: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    gradients: Callable[..., Sequence[Any]],
) -> Callable[..., Tensor]:
    """Implement the operator ``name``, a map that is linear in each of its tensors.

    ``gradients(grad, *tensors, *others, rule, needs)`` gives one gradient per tensor, in terms of
    such maps. The map takes the tensors, then other arguments, then the rule. ``plain`` is the same
    map in PyTorch's own operators.
    """
    implement(name, real, fake)
    operator = getattr(ops, name)

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or _tracing.is_traced():
            _refuse_forward_mode()
            if _tracing.is_for_onnx():
                return plain(*args)
            rule = args[-1]
            return _tracing.record(operator, rule.rank, *args[:-1], *_pack(rule))
        return Map.apply(*args)

    class Map(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return operator(*args[:-1], *_pack(args[-1]))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            ctx.others = inputs[len(tensors) :]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            _tracing.refuse_gradients()
            found = gradients(grad, *ctx.saved_tensors, *ctx.others, ctx.needs_input_grad)
            return (*found, *(None for _ in ctx.others))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            _refuse_nested_forward_mode()
            primals = ctx.saved_tensors
            parts = [
                call(*primals[:i], tangents[i], *primals[i + 1 :], *ctx.others)
                for i in range(len(primals))
                if tangents[i] is not None
            ]
            return sum(parts[1:], parts[0])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
            size = info.batch_size
            merged = [_merge(x, dim, size, 0) for x, dim in zip(args, in_dims)]
            return _split(call(*merged), size, 0), 0

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # The operator's rule is four arguments, the Function's is one.
        Map.setup_context(ctx, (*inputs[:-4], unpack(*inputs[-4:])), output)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*Map.backward(ctx, grad), None, None, None)

    differentiate(name, backward, setup)
    Map.__name__ = Map.__qualname__ = call.__name__ = name
    return call


qk: Callable[..., Tensor] = _linear(
    "qk",
    _unfused("qk"),
    _fake_qk,
    gather.qk,
    lambda grad, query, key, rule, needs: (
        av(grad, key, rule) if needs[0] else None,
        av_transposed(grad, query, rule) if needs[1] else None,
    ),
)
av: Callable[..., Tensor] = _linear(
    "av",
    _unfused("av"),
    _fake_av,
    gather.av,
    lambda grad, attn, value, rule, needs: (
        qk(grad, value, rule) if needs[0] else None,
        av_transposed(attn, grad, rule) if needs[1] else None,
    ),
)
av_transposed: Callable[..., Tensor] = _linear(
    "av_transposed",
    _unfused("av_transposed"),
    _fake_av,
    gather.av_transposed,
    lambda grad, attn, x, rule, needs: (
        qk(x, grad, rule) if needs[0] else None,
        av(attn, grad, rule) if needs[1] else None,
    ),
)
rpb_bias: Callable[..., Tensor] = _linear(
    "rpb_bias",
    _bias,
    _fake_bias,
    gather.rpb_bias,
    lambda grad, rpb, shape, rule, needs: (rpb_bias_transposed(grad, rule),),
)
rpb_bias_transposed: Callable[..., Tensor] = _linear(
    "rpb_bias_transposed",
    _bias_transposed,
    _fake_bias_transposed,
    gather.rpb_bias_transposed,
    lambda grad, x, rule, needs: (rpb_bias(grad, x.shape[1:-1], rule),),
)


# --- fused: [batch, *space, heads, channels] ----------------------------------------------------


@dataclass
class Call:
    """Attention of tensors of one kind: shapes, dtypes and devices are always the same.

    They decide which backends run it, so these are chosen once.
    """

    rule: Rule
    scale: float
    choice: Choice = _ANY
    _chosen: dict[str, tuple[backends.Backend, dict[str, Any]]] = field(
        default_factory=dict, repr=False
    )

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output and LSE of plain tensors, differentiable."""
        watched = [x for x in inputs if x is not None and x.requires_grad]
        if (watched and torch.is_grad_enabled()) or in_forward_mode():
            return _PlainAttention.apply(*inputs, self)
        return self.forward(inputs)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        backend, options = self._backend("attention", inputs)
        return backend.forward(inputs, self.rule, self.scale, **options)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Gradients of the inputs."""
        backend, options = self._backend("gradient", inputs)
        return backend.backward(
            grad_out, grad_lse, inputs, out, lse, self.rule, self.scale, **options
        )

    def packed(self) -> tuple[Any, ...]:
        """What the operators take after the tensors."""
        return (*_pack(self.rule), self.scale, *_pack_choice(self.choice))

    def _backend(self, operation: str, inputs: Inputs) -> tuple[backends.Backend, dict[str, Any]]:
        """The backend that runs "attention" or its "gradient", and its options."""
        if operation not in self._chosen:
            problem = backends.Problem.of(operation, inputs, self.rule, self.scale)
            chosen = backends.choose(self.choice.backend, problem)
            if self.choice.backend not in ("", chosen.name):
                backends.warn_of_another(self.choice.backend, chosen, problem)
            tiles = self.choice.tiles
            options = {"tiles": tiles} if tiles and chosen.takes_tiles else {}
            self._chosen[operation] = chosen, options
        return self._chosen[operation]


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, call = unpack_call(arguments)
    if isinstance(call.rule, Neighborhood):  # a trace may see other sizes than those of its making
        call.rule.check(inputs.query.shape[1:-2])
    out, lse = call.forward(inputs)
    return out.contiguous(), lse.contiguous()  # as the fake ones


def unpack_call(arguments: Sequence[Any]) -> tuple[Inputs, Call]:
    """Inputs and call of the arguments of ``natten::attention``."""
    *rule, scale, backend, tiles = arguments[6:]
    return Inputs(*arguments[:6]), Call(unpack(*rule), scale, _unpack_choice(backend, tiles))


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))


def _attention_backward(grad_out: Tensor, grad_lse: Any, *arguments: Any) -> list[Tensor]:
    (out, lse), options = arguments[6:8], arguments[8:]
    inputs, call = unpack_call((*arguments[:6], *options))
    grads = call.backward(grad_out, grad_lse, inputs, out, lse)
    return [grad.contiguous() for grad in grads if grad is not None]


def _fake_attention_backward(grad_out: Tensor, grad_lse: Any, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[:6] if x is not None]


implement("attention", _attention, _fake_attention)
implement("attention_backward", _attention_backward, _fake_attention_backward)


class _Products:
    """``qk``, ``av`` and the bias for any rule, differentiable to any order; heads-first.

    With ``gathered`` they are made of PyTorch's operators only, in graphs where autograd is off.
    Slots that causality masks hold weights of 0 and may hold any score.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        rule: Rule,
        gathered: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        self.rule, self.shape, self.mask = rule, query.shape[1:-2], mask
        self.windows: gather.Windows | None = None
        if mask is not None:
            return
        if isinstance(rule, Dense):
            self.mask = window_mask(rule, self.shape, key.shape[1:-2], query.device)
        elif gathered:
            self.windows = gather.Windows(rule, self.shape, query.device)
            self.mask = self.windows.attended
        elif any(rule.is_causal):
            self.mask = rule.attended_slots(self.shape, query.device)

    def qk(self, query: Tensor, key: Tensor) -> Tensor:
        if isinstance(self.rule, Dense):
            return query @ key.transpose(-1, -2)
        return self.windows.qk(query, key) if self.windows else qk(query, key, self.rule)

    def av(self, attn: Tensor, value: Tensor) -> Tensor:
        if isinstance(self.rule, Dense):
            return attn @ value
        return self.windows.av(attn, value) if self.windows else av(attn, value, self.rule)

    def av_transposed(self, attn: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.rule, Dense):
            return attn.transpose(-1, -2) @ x
        if self.windows:
            return self.windows.av_transposed(attn, x)
        return av_transposed(attn, x, self.rule)

    def bias(self, rpb: Tensor) -> Tensor:
        if self.windows:
            return self.windows.rpb_bias(rpb)
        return rpb_bias(rpb, tuple(self.shape), self.rule)

    def bias_transposed(self, grad: Tensor) -> Tensor:
        if self.windows:
            return self.windows.rpb_bias_transposed(grad)
        return rpb_bias_transposed(grad, self.rule)

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
            slots = slots + self.bias(inputs.rpb.to(slots.dtype))
        slots = self.masked(slots, -math.inf)
        if inputs.additional_keys is None:
            return slots
        additional = self.additional_qk(inputs.query, inputs.additional_keys)
        return torch.cat([slots, additional], dim=-1)

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

    query, key, value, rpb, additional_keys, additional_values = inputs
    q, kind = first(query), cast(Any, type(inputs))
    return kind(
        None if q is None else q * scale, first(key), first(value), rpb, first(additional_keys),
        first(additional_values),
    )  # fmt: skip


def composed_attention(
    inputs: Inputs, rule: Rule, scale: float, gathered: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``attention`` composed of differentiable maps; stores all weights.

    ``mask [queries, keys]`` says who attends whom in plain attention, instead of the rule.
    """
    products = _Products(inputs.query, inputs.key, rule, gathered, mask)
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
    products = _Products(inputs.query, inputs.key, rule, True, mask)

    def finish(grad: Tensor, like: Tensor) -> Tensor:
        return grad.movedim(1, -2).to(like.dtype)

    def finish_kv(grad: Tensor, like: Tensor) -> Tensor:
        return finish(grad.unflatten(1, (like.shape[-2], -1)).sum(2), like)

    q, k, v, _, ak, av = prepared = _prepared(inputs, inputs, scale)
    do = _heads_first(grad_out, inputs.query.shape[-2], q.dtype)
    weights, _ = softmax_with_lse(products.scores(prepared))
    dp = products.qk(do, v)  # dP = dO V^T
    windowed = dp.shape[-1]
    if av is not None:
        dp = torch.cat([dp, products.additional_qk(do, av)], dim=-1)
    delta = (weights * dp).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.movedim(-1, 1)
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


def _composed_tangent(
    primals: Inputs, tangents: Gradients, rule: Rule, scale: float
) -> tuple[Tensor, Tensor]:
    """Tangents of ``attention``'s output and LSE; None stands for a zero tangent."""
    products, dtype = _Products(primals.query, primals.key, rule), primals.query.dtype
    tangents = _prepared(tangents, primals, scale)
    primals = _prepared(primals, primals, scale)
    q, k, v, _, ak, av = primals

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
        change = torch.cat([change, additional_change], dim=-1)
    weights, _ = softmax_with_lse(scores)
    lse_tangent = (weights * change).sum(-1)
    weight_tangent = weights * (change - lse_tangent[..., None])
    out = weighted(weight_tangent, v, av)
    out = out + weighted(weights, tangents.value, tangents.additional_values)
    return out.movedim(1, -2).to(dtype), lse_tangent.movedim(1, -1)


# The heads' dimension in each input. Mapped dimensions become more heads, because each mapped rpb
# has heads of its own.
_HEADS = (-2, -2, -2, 0, -2, -2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        inputs, call = Inputs(*args[:6]), args[6]
        if is_plain(inputs):
            return call.forward(inputs)
        return ops.attention(*inputs, *call.packed())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.call = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        if in_forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        inputs = Inputs(*tensors)
        if is_composed((grad_out, grad_lse)):
            _tracing.refuse_gradients()
            needed = ctx.needs_input_grad[:6]
            grads = _differentiable_gradient(inputs, needed, grad_out, grad_lse, ctx.call)
        else:
            grads = _gradient(grad_out, grad_lse, inputs, out, lse, ctx.call)
        return (*grads, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        # The operator's outputs may be views, whose tangents must have their strides.
        out, lse = _PlainAttention.jvp(ctx, *tangents)
        return out.contiguous(), lse.contiguous()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        call, size = args[6], info.batch_size
        merged: list[Any] = [
            _merge(x, dim, size, heads) for x, dim, heads in zip(args, in_dims, _HEADS)
        ]
        out, lse = attention(Inputs(*merged), call.rule, call.scale, call.choice)
        return (_split(out, size, -2), _split(lse, size, -1)), (0, 0)


class _PlainAttention(torch.autograd.Function):
    """:class:`_Attention` without ``torch.func``, which makes ``apply`` twice as slow."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = args[6].forward(Inputs(*args[:6]))
        _Attention.setup_context(ctx, args, output)
        return output

    backward = _Attention.backward

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        _refuse_nested_forward_mode()
        primals, changes = Inputs(*ctx.saved_tensors[:6]), Gradients(*tangents[:6])
        return _composed_tangent(primals, changes, ctx.call.rule, ctx.call.scale)


def _gradient(
    grad_out: Tensor | None, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
    call: Call,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Gradients of the inputs, None for those that are None."""
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if is_plain((grad_out, grad_lse, *inputs, out, lse)):
        return call.backward(grad_out, grad_lse, inputs, out, lse)
    _tracing.refuse_gradients()
    arguments = (grad_out, grad_lse, *inputs, out, lse, *call.packed())
    found = iter(ops.attention_backward(*arguments))
    return [None if x is None else next(found) for x in inputs]


def _differentiable_gradient(
    inputs: Inputs, needed: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None,
    call: Call,
) -> Sequence[Any]:  # fmt: skip
    def composed(*tensors: Any) -> tuple[Tensor, Tensor]:
        return composed_attention(Inputs(*tensors), call.rule, call.scale)

    if is_plain((grad_out, grad_lse, *inputs)):
        return differentiable_gradients(composed, inputs, needed, (grad_out, grad_lse))

    def of_present(*present: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(present)
        return composed(*(None if x is None else next(given) for x in inputs))

    (out, lse), pull, *_ = torch.func.vjp(of_present, *(x for x in inputs if x is not None))
    grads = (
        torch.zeros_like(out) if grad_out is None else grad_out,
        torch.zeros_like(lse) if grad_lse is None else grad_lse,
    )
    found = iter(pull(grads))
    return [None if x is None else next(found) for x in inputs]


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


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, call = unpack_call(inputs)
    _Attention.setup_context(ctx, (*tensors, call), output)


def _attention_gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    # The operator's options are seven arguments, the Function's are one.
    return (*_Attention.backward(ctx, grad_out, grad_lse), *(None for _ in range(6)))


differentiate("attention", _attention_gradient, _setup_attention)


def attention(
    inputs: Inputs, rule: Rule, scale: float, choice: Choice = _ANY
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value_dim]`` and LSE ``[batch, *space, heads]``."""
    call = Call(rule, scale, choice)
    compiled = torch.compiler.is_compiling()
    if not compiled and is_plain(inputs):
        return call(inputs)
    if compiled or _tracing.is_traced():
        _refuse_forward_mode()
        if _tracing.is_for_onnx():
            return composed_attention(inputs, rule, scale, gathered=True)
        rank = rule.rank if isinstance(rule, Neighborhood) else 0
        return _tracing.record(ops.attention, rank, *inputs, *call.packed())
    return _Attention.apply(*inputs, call)
