"""Layers: a projection to query, key and value, neighborhood attention, and a projection."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from . import operators
from ._checks import autocast_tensors, check_mask, check_same, check_scale, check_tensors
from ._hints import KERNEL_HINTS
from ._keywords import ELSEWHERE, signature_of, unknown_keyword
from ._numbers import entries, integer, truth
from ._ranks import SHAPES
from ._tracing import call_as_node, refuse_script
from ._warnings import warn_once
from .errors import ArgumentError
from .functional import attend, check_call_of
from .inputs import Inputs
from .neighborhood import Boundary, Causal, Dimension, Neighborhood, crop_rpb
from .softmax import softmax_with_lse
from .unfused import scores, weighted_sum
from .varlen import VarlenLayout, varlen_generic

_BIAS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OVERSIZE = ("error", "clamp", "pad")


class NeighborhoodAttentionGeneric(nn.Module):
    """Multi-head neighborhood attention over ``na_dim`` axes of tokens.

    Checkpoints of every NATTEN era load strictly (``qkv.*``, ``proj.*``, ``rpb``). If a module was
    built without ``rpb``, a checkpoint that has it creates the parameter, because eras differed in
    their default. So load before you build the optimizer. The new parameter requires a gradient if
    the projections do.

    Args:
        na_dim: number of token axes, 1 to 3.
        embed_dim: channels of input and output.
        num_heads: attention heads; the number divides ``embed_dim``.
        kernel_size: tokens in the window, one number for all axes or one per axis.
        stride: how many queries share a window.
        dilation: step between the tokens of a window; None means 1.
        is_causal: whether a query attends no later tokens, per axis.
        qkv_bias: whether the first projection has a bias.
        qk_scale: factor on the scores; None means ``head_dim ** -0.5``.
        proj_drop: dropout probability after the last projection.
        rel_pos_bias: whether to learn a relative positional bias ``rpb``; None means no. Backends
            without bias are passed over, so it may change which backend runs the layer and how
            fast; :func:`natten.backends.explain` says which one.
        attn_drop: dropout probability of the attention weights. If it is above 0, training takes
            the unfused operators, which store the weights and run on other backends.
        boundary: what windows do at the ends of an axis, ``"shift"``, ``"truncate"`` or
            ``"circular"``, as in the fused operator.
        oversize: what to do when ``kernel_size * dilation`` exceeds the input: raise an
            ``"error"``, ``"clamp"`` the window by :func:`natten.fit_window`, or ``"pad"`` the input
            with zeros and crop the output, as NATTEN 0.14 and 0.15 did. Truncated axes take any
            size as they are.
        pad_mask: whether the tokens that ``"pad"`` adds are masked. By default they are attended,
            as they were there.
        keep: what ``"clamp"`` keeps where not both fit, the ``"dilation"`` or the ``"window"``.
        dim, bias: older names of ``embed_dim`` and ``rel_pos_bias``.
        kernel_size_d, dilation_d: window and dilation of the first of three axes, as in 0.15.
        use_experimental_ops: accepted, without effect.

    Raises:
        ArgumentError: an argument has a type or value that is not allowed.

    Shape:
        Input and output are ``[batch, *space, embed_dim]``.
    """

    def __init__(
        self,
        na_dim: int,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: Dimension | None = None,
        stride: Dimension | None = 1,
        dilation: Dimension | None = 1,
        is_causal: Causal | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        dim: int | None = None,
        rel_pos_bias: bool | None = None,
        bias: bool | None = None,
        attn_drop: float = 0.0,
        boundary: Boundary = "shift",
        oversize: str = "error",
        pad_mask: bool = False,
        keep: Literal["dilation", "window"] = "dilation",
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
        use_experimental_ops: bool | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise unknown_keyword(type(self).__name__, name, _LAYER)
        if (embed_dim is None) == (dim is None):
            raise ArgumentError(
                f"give one of `embed_dim` and `dim` (its older name), got {embed_dim} and {dim}."
            )
        if num_heads is None or kernel_size is None:
            raise ArgumentError(
                "`num_heads` and `kernel_size` are required, "
                f"got num_heads={num_heads}, kernel_size={kernel_size}."
            )
        if rel_pos_bias is not None and bias is not None and bool(rel_pos_bias) != bool(bias):
            raise ArgumentError(
                "`rel_pos_bias` and `bias` (its older name) contradict each other, got "
                f"{rel_pos_bias} and {bias}; the projection's bias is `qkv_bias`."
            )
        channels = _count("embed_dim", embed_dim if embed_dim is not None else dim)
        num_heads = _count("num_heads", num_heads)
        if num_heads < 1 or channels < 1 or channels % num_heads != 0:
            raise ArgumentError(
                f"`embed_dim` must be a positive multiple of `num_heads`, got {channels} and "
                f"{num_heads}."
            )
        if oversize not in _OVERSIZE:
            raise ArgumentError(f"`oversize` must be one of {_OVERSIZE}, got {oversize!r}.")
        if truth(pad_mask) is None:
            raise ArgumentError(f"`pad_mask` must be a bool, got {type(pad_mask)}: {pad_mask!r}.")
        if keep not in ("dilation", "window"):
            raise ArgumentError(f'`keep` must be "dilation" or "window", got {keep!r}.')
        kernel_size = _with_depth("kernel_size_d", na_dim, kernel_size_d, kernel_size)
        dilation = _with_depth(
            "dilation_d", na_dim, dilation_d, 1 if dilation is None else dilation
        )
        self.neighborhood = Neighborhood.create(
            na_dim, kernel_size, stride, dilation, is_causal, boundary
        )
        self.num_heads = num_heads
        self.head_dim = channels // num_heads
        self.scale = check_scale(qk_scale, self.head_dim, "qk_scale")
        self.oversize, self.pad_mask, self.keep = oversize, bool(pad_mask), keep

        self.rpb: nn.Parameter | None
        self.register_parameter("rpb", None)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)
        if rel_pos_bias or bias:
            self._create_rpb(self.qkv.weight)
            nn.init.trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)

    def _create_rpb(self, like: Tensor, is_trained: bool = True) -> None:
        """Create ``rpb`` of zeros with the dtype and device of ``like``."""
        shape = (self.num_heads, *(2 * k - 1 for k in self.kernel_size))
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.rpb = nn.Parameter(zeros, requires_grad=is_trained)

    @property
    def attn_drop_rate(self) -> float:
        """The share of the weights that is dropped in training."""
        return self.attn_drop.p

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Window, per axis."""
        return self.neighborhood.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride, per axis."""
        return self.neighborhood.stride

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation, per axis."""
        return self.neighborhood.dilation

    @property
    def is_causal(self) -> tuple[bool, ...]:
        """Causality, per axis."""
        return self.neighborhood.is_causal

    @property
    def boundary(self) -> tuple[str, ...]:
        """What windows do at the ends, per axis."""
        return self.neighborhood.boundary

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        additional_mask: Tensor | None = None,
        layout: VarlenLayout | None = None,
        **hints: Any,
    ) -> Tensor:
        """Project, attend and project.

        Args:
            x: ``[batch, *space, embed_dim]``, channels last; ``[tokens, embed_dim]`` with
                ``layout``.
            key_mask: bool ``[batch or 1, *space]``, or ``[tokens]`` with ``layout``, True where a
                token may be attended. A mask moves no window. What masked tokens hold reaches no
                other token's output, not even NaN. They still have queries, so their own outputs
                depend on them, and so do gradients: in training all tokens must be finite.
            additional_tokens: ``[batch, n, embed_dim]``. They go through the layer's projections to
                key and value, and every token attends them beside its window. With ``layout`` the
                batch is that of the documents.
            additional_mask: bool ``[batch or 1, n]``, True where an additional token may be
                attended. Masked ones may hold NaN, also in training: their gradients are 0.
            layout: documents of different shapes, packed into ``x`` one after another. Each gets
                the output that it has alone; ``oversize="pad"`` and ``keep="window"`` are refused
                where a window does not fit a document.
            hints: ``additional_keys`` and ``additional_values`` (already projected, instead of
                ``additional_tokens``, not with ``layout``), ``backend``, tile shapes and what else
                the fused operator takes for kernels. Where weights are dropped out, ``backend`` and
                tile shapes are checked but have no effect.

        Returns:
            A tensor shaped like ``x``.

        Raises:
            ArgumentError: ``x`` has another layout, an argument has a type, shape, dtype, device or
                value that is not allowed, or a keyword is unknown.

        Example:
            >>> layer = NeighborhoodAttentionGeneric(2, 16, num_heads=2, kernel_size=3)
            >>> x, text = torch.randn(1, 8, 8, 16), torch.randn(1, 4, 16)
            >>> mask = torch.rand(1, 8, 8) < 0.5
            >>> layer(x, key_mask=mask, additional_tokens=text).shape
            torch.Size([1, 8, 8, 16])
        """
        if isinstance(x, Proxy):
            given = key_mask, additional_tokens, additional_mask, layout
            used = {name: y for name, y in zip(_TOKENS, given) if y is not None}
            return call_as_node(self, x, used | hints)
        self._check_keywords("forward", hints)
        if layout is None:
            self._check_input(x)
            rule, inputs = self._inputs(x, key_mask, additional_tokens, additional_mask, hints)
            out = _cropped(self._attend(inputs, rule, hints), 1, x.shape[1:-1])
        else:
            self._check_packed(x, layout, hints)
            out = self._packed(x, key_mask, additional_tokens, additional_mask, layout, hints)
        return self.proj_drop(self.proj(out))

    def attention_weights(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        additional_mask: Tensor | None = None,
        **hints: Any,
    ) -> Tensor:
        """The weights with which every token attends, for pictures; none are dropped out.

        Args:
            x, key_mask, additional_tokens, additional_mask, hints: as in :meth:`forward`. What is
                for kernels has no effect.

        Returns:
            ``[batch, heads, *space, window tokens + n]``: the softmax over the slots of a token's
            window and the additional tokens. Slots of masked tokens hold 0, and so do those that
            causality or a boundary cuts off. ``layer.neighborhood.window_tokens_of(space)`` says
            which token is in each slot; where ``oversize="clamp"`` makes the window smaller,
            ``layer.neighborhood.fitted(space, layer.keep)`` has the windows.

        Raises:
            ArgumentError: as in :meth:`forward`.

        Example:
            >>> layer = NeighborhoodAttentionGeneric(2, 16, num_heads=2, kernel_size=3)
            >>> layer.attention_weights(torch.randn(1, 8, 8, 16)).shape
            torch.Size([1, 2, 8, 8, 9])
        """
        self._check_keywords("attention_weights", hints)
        self._check_input(x)
        rule, inputs = self._inputs(x, key_mask, additional_tokens, additional_mask, hints)
        return _cropped(self._weights(inputs, rule), 2, x.shape[1:-1])

    def _check_keywords(self, method: str, hints: dict[str, Any]) -> None:
        for name in hints:
            if name not in _HINTS:
                function = f"{type(self).__name__}.{method}"
                raise unknown_keyword(function, name, (*_TOKENS, *_HINTS), _IN_LAYERS)

    def _check_input(self, x: Any) -> None:
        """Raise an error unless ``x`` is ``[batch, *space, channels]``."""
        if (
            not isinstance(x, Tensor)
            or x.is_nested
            or x.dim() != self.neighborhood.rank + 2
            or x.shape[-1] != self.num_heads * self.head_dim
        ):
            raise self._misfit(x)

    def _check_packed(self, x: Any, layout: Any, hints: dict[str, Any]) -> None:
        """Raise an error unless ``x`` is packed as ``layout`` says, of documents that fit."""
        rule, channels = self.neighborhood, self.num_heads * self.head_dim
        if not isinstance(layout, VarlenLayout) or layout.rank != rule.rank:
            got = layout if isinstance(layout, VarlenLayout) else type(layout)
            raise ArgumentError(
                f"`layout` must be a natten.VarlenLayout of rank {rule.rank}, got {got}."
            )
        check_tensors(x=x)
        layout.check("x", x)
        if tuple(x.shape[1:]) != (channels,):
            raise ArgumentError(
                f"`x` must be [tokens, {channels}] with `layout`, got {tuple(x.shape)}."
            )
        for name in _ADDITIONAL:
            if hints.get(name) is not None:
                raise ArgumentError(
                    f"`{name}` is not for packed documents: give `additional_tokens`."
                )
        for shape in layout.shapes:
            if 0 in shape:
                continue
            if self.oversize != "clamp":
                rule.check(shape, shape)
            elif self.keep == "window" and rule.fitted(shape, "window") != rule.fitted(shape):
                raise ArgumentError(
                    "`layout` must hold documents that the window fits, because packed ones keep "
                    f'the dilation and the layer has keep="window", got one of {shape}.'
                )

    def _packed(
        self, x: Tensor, key_mask: Any, additional_tokens: Any, additional_mask: Any,
        layout: VarlenLayout, hints: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """What is attended inside documents, ``[tokens, channels]``."""
        documents, lengths = len(layout), None
        if key_mask is not None:
            check_mask("key_mask", key_mask, "x", x, "[tokens]", (x.shape[0],))
            key_mask = key_mask[None]
        _check_additional(x, documents, additional_tokens, additional_mask, {})
        if additional_tokens is not None:
            lengths = [additional_tokens.shape[1]] * documents
            additional_tokens = additional_tokens.flatten(0, 1)[None]
            if additional_mask is not None:
                additional_mask = additional_mask.expand(documents, -1).flatten()[None]
        masks = key_mask, additional_mask
        inputs = self._projected(x[None], self.rpb, additional_tokens, *masks, {})
        rule = self.neighborhood
        if self._drops_weights:
            each = operators.each_document(inputs, layout.shapes, rule, lengths or ())
            out = [self._attend(own, fitted, hints).flatten(1, -2) for own, fitted in each]
            return torch.cat(out or [inputs.value.flatten(-2)], 1)[0]
        q, k, v = (each[0] for each in inputs[:3])
        options = {
            name: None if each is None else each[0]
            for name, each in zip(inputs._fields[4:], inputs[4:])
        }
        out = varlen_generic(
            q, k, v, layout, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal,
            self.scale, rpb=inputs.rpb, boundary=rule.boundary, additional_lengths=lengths,
            **hints | options,
        )  # fmt: skip
        return out.flatten(-2)

    def _inputs(
        self, x: Tensor, key_mask: Any, additional_tokens: Any, additional_mask: Any,
        hints: dict[str, Any],
    ) -> tuple[Neighborhood, Inputs]:  # fmt: skip
        """Windows that fit ``x [batch, *space, channels]``, and what is attended.

        Where padding makes windows fit, queries, keys and values are those of padded tokens.
        """
        batch, *space = x.shape[:-1]
        if key_mask is not None:
            form, shapes = "[batch or 1, *space]", ((batch, *space), (1, *space))
            check_mask("key_mask", key_mask, "x", x, form, *shapes)
        _check_additional(x, batch, additional_tokens, additional_mask, hints)
        rule = self.neighborhood
        rpb: Tensor | None = self.rpb
        if self.oversize == "pad":
            wanted = (
                0 if border == "truncate" else k * d
                for k, d, border in zip(rule.kernel_size, rule.dilation, rule.boundary)
            )
            missing = [max(0, size - length) for size, length in zip(wanted, space)]
            if any(missing):
                after = [n for each in reversed(missing) for n in (0, each)]
                x = F.pad(x, (0, 0, *after))
                if key_mask is None and self.pad_mask:
                    key_mask = x.new_ones((1, *space), dtype=torch.bool)
                if key_mask is not None:
                    key_mask = F.pad(key_mask, after, value=not self.pad_mask)
        elif self.oversize == "clamp":
            rule = rule.fitted(space, self.keep)
            rpb = None if rpb is None else crop_rpb(rpb, self.kernel_size, rule.kernel_size)
        masks = key_mask, additional_mask
        return rule, self._projected(x, rpb, additional_tokens, *masks, hints)

    def _projected(
        self, x: Tensor, rpb: Tensor | None, additional_tokens: Tensor | None,
        key_mask: Tensor | None, additional_mask: Tensor | None, hints: dict[str, Any],
    ) -> Inputs:  # fmt: skip
        """Queries, keys and values of ``x``, and keys and values of additional tokens."""

        def project(x: Tensor) -> Tensor:
            found: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            return found

        keys, values = hints.get("additional_keys"), hints.get("additional_values")
        if additional_tokens is not None:
            if additional_mask is not None:  # NaN there would reach the projection's gradient
                masked = ~additional_mask[..., None]
                additional_tokens = additional_tokens.masked_fill(masked, 0.0)
            # Queries, too, because only the whole projection works if it is wrapped or quantized.
            keys, values = project(additional_tokens).narrow(-3, 1, 2).unbind(-3)
        q, k, v, keys, values = autocast_tensors(*project(x).unbind(-3), keys, values)
        return Inputs(q, k, v, rpb, keys, values, key_mask, additional_mask)

    @property
    def _drops_weights(self) -> bool:
        return self.training and self.attn_drop_rate > 0

    def _attend(self, inputs: Inputs, rule: Neighborhood, hints: dict[str, Any]) -> Tensor:
        """What is attended, ``[batch, *space, channels]``."""
        options = [hints.get(name) for name in _OPTIONS]
        if not self._drops_weights:
            out, _ = attend(inputs, rule, self.scale, *options)
            return out.flatten(-2)
        if hints:
            call = check_call_of(inputs, rule, self.scale, *options)
            if call.choice.backend:
                warn_once(
                    f"{type(self).__name__}: `backend` has no effect in training with `attn_drop`, "
                    "where weights are dropped out between the unfused operators."
                )
        attn = self.attn_drop(self._weights(inputs, rule))
        v = _without_masked(inputs.value, inputs.key_mask).movedim(-2, 1)
        values = inputs.additional_values
        if values is not None:
            values = _without_masked(values, inputs.additional_mask).transpose(1, 2)
        return weighted_sum(attn, v, rule, values).movedim(1, -2).flatten(-2)

    def _weights(self, inputs: Inputs, rule: Neighborhood) -> Tensor:
        """The weights ``[batch, heads, *space, slots]``."""
        q, k = (x.movedim(-2, 1) for x in (inputs.query, inputs.key))
        keys = None if inputs.additional_keys is None else inputs.additional_keys.transpose(1, 2)
        masks = inputs.key_mask, inputs.additional_mask
        attn = scores(q * self.scale, k, rule, inputs.rpb, keys, *masks)
        # Only masks leave a token with nothing to attend.
        return softmax_with_lse(attn)[0] if inputs.is_masked else attn.softmax(-1)

    def _misfit(self, x: Any) -> ArgumentError:
        """The error that says why ``x`` can not be an input."""
        check_tensors(x=x)
        rank, channels = self.neighborhood.rank, self.num_heads * self.head_dim
        name = type(self).__name__
        layout = f"[batch, {SHAPES[rank]['space']}, {channels}], channels last"
        if x.dim() != rank + 2:
            return ArgumentError(
                f"{name} expected a rank-{rank + 2} input tensor; got x.dim()={x.dim()}: "
                f"`x` must be {layout}."
            )
        advice = (
            "; x.movedim(1, -1) makes channels last, and .movedim(-1, 1) of the output moves them "
            "back"
        )
        return ArgumentError(
            f"`x` of {name} must be {layout}, got {tuple(x.shape)}"
            f"{advice if x.shape[1] == channels else ''}."
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}rpb")
        if self.rpb is None and found is not None:
            # The projections may be wrapped or quantized. Their weights are the largest parameters,
            # because whatever a wrapper adds and trains is smaller.
            parameters = sorted(self.parameters(), key=Tensor.numel, reverse=True)
            like = next((x for x in parameters if x.dtype in _BIAS_DTYPES), found)
            self._create_rpb(like, is_trained=bool(parameters) and parameters[0].requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script()

    def extra_repr(self) -> str:
        """The line that ``print(module)`` shows."""
        boundary = set(self.boundary) - {"shift"} and f", boundary={self.boundary}"
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}{boundary or ''}, has_bias={self.rpb is not None}"
        )


