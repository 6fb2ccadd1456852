"""How many programs compute the tiles of a kernel: one each, or so many that take them in turn.

Of ``n`` programs, each takes every ``n``-th tile. Tiles near the ends of a layout have fewer
blocks. Where ``n`` and the tiles of a head have a common factor, a program has tiles at the same
few positions of all heads, so that some programs have long ones only and are waited for. A few
programs less than could run at once have all kinds of tiles.

A program of its own costs each tile what it takes to start, but where tiles differ much, those that
end early leave room for others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

# How many programs less are tried, how many tiles are looked at, and what part of the time may be
# lost to programs that are waited for, without anything else being tried.
_FEWER, _TILES, _LOST = 8, 2**16, 0.02
# Cycles until a program has its first block, in those of the estimate (1.4 us: hopper-log.md).
_START = 5500.0
_LAST = 8  # rounds of such programs that are looked at: what is lost is lost at the end


def programs_of(
    blocks: Sequence[Sequence[float]],
    cycles: tuple[float, float],
    sets: int,
    at_once: int,
    processors: int,
    resident: int,
) -> int | None:
    """How many programs take tiles in turn; None if each tile has its own, which is faster.

    Args:
        blocks: of a warpgroup of each tile along each axis; those of all axes multiply.
        cycles: of such a block, and of a warpgroup's tile beside its blocks.
        sets: how often such tiles follow one another: heads, batch entries, dilation groups.
        at_once: heads of which tiles at one position follow one another.
        processors: multiprocessors of the GPU.
        resident: programs that each of them runs at once.
    """
    most = processors * resident
    tiles = torch.ones(1, dtype=torch.float32, device="cpu")
    for each in blocks:
        tiles = tiles[:, None] * torch.tensor(each, dtype=torch.float32, device="cpu")
        tiles = tiles.flatten()
    per_block, per_tile = cycles
    tiles = (per_block * tiles + per_tile).repeat_interleave(at_once)
    tiles = tiles.repeat(min(sets // at_once, -(-_TILES // len(tiles))))
    if len(tiles) <= most:
        return most
    # What each processor has to do if all have as much.
    least = tiles.sum().item() / processors
    best, found = math.inf, most
    for count in range(most, max(0, most - _FEWER - 1), -1):
        of_program = _in_turn(tiles, count)
        of_processor = _in_turn(of_program, processors)
        # Programs of a processor share its units, but one alone does not use them well.
        longest = (resident * of_program.max().item() + of_processor.max().item()) / 2
        if longest < best:
            best, found = longest, count
        if best <= (1 + _LOST) * least:
            return found
    starts = len(tiles) / processors * _START / resident
    last = (tiles[-_LAST * most :] + _START / resident).tolist()
    lost = resident * _end(last, most) - sum(last) / processors
    return found if best <= least + starts + lost else None


def _in_turn(work: Tensor, count: int) -> Tensor:
    """What each of ``count`` has to do that take pieces of work in turn."""
    rounds = -(-len(work) // count)
    return pad(work, (0, rounds * count - len(work))).view(rounds, count).sum(0)


def _end(work: list[float], programs: int) -> float:
    """When the last of pieces of work ends, each of which begins when an earlier one ends."""
    ends = [0.0] * programs
    for each in work:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)
