"""Layers: a projection to query, key and value, neighborhood attention, and a projection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ._checks import autocast_tensors, check_scale, check_tensors
from ._hints import KERNEL_HINTS
from ._keywords import ELSEWHERE, signature_of, unknown_keyword
from ._numbers import entries, integer
from ._ranks import SHAPES
from ._tracing import call_as_node, refuse_script
from ._warnings import warn_once
from .errors import ArgumentError
from .functional import attend, check_call_of
from .inputs import Inputs
from .neighborhood import Boundary, Causal, Dimension, Neighborhood, crop_rpb
from .unfused import scores, weighted_sum

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
        embed_dim: channels of input and output; ``dim`` is its older name.
        num_heads: attention heads; the number divides ``embed_dim``.
        kernel_size: tokens in the window, one number for all axes or one per axis.
        stride: how many queries share a window.
        dilation: step between the tokens of a window; None means 1.
        is_causal: whether a query attends no later tokens, per axis.
        qkv_bias: whether the first projection has a bias.
        qk_scale: factor on the scores; None means ``head_dim ** -0.5``.
        proj_drop: dropout probability after the last projection.
        rel_pos_bias: whether to learn a relative positional bias ``rpb``; None means no. ``bias``
            is its older name.
        attn_drop: dropout probability of the attention weights. If it is above 0, training takes
            the unfused operators, which store the weights.
        boundary: what windows do at the ends of an axis, ``"shift"``, ``"truncate"`` or
            ``"circular"``, as in the fused operator.
        oversize: what to do when ``kernel_size * dilation`` exceeds the input: raise an
            ``"error"``, ``"clamp"`` the window by :func:`natten.fit_window`, or ``"pad"`` the input
            with zeros and crop the output, as NATTEN 0.14 and 0.15 did. Truncated axes take any
            size as they are.
        keep: what ``"clamp"`` keeps where not both fit, the ``"dilation"`` or the ``"window"``.
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
        self.oversize, self.keep = oversize, keep

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

    def forward(self, x: Tensor, **hints: Any) -> Tensor:
        """Project, attend and project.

        Args:
            x: ``[batch, *space, embed_dim]``, channels last.
            hints: ``additional_keys`` and ``additional_values``, ``backend``, tile shapes and what
                else the fused operator takes for kernels. Where weights are dropped out,
                ``backend`` and tile shapes are checked but have no effect.

        Returns:
            ``[batch, *space, embed_dim]``.

        Raises:
            ArgumentError: ``x`` has another layout, or a keyword is unknown or not allowed.
        """
        if isinstance(x, Proxy):
            return call_as_node(self, x, hints)
        rank = self.neighborhood.rank
        if (
            not isinstance(x, Tensor)
            or x.is_nested
            or x.dim() != rank + 2
            or x.shape[-1] != self.num_heads * self.head_dim
        ):
            raise self._misfit(x)
        for name in hints:
            if name not in _FORWARD:
                forward = f"{type(self).__name__}.forward"
                raise unknown_keyword(forward, name, _FORWARD, _IN_LAYERS)
        shape = x.shape[1:-1]
        rule = self.neighborhood
        rpb: Tensor | None = self.rpb
        if self.oversize == "pad":
            wanted = (
                0 if border == "truncate" else k * d
                for k, d, border in zip(rule.kernel_size, rule.dilation, rule.boundary)
            )
            missing = [max(0, size - length) for size, length in zip(wanted, shape)]
            if any(missing):
                x = F.pad(x, (0, 0, *(n for each in reversed(missing) for n in (0, each))))
        elif self.oversize == "clamp":
            rule = rule.fitted(shape, self.keep)
            rpb = None if rpb is None else crop_rpb(rpb, self.kernel_size, rule.kernel_size)
        out = self._attend(x, rule, rpb, hints)
        for axis, length in enumerate(shape):
            out = out.narrow(1 + axis, 0, length)
        return self.proj_drop(self.proj(out))

    def _attend(
        self, x: Tensor, rule: Neighborhood, rpb: Tensor | None, hints: dict[str, Any]
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(-3)
        additional = hints.get("additional_keys"), hints.get("additional_values")
        options = [hints.get(name) for name in _OPTIONS]
        if not (self.training and self.attn_drop_rate > 0):
            q, k, v, keys, values = autocast_tensors(q, k, v, *additional)
            out, _ = attend(Inputs(q, k, v, rpb, keys, values), rule, self.scale, *options)
            return out.flatten(-2)
        if hints:
            call = check_call_of(Inputs(q, k, v, rpb, *additional), rule, self.scale, *options)
            if call.choice.backend:
                warn_once(
                    f"{type(self).__name__}: `backend` has no effect in training with `attn_drop`, "
                    "where weights are dropped out between the unfused operators."
                )
        q, k, v = (t.movedim(-2, 1) for t in (q, k, v))
        keys, values = (None if t is None else t.transpose(1, 2) for t in additional)
        attn = scores(q * self.scale, k, rule, rpb, keys)
        attn = self.attn_drop(attn.softmax(-1))
        return weighted_sum(attn, v, rule, values).movedim(1, -2).flatten(-2)

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
_FORWARD = ("backend", "additional_keys", "additional_values", *KERNEL_HINTS)
_IN_LAYERS = {
    **ELSEWHERE,
    **dict.fromkeys((*_LAYER, "rpb"), "it is the layer's own, given when it is built"),
    "scale": "the layer has its own, `qk_scale`, given when it is built",
    "dropout_p": "the layer has its own, `attn_drop`, given when it is built",
    "return_lse": "a layer returns its output only",
}


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
