"""Documents of different shapes packed into one tensor: their layout, and attention inside each.

A packed tensor holds the tokens of all documents, one document after another, each in row-major
order.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from . import _dtensors, operators
from ._checks import (
    autocast_tensors,
    check_hints,
    check_mask,
    check_qkv,
    check_rpb,
    check_same,
    check_scale,
    check_tensors,
    check_tiles,
)
from ._hints import KERNEL_HINTS, Hints
from ._keywords import check_call, unknown_keyword
from ._numbers import entries, integer
from ._ranks import SHAPES
from .backends import check_name
from .documents import Documents
from .errors import ArgumentError
from .inputs import Inputs
from .neighborhood import Boundary, Causal, Dimension, Neighborhood

if TYPE_CHECKING:
    from typing_extensions import Unpack


class VarlenLayout:
    """The token layouts of the documents in a packed tensor.

    Args:
        shapes: a list with one token layout per document, all of the same rank (1 to 3); a number
            is a 1-D layout. Documents may be empty.
        device: the device of :attr:`offsets`.

    Attributes:
        shapes: the token layouts, a tuple of tuples.
        rank: number of axes.
        lengths: tokens of each document.
        total_tokens: tokens of all documents.
        offsets: where each document starts, and where the last one ends, int32
            ``[documents + 1]``.

    Raises:
        ArgumentError: ``shapes`` is something else. A tuple of numbers is refused, because it could
            be the layout of one document.

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
        """The layout of documents, and the packed documents.

        Args:
            tensors: the documents, ``[*space, heads, head_dim]`` each.

        Returns:
            The layout, and ``[tokens, heads, head_dim]``.

        Raises:
            ArgumentError: there is no tensor.

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
        """The number of documents."""
        return len(self)

    @property
    def token_layouts(self) -> Tensor:
        """:attr:`shapes` as int32 ``[documents, rank]``, on the device of :attr:`offsets`."""
        return torch.tensor(self.shapes, dtype=torch.int32, device=self.device)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """The same as :attr:`offsets`: where each document starts, int32 ``[documents + 1]``."""
        return self.offsets

    @property
    def device(self) -> torch.device:
        """The device of :attr:`offsets`."""
        return self.offsets.device

    @property
    def is_uniform(self) -> bool:
        """Whether all documents have one token layout."""
        return len(set(self.shapes)) == 1

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Pack documents into one tensor.

        Args:
            tensors: the documents, ``[*space, ...]`` each, of these layouts in this order.

        Returns:
            ``[tokens, ...]``.

        Raises:
            ArgumentError: they have other layouts.
        """
        if len(tensors) != len(self):
            raise ArgumentError(f"`tensors` must be {len(self)} documents, got {len(tensors)}.")
        for x, shape in zip(tensors, self.shapes):
            if tuple(x.shape[: self.rank]) != shape:
                raise ArgumentError(
                    f"`tensors` must start with the layouts {self.shapes}, got {tuple(x.shape)}."
                )
        return torch.cat([x.flatten(0, self.rank - 1) for x in tensors])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Undo :meth:`pack`.

        Args:
            packed: all documents, ``[tokens, ...]``.

        Returns:
            The documents, ``[*space, ...]`` each; they are views of the packed tensor.

        Raises:
            ArgumentError: it has another number of tokens.
        """
        self.check("packed", packed)
        return [
            part.unflatten(0, shape) for part, shape in zip(packed.split(self.lengths), self.shapes)
        ]

    split = unpack

    def documents(self, rule: Neighborhood, device: torch.device) -> Documents:
        """The documents in the form that kernels read, with ``rule``'s windows."""
        if (rule, device) not in self._documents:
            self._documents[rule, device] = Documents.of_layouts(self.shapes, rule, device)
        return self._documents[rule, device]

    def check(self, name: str, packed: Any) -> None:
        """Raise ArgumentError unless ``packed`` is a tensor of :attr:`total_tokens` tokens."""
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


