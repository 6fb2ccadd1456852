"""The definition of a neighborhood; no other module knows which keys a query attends.

Per axis, keys have length ``L``; the window is ``K``, the stride ``S``, the dilation ``d``.

* Query ``x`` stands at key token ``p = (o + x) // r``: queries are ``r`` times as fine as keys, and
  ``o`` of them come before the first. By default they are the keys' own tokens, ``r = 1, o = 0``.
* Dilation splits the axis into ``d`` independent groups. Token ``p`` is at position ``i = p // d``
  of group ``g = p % d``, which has ``n = ceil((L - g) / d)`` positions.
* Not causal: the leader of position ``i`` is ``c = min((i // S) * S + S // 2, n - 1)``, and its
  window starts at ``s = c - K // 2`` and has ``K`` positions. What happens where it exceeds the
  group is the axis's boundary:

  * ``"shift"``: it starts at ``min(max(s, 0), n - K)``. It shifts and never shrinks.
  * ``"truncate"``: positions before 0 and from ``n`` on are left out.
  * ``"circular"``: positions are modulo ``n``.
* Causal: the leader is ``c = min((i // S) * S + S - 1, n - 1)``, the window starts at
  ``max(c - K + 1, 0)`` and ends at the position itself.

A query attends a key when it does so along every axis.

Source: Hassani et al., "Neighborhood Attention Transformer" (2023); "Dilated Neighborhood
Attention Transformer" (2022); stride: "Generalized Neighborhood Attention" (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ._numbers import entries, integer, truth
from .errors import ArgumentError

# Arguments with one value for all axes, or one per axis.
Dimension = int | Sequence[int]
Causal = bool | Sequence[bool]
BoundaryName = Literal["shift", "truncate", "circular"]
Boundary = BoundaryName | Sequence[BoundaryName] | Sequence[str]

Position = TypeVar("Position", int, Tensor)  # of keys inside of a dilation group

# What a window does at the ends of an axis. Operators take these by number.
BOUNDARIES = ("shift", "truncate", "circular")


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
    converted = tuple([_entry(e, kind) for e in given])
    for entry, known in zip(given, converted):
        if known is None:
            raise ArgumentError(
                f"Invalid value for `{name}`; expected {what} or a tuple of {rank} of them, "
                f"got {type(entry)}: {value!r}."
            )
    return converted


def _entry(value: Any, kind: type) -> Any:
    """``value`` as ``kind``, None if it is something else."""
    if kind is str:
        return value if isinstance(value, str) else None
    return truth(value) if kind is bool else integer(value)


@dataclass(frozen=True)
class Neighborhood:
    """Which keys a query attends, for every axis; hashable.

    Build it with :meth:`create`, which accepts one value for all axes and checks what it gets.

    Attributes:
        kernel_size, stride, dilation, is_causal: window, stride, dilation and causality.
        boundary: what windows do at the ends, one of ``BOUNDARIES``.
        queries_per_key: how many queries stand at one key.
        query_offset: queries before the first one; None if the queries are the whole layout.

    Example:
        >>> Neighborhood.create(2, 3, dilation=(1, 2)).dilation
        (1, 2)
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    boundary: tuple[str, ...]
    queries_per_key: tuple[int, ...]
    query_offset: tuple[int, ...] | None

    @classmethod
    def create(
        cls,
        rank: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        boundary: Boundary | None = "shift",
        queries_per_key: int | Sequence[int] | None = 1,
        query_offset: int | Sequence[int] | None = None,
    ) -> Neighborhood:
        """Spread the arguments over ``rank`` axes and check them.

        Args:
            rank: number of axes, 1 to 3.
            kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset: as in
                :func:`natten.neighborhood_attention_generic`; None means the default.

        Raises:
            ArgumentError: an argument has the wrong type, length or value.
        """
        given: tuple[Any, ...] = (
            kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            return _created.__wrapped__(rank, *given)
        kinds = tuple(map(_kinds, given))
        if all(kinds):
            return _created(rank, *given, *kinds)
        return _created.__wrapped__(rank, *given)

    def fitted(
        self, shape: Sequence[int], keep: Literal["dilation", "window"] = "dilation"
    ) -> Neighborhood:
        """The largest windows up to these that fit a token layout.

        Args:
            shape: the token layout.
            keep: what is kept where not both of window and dilation fit, as in :func:`fit_window`.
        """
        fitted = fit_window(
            shape, self.kernel_size, self.stride, self.dilation, keep=keep, boundary=self.boundary
        )
        kernel_size, stride, dilation = fitted
        return replace(self, kernel_size=kernel_size, stride=stride, dilation=dilation)

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

    @property
    def offset(self) -> tuple[int, ...]:
        """Queries before the first one, also where they are the whole layout."""
        return (0,) * self.rank if self.query_offset is None else self.query_offset

    @property
    def is_self_attention(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query_offset is None and all(r == 1 for r in self.queries_per_key)

    @property
    def has_empty_slots(self) -> bool:
        """Whether some windows may have fewer tokens than ``window_tokens``."""
        return any(self.is_causal) or "truncate" in self.boundary

    def check(self, shape: Sequence[int], key_shape: Sequence[int]) -> None:
        """Check that windows and queries fit the token layout of the keys.

        Args:
            shape: token layout of the queries.
            key_shape: token layout of the keys.

        Raises:
            ArgumentError: they do not fit.
        """
        rank = len(self.kernel_size)
        if len(shape) != rank or len(key_shape) != rank:
            wrong = key_shape if len(shape) == rank else shape
            raise ArgumentError(
                f"`kernel_size` has {rank} axes, but the token layout is {tuple(wrong)}."
            )
        axes = zip(key_shape, self.kernel_size, self.stride, self.dilation, self.boundary)
        for axis, (length, k, s, d, border) in enumerate(axes):
            if border == "truncate":
                continue
            if k * d > length:
                raise ArgumentError(
                    "`kernel_size` times `dilation` must not exceed the input on any axis, got "
                    f"kernel_size {self.kernel_size}, dilation {self.dilation} for the token "
                    f"layout {tuple(key_shape)}: on axis {axis}, {k} * {d} > {length}; "
                    'natten.fit_window makes a window fit, `boundary="truncate"` cuts it.'
                )
            if border == "circular" and length % (s * d) != 0:
                raise ArgumentError(
                    "`stride` times `dilation` must divide the input on a circular axis, got "
                    f"stride {self.stride}, dilation {self.dilation} for the token layout "
                    f"{tuple(key_shape)}: on axis {axis}, {s} * {d} does not divide {length}."
                )
        self.check_queries(shape, key_shape)

    def check_queries(self, shape: Sequence[int], key_shape: Sequence[int]) -> None:
        """As :meth:`check`, only of the queries."""
        offset, fine = self.query_offset, self.queries_per_key
        if offset is not None:
            for axis, (o, length, r, n) in enumerate(zip(offset, shape, fine, key_shape)):
                if o + length > r * n:
                    raise ArgumentError(
                        "`query_offset` plus the token layout of `query` must not exceed "
                        "`queries_per_key` times that of `key`, got "
                        f"{offset} + {tuple(shape)} for {fine} times {tuple(key_shape)}: on axis "
                        f"{axis}, {o} + {length} > {r} * {n}."
                    )
            return
        for axis, (length, key_length, r) in enumerate(zip(shape, key_shape, fine)):
            if length != r * key_length and self.is_self_attention:
                raise ArgumentError(
                    "`key` must have the token layout of `query`, got "
                    f"{tuple(key_shape)} and {tuple(shape)}. `query_offset` is for queries that "
                    "are a part of the layout, `queries_per_key` for queries that are finer than "
                    "keys."
                )
            if length != r * key_length:
                raise ArgumentError(
                    "`query` must have `queries_per_key` times the token layout of `key`, got "
                    f"{tuple(shape)} for {fine} times {tuple(key_shape)}: on axis {axis}, "
                    f"{length} is not {r} * {key_length}. `query_offset` is for queries that are a "
                    "part of the layout."
                )

    def without_full_rings(self, key_shape: Sequence[int]) -> Neighborhood:
        """The same windows, on circular axes that a window fills without the circle.

        Only the order of a window's tokens differs, which matters to a bias and to slots.
        """
        rings = zip(self.boundary, self.kernel_size, self.dilation, key_shape)
        boundary = tuple("shift" if b == "circular" and k * d == n else b for b, k, d, n in rings)
        return self if boundary == self.boundary else replace(self, boundary=boundary)

    def unrolled(self) -> tuple[Neighborhood, tuple[tuple[int, int], ...]]:
        """The same windows without circular axes, on keys that are padded around.

        Padding is by whole strides before the first key, so that queries keep their leaders.

        Returns:
            The rule, whose queries are the middle of the padded layout, and the tokens to add
            before and after each axis: the axis's last, and its first.
        """
        margins = []
        for k, s, d, border in zip(self.kernel_size, self.stride, self.dilation, self.boundary):
            before, after = -(-(k // 2) // s) * s * d, (k - 1 - k // 2) * d
            margins.append((before, after) if border == "circular" else (0, 0))
        offset = tuple(
            o + r * before for o, r, (before, _) in zip(self.offset, self.queries_per_key, margins)
        )
        boundary = tuple("shift" if b == "circular" else b for b in self.boundary)
        return replace(self, boundary=boundary, query_offset=offset), tuple(margins)

    def moved(self, offset: int | Sequence[int]) -> Neighborhood:
        """The same windows for other queries, those from ``offset`` on.

        Raises:
            ArgumentError: it is no offset.
        """
        found = object.__new__(Neighborhood)  # dataclasses.replace takes several times longer
        found.__dict__.update(self.__dict__, query_offset=_offset_of(offset, self.rank))
        return found

    def of_axis(self, axis: int) -> Neighborhood:
        """The rule of one axis alone, of a layout of one axis."""
        one = slice(axis, axis + 1)
        return Neighborhood(
            self.kernel_size[one], self.stride[one], self.dilation[one], self.is_causal[one],
            self.boundary[one], self.queries_per_key[one],
            None if self.query_offset is None else self.query_offset[one],
        )  # fmt: skip

    def key_tokens(self, axis: int, query: Tensor) -> Tensor:
        """The key tokens at which queries of an axis stand."""
        offset, r = self.offset[axis], self.queries_per_key[axis]
        # What changes nothing is left out, which makes exported graphs smaller.
        query = query if self.query_offset is None else query + offset
        return query if r == 1 else query // r

    def windows(self, axis: int, position: Position, n: int | Tensor) -> tuple[Position, Position]:
        """First and one-past-last key position of queries.

        On a circular axis they are those before the modulo: from ``-kernel_size`` on and below
        ``n + kernel_size``.

        Args:
            axis: the axis.
            position: int64, positions of the queries' key tokens inside their dilation groups; or
                one position, a number.
            n: the number of positions in their groups; one number, or one per query.

        Returns:
            Two int64 tensors shaped like ``position``; or two numbers.
        """
        return window_bounds(
            position, n, self.kernel_size[axis], self.stride[axis], self.is_causal[axis],
            self.boundary[axis],
        )  # fmt: skip

    def attended(self, axis: int, length: int, key_length: int) -> tuple[int, int]:
        """First and one-past-last position, in any dilation group, of keys that some query attends.

        Of the keys between them, some may have no query, too: those of a dilation group that has
        none, for one.

        Args:
            axis: the axis.
            length, key_length: how many queries and keys it has, at least one.
        """
        if self.boundary[axis] == "circular":
            return 0, group_length(key_length, self.dilation[axis], 0)
        d, r, offset = self.dilation[axis], self.queries_per_key[axis], self.offset[axis]
        low, high = offset // r // d, (offset + length - 1) // r // d
        n = -(-key_length // d)
        # Windows move on from query to query.
        first, end = self.windows(axis, low, n)[0], self.windows(axis, high, n)[1]
        if key_length % d and n > 1:  # there are groups with a position less
            first = min(first, self.windows(axis, min(low, n - 2), n - 1)[0])
            end = max(end, self.windows(axis, min(high, n - 2), n - 1)[1])
        return first, end

    def attended_slots(
        self,
        shape: Sequence[int],
        key_shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Whether each query attends each slot of its window; slots that are cut off come last.

        Args:
            shape: token layout of the queries.
            key_shape: token layout of the keys; None means that of the queries.
            device: of the result.

        Returns:
            bool ``[*shape, window tokens]``; slots are in row-major order, the first attended token
            first.
        """
        return self._slots(shape, key_shape, device)[1]

    def window_tokens_of(
        self,
        shape: Sequence[int],
        key_shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The key in each slot of each query's window.

        Args:
            shape: token layout of the queries.
            key_shape: token layout of the keys; None means that of the queries.
            device: of the result.

        Returns:
            int64 ``[*shape, window tokens]``. Keys are counted in row-major order; a slot that is
            not attended holds some key.
        """
        return self._slots(shape, key_shape, device)[0]

    def in_slots(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """A mask of keys, ``[B, *key_shape]``, in each slot of the windows of queries of ``shape``.

        Returns:
            ``[B, *shape, window tokens]``; a slot that is not attended holds some key's.
        """
        tokens = self.window_tokens_of(shape, mask.shape[1:], mask.device)
        found = mask.flatten(1).index_select(1, tokens.flatten())
        return found.reshape(mask.shape[0], *shape, self.window_tokens)

    def _slots(
        self, shape: Sequence[int], key_shape: Sequence[int] | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        key_shape = shape if key_shape is None else key_shape
        token = torch.zeros((), dtype=torch.int64, device=device)
        valid = torch.ones((), dtype=torch.bool, device=device)
        for axis, (length, key_length) in enumerate(zip(shape, key_shape)):
            d, k = self.dilation[axis], self.kernel_size[axis]
            at = self.key_tokens(axis, torch.arange(length, device=device))
            n = group_length(key_length, d, at % d)
            bounds = self.windows(axis, at // d, n)
            # A colon in brackets would bound the length in exports of PyTorch 2.6.
            start, end, n, group = (each.unsqueeze(1) for each in (*bounds, n, at % d))
            position = start + torch.arange(k, device=device)
            own_valid = position < end
            circular = self.boundary[axis] == "circular"
            position = position % n if circular else position.minimum(n - 1)
            own = position * d + group
            spread = [1] * (2 * self.rank)  # every axis of tokens, then every axis of the window
            spread[axis], spread[self.rank + axis] = length, k
            token = token * key_length + own.view(spread)
            valid = valid & own_valid.view(spread)
        slots = (*shape, self.window_tokens)
        return token.reshape(slots), valid.reshape(slots)


def window_bounds(
    position: Position,
    n: int | Tensor,
    kernel_size: int | Tensor,
    stride: int | Tensor,
    is_causal: bool,
    boundary: str = "shift",
) -> tuple[Position, Position]:
    """First and one-past-last key position of queries of one axis; tensors are broadcast."""
    k, s = kernel_size, stride
    if is_causal:
        leader = _at_most(position // s * s + s - 1, n - 1)
        return _at_least(leader - k + 1, 0), position + 1
    leader = _at_most(position // s * s + s // 2, n - 1)
    start = leader - k // 2
    if boundary == "circular":
        return start, start + k
    if boundary == "truncate":
        return _at_least(start, 0), _at_most(start + k, n)
    start = _at_most(_at_least(start, 0), n - k)
    return start, start + k


def _at_least(x: Any, low: Any) -> Any:
    return max(x, low) if isinstance(x, int) else x.clamp(min=low)


def _at_most(x: Any, high: Any) -> Any:
    return min(x, high) if isinstance(x, int) else x.clamp(max=high)


_UNCHANGING = frozenset((int, bool, str, type(None)))


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


def _offset_of(query_offset: Any, rank: int) -> tuple[int, ...]:
    """An offset per axis, checked."""
    is_tuple = type(query_offset) is tuple
    if is_tuple and tuple(map(type, query_offset)) == (int,) * rank and min(query_offset) >= 0:
        return query_offset  # as it should be, and new in every call
    offset = _per_axis("query_offset", query_offset, rank, int, "an integer")
    if any(o < 0 for o in offset):
        raise ArgumentError(f"`query_offset` must be at least 0 on every axis, got {offset}.")
    return offset


@lru_cache(maxsize=1024)
def _created(
    rank: int,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    boundary: Any,
    queries_per_key: Any,
    query_offset: Any,
    *kinds: Any,
) -> Neighborhood:
    """:meth:`Neighborhood.create`, cached because models call with the same few windows."""
    if rank not in (1, 2, 3):
        raise ArgumentError(f"`rank` must be 1, 2 or 3, got {rank}.")
    kernel = _per_axis("kernel_size", kernel_size, rank, int, "an integer")
    strides = _per_axis("stride", stride, rank, int, "an integer", 1)
    dilations = _per_axis("dilation", dilation, rank, int, "an integer", 1)
    causal = _per_axis("is_causal", is_causal, rank, bool, "a boolean", False)
    borders = _per_axis("boundary", boundary, rank, str, "a string", "shift")
    fine = _per_axis("queries_per_key", queries_per_key, rank, int, "an integer", 1)
    offset = None if query_offset is None else _offset_of(query_offset, rank)
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
    for border, is_axis_causal, r in zip(borders, causal, fine):
        if border not in BOUNDARIES:
            raise ArgumentError(
                f"`boundary` must be one of {BOUNDARIES}, or one of them per axis, "
                f"got {boundary!r}."
            )
        if border == "circular" and is_axis_causal:
            raise ArgumentError(
                "`boundary` must not be circular on an axis that `is_causal`, because a ring has "
                f"no earlier and later tokens, got boundary {borders} with is_causal {causal}."
            )
        if r < 1:
            raise ArgumentError(f"`queries_per_key` must be at least 1 on every axis, got {fine}.")
    return Neighborhood(kernel, strides, dilations, causal, borders, fine, offset)


@dataclass(frozen=True)
class Dense:
    """Plain attention between sequences of any two lengths, with the methods of a neighborhood.

    Causal attention is aligned top-left: query ``i`` attends keys ``0 .. i``.
    """

    causal: bool = False
    dilation: tuple[int, ...] = (1,)
    queries_per_key: tuple[int, ...] = (1,)
    offset: tuple[int, ...] = (0,)
    boundary: tuple[str, ...] = ("truncate",)

    @property
    def rank(self) -> int:
        """The same as :attr:`Neighborhood.rank`."""
        return 1

    def of_axis(self, axis: int) -> Dense:
        """The same as :meth:`Neighborhood.of_axis`: there is one axis."""
        return self

    def key_tokens(self, axis: int, query: Tensor) -> Tensor:
        """The same as :meth:`Neighborhood.key_tokens`, perhaps beyond the last key."""
        return query

    def windows(self, axis: int, position: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor]:
        """The same as :meth:`Neighborhood.windows`, for ``n`` keys."""
        end = (position + 1).clamp(max=n) if self.causal else torch.zeros_like(position) + n
        return torch.zeros_like(position), end

    def attended(self, axis: int, length: int, key_length: int) -> tuple[int, int]:
        """The same as :meth:`Neighborhood.attended`."""
        return 0, min(length, key_length) if self.causal else key_length


Rule = Neighborhood | Dense


def as_dense(rule: Rule, shape: Sequence[int], key_shape: Sequence[int]) -> Dense | None:
    """The plain attention of tokens in a row that a rule is for these token layouts, if it is one.

    It is where every window is the whole layout. On a single causal axis windows end at their
    queries, which plain attention does, too.
    """
    if isinstance(rule, Dense):
        return rule
    if rule.rank == 1 and rule.is_causal[0]:
        if not rule.is_self_attention or rule.dilation[0] > 1:
            return None
        n = key_shape[0]
        return Dense(True) if rule.windows(0, n - 1, n)[0] == 0 else None
    axes = zip(shape, key_shape, rule.dilation, rule.queries_per_key, rule.offset)
    for axis, (length, n, d, r, offset) in enumerate(axes):
        if n > 1 and d > 1:
            return None
        if rule.boundary[axis] == "circular":
            is_whole = rule.kernel_size[axis] == n
        else:  # windows move on from query to query
            first, last = offset // r, (offset + length - 1) // r
            is_whole = rule.windows(axis, first, n)[1] == n and rule.windows(axis, last, n)[0] == 0
        if not is_whole:
            return None
    return Dense()


def window_mask(
    rule: Rule,
    shape: Sequence[int],
    key_shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which query attends which key.

    Args:
        rule: the windows.
        shape: token layout of the queries.
        key_shape: token layout of the keys.
        device: of the result.

    Returns:
        bool ``[queries, keys]``; tokens are in row-major order.
    """
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis, (length, key_length) in enumerate(zip(shape, key_shape)):
        d = rule.dilation[axis]
        at = rule.key_tokens(axis, torch.arange(length, device=device))
        key = torch.arange(key_length, device=device)
        n = group_length(key_length, d, at % d)
        start, end, n, group = (
            each[:, None] for each in (*rule.windows(axis, at // d, n), n, at % d)
        )
        after = key // d - start  # positions of each key after the start of each window
        if rule.boundary[axis] == "circular":
            after = after % n
        own = (group == key % d) & (after >= 0) & (after < end - start)
        mask = outer(mask, own, torch.logical_and)
    return mask


def outer(a: Tensor, b: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine ``a [m, n]`` of the first axes with ``b [p, q]`` of the next: ``[m * p, n * q]``."""
    return combine(a[:, None, :, None], b[None, :, None, :]).flatten(2).flatten(0, 1)


def group_length(length: int, dilation: int, group: Any) -> Any:
    """The number of positions in dilation group ``group`` of an axis; ``group`` may be a tensor."""
    return (length - group + dilation - 1) // dilation


def queries_before(token: Any, group: Any, dilation: int, queries_per_key: int) -> Any:
    """How many queries of dilation group ``group`` come before query ``token`` of an axis.

    ``token`` counts from the first query of the layout. Queries of a group are numbered in their
    order, so number ``j`` stands at key position ``j // queries_per_key`` of the group.
    """
    period = dilation * queries_per_key
    rest = token % period - group * queries_per_key
    return token // period * queries_per_key + min(max(rest, 0), queries_per_key)


def query_range(rule: Rule, axis: int, length: int, group: int) -> tuple[int, int]:
    """First and one-past-last number of a dilation group's queries, of ``length`` on an axis."""
    d, r, offset = rule.dilation[axis], rule.queries_per_key[axis], rule.offset[axis]
    return queries_before(offset, group, d, r), queries_before(offset + length, group, d, r)


def fit_window(
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    *,
    keep: Literal["dilation", "window"] = "dilation",
    boundary: Boundary = "shift",
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The largest window, stride and dilation that fit ``shape`` and do not exceed the given ones.

    Per axis of length ``L``, with ``keep="dilation"``: ``d' = min(d, L)``,
    ``K' = min(K, L // d')``, ``S' = min(S, K')``. With ``keep="window"``: ``K' = min(K, L)``,
    ``d' = min(d, L // K')``, ``S' = min(S, K')``.

    Args:
        shape: token layout, one to three axis lengths, each at least 1.
        kernel_size, stride, dilation: one value for all axes or one per axis.
        keep: what is kept as large as it can be where not both of window and dilation fit.
        boundary: one value for all axes or one per axis; a window that is truncated always fits. On
            a circular axis, the stride becomes the largest one for which ``S' * d'`` divides ``L``,
            and the dilation likewise.

    Returns:
        ``(kernel_size, stride, dilation)``, each a tuple with one entry per axis.

    Raises:
        ArgumentError: an argument has the wrong type, length or value.

    Example:
        >>> fit_window((4, 16), 7, dilation=2)
        ((2, 7), (1, 1), (2, 2))
        >>> fit_window((5, 9), 7, dilation=4, keep="window")
        ((5, 7), (1, 1), (1, 1))
    """
    lengths = entries(shape)
    if lengths is None:
        raise ArgumentError(f"`shape` must be a tuple of integers, got {type(shape)}: {shape!r}.")
    if torch.jit.is_tracing():  # sizes are tensors there
        lengths = tuple(int(n) for n in lengths)
    lengths = _per_axis("shape", lengths, len(lengths), int, "an integer")
    wanted = Neighborhood.create(len(lengths), kernel_size, stride, dilation, boundary=boundary)
    if any(length < 1 for length in lengths):
        raise ArgumentError(f"`shape` must have at least 1 token per axis, got {lengths}.")
    if keep not in ("dilation", "window"):
        raise ArgumentError(f'`keep` must be "dilation" or "window", got {keep!r}.')
    fitted = []
    for axis, length in enumerate(lengths):
        k, s, d = wanted.kernel_size[axis], wanted.stride[axis], wanted.dilation[axis]
        circular = wanted.boundary[axis] == "circular"
        if wanted.boundary[axis] != "truncate":
            if keep == "window":
                k = min(k, length)
                d = min(d, length // k)
            else:
                d = min(d, length)
            if circular:
                d = _largest_divisor(length, d)
            k = min(k, length // d)
            s = min(s, k)
            if circular:
                s = _largest_divisor(length // d, s)
        fitted.append((k, s, d))
    kernel, strides, dilations = zip(*fitted)
    return kernel, strides, dilations


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that does not exceed ``most``."""
    while number % most:
        most -= 1
    return most


def crop_rpb(rpb: Tensor, kernel_size: Sequence[int], fitted: Sequence[int]) -> Tensor:
    """The middle of ``rpb`` for a smaller window, in which offset 0 is still in the middle.

    Args:
        rpb: the bias ``[heads, 2 * kernel_size - 1, ...]``.
        kernel_size, fitted: its window, and the smaller one.
    """
    for axis, (k, new) in enumerate(zip(kernel_size, fitted)):
        rpb = rpb.narrow(1 + axis, k - new, 2 * new - 1)
    return rpb
