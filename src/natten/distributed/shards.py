"""Which keys the queries of a shard attend, and who has them.

The axes of a token layout are split over ranks; an axis that is not split lies on one rank. A
rank's queries attend a box of keys: its own and a halo, which other ranks have. That box, widened
as :func:`key_part` says, is a layout of its own in which the same queries, now a part of it
(``query_offset``), have the same windows as in the whole. So each rank calls the ordinary operator.

Along a ring that is split, tokens are counted from before the first one, as far as windows reach
(:meth:`natten.neighborhood.Neighborhood.unrolled`); they are those of the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

from ..neighborhood import Neighborhood, group_length
from .collectives import joined

Span = tuple[int, int]  # first and one-past-last token
Box = tuple[Span, ...]  # one span for each axis
Index = tuple[int, ...]  # into a grid of segments


class Segment(NamedTuple):
    """Neighboring tokens of an axis that one rank has.

    Attributes:
        at: where they begin among the tokens that are wanted.
        owner: the rank along the axis that has them.
        own: which of its tokens they are.
    """

    at: int
    owner: int
    own: Span

    @property
    def length(self) -> int:
        return self.own[1] - self.own[0]


class Piece(NamedTuple):
    """Queries of a rank that run together, and the keys that they need.

    Attributes:
        queries: counted from the rank's first.
        keys: counted from the first key that the rank needs.
        rule: the windows of these queries among these keys.
    """

    queries: Box
    keys: Box
    rule: Neighborhood


@dataclass(frozen=True)
class Sharding:
    """A token layout on several ranks.

    Attributes:
        rule: the windows of the whole layout, all of whose queries are given.
        sizes: for each axis, how many keys each rank along it has.
    """

    rule: Neighborhood
    sizes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The token layout of all keys."""
        return tuple(map(sum, self.sizes))

    def is_split(self, axis: int) -> bool:
        """Whether several ranks have tokens of the axis."""
        return len(self.sizes[axis]) > 1

    def own(self, axis: int, rank: int) -> Span:
        """The keys that a rank has along an axis."""
        ends = (0, *accumulate(self.sizes[axis]))
        return ends[rank], ends[rank + 1]

    @cached_property
    def unrolled(self) -> tuple[Neighborhood, tuple[Span, ...]]:
        """The rule without rings that are split, and the tokens to add before and after them."""
        names = self.rule.boundary
        rings = [self.is_split(i) and name == "circular" for i, name in enumerate(names)]
        others = tuple("shift" if name == "circular" else name for name in names)
        unrolled, margins = replace(
            self.rule,
            boundary=tuple(a if ring else b for a, b, ring in zip(names, others, rings)),
        ).unrolled()
        kept = tuple(other if ring else name for name, other, ring in zip(names, others, rings))
        return replace(unrolled, boundary=kept), margins

    def needed(self, axis: int, rank: int) -> Span:
        """The keys, in the unrolled axis, that a rank's queries need."""
        rule, margins = self.unrolled
        before, after = margins[axis]
        first, last = self.own(axis, rank)
        if not self.is_split(axis) or first == last:
            return first, last
        length = before + self.shape[axis] + after
        return key_part(rule, axis, length, (first + before, last + before))

    def segments(self, axis: int, rank: int) -> tuple[Segment, ...]:
        """Who has the keys that a rank needs along an axis, in their order."""
        first, last = self.needed(axis, rank)
        before, _ = self.unrolled[1][axis]
        length, found, at = self.shape[axis], [], first
        while at < last:
            token = (at - before) % length
            owner = next(r for r in range(len(self.sizes[axis])) if token < self.own(axis, r)[1])
            start, end = self.own(axis, owner)
            end = min(end, token + last - at)
            found.append(Segment(at - first, owner, (token - start, end - start)))
            at += end - token
        return tuple(found)


