"""Ranks agree about a call before they exchange anything else, so that a mistake does not hang."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..errors import ArgumentError
from .collectives import named_failures

# Kinds of calls that a group has agreed about. Its ranks add them together, and so forget them
# together.
_agreed: WeakKeyDictionary[dist.ProcessGroup, set[Hashable]] = WeakKeyDictionary()
_MOST = 4096


def agree(
    name: str, group: dist.ProcessGroup, kind: dict[str, Any], error: Exception | None
) -> None:
    """Return if every rank of a group makes the same call; otherwise raise on all of them.

    Only the first call of a kind is compared. It takes one collective of Python objects. What is
    wrong with one rank's call is told to the others if the group has agreed about nothing yet.
    Later it is raised at once, because the others may be past comparing.

    Args:
        name: the public function, for messages.
        group: the ranks.
        kind: what has to be the same everywhere, by what it is called in messages; hashable.
        error: what is wrong with this rank's call; it is raised here.

    Raises:
        ArgumentError: two ranks differ, or another rank's call is wrong.
    """
    known, key = _agreed.setdefault(group, set()), tuple(kind.items())
    if error is not None and known:
        raise error
    if key in known:
        return
    told = None if error is None else str(error)
    calls: list[Any] = [None] * group.size()
    with named_failures(name):
        dist.all_gather_object(calls, (told, name, kind), group=group)
    if error is not None:
        raise error
    for rank, (wrong, *_) in enumerate(calls):
        if wrong is not None:
            raise ArgumentError(
                f"natten.distributed.{name}: rank {rank} of the group says: {wrong}"
            )
    _, first_name, first = calls[0]
    for rank, (_, other_name, other) in enumerate(calls):
        if other_name != first_name:
            raise ArgumentError(
                f"natten.distributed: rank 0 of the group calls {first_name}, and rank {rank} "
                f"calls {other_name}."
            )
        for what in first:
            if first[what] != other[what]:
                raise ArgumentError(
                    f"natten.distributed.{name}: `{what}` must be the same on every rank of the "
                    f"group, got {first[what]} on rank 0 and {other[what]} on rank {rank}."
                )
    if len(known) >= _MOST:
        known.clear()
    known.add(key)
