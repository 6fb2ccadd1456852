"""Ranks agree about a call before they exchange anything else, so that a mistake does not hang.

They do so by the store through which the process group was made, not by a collective: a rank whose
call is wrong says so there and need not wait for anybody.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from .._torch import default_store
from ..errors import ArgumentError
from .collectives import named_failures


class _Agreed:
    """Kinds of calls that a group has agreed about, and how often it has compared calls.

    Its ranks change both together.
    """

    def __init__(self) -> None:
        self.kinds: set[Hashable] = set()
        self.comparisons = 0


_agreed: WeakKeyDictionary[dist.ProcessGroup, _Agreed] = WeakKeyDictionary()
_MOST = 4096  # kinds


def agree(
    name: str, group: dist.ProcessGroup, kind: dict[str, Any], error: Exception | None
) -> None:
    """Return if every rank of a group makes the same call; otherwise raise on all of them.

    Only the first call of a kind is compared. What is wrong with one rank's call is told to the
    others, who hear of it if theirs is the first call of a kind, too.

    Args:
        name: the public function, for messages.
        group: the ranks.
        kind: what has to be the same everywhere, by what it is called in messages; hashable.
        error: what is wrong with this rank's call; it is raised here.

    Raises:
        ArgumentError: two ranks differ, or another rank's call is wrong.
    """
    agreed, key = _agreed.setdefault(group, _Agreed()), tuple(kind.items())
    if error is None and key in agreed.kinds:
        return
    agreed.comparisons += 1
    store, place = default_store(), f"natten/{group.group_name}/{agreed.comparisons}"
    keys = [f"{place}/{rank}" for rank in range(group.size())]
    own = {"": str(error)} if error is not None else {what: str(x) for what, x in kind.items()}
    if store is not None:
        store.set(keys[group.rank()], json.dumps({"function": name, **own}))
    if error is not None:
        raise error
    with named_failures(name):
        calls = [] if store is None else [json.loads(store.get(each)) for each in keys]
    for rank, call in enumerate(calls):
        if "" in call:
            raise ArgumentError(
                f"natten.distributed.{name}: rank {rank} of the group says: {call['']}"
            )
        for what, value in calls[0].items():
            if call.get(what) != value:
                raise ArgumentError(
                    f"natten.distributed.{name}: `{what}` must be the same on every rank of the "
                    f"group, got {value} on rank 0 and {call.get(what)} on rank {rank}."
                )
    if len(agreed.kinds) >= _MOST:
        agreed.kinds.clear()
    agreed.kinds.add(key)
