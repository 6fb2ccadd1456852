"""Sequences of different shapes packed into one: their layout, as people and kernels see it.

A packed tensor holds the tokens of all documents one after another, each in row-major order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._numbers import entries, integer
from ._torch import assert_later
from .documents import Documents
from .errors import ArgumentError
from .neighborhood import Neighborhood


class VarlenLayout:
    """The token layouts of the documents in a packed tensor.

    Args:
        shapes: a list with one token layout per document, all of the same rank (1 to 3); a number
            is a 1-D layout. Documents may be empty.
        device: where :attr:`offsets` lives.

    Raises:
        ArgumentError: ``shapes`` is something else, or a tuple of numbers, which could be the
            layout of one document.

    Example:
        >>> layout = VarlenLayout([(4, 6), (3, 3)])
        >>> len(layout), layout.total_tokens, layout.offsets.tolist()
        (2, 33, [0, 24, 33])
    """

    def __init__(
        self,
        shapes: Sequence[int | Sequence[int]],
        device: torch.device | str | None = None,
    ) -> None:
        layouts = []
        if not isinstance(shapes, Iterable):
            raise ArgumentError(f"`shapes` must be a sequence of layouts, got {type(shapes)}.")
        if isinstance(shapes, tuple) and len(shapes) > 1 and not isinstance(shapes[0], Iterable):
            raise ArgumentError(
                f"`shapes` must be a list with one layout per document: `[{tuple(shapes)}]` for "
                f"one {len(shapes)}-D document or `{[(n,) for n in shapes]}` for {len(shapes)} 1-D "
                f"ones, got {shapes!r}."
            )
        for shape in shapes:
            given = entries(shape)
            lengths = tuple(integer(n) for n in ((shape,) if given is None else given))
            if any(n is None or n < 0 for n in lengths):
                raise ArgumentError(
                    "`shapes` must be token layouts of integers from 0 on, one per document, "
                    f"got {shape!r}."
                )
            layouts.append(lengths)
        ranks = {len(shape) for shape in layouts}
        if len(ranks) != 1 or not ranks <= {1, 2, 3}:
            raise ArgumentError(
                "`shapes` must hold at least one token layout, all of one rank from 1 to 3, "
                f"got {list(shapes)!r}."
            )
        self.shapes: tuple[tuple[int, ...], ...] = tuple(layouts)
        self.rank: int = ranks.pop()
        self.lengths: tuple[int, ...] = tuple(math.prod(shape) for shape in self.shapes)
        self.total_tokens: int = sum(self.lengths)
        ends = (0, *itertools.accumulate(self.lengths))
        self.offsets: Tensor = torch.tensor(ends, dtype=torch.int32, device=device)
        self._documents: dict[tuple[Neighborhood, torch.device], Documents] = {}

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[VarlenLayout, Tensor]:
        """The layout of documents ``[*space, heads, head_dim]``, and the packed documents.

        Example:
            >>> documents = torch.zeros(4, 6, 2, 8), torch.zeros(3, 3, 2, 8)
            >>> layout, packed = VarlenLayout.from_tensor_list(documents)
            >>> layout.shapes, packed.shape
            (((4, 6), (3, 3)), torch.Size([33, 2, 8]))
        """
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise ArgumentError("`tensors` must be a sequence of at least one tensor.")
        layout = cls([tuple(x.shape[:-2]) for x in tensors], device=tensors[0].device)
        return layout, layout.pack(tensors)

    @property
    def num_docs(self) -> int:
        """How many documents."""
        return len(self)

    @property
    def token_layouts(self) -> Tensor:
        """:attr:`shapes` as int32 ``[documents, rank]``, where :attr:`offsets` lives."""
        return torch.tensor(self.shapes, dtype=torch.int32, device=self.device)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """:attr:`offsets`: int32 ``[documents + 1]``, where each document starts."""
        return self.offsets

    @property
    def device(self) -> torch.device:
        """Where :attr:`offsets` lives."""
        return self.offsets.device

    @property
    def is_uniform(self) -> bool:
        """Whether all documents have one token layout."""
        return len(set(self.shapes)) == 1

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Documents ``[*space, ...]`` as one packed tensor ``[tokens, ...]``."""
        if len(tensors) != len(self):
            raise ArgumentError(f"`tensors` must be {len(self)} documents, got {len(tensors)}.")
        for x, shape in zip(tensors, self.shapes):
            if tuple(x.shape[: self.rank]) != shape:
                raise ArgumentError(
                    f"`tensors` must start with the layouts {self.shapes}, got {tuple(x.shape)}."
                )
        return torch.cat([x.flatten(0, self.rank - 1) for x in tensors])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Undo :meth:`pack`: views of the packed tensor."""
        self.check("packed", packed)
        return [
            part.unflatten(0, shape) for part, shape in zip(packed.split(self.lengths), self.shapes)
        ]

    split = unpack

    def documents(self, rule: Neighborhood, device: torch.device) -> Documents:
        """The documents as kernels read them."""
        if (rule, device) not in self._documents:
            self._documents[rule, device] = Documents.of_layouts(self.shapes, rule, device)
        return self._documents[rule, device]

    def check(self, name: str, packed: Any) -> None:
        """Raise ArgumentError unless ``packed`` is a tensor of as many tokens."""
        if (
            not isinstance(packed, Tensor)
            or packed.dim() < 1
            or packed.shape[0] != self.total_tokens
        ):
            got = tuple(packed.shape) if isinstance(packed, Tensor) else type(packed)
            raise ArgumentError(
                f"`{name}` must be packed, [{self.total_tokens} tokens, ...], got {got}."
            )

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.shapes)

    def __repr__(self) -> str:
        return f"VarlenLayout({list(self.shapes)})"


def check_starts(side: str, tokens: int, starts: Tensor, longest: int) -> None:
    """As :func:`sequence_lengths` for cumulative sums on a GPU, without waiting for it.

    What they hold is checked on the GPU, where a failure is an error of the next synchronisation.
    """
    check_integers(f"cumulative_seqlen_{side}", starts)
    lengths = starts.diff()
    whole = (starts[0] == 0) & (starts[-1] == tokens)
    assert_later(whole & (lengths >= 0).all() & (lengths <= longest).all())


def sequence_lengths(
    side: str, tokens: int, seqlens: Tensor | None, cumulative: Tensor | None,
    longest: int | None = None,
) -> list[int] | None:  # fmt: skip
    """Lengths of packed sequences from either description, None where neither is given.

    Args:
        side: "Q" or "KV", for messages.
        tokens: how many tokens the packed tensor has.
        seqlens: integers ``[sequences]``.
        cumulative: their cumulative sum ``[sequences + 1]``, from 0 to ``tokens``.
        longest: at least the longest length, if given.

    Raises:
        ArgumentError: the description is malformed or does not add up to ``tokens``.
    """
    given = cumulative if cumulative is not None else seqlens
    if given is None:
        return None
    name = f"cumulative_seqlen_{side}" if cumulative is not None else f"seqlens_{side}"
    check_integers(name, given)
    numbers = given.tolist()
    if cumulative is not None:
        lengths = [b - a for a, b in itertools.pairwise(numbers)]
        whole = bool(numbers) and numbers[0] == 0 and numbers[-1] == tokens
    else:
        lengths, whole = numbers, sum(numbers) == tokens
    if not whole or any(length < 0 for length in lengths):
        raise ArgumentError(
            f"`{name}` must describe sequences that add up to {tokens} tokens, got {numbers}."
        )
    if cumulative is not None and seqlens is not None:
        check_integers(f"seqlens_{side}", seqlens)
        if seqlens.tolist() != lengths:
            raise ArgumentError(
                f"`seqlens_{side}` must be the lengths that `{name}` has, {lengths}, "
                f"got {seqlens.tolist()}."
            )
    if longest is not None and longest < max(lengths, default=0):
        raise ArgumentError(
            f"`max_seqlen_{side}` must be at least the longest sequence, {max(lengths)}, "
            f"got {longest}."
        )
    return lengths


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_integers(name: str, given: Any) -> None:
    """Raise ArgumentError unless ``given`` is a 1-D tensor of integers."""
    if not isinstance(given, Tensor) or given.dim() != 1 or given.dtype not in _INTEGERS:
        got = (given.dtype, tuple(given.shape)) if isinstance(given, Tensor) else type(given)
        raise ArgumentError(f"`{name}` must be a 1-D integer tensor, got {got}.")