_LAYER = tuple(signature_of(NeighborhoodAttentionGeneric).parameters)[1:]
# What a call of fused attention takes after the scale.
_OPTIONS = (
    "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
    "backward_kv_tile_shape",
)  # fmt: skip
_ADDITIONAL = ("additional_keys", "additional_values")
_HINTS = ("backend", *_ADDITIONAL, *KERNEL_HINTS)
# What else a layer takes beside its input.
_TOKENS = ("key_mask", "additional_tokens", "additional_mask", "layout")
_IN_LAYERS = {
    **ELSEWHERE,
    **dict.fromkeys((*_LAYER, "rpb"), "it is the layer's own, given when it is built"),
    "scale": "the layer has its own, `qk_scale`, given when it is built",
    "dropout_p": "the layer has its own, `attn_drop`, given when it is built",
    "return_lse": "a layer returns its output only",
    "need_weights": "`attention_weights` of the layer gives them",
    "layout": "`attention_weights` takes one document at a time",
}


def _check_additional(x: Tensor, batch: int, tokens: Any, mask: Any, hints: dict[str, Any]) -> None:
    """Raise an error unless additional tokens and their mask fit ``x`` and the batch size."""
    given = [name for name in _ADDITIONAL if hints.get(name) is not None]
    if tokens is None:
        if mask is not None and not given:
            raise ArgumentError("`additional_mask` needs `additional_tokens`, which is None.")
        return
    if given:
        raise ArgumentError(
            f"`additional_tokens`, which the layer projects, and `{given[0]}` exclude each other."
        )
    check_tensors(additional_tokens=tokens)
    if tokens.dim() != 3 or (tokens.shape[0], tokens.shape[2]) != (batch, x.shape[-1]):
        raise ArgumentError(
            f"`additional_tokens` must be [batch, n, embed_dim] with batch {batch} and embed_dim "
            f"{x.shape[-1]}, got {tuple(tokens.shape)}."
        )
    own, others = autocast_tensors(tokens[:0], x[:0])
    check_same("additional_tokens", own, "x", others)
    if mask is not None:
        n = tokens.shape[1]
        check_mask("additional_mask", mask, "x", x, "[batch or 1, n]", (batch, n), (1, n))