@overload
def varlen_generic(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, kernel_size: Dimension,
    stride: Dimension = ..., dilation: Dimension = ..., is_causal: Causal | None = ...,
    scale: float | None = ..., backend: str | None = ...,
    *, rpb: Tensor | None = ..., boundary: Boundary = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ...,
    additional_lengths: Sequence[int] | None = ..., key_mask: Tensor | None = ...,
    additional_mask: Tensor | None = ..., return_lse: Literal[False] = ...,
    **hints: Unpack[Hints],
) -> Tensor: ...  # fmt: skip
@overload
def varlen_generic(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, kernel_size: Dimension,
    stride: Dimension = ..., dilation: Dimension = ..., is_causal: Causal | None = ...,
    scale: float | None = ..., backend: str | None = ...,
    *, rpb: Tensor | None = ..., boundary: Boundary = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ...,
    additional_lengths: Sequence[int] | None = ..., key_mask: Tensor | None = ...,
    additional_mask: Tensor | None = ..., return_lse: Literal[True],
    **hints: Unpack[Hints],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def varlen_generic(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, kernel_size: Dimension,
    stride: Dimension = ..., dilation: Dimension = ..., is_causal: Causal | None = ...,
    scale: float | None = ..., backend: str | None = ...,
    *, rpb: Tensor | None = ..., boundary: Boundary = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ...,
    additional_lengths: Sequence[int] | None = ..., key_mask: Tensor | None = ...,
    additional_mask: Tensor | None = ..., return_lse: bool,
    **hints: Unpack[Hints],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: VarlenLayout,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: Causal | None = False,
    scale: float | None = None,
    backend: str | None = None,
    *,
    rpb: Tensor | None = None,
    boundary: Boundary = "shift",
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Sequence[int] | None = None,
    key_mask: Tensor | None = None,
    additional_mask: Tensor | None = None,
    return_lse: bool = False,
    **hints: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``na1d_varlen``, ``na2d_varlen`` or ``na3d_varlen``; ``layout`` decides the rank."""
    if not isinstance(layout, VarlenLayout):
        raise ArgumentError(f"`layout` must be a natten.VarlenLayout, got {type(layout)}.")
    rule = Neighborhood.create(layout.rank, kernel_size, stride, dilation, is_causal, boundary)
    for name in hints:
        if name not in KERNEL_HINTS:
            raise unknown_keyword(f"na{layout.rank}d_varlen", name, _VARLEN_KEYWORDS)
    check_hints(hints.get("attention_kwargs"))
    check_tiles(layout.rank, **{name: x for name, x in hints.items() if name.endswith("_shape")})
    for tensor_name, x in (("query", query), ("key", key), ("value", value)):
        _check_packed(tensor_name, x, layout)
    check_rpb(rpb, query, rule, heads=query.shape[-2])

    query, key, value, additional_keys, additional_values = autocast_tensors(
        query, key, value, additional_keys, additional_values
    )
    check_qkv(query[None], key[None], value[None])
    lengths = _check_additional(
        layout, query, key, value, additional_keys, additional_values, additional_lengths
    )
    _check_masks(key, additional_keys, key_mask, additional_mask)
    factor, name = check_scale(scale, query.shape[-1]), check_name(backend)
    additional = additional_keys, additional_values, key_mask, additional_mask
    packed = Inputs(query, key, value, rpb, *additional)
    if _dtensors.has_dtensor(packed):
        out, lse = _dtensors.runner().attend_documents(packed, layout, rule, lengths, factor, name)
        return (out, lse) if return_lse else out
    keys, values, *masks = (None if x is None else x[None] for x in additional)
    out, lse = operators.document_attention(
        Inputs(query[None], key[None], value[None], rpb, keys, values, *masks), layout.shapes,
        lambda: layout.documents(rule, query.device), rule, factor, operators.Choice(name), lengths,
    )  # fmt: skip
    return (out[0], lse[0]) if return_lse else out[0]


_VARLEN_KEYWORDS = (*list(inspect.signature(varlen_generic).parameters)[:-1], *KERNEL_HINTS)


def _check_packed(name: str, packed: Tensor, layout: VarlenLayout) -> None:
    check_tensors(**{name: packed})
    layout.check(name, packed)
    if packed.dim() != 3:
        raise ArgumentError(
            f"`{name}` must be [tokens, heads, head_dim], got {tuple(packed.shape)}."
        )


def _check_additional(
    layout: VarlenLayout, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None,
    values: Tensor | None, lengths: Sequence[int] | None,
) -> tuple[int, ...]:  # fmt: skip
    """How many additional tokens each document has; () if none are given."""
    given = {"additional_keys": keys, "additional_values": values, "additional_lengths": lengths}
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == 3:
        return ()
    if missing:
        raise ArgumentError(
            "`additional_keys`, `additional_values` and `additional_lengths` must be given "
            f"together, but `{missing[0]}` is None."
        )
    counts = [integer(n) for n in entries(lengths) or ()]
    if len(counts) != len(layout) or any(n is None or n < 0 for n in counts):
        raise ArgumentError(
            f"`additional_lengths` must be {len(layout)} integers from 0 on, one per document, "
            f"got {lengths!r}."
        )
    for name, x, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        check_tensors(**{name: x})
        assert x is not None
        check_same(name, x, "query", query)
        wanted = (sum(counts), *like.shape[1:])
        if tuple(x.shape) != wanted:
            raise ArgumentError(
                f"`{name}` must be [total, heads_kv, head_dim] = {wanted}, where the total is the "
                f"sum of `additional_lengths`, got {tuple(x.shape)}."
            )
    return tuple(counts)


def _check_masks(
    key: Tensor, additional_keys: Tensor | None, key_mask: Any, additional_mask: Any
) -> None:
    if key_mask is not None:
        check_mask("key_mask", key_mask, "key", key, "[tokens]", (key.shape[0],))
    if additional_mask is None:
        return
    if additional_keys is None:
        raise ArgumentError("`additional_mask` needs `additional_keys`, which is None.")
    total = (additional_keys.shape[0],)
    check_mask("additional_mask", additional_mask, "key", key, "[total]", total)


_VARLEN = """{rank}-D neighborhood attention inside each document of a packed tensor.

    On a GPU all documents are one launch. With a bias, additional tokens or masks they run one
    after the other.

    Args:
        query: ``[tokens, heads, head_dim]``, documents one after another.
        key, value: ``[tokens, heads_kv, head_dim or value_dim]``.
        layout: the documents' token layouts, :class:`natten.VarlenLayout` of rank {rank}.
        kernel_size, stride, dilation, is_causal, scale, rpb, boundary: as in ``na{rank}d``. A
            window that does not fit a document is clamped to it by :func:`natten.fit_window`.
        additional_keys, additional_values: keys and values that every query of their document
            attends in the same softmax, ``[total, heads_kv, head_dim or value_dim]``, those of one
            document after those of another.
        additional_lengths: how many of them each document has, one integer per document, 0 too.
        key_mask: bool ``[tokens]``, True where a key may be attended, as in ``na{rank}d``.
        additional_mask: bool ``[total]``, the same of additional tokens.
        backend: None, or the name of a backend, as in ``na{rank}d``.
        return_lse: also return the LSE.
        hints: tile shapes and what else ``na{rank}d`` takes for kernels; without effect.

    Returns:
        ``[tokens, heads, value_dim]``; with ``return_lse`` also the LSE ``[tokens, heads]``.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed.

    Example:
        >>> layout = VarlenLayout([({sizes}), ({sizes})])
        >>> q, k, v = (torch.randn(layout.total_tokens, 2, 16) for _ in range(3))
        >>> out = {name}(q, k, v, layout, kernel_size={kernel})
"""


Varlen = TypeVar("Varlen", bound=Callable[..., Any])


def _varlen_of_rank(rank: int, generic: Varlen) -> Varlen:
    def function(*args: Any, **kwargs: Any) -> Any:
        layout = args[3] if len(args) > 3 else kwargs.get("layout")
        if isinstance(layout, VarlenLayout) and layout.rank != rank:
            raise ArgumentError(f"`layout` must have rank {rank}, got {layout}.")
        try:
            return generic(*args, **kwargs)
        except TypeError:
            check_call(name, signature, args, kwargs)
            raise

    name, signature = f"na{rank}d_varlen", inspect.signature(generic)
    function.__name__ = function.__qualname__ = name
    function.__doc__ = inspect.cleandoc(_VARLEN.format(rank=rank, name=name, **SHAPES[rank]))
    function.__signature__ = signature  # type: ignore[attr-defined]
    return cast(Varlen, function)


na1d_varlen = _varlen_of_rank(1, varlen_generic)
na2d_varlen = _varlen_of_rank(2, varlen_generic)
na3d_varlen = _varlen_of_rank(3, varlen_generic)
