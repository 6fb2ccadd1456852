"""Lengths of packed sequences, as :func:`natten.attention` takes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_same_shape
from ._numbers import integer
from ._torch import assert_later, is_transformed
from .documents import Documents
from .errors import ArgumentError


class Lengths(NamedTuple):
    """The lengths of packed sequences, in the forms that :func:`natten.attention` takes.

    Attributes:
        seqlens_q, seqlens_kv: the lengths, integers ``[sequences]``.
        starts_q, starts_kv: their cumulative sums ``[sequences + 1]``.
        longest_q, longest_kv: lengths that no sequence exceeds, or -1 if they are not known.
    """

    seqlens_q: Tensor | None
    seqlens_kv: Tensor | None
    starts_q: Tensor | None
    starts_kv: Tensor | None
    longest_q: int = -1
    longest_kv: int = -1

    @classmethod
    def create(cls, *tensors: Tensor | None, longest: Sequence[Any]) -> Lengths | None:
        """The lengths from the arguments of a call; None if there are none.

        Raises:
            ArgumentError: something has the wrong type, or one side lacks lengths.
        """
        if all(x is None for x in tensors):
            return None
        names = "seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q", "cumulative_seqlen_KV"
        for name, x in zip(names, tensors):
            if x is not None:
                check_integers(name, x)
        if all(x is None for x in tensors[::2]) or all(x is None for x in tensors[1::2]):
            given = [name for name, x in zip(names, tensors) if x is not None]
            raise ArgumentError(
                "the lengths of packed sequences must be given for `query` and for `key`, got "
                f"{' and '.join(given)} only."
            )
        numbers = []
        for name, x in zip(("max_seqlen_Q", "max_seqlen_KV"), longest):
            number = -1 if x is None else integer(x)
            if number is None or (x is not None and number < 0):
                raise ArgumentError(
                    f"`{name}` must be None or an integer from 0 on, got {type(x)}: {x!r}."
                )
            numbers.append(number)
        seqlens_q, seqlens_kv, starts_q, starts_kv = tensors
        return cls(seqlens_q, seqlens_kv, starts_q, starts_kv, *numbers)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors among the fields."""
        return self.seqlens_q, self.seqlens_kv, self.starts_q, self.starts_kv

    def read(self, query: Tensor, key: Tensor) -> tuple[list[int], list[int]]:
        """Read the lengths, which waits for the device.

        Raises:
            ArgumentError: they do not add up, or queries and keys have different numbers of them.
        """
        most = [None if n < 0 else n for n in (self.longest_q, self.longest_kv)]
        ours = sequence_lengths("Q", query.shape[1], self.seqlens_q, self.starts_q, most[0])
        theirs = sequence_lengths("KV", key.shape[1], self.seqlens_kv, self.starts_kv, most[1])
        if ours is None or theirs is None or len(ours) != len(theirs):
            raise ArgumentError(
                "the lengths of packed sequences must be given for `query` and for `key`, as many "
                f"each, got {ours} and {theirs}."
            )
        return ours, theirs

    def documents(self, query: Tensor, key: Tensor) -> Documents:
        """The table for kernels; cumulative sums with longest lengths never leave the GPU."""
        starts_q, starts_kv = self.starts_q, self.starts_kv
        most = self.longest_q, self.longest_kv
        if query.is_cuda and starts_q is not None and starts_kv is not None and min(most) >= 0:
            check_same_shape(
                "cumulative_seqlen_KV", starts_kv.shape, "cumulative_seqlen_Q", starts_q.shape
            )
            check_starts("Q", query.shape[1], starts_q, most[0])
            check_starts("KV", key.shape[1], starts_kv, most[1])
            return Documents.of_sequences((starts_q, starts_kv), most)
        both = self.read(query, key)
        sums = [torch.tensor([0, *accumulate(each)], device=query.device) for each in both]
        return Documents.of_sequences(sums, [max(each, default=0) for each in both])


def check_starts(side: str, tokens: int, starts: Tensor, longest: int) -> None:
    """Check cumulative sums on a GPU as :func:`sequence_lengths` does, without waiting for it.

    The GPU checks the values. If they are wrong, the next synchronisation raises an error.
    """
    check_integers(f"cumulative_seqlen_{side}", starts)
    lengths = starts.diff()
    complete = (starts[0] == 0) & (starts[-1] == tokens)
    assert_later(complete & (lengths >= 0).all() & (lengths <= longest).all())


def sequence_lengths(
    side: str, tokens: int, seqlens: Tensor | None, cumulative: Tensor | None,
    longest: int | None = None,
) -> list[int] | None:  # fmt: skip
    """Lengths of packed sequences from either description; None if neither is given.

    Args:
        side: "Q" or "KV", for messages.
        tokens: the number of tokens in the packed tensor.
        seqlens: the lengths, integers ``[sequences]``.
        cumulative: their cumulative sum ``[sequences + 1]``, from 0 to ``tokens``.
        longest: a length that no sequence exceeds, or None.

    Raises:
        ArgumentError: the description is malformed or does not add up to ``tokens``.
    """
    given = cumulative if cumulative is not None else seqlens
    if given is None:
        return None
    name = f"cumulative_seqlen_{side}" if cumulative is not None else f"seqlens_{side}"
    check_integers(name, given)
    numbers = _integers_of(given)
    if cumulative is not None:
        lengths = [b - a for a, b in itertools.pairwise(numbers)]
        complete = bool(numbers) and numbers[0] == 0 and numbers[-1] == tokens
    else:
        lengths, complete = numbers, sum(numbers) == tokens
    if not complete or any(length < 0 for length in lengths):
        raise ArgumentError(
            f"`{name}` must describe sequences that add up to {tokens} tokens, got {numbers}."
        )
    if cumulative is not None and seqlens is not None:
        check_integers(f"seqlens_{side}", seqlens)
        numbers = _integers_of(seqlens)
        if numbers != lengths:
            raise ArgumentError(
                f"`seqlens_{side}` must be the lengths that `{name}` has, {lengths}, got {numbers}."
            )
    if longest is not None and longest < max(lengths, default=0):
        raise ArgumentError(
            f"`max_seqlen_{side}` must be at least the longest sequence, {max(lengths)}, "
            f"got {longest}."
        )
    return lengths


def _integers_of(x: Tensor) -> list[int]:
    """The numbers of a 1-D tensor."""
    # Up to PyTorch 2.8, tolist looks for memory that a tensor inside of torch.func has not.
    return [int(n) for n in x] if is_transformed() else x.tolist()


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_integers(name: str, given: Any) -> None:
    """Raise ArgumentError unless ``given`` is a 1-D tensor of integers."""
    if not isinstance(given, Tensor) or given.dim() != 1 or given.dtype not in _INTEGERS:
        got = (given.dtype, tuple(given.shape)) if isinstance(given, Tensor) else type(given)
        raise ArgumentError(f"`{name}` must be a 1-D integer tensor, got {got}.")