def _without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x [batch, *tokens, heads, channels]`` with 0 where the mask takes tokens away."""
    return x if mask is None else x.masked_fill(~mask[..., None, None], 0.0)


def _cropped(x: Tensor, first: int, space: Sequence[int]) -> Tensor:
    """``x`` without padding after the axes of tokens, of which ``first`` is the first."""
    for axis, length in enumerate(space):
        x = x.narrow(first + axis, 0, length)
    return x


def _count(name: str, given: Any) -> int:
    number = integer(given)
    if number is None:
        raise ArgumentError(f"`{name}` must be an integer, got {type(given)}: {given!r}.")
    return number


def _with_depth(name: str, na_dim: int, depth: int | None, rest: Dimension) -> Dimension:
    """``rest`` with ``depth`` before it; 0.15's 3-D modules had an argument for the first axis."""
    if depth is None:
        return rest
    if na_dim != 3 or entries(rest) is not None:
        raise ArgumentError(
            f"`{name}` is for 3-D modules whose other argument is one integer, got {rest!r}."
        )
    return (depth, rest, rest)  # type: ignore[return-value]


Parameters = ParamSpec("Parameters")


def _without_na_dim(
    generic: Callable[Concatenate[Any, int, Parameters], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, Parameters], None]]:
    """Give a constructor the signature and the documented arguments of ``generic``'s layer."""
    signature = signature_of(generic)
    known = [each for name, each in signature.parameters.items() if name != "na_dim"]
    _, _, sections = (inspect.getdoc(NeighborhoodAttentionGeneric) or "").partition("Args:\n")
    _, _, arguments = sections.partition("\n")  # drops `na_dim`, the first argument

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, Parameters], None]:
        init.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
        init.__doc__ = f"Args:\n{arguments}"
        return init

    return decorate