def chunk_sizes(n: int, ranks: int) -> list[int]:
    """How many of ``n`` entries each rank has by DTensor's rule, which is that of torch.chunk."""
    most = -(-n // ranks)
    return [max(0, min(most, n - most * i)) for i in range(ranks)]


def key_part(rule: Neighborhood, axis: int, length: int, tokens: Span) -> Span:
    """The keys of an axis that queries at ``tokens`` need, such that they are a layout of its own.

    Positions, strides and dilation groups fall as in the whole if it begins at a multiple of
    stride times dilation. No window is moved or cut that was not before, because all windows
    and their leaders lie inside, and it is no smaller than a window.

    Args:
        rule: windows; the axis is not circular.
        axis: the axis, which has ``length`` keys.
        tokens: keys at which the queries stand, at least one.
    """
    low, high = _reach(rule, axis, length, tokens)
    period = rule.stride[axis] * rule.dilation[axis]
    first, last = int(low.min()), int(high.max())
    if rule.boundary[axis] == "truncate":
        return first, last
    window = rule.kernel_size[axis] * rule.dilation[axis]
    last = min(max(last, first + window), length)
    first = min(first, (last - window) // period * period)
    return first, last


def _reach(rule: Neighborhood, axis: int, length: int, tokens: Span) -> tuple[Tensor, Tensor]:
    """First and one-past-last key that each of the tokens needs, at whole strides."""
    d, s = rule.dilation[axis], rule.stride[axis]
    token = torch.arange(*tokens)
    position, group = token // d, token % d
    n = group_length(length, d, group)
    start, end = rule.windows(axis, position, n)
    # The last of the tokens that share a window comes after the window's leader.
    after = ((position // s + 1) * s).minimum(n).maximum(end)
    low = start.minimum(position) * d // (s * d) * (s * d)
    return low, (after * d).clamp(max=length)


class HaloPlan(NamedTuple):
    """What a rank sends, receives and computes.

    Attributes:
        core: the rank's queries but those of the border, None if it has no queries.
        is_inner: whether the core needs the rank's own keys only.
        border: for each axis, the slabs before and after what is left by the axes before it.
        segments: for each axis, who has the keys that the rank needs. Their product is a grid.
        own: boxes of the rank's own keys that are sent or attended.
        here: which of them are some tokens of a place in the grid.
        sent: for each rank, which of them go there.
        received: for each rank, where in the grid that which it sends belongs, in the same order.
        moves: whether any rank sends anything.
    """

    core: Piece | None
    is_inner: bool
    border: tuple[tuple[Piece | None, Piece | None], ...]
    segments: tuple[tuple[Segment, ...], ...]
    own: tuple[Box, ...]
    here: dict[tuple[Index, Box], int]
    sent: tuple[tuple[int, ...], ...]
    received: tuple[tuple[Index, ...], ...]
    moves: bool

    @property
    def uses_message(self) -> bool:
        """Whether any of the rank's queries needs what others send."""
        return self.core is not None and (not self.is_inner or any(map(any, self.border)))


Coordinates = tuple[int, ...]  # of a rank, along each axis

# Inner queries run while keys travel. Below this share of a rank's queries that hides little, and
# more calls cost more.
_WORTH_SPLITTING = 0.25

# Most tiles of the GPU kernels are at most this wide, and the last one of a piece is partly wasted.
# Where inner queries and border are whole tiles, they cost what one call costs.
_TILE = 8
# Inner queries are given to the border for that only where so many of them are left.
_WORTH_WHOLE_TILES = 0.75


@lru_cache(maxsize=256)
def halo_plan(sharding: Sharding, ranks: tuple[Coordinates, ...], rank: int) -> HaloPlan:
    """The plan of one rank.

    Args:
        sharding: the layout.
        ranks: the coordinates of each rank.
        rank: which of them.
    """
    me = ranks[rank]
    needs = [needs_of(sharding, at) for at in ranks]
    segments = _segments(sharding, me)
    grid = list(zip(product(*(range(len(each)) for each in segments)), needs[rank]))
    received = tuple(
        tuple(index for index, (owner, _) in grid if owner == at and at != me) for at in ranks
    )
    moves = any(owner != at for at, need in zip(ranks, needs) for owner, _ in need)
    own: list[Box] = []
    sent = []
    for at, need in zip(ranks, needs):
        boxes = [box for owner, box in need if owner == me and at != me]
        sent.append(tuple(range(len(own), len(own) + len(boxes))))
        own += boxes
    core, is_inner, border = _pieces(sharding, me)
    starts = {index: [first for first, _ in box] for index, (owner, box) in grid if owner == me}
    here: dict[tuple[Index, Box], int] = {}
    for piece in (core, *(slab for slabs in border for slab in slabs)):
        for wanted in product(*_overlaps(segments, piece.keys)) if piece is not None else ():
            index, spans = zip(*wanted)
            if index in starts and (index, spans) not in here:
                here[index, spans] = len(own)
                own.append(tuple((a + i, b + i) for i, (a, b) in zip(starts[index], spans)))
    return HaloPlan(
        core, is_inner, border, segments, tuple(own), here, tuple(sent), received, moves
    )


def _segments(sharding: Sharding, at: Coordinates) -> tuple[tuple[Segment, ...], ...]:
    return tuple(sharding.segments(axis, rank) for axis, rank in enumerate(at))


@lru_cache(maxsize=4096)
def needs_of(sharding: Sharding, at: Coordinates) -> list[tuple[Coordinates, Box]]:
    """Who has the keys that a rank needs, and which of its keys they are."""
    found = []
    for segments in product(*_segments(sharding, at)):
        found.append((tuple(s.owner for s in segments), tuple(s.own for s in segments)))
    return found


def _pieces(
    sharding: Sharding, at: Coordinates
) -> tuple[Piece | None, bool, tuple[tuple[Piece | None, Piece | None], ...]]:
    """Core, whether it is an inner one, and border of a rank's queries."""
    own = tuple(sharding.own(axis, rank) for axis, rank in enumerate(at))
    if any(first == last for first, last in own):
        return None, False, ()
    inner = tuple(_inner(sharding, axis, span) for axis, span in enumerate(own))
    share = 1.0
    for (first, last), (begin, end) in zip(own, inner):
        share *= (end - begin) / (last - first)
    if share < _WORTH_SPLITTING:
        return _piece(sharding, at, own), False, ()
    border, rest = [], list(own)

    def slab(axis: int, span: Span) -> Piece | None:
        box = (*rest[:axis], span, *rest[axis + 1 :])
        return _piece(sharding, at, box) if span[0] < span[1] else None

    for axis, ((first, last), (begin, end)) in enumerate(zip(own, inner)):
        border.append((slab(axis, (first, begin)), slab(axis, (end, last))))
        rest[axis] = begin, end
    return _piece(sharding, at, inner), True, tuple(border)


def _inner(sharding: Sharding, axis: int, own: Span) -> Span:
    """The tokens of a rank at which queries need none but the rank's own keys."""
    if not sharding.is_split(axis):
        return own
    rule, margins = sharding.unrolled
    before, after = margins[axis]
    length = before + sharding.shape[axis] + after
    first, last = own[0] + before, own[1] + before
    low, high = _reach(rule, axis, length, (first, last))
    short = (low < first).nonzero().flatten()
    begin = first + (int(short[-1]) + 1 if len(short) else 0)
    long = (high[begin - first :] > last).nonzero().flatten()
    end = begin + int(long[0]) if len(long) else last
    begin, end = _whole_tiles(rule, axis, (first, last), (begin, end))
    if begin < end:
        low_end, high_end = key_part(rule, axis, length, (begin, end))
        if first <= low_end and high_end <= last:
            return begin - before, end - before
    return own[0], own[0]


def _whole_tiles(rule: Neighborhood, axis: int, own: Span, inner: Span) -> Span:
    """Inner tokens such that those before and after them are whole tiles, if enough are left."""
    wide = -(-_TILE // rule.queries_per_key[axis]) * rule.dilation[axis]
    begin = own[0] + -(-(inner[0] - own[0]) // wide) * wide
    end = own[1] - -(-(own[1] - inner[1]) // wide) * wide
    enough = end - begin >= _WORTH_WHOLE_TILES * (inner[1] - inner[0])
    return (begin, end) if enough else inner


def _piece(sharding: Sharding, at: Coordinates, tokens: Box) -> Piece:
    """The queries at ``tokens``, which are counted in the whole layout."""
    rule, margins = sharding.unrolled
    queries, keys, offset = [], [], []
    for axis, (first, last) in enumerate(tokens):
        r, own = rule.queries_per_key[axis], sharding.own(axis, at[axis])[0]
        queries.append(((first - own) * r, (last - own) * r))
        if not sharding.is_split(axis):
            keys.append((first, last))
            offset.append(0)
            continue
        before, after = margins[axis]
        length = before + sharding.shape[axis] + after
        begin, end = key_part(rule, axis, length, (first + before, last + before))
        needed = sharding.needed(axis, at[axis])[0]
        keys.append((begin - needed, end - needed))
        offset.append((first + before - begin) * r)
    return Piece(tuple(queries), tuple(keys), rule.moved(offset))


def gather(
    find: Callable[[Index, Box], Tensor], segments: Sequence[Sequence[Segment]], box: Box
) -> Tensor:
    """The tokens of ``box`` from a grid of pieces, as they are where one piece has all of them.

    Args:
        find: gives some tokens ``[batch, *space, ...]`` of the piece of an index.
        segments: along each axis, where pieces begin and how long they are.
        box: what is wanted.
    """
    wanted = _overlaps(segments, box)

    def gathered(index: Index, spans: Box) -> Tensor:
        axis = len(index)
        if axis == len(wanted):
            return find(index, spans)
        parts = [gathered((*index, i), (*spans, span)) for i, span in wanted[axis]]
        return joined(parts, 1 + axis)

    return gathered((), ())


def _overlaps(segments: Sequence[Sequence[Segment]], box: Box) -> list[list[tuple[int, Span]]]:
    """Along each axis, which segments have tokens of ``box``, and which of theirs they are."""
    found = []
    for each, (first, last) in zip(segments, box):
        spans = [(max(first - s.at, 0), min(last - s.at, s.length)) for s in each]
        found.append([(i, span) for i, span in enumerate(spans) if span[0] < span[1]])
    return found
