"""Fused attention: which backend runs a call, the operator, and its derivatives."""

from __future__ import annotations

import contextlib
import marshal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .. import _tracing, backends, compiling, tuning
from .._library import differentiate, implement, ops
from .._torch import in_forward_mode, plain_apply
from ..documents import roomy_layout
from ..inputs import Gradients, Inputs, compute_dtype
from ..neighborhood import Dense, Neighborhood, Rule
from .composed import composed_attention, composed_tangent, differentiable_gradients
from .schema import ANY, Choice, pack, pack_choice, unpack, unpack_choice
from .transforms import (
    is_composed,
    is_plain,
    is_plain_call,
    merge,
    refuse_forward_mode,
    refuse_nested_forward_mode,
    split,
)


@dataclass
class Call:
    """Attention of tensors of one kind: shapes, dtypes and devices are always the same.

    They decide which backends run it, so these are chosen once.

    Attributes:
        rule: in its simplest form.
        scale, choice: as the operators take them.
        given: the rule of a part of a layout before it was :func:`simplified`.
    """

    rule: Rule
    scale: float
    choice: Choice
    given: Rule | None = None
    _chosen: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False)
    # Of parts, shared by those that were moved: what is chosen, by what decides it.
    _choices: dict[Any, dict[str, Callable[..., Any]]] = field(default_factory=dict, repr=False)
    # The same calls without a mask of keys, of additional ones, or both, by what they have.
    _less_masked: dict[tuple[bool, bool], Call] = field(default_factory=dict, repr=False)

    def __call__(self, inputs: Inputs, plain: bool) -> tuple[Tensor, Tensor]:
        """Output ``[batch, *space, heads, value_dim]`` and LSE ``[batch, *space, heads]``.

        ``plain`` is what :func:`is_plain_call` says of the inputs.
        """
        if plain:
            watched = [x for x in inputs if x is not None and x.requires_grad]
            if (watched and torch.is_grad_enabled()) or in_forward_mode():
                return _apply(*inputs, self)
            return self.forward(inputs)
        if torch.compiler.is_compiling() or _tracing.is_traced():
            refuse_forward_mode()
            if _tracing.is_for_onnx():
                return composed_attention(inputs, self.rule, self.scale, gathered=True)
            rank = self.rule.rank if isinstance(self.rule, Neighborhood) else 0
            return _tracing.record(ops.attention, rank, *inputs, *self.arguments())
        return _Attention.apply(*inputs, self)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        if inputs.is_masked and (less := inputs.without_idle_masks()) is not inputs:
            return self._less_masked_call(less).forward(less)
        run = self._chosen.get("attention")
        if run is None:
            return self._first_forward(inputs)
        return run(inputs, self.rule, self.scale)

    def _less_masked_call(self, inputs: Inputs) -> Call:
        """The same call of inputs that lack a mask."""
        kind = inputs.key_mask is None, inputs.additional_mask is None
        if kind not in self._less_masked:
            self._less_masked[kind] = Call(self.rule, self.scale, self.choice)
        return self._less_masked[kind]

    def _first_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        run = self._choose("attention", inputs)
        if not any(x is not None and x.requires_grad for x in inputs):
            return run(inputs, self.rule, self.scale)
        with self._gradient_meanwhile(inputs):
            return run(inputs, self.rule, self.scale)

    def _gradient_meanwhile(
        self, inputs: Inputs, has_grad_lse: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, threads compile the gradient's kernels if a launch has to compile its own."""
        device = inputs.query.device
        return compiling.before_a_new_kernel(
            lambda: self.compile("gradient", inputs, device, has_grad_lse)
        )

    def compile(
        self, operation: str, inputs: Inputs, device: torch.device, has_grad_lse: bool = False
    ) -> list[Future[Any]]:
        """Begin to compile the kernels of "attention" or of its "gradient", in threads.

        Args:
            operation: which of the two.
            inputs: tensors of the kind that the call will have; their data are not read.
            device: where the call will be.
            has_grad_lse: whether the LSE will have a gradient.

        Returns:
            What to wait for.
        """
        problem = backends.Problem.of(operation, inputs, self.rule, self.scale)
        problem = problem._replace(device=device)
        chosen = backends.choose(self.choice.backend, problem)
        if not chosen.compiles or device.type != "cuda":  # interpreted kernels are not compiled
            return []
        run = self._runner(operation, chosen, problem)
        inputs = Inputs(*map(_without_data, inputs))
        with compiling.recorded() as jobs:
            if operation == "attention":
                run(inputs, self.rule, self.scale)
            else:
                out, lse = fake_attention(*inputs)
                grad_lse = lse if has_grad_lse else None
                run(out, grad_lse, inputs, out, lse, self.rule, self.scale)
        return compiling.start(device, jobs)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Gradients of the inputs."""
        if inputs.is_masked and (less := inputs.without_idle_masks()) is not inputs:
            return self._less_masked_call(less).backward(grad_out, grad_lse, less, out, lse)
        arguments = grad_out, grad_lse, inputs, out, lse, self.rule, self.scale
        run = self._chosen.get("gradient")
        if run is not None:
            return run(*arguments)
        run = self._choose("gradient", inputs)
        with self._gradient_meanwhile(inputs, grad_lse is not None):
            return run(*arguments)

    def moved(self, offset: Any, inputs: Inputs, is_resized: bool) -> Call:
        """The call of another part of a layout: of other queries, those from ``offset`` on, and of
        tensors that differ in their token layouts only, and do so only if it ``is_resized``."""
        assert isinstance(self.given, Neighborhood)
        given, chosen = self.given.moved(offset), self._chosen
        shape, key_shape = inputs.query.shape[1:-2], inputs.key.shape[1:-2]
        if is_resized:
            given.check(shape, key_shape)
            # What :func:`backends.interface.roomy_part` looks at, and the rule's simplest form.
            rule = simplified(given, inputs)
            kind = rule.boundary, roomy_layout(shape), roomy_layout(key_shape)
            chosen = self._choices.setdefault(kind, {})
        else:
            given.check_queries(shape, key_shape)
            rule = given if self.rule is self.given else simplified(given, inputs)
        return Call(rule, self.scale, self.choice, given, chosen, self._choices)

    def arguments(self) -> tuple[Any, ...]:
        """What the operators take after the tensors."""
        return (*pack(self.rule), self.scale, *pack_choice(self.choice))

    def _choose(self, operation: str, inputs: Inputs) -> Callable[..., Any]:
        """The function of the backend that runs "attention" or its "gradient"."""
        problem = backends.Problem.of(operation, inputs, self.rule, self.scale)
        chosen = backends.choose(self.choice.backend, problem)
        if self.choice.backend not in ("", chosen.name):
            backends.warn_of_another(self.choice.backend, chosen, problem)
        run = self._chosen[operation] = self._runner(operation, chosen, problem)
        return run

    def _runner(
        self, operation: str, chosen: backends.Backend, problem: backends.Problem
    ) -> Callable[..., Any]:
        """The function of a backend for an operation."""
        chosen = backends.runner_of(chosen, problem)
        run: Callable[..., Any] = chosen.forward if operation == "attention" else chosen.backward
        if self.choice.tiles and chosen.takes_tiles:
            run = partial(run, tiles=self.choice.tiles)
        return run


def _without_data(x: Any) -> Any:
    """A tensor that lies in memory as ``x`` does and has no data; None for None."""
    if x is None:
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def simplified(rule: Any, inputs: Inputs) -> Any:
    """The rule in its simplest form, for tensors of known shapes."""
    if isinstance(rule, Dense) or inputs.rpb is not None or "circular" not in rule.boundary:
        return rule
    return rule.without_full_rings(inputs.key.shape[1:-2])


# --- the operator ---


def unpack_call(arguments: Sequence[Any]) -> tuple[Inputs, Call]:
    """Inputs and call of the arguments of ``natten::attention``."""
    tensors, options = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    *rule, scale, backend, tiles = options
    return Inputs(*tensors), Call(unpack(*rule), scale, unpack_choice(backend, tiles))


# Compiled code calls operators, layer by layer and step by step with the same arguments.
_calls = tuning.Kept()


def _known_call(arguments: tuple[Any, ...]) -> tuple[Inputs, Call]:
    """As :func:`unpack_call`, but the call has been checked, and is kept for others of its kind."""
    tensors, options = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    inputs = Inputs(*tensors)
    kinds = [None if x is None else (x.shape, x.dtype, x.device) for x in inputs]
    call: Call = _calls.find((marshal.dumps(options, 2), *kinds), _checked_call, arguments)
    return inputs, call


def _checked_call(arguments: Sequence[Any]) -> Call:
    inputs, call = unpack_call(arguments)
    if isinstance(call.rule, Neighborhood):  # a trace may see other sizes than those of its making
        call.rule.check(inputs.query.shape[1:-2], inputs.key.shape[1:-2])
    call.rule = simplified(call.rule, inputs)
    return call


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, call = _known_call(arguments)
    out, lse = call.forward(inputs)
    return out.contiguous(), lse.contiguous()  # as the fake ones


def fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What the operator returns, without data."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> list[Tensor]:
    inputs, call = _known_call(arguments)
    grads = call.backward(grad_out, grad_lse, inputs, out, lse)
    return [grad.contiguous() for grad in grads if grad is not None]


def _fake_attention_backward(*arguments: Any) -> list[Tensor]:
    inputs, _ = unpack_call(arguments[4:])
    return [x.new_empty(x.shape) for x in inputs.differentiable if x is not None]


implement("attention", _attention, fake_attention)
implement("attention_backward", _attention_backward, _fake_attention_backward)


# The heads' dimension in each input but the masks, which have none. Mapped dimensions become more
# heads, because each mapped rpb has heads of its own.
_HEADS = (-2, -2, -2, 0, -2, -2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, call = args
        inputs = Inputs(*tensors)
        if is_plain(inputs):
            return call.forward(inputs)
        return ops.attention(*inputs, *call.arguments())

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
        if is_composed(grad_out, grad_lse):
            _tracing.refuse_gradients()
            needed = ctx.needs_input_grad[: len(_HEADS)]  # other arguments follow
            grads = _differentiable_gradient(inputs, needed, grad_out, grad_lse, ctx.call)
        else:
            grads = _gradient(grad_out, grad_lse, inputs, out, lse, ctx.call)
        masks = tensors[len(_HEADS) :]
        return (*grads, *(None for _ in masks), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        # The operator's outputs may be views, whose tangents must have their strides.
        out, lse = _PlainAttention.jvp(ctx, *tangents)
        return out.contiguous(), lse.contiguous()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        *tensors, call = args
        size, masks = info.batch_size, tensors[len(_HEADS) :]
        if any(dim is not None for dim in in_dims[len(_HEADS) : len(tensors)]):
            return _one_by_one(size, in_dims, *args), (0, 0)
        inputs = Inputs(*map(merge, tensors, in_dims, repeat(size), _HEADS), *masks)
        out, lse = call(inputs, is_plain_call(inputs))
        return (split(out, size, -2), split(lse, size, -1)), (0, 0)


def _one_by_one(size: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, Tensor]:
    """Attention of each entry of a mapped dimension, where masks have it, too."""
    *tensors, call = args
    results = []
    for i in range(size):
        own = (x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims))
        inputs = Inputs(*own)
        results.append(call(inputs, is_plain_call(inputs)))
    outputs, exponents = zip(*results)
    return torch.stack(outputs), torch.stack(exponents)


class _PlainAttention(torch.autograd.Function):
    """:class:`_Attention` without ``torch.func``, which makes ``apply`` twice as slow."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, call = args
        output = call.forward(Inputs(*tensors))
        _Attention.setup_context(ctx, args, output)
        return output

    backward = _Attention.backward

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        refuse_nested_forward_mode()
        primals, changes = Inputs(*ctx.saved_tensors), Gradients(*tangents[: len(_HEADS)])
        return composed_tangent(primals, changes, ctx.call.rule, ctx.call.scale)


_apply = plain_apply(_PlainAttention)


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
    arguments = (grad_out, grad_lse, out, lse, *inputs, *call.arguments())
    found = iter(ops.attention_backward(*arguments))
    return [None if x is None else next(found) for x in inputs.differentiable]


def _differentiable_gradient(
    inputs: Inputs, needed: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None,
    call: Call,
) -> Sequence[Any]:  # fmt: skip
    tensors, masks = inputs.differentiable, inputs[len(_HEADS) :]

    def composed(*tensors: Any) -> tuple[Tensor, Tensor]:
        return composed_attention(Inputs(*tensors, *masks), call.rule, call.scale)

    if is_plain((grad_out, grad_lse, *inputs)):
        return differentiable_gradients(composed, tensors, needed, (grad_out, grad_lse))

    def of_present(*present: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(present)
        return composed(*(None if x is None else next(given) for x in tensors))

    (out, lse), pull, *_ = torch.func.vjp(of_present, *(x for x in tensors if x is not None))
    grads = (
        torch.zeros_like(out) if grad_out is None else grad_out,
        torch.zeros_like(lse) if grad_lse is None else grad_lse,
    )
    found = iter(pull(grads))
    return [None if x is None else next(found) for x in tensors]


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, call = unpack_call(inputs)
    _Attention.setup_context(ctx, (*tensors, call), output)


def _attention_gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    # The Function has one argument after the inputs, the operator several.
    *grads, _ = _Attention.backward(ctx, grad_out, grad_lse)
    return (*grads, *(None for _ in ctx.call.arguments()))


differentiate("attention", _attention_gradient, _setup_attention)


def attention(
    inputs: Inputs, rule: Rule, scale: float, choice: Choice = ANY
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call that is not kept."""
    return Call(rule, scale, choice)(inputs, is_plain_call(inputs))