class NeighborhoodAttention1D(NeighborhoodAttentionGeneric):
    """Multi-head neighborhood attention over ``[batch, length, channels]``.

    It is a :class:`NeighborhoodAttentionGeneric`, where the arguments are explained.

    Example:
        >>> import torch
        >>> NeighborhoodAttention1D(64, 4, kernel_size=7)(torch.randn(2, 32, 64)).shape
        torch.Size([2, 32, 64])
    """

    @_without_na_dim(NeighborhoodAttentionGeneric.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(1, *args, **kwargs)


class NeighborhoodAttention2D(NeighborhoodAttentionGeneric):
    """Multi-head neighborhood attention over ``[batch, height, width, channels]``.

    It is a :class:`NeighborhoodAttentionGeneric`, where the arguments are explained.

    Example:
        >>> import torch
        >>> NeighborhoodAttention2D(64, 4, kernel_size=7)(torch.randn(2, 8, 8, 64)).shape
        torch.Size([2, 8, 8, 64])
    """

    @_without_na_dim(NeighborhoodAttentionGeneric.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(2, *args, **kwargs)


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
    """Multi-head neighborhood attention over ``[batch, depth, height, width, channels]``.

    It is a :class:`NeighborhoodAttentionGeneric`, where the arguments are explained.

    Example:
        >>> import torch
        >>> NeighborhoodAttention3D(64, 4, kernel_size=3)(torch.randn(2, 4, 6, 8, 64)).shape
        torch.Size([2, 4, 6, 8, 64])
    """

    @_without_na_dim(NeighborhoodAttentionGeneric.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(3, *args, **kwargs)
