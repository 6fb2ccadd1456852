"""The definition of a neighborhood; no other module knows which keys a query attends.

Per axis of length ``L``, with window ``K``, stride ``S``, dilation ``d``:

* Dilation splits the axis into ``d`` independent groups. Token ``x`` is at position ``i = x // d``
  of group ``g = x % d``, which has ``n = ceil((L - g) / d)`` positions.
* Not causal: the leader of query ``i`` is ``c = min((i // S) * S + S // 2, n - 1)``; its window
  starts at ``s = min(max(c - K // 2, 0), n - K)`` and has ``K`` positions. At a border the window
  shifts; it never shrinks.
* Causal: the leader is ``c = min((i // S) * S + S - 1, n - 1)``, the window starts at
  ``s = max(c - K + 1, 0)`` and ends at the query itself.

A token attends another when it does so along every axis.

Source: Hassani et al., "Neighborhood Attention Transformer" (2023); "Dilated Neighborhood
Attention Transformer" (2022); stride: "Generalized Neighborhood Attention" (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._numbers import entries, integer, truth
from .errors import ArgumentError

# Arguments with one value for all axes, or one per axis.
Dimension = int | Sequence[int]
Causal = bool | Sequence[bool]


def _per_axis(
    name: str, value: Any, rank: int, kind: type, what: str, default: Any = None
) -> tuple[Any, ...]:
    """``value`` as a tuple of ``rank`` entries of ``kind``; a single value stands for all axes."""
    if value is None and default is not None:
        value = default
    given = entries(value)
    given = (value,) * rank if given is None else given
    if len(given) != rank:
        raise ArgumentError(
            f"Invalid value for `{name}`; expected {what} or {rank} of them (one per axis), "
            f"got {len(given)}: {value!r}."
        )
    converted = tuple([truth(e) if kind is bool else integer(e) for e in given])
    for entry, known in zip(given, converted):
        if known is None:
            raise ArgumentError(
                f"Invalid value for `{name}`; expected {what} or a tuple of {rank} of them, "
                f"got {type(entry)}: {value!r}."
            )
    return converted


@dataclass(frozen=True)
class Neighborhood:
    """Window, stride, dilation and causality of every axis; hashable.

    Build it with :meth:`create`, which accepts one value for all axes and checks what it gets.

    Example:
        >>> Neighborhood.create(2, 3, dilation=(1, 2)).dilation
        (1, 2)
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @classmethod
    def create(
        cls,
        rank: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
    ) -> Neighborhood:
        """Spread the arguments over ``rank`` axes and check them.

        Raises:
            ArgumentError: an argument has the wrong type, length or value.
        """
        given: tuple[Any, ...] = (kernel_size, stride, dilation, is_causal)
        if torch.compiler.is_compiling():
            return _created.__wrapped__(rank, *given)
        kinds = tuple(map(_kinds, given))
        if all(kinds):
            return _created(rank, *given, *kinds)
        return _created.__wrapped__(rank, *given)

    def fitted(self, shape: Sequence[int]) -> Neighborhood:
        """The largest windows up to these that fit the token layout ``shape``."""
        fitted = fit_window(shape, self.kernel_size, self.stride, self.dilation)
        return Neighborhood.create(self.rank, *fitted, self.is_causal)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.kernel_size)

    @property
    def window_tokens(self) -> int:
        """Tokens in one window: the product of ``kernel_size``."""
        product = 1
        for k in self.kernel_size:
            product = product * k
        return product

    def check(self, shape: Sequence[int]) -> None:
        """Raise ArgumentError unless every window fits the token layout ``shape``."""
        if len(shape) != self.rank:
            raise ArgumentError(
                f"`kernel_size` has {self.rank} axes, but the token layout is {tuple(shape)}."
            )
        for axis, (length, k, d) in enumerate(zip(shape, self.kernel_size, self.dilation)):
            if k * d > length:
                raise ArgumentError(
                    "`kernel_size` times `dilation` must not exceed the input on any axis, got "
                    f"kernel_size {self.kernel_size}, dilation {self.dilation} for the token "
                    f"layout {tuple(shape)}: on axis {axis}, {k} * {d} > {length}; "
                    "natten.fit_window makes a window fit."
                )

    def windows(
        self, axis: int, position: Tensor, n: int | Tensor, n_keys: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """First and one-past-last key position of the queries at ``position``.

        Args:
            axis: the axis.
            position: int64, the queries' positions inside their dilation groups.
            n: the number of positions in their groups; one number, or one per query.
            n_keys: the same number for keys; it equals ``n``, as queries and keys are the same
                tokens.

        Returns:
            Two int64 tensors shaped like ``position``.
        """
        return window_bounds(
            position, n, self.kernel_size[axis], self.stride[axis], self.is_causal[axis]
        )

    def attended_slots(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Whether each token attends each slot of its window; causality empties the last slots.

        Returns:
            bool ``[*shape, window tokens]``; slots are in row-major order, window start first.
        """
        return self._slots(shape, device)[1]

    def window_tokens_of(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The token in each slot of each token's window, int64 ``[*shape, window tokens]``.

        Tokens are counted in row-major order; a slot that is not attended holds some token.
        """
        return self._slots(shape, device)[0]

    def _slots(self, shape: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        token = torch.zeros((), dtype=torch.int64, device=device)
        valid = torch.ones((), dtype=torch.bool, device=device)
        for axis, length in enumerate(shape):
            d, k = self.dilation[axis], self.kernel_size[axis]
            x = torch.arange(length, device=device)
            n = group_length(length, d, x % d)
            bounds = self.windows(axis, x // d, n, n)
            # A colon in brackets would bound the length in exports of PyTorch 2.6.
            start, end, n, group = (each.unsqueeze(1) for each in (*bounds, n, x % d))
            position = start + torch.arange(k, device=device)
            own_valid = position < end
            own = position.minimum(n - 1) * d + group
            spread = [1] * (2 * self.rank)  # every axis of tokens, then every axis of the window
            spread[axis], spread[self.rank + axis] = length, k
            token = token * length + own.view(spread)
            valid = valid & own_valid.view(spread)
        slots = (*shape, self.window_tokens)
        return token.reshape(slots), valid.reshape(slots)


def window_bounds(
    position: Tensor,
    n: int | Tensor,
    kernel_size: int | Tensor,
    stride: int | Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """First and one-past-last key position of queries of one axis; arguments are broadcast."""
    k, s = kernel_size, stride
    if is_causal:
        leader = (position // s * s + s - 1).clamp(max=n - 1)
        return (leader - k + 1).clamp(min=0), position + 1
    leader = (position // s * s + s // 2).clamp(max=n - 1)
    start = (leader - k // 2).clamp(min=0).clamp(max=n - k)
    return start, start + k


_UNCHANGING = frozenset((int, bool, type(None)))


def _kinds(value: Any) -> Any:
    """The types in ``value``, which belong to its cache key because True and 1 are equal.

    None if ``value`` may change later, as lists, arrays and tensors may. A hash does not tell:
    OmegaConf's lists have one.
    """
    kind = type(value)
    if kind in _UNCHANGING:
        return kind
    kinds = tuple(map(type, value)) if isinstance(value, tuple) else ()
    return kinds if kinds and _UNCHANGING.issuperset(kinds) else None


@lru_cache(maxsize=1024)
def _created(
    rank: int,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    *kinds: Any,
) -> Neighborhood:
    """:meth:`Neighborhood.create`, cached because models call with the same few windows."""
    if rank not in (1, 2, 3):
        raise ArgumentError(f"`rank` must be 1, 2 or 3, got {rank}.")
    kernel = _per_axis("kernel_size", kernel_size, rank, int, "an integer")
    strides = _per_axis("stride", stride, rank, int, "an integer", 1)
    dilations = _per_axis("dilation", dilation, rank, int, "an integer", 1)
    causal = _per_axis("is_causal", is_causal, rank, bool, "a boolean", False)
    for k, s, d in zip(kernel, strides, dilations):
        if k < 1:
            raise ArgumentError(f"`kernel_size` must be at least 1 on every axis, got {kernel}.")
        if d < 1:
            raise ArgumentError(f"`dilation` must be at least 1 on every axis, got {dilations}.")
        if s < 1 or s > k:
            raise ArgumentError(
                "`stride` must be at least 1 and at most `kernel_size` on every axis, "
                f"got stride {strides} with kernel_size {kernel}."
            )
    return Neighborhood(kernel, strides, dilations, causal)


@dataclass(frozen=True)
class Dense:
    """Plain attention between sequences of any two lengths, with the methods of a neighborhood.

    Causal attention is aligned top-left: query ``i`` attends keys ``0 .. i``.
    """

    causal: bool = False
    dilation: tuple[int, ...] = (1,)

    def windows(
        self, axis: int, position: Tensor, n: int | Tensor, n_keys: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same as :meth:`Neighborhood.windows`, for ``n`` queries and ``n_keys`` keys."""
        end = (
            (position + 1).clamp(max=n_keys) if self.causal else torch.zeros_like(position) + n_keys
        )
        return torch.zeros_like(position), end


Rule = Neighborhood | Dense


def window_mask(
    rule: Rule,
    shape: Sequence[int],
    key_shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which query attends which key, bool ``[queries, keys]``; tokens are in row-major order."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis, (length, key_length) in enumerate(zip(shape, key_shape)):
        d = rule.dilation[axis]
        x, key = torch.arange(length, device=device), torch.arange(key_length, device=device)
        n, n_keys = group_length(length, d, x % d), group_length(key_length, d, x % d)
        start, end = (bound[:, None] for bound in rule.windows(axis, x // d, n, n_keys))
        same_group = (x % d)[:, None] == key % d
        mask = outer(mask, same_group & (key // d >= start) & (key // d < end), torch.logical_and)
    return mask


def outer(a: Tensor, b: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine ``a [m, n]`` of the first axes with ``b [p, q]`` of the next: ``[m * p, n * q]``."""
    return combine(a[:, None, :, None], b[None, :, None, :]).flatten(2).flatten(0, 1)


def group_length(length: int, dilation: int, group: Any) -> Any:
    """The number of positions in dilation group ``group`` of an axis; ``group`` may be a tensor."""
    return (length - group + dilation - 1) // dilation


def fit_window(
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The largest window, stride and dilation that fit ``shape`` and do not exceed the given ones.

    Per axis of length ``L``: ``d' = min(d, L)``, ``K' = min(K, L // d')``, ``S' = min(S, K')``.

    Args:
        shape: token layout, one to three axis lengths, each at least 1.
        kernel_size, stride, dilation: one value for all axes or one per axis.

    Returns:
        ``(kernel_size, stride, dilation)``, each a tuple with one entry per axis.

    Raises:
        ArgumentError: an argument has the wrong type, length or value.

    Example:
        >>> fit_window((4, 16), 7, dilation=2)
        ((2, 7), (1, 1), (2, 2))
    """
    lengths = entries(shape)
    if lengths is None:
        raise ArgumentError(f"`shape` must be a tuple of integers, got {type(shape)}: {shape!r}.")
    if torch.jit.is_tracing():  # sizes are tensors there
        lengths = tuple(int(n) for n in lengths)
    lengths = _per_axis("shape", lengths, len(lengths), int, "an integer")
    wanted = Neighborhood.create(len(lengths), kernel_size, stride, dilation)
    if any(length < 1 for length in lengths):
        raise ArgumentError(f"`shape` must have at least 1 token per axis, got {lengths}.")
    fitted = []
    for length, k, s, d in zip(lengths, wanted.kernel_size, wanted.stride, wanted.dilation):
        d = min(d, length)
        k = min(k, length // d)
        fitted.append((k, min(s, k), d))
    kernel, strides, dilations = zip(*fitted)
    return kernel, strides, dilations


def crop_rpb(rpb: Tensor, kernel_size: Sequence[int], fitted: Sequence[int]) -> Tensor:
    """The middle of ``rpb`` for a smaller window, in which offset 0 is still in the middle.

    Args:
        rpb: the bias ``[heads, 2 * kernel_size - 1, ...]``.
        kernel_size, fitted: its window, and the smaller one.
    """
    for axis, (k, new) in enumerate(zip(kernel_size, fitted)):
        rpb = rpb.narrow(1 + axis, k - new, 2 * new - 1)
    return rpb
