"""Bad input raises one class of exception, with a message that names what is wrong."""

import inspect
import re

import pytest
import torch

import natten
from natten import ArgumentError, VarlenLayout
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D

X = torch.randn(1, 8, 8, 2, 4)
Q = torch.randn(1, 2, 8, 8, 4)
A = torch.randn(1, 2, 8, 8, 9)


def fused(query=X, key=X, value=X, kernel_size=3, **options):
    return lambda: natten.na2d(query, key, value, kernel_size, **options)


def qk(query=Q, key=Q, kernel_size=3, **options):
    return lambda: natten.na2d_qk(query, key, kernel_size, **options)


def av(attn=A, value=Q, kernel_size=3, **options):
    return lambda: natten.na2d_av(attn, value, kernel_size, **options)


def packed(**options):
    return lambda: natten.attention(X[:, :, 0], X[:, :, 0], X[:, :, 0], **options)


def varlen(**options):
    x = X[0, :, 0]
    return lambda: natten.na1d_varlen(x, x, x, VarlenLayout([5, 3]), 3, **options)


LENGTHS = torch.tensor([3, 5])
COMPRESSED = torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))
CUMULATIVE = torch.tensor([0, 3, 8])
EXTRA = torch.randn(1, 3, 2, 4)

CASES = {
    "not a tensor": (fused(query=[1]), "`query` must be a torch.Tensor, got.*list"),
    "integer dtype": (fused(query=X.long()), "`query`.*floating-point.*int64"),
    "wrong rank": (fused(query=X[0]), r"5-D tensors.*na2d.*\(8, 8, 2, 4\)"),
    "dtype": (fused(key=X.double()), "`key` must have the dtype of `query`.*float64.*float32"),
    "device": (fused(value=X.to("meta")), "`value` must be on the device of `query`.*meta.*cpu"),
    "batch": (fused(key=X.repeat(2, 1, 1, 1, 1)), "`key`.*batch size of `query`"),
    "space": (fused(key=X[:, :7], value=X[:, :7]), r"`key`.*token layout.*\(7, 8\).*\(8, 8\)"),
    "value space": (fused(value=X[:, :7]), "`value` must have the token layout and heads of `key`"),
    "head dim": (fused(key=X[..., :3], value=X), "`key` must have the head_dim.*3 and 4"),
    "no head dim": (fused(X[..., :0], X[..., :0], X[..., :0]), "at least 1"),
    "heads": (fused(X[..., :1, :]), "heads of `query` must be a multiple.*1 and 2"),
    "window": (fused(kernel_size=9), r"`kernel_size` times `dilation`.*\(9, 9\).*fit_window"),
    "window type": (fused(kernel_size=3.0), "`kernel_size`.*float"),
    "window length": (fused(kernel_size=(3,)), "`kernel_size`.*2 of them"),
    "dilation": (fused(dilation=0), "`dilation` must be at least 1"),
    "stride": (fused(stride=4), "`stride` must be.*at most `kernel_size`"),
    "causal type": (fused(is_causal=1), "`is_causal`; expected a boolean.*int"),
    "scale": (fused(scale="1"), "`scale` must be None or a number.*str"),
    "bool scale": (fused(scale=True), "`scale`.*bool"),
    "backend": (fused(backend="cuda"), "`backend` must be None or one of.*'cuda'"),
    "backend type": (fused(backend=["tiled"]), r"`backend` must be None.*\['tiled'\]"),
    "array as window": (fused(kernel_size=X.numpy()), "`kernel_size`.*ndarray"),
    "attention_kwargs": (fused(attention_kwargs=3), "`attention_kwargs` must be None or a dict"),
    "additional alone": (fused(additional_keys=EXTRA), "given together, but `additional_values`"),
    "additional shape": (
        fused(additional_keys=EXTRA[..., :3], additional_values=EXTRA),
        r"`additional_keys` must be \[batch, num_additional, heads_kv, head_dim\]",
    ),
    "additional count": (
        fused(additional_keys=EXTRA, additional_values=EXTRA[:, :2]),
        "as many tokens, got 3 and 2",
    ),
    "rpb shape": (fused(rpb=torch.zeros(2, 5, 4)), r"`rpb` must be.*\(2, 5, 5\).*\(2, 5, 4\)"),
    "rpb heads": (fused(rpb=torch.zeros(1, 5, 5)), r"`rpb` must be.*\(1, 5, 5\)"),
    "rpb device": (fused(rpb=torch.zeros(2, 5, 5, device="meta")), "`rpb` must be on the device"),
    "unfused even-sized oversize": (qk(kernel_size=4, dilation=3), "must not exceed"),
    "unfused rank": (qk(Q[0], Q[0]), "5-D tensors.*na2d_qk"),
    "unfused shape": (qk(key=Q[:, :, :7]), "`key` must have the token layout of `query`"),
    "unfused dtype": (qk(key=Q.double()), "`key` must have the dtype of `query`"),
    "unfused zero dilation": (qk(dilation=0), "`dilation`"),
    "unfused window of zero": (qk(kernel_size=0), "`kernel_size` must be at least 1"),
    "unfused additional": (qk(additional_keys=EXTRA[0]), "`additional_keys` must be"),
    "unfused additional dtype": (
        qk(additional_keys=torch.zeros(1, 2, 1, 4).double()),
        "`additional_keys` must have the dtype",
    ),
    "unfused rpb": (qk(rpb=torch.zeros(2, 3, 3)), "`rpb` must be"),
    "unfused integer dtype": (qk(Q.long(), Q.long()), "`query`.*floating-point.*int64"),
    "unfused device": (qk(key=Q.to("meta")), "`key` must be on the device of `query`.*meta.*cpu"),
    "unfused additional device": (
        qk(additional_keys=torch.zeros(1, 2, 1, 4, device="meta")),
        "`additional_keys` must be on the device",
    ),
    "additional values type": (
        av(additional_values=[1]),
        "`additional_values` must be a torch.Tensor",
    ),
    "additional values rank": (av(additional_values=Q[0, 0, 0, 0]), "`additional_values` must be"),
    "additional values shape": (
        av(attn=torch.zeros(1, 2, 8, 8, 10), additional_values=torch.zeros(1, 1, 1, 4)),
        r"`additional_values` must be.*\(1, 2, 4\), got \(1, 1, 1, 4\)",
    ),
    "weights": (av(attn=A[..., :5]), r"must hold 9 attention weights per token.*5"),
    "weights shape": (av(attn=A[:, :1]), "`attn` must match `value`"),
    "weights device": (av(attn=A.to("meta")), "`attn` must be on the device of `value`"),
    "packed one side": (packed(seqlens_Q=LENGTHS), "for `query` and for `key`"),
    "packed sum": (
        packed(seqlens_Q=LENGTHS, seqlens_KV=LENGTHS + 1),
        r"`seqlens_KV`.*8 tokens, got \[4, 6\]",
    ),
    "packed type": (packed(seqlens_Q=[3, 5], seqlens_KV=LENGTHS), "`seqlens_Q`.*1-D integer"),
    "packed start": (
        packed(cumulative_seqlen_Q=LENGTHS + 3, cumulative_seqlen_KV=LENGTHS + 3),
        r"`cumulative_seqlen_Q`.*8 tokens, got \[6, 8\]",
    ),
    "packed batch": (
        lambda: natten.attention(
            *(X[:, :, 0].repeat(2, 1, 1, 1),) * 3, seqlens_Q=LENGTHS, seqlens_KV=LENGTHS
        ),
        "batch size 1",
    ),
    "attention rank": (lambda: natten.attention(X, X, X), r"`query` must be \[batch, length"),
    "attention causal": (packed(is_causal=1), "`is_causal` must be a bool"),
    "merge nothing": (lambda: natten.merge_attentions([], []), "at least one, got 0 and 0"),
    "merge shapes": (
        lambda: natten.merge_attentions([X, X], [X[..., 0], X[..., 0, 0]]),
        "`lse_tensors` must match",
    ),
    "merge devices": (
        lambda: natten.merge_attentions([X], [X[..., 0].to("meta")]),
        "`lse_tensors` must be on the device of `outputs`, got meta and cpu",
    ),
    "layout": (lambda: VarlenLayout([(3, -1)]), "`shapes` must be token layouts"),
    "layout of one document": (
        lambda: VarlenLayout((4, 6)),
        r"`\[\(4, 6\)\]` for one 2-D document or `\[\(4,\), \(6,\)\]` for 2 1-D ones, got \(4, 6\)",
    ),
    "layout that is a size": (lambda: VarlenLayout(torch.Size((4, 6))), "for one 2-D document"),
    "layout ranks": (lambda: VarlenLayout([(3,), (3, 3)]), "all of one rank"),
    "layout empty": (lambda: VarlenLayout([]), "at least one"),
    "layout tensors": (lambda: VarlenLayout.from_tensor_list([]), "`tensors`"),
    "layout pack": (lambda: VarlenLayout([3]).pack([X]), "`tensors` must start with"),
    "varlen layout": (lambda: natten.na1d_varlen(X, X, X, [3], 3), "`layout` must be a natten"),
    "varlen rank": (
        lambda: natten.na1d_varlen(X, X, X, VarlenLayout([(3, 3)]), 3),
        "`layout` must have rank 1",
    ),
    "varlen tokens": (
        lambda: natten.na1d_varlen(X, X, X, VarlenLayout([5]), 3),
        r"`query` must be packed, \[5 tokens",
    ),
    "varlen bias": (varlen(rpb=torch.zeros(2, 3)), r"`rpb` must be.*\(2, 5\), got \(2, 3\)"),
    "varlen additional": (
        varlen(additional_keys=EXTRA),
        "must be given together, but `additional_values` is None",
    ),
    "varlen typo": (varlen(is_casual=True), "`is_casual` is no argument of na1d_varlen"),
    "varlen hint": (varlen(attention_kwargs=[1]), "`attention_kwargs` must be None or a dict"),
    "varlen tile": (varlen(q_tile_shape=(0,)), "`q_tile_shape` must be None or 1 positive"),
    "layout number": (lambda: VarlenLayout(5), "`shapes` must be a sequence of layouts, got.*int"),
    "merge None": (lambda: natten.merge_attentions(None, None), "`outputs` must be a list or tup"),
    "both lengths": (
        packed(
            seqlens_Q=LENGTHS,
            seqlens_KV=LENGTHS,
            cumulative_seqlen_Q=torch.tensor([0, 4, 8]),
            cumulative_seqlen_KV=CUMULATIVE,
        ),
        r"`seqlens_Q` must be the lengths that `cumulative_seqlen_Q` has, \[4, 4\], got \[3, 5\]",
    ),
    "longest": (
        packed(seqlens_Q=LENGTHS, seqlens_KV=LENGTHS, max_seqlen_KV=4),
        "`max_seqlen_KV` must be at least the longest sequence, 5, got 4",
    ),
    "lengths that are booleans": (
        packed(seqlens_Q=torch.ones(8).bool(), seqlens_KV=torch.ones(8).bool()),
        "`seqlens_Q` must be a 1-D integer tensor, got .*torch.bool",
    ),
    "tile number": (fused(q_tile_shape=4.0), "`q_tile_shape` must be None or 2 positive.*4.0"),
    "scale overflow": (fused(scale=10**400), "`scale` must be None or a finite number"),
    "scale NaN": (fused(scale=float("nan")), "`scale` must be None or a finite number, got nan"),
    "layout of memory": (
        lambda: natten.neighborhood_attention_generic(COMPRESSED, COMPRESSED, COMPRESSED, 3),
        "`query` must be dense, got layout torch.sparse_csr",
    ),
    "rank by keyword": (
        lambda: natten.na1d(kernel_size=3, query=X, key=X, value=X),
        "Expected 4-D tensors: `query` of na1d has 1 axes of tokens",
    ),
    "rank of nested": (
        lambda: natten.na2d_qk(*[torch.nested.nested_tensor([A[..., 0]])] * 2, 3),
        "Expected 5-D tensors: `query` of na2d_qk has 2 axes of tokens, got 4-D items",
    ),
    "module scale": (
        lambda: NeighborhoodAttention2D(8, 2, 3, qk_scale="x"),
        "`qk_scale` must be None or a number, got .*str",
    ),
    "fit_window type": (lambda: natten.fit_window(8, 3), "`shape` must be a tuple of integers"),
    "fit_window entries": (lambda: natten.fit_window((8.0,), 3), "`shape`.*an integer.*float"),
    "fit_window": (lambda: natten.fit_window((0, 4), 3), "`shape` must have at least 1 token"),
    "module heads": (
        lambda: NeighborhoodAttention2D(10, 3, 3),
        "`embed_dim` must be a positive multiple of `num_heads`, got 10 and 3",
    ),
    "module channels": (
        lambda: NeighborhoodAttention2D(8.0, 2, 3),
        "`embed_dim` must be an integer, got .*float.*8.0",
    ),
    "module without window": (lambda: NeighborhoodAttention2D(8, 2), "`kernel_size` are required"),
    "module both names": (
        lambda: NeighborhoodAttention2D(8, 2, 3, dim=8),
        "one of `embed_dim` and `dim`",
    ),
    "module oversize": (
        lambda: NeighborhoodAttention2D(8, 2, 3, oversize="shrink"),
        "`oversize` must be one of",
    ),
    "module depth": (
        lambda: NeighborhoodAttention2D(8, 2, 3, kernel_size_d=3),
        "`kernel_size_d` is for 3-D",
    ),
    "module input": (
        lambda: NeighborhoodAttention1D(8, 2, 3)(torch.zeros(1, 8)),
        "NeighborhoodAttention1D expected a rank-3 input tensor; got x.dim",
    ),
    "module window": (
        lambda: NeighborhoodAttention1D(8, 2, 5)(torch.zeros(1, 4, 8)),
        r"must not exceed.*\(5,\).*\(4,\)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, message = CASES[name]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_every_era_can_catch_it():
    for kind in (ValueError, TypeError, RuntimeError):
        assert issubclass(ArgumentError, kind)


def test_0_17_order_is_recognized():
    """na2d(q, k, v, kernel_size, dilation, is_causal) was 0.17's order."""
    for causal in (True, (True, False)):
        with pytest.raises(ArgumentError, match=r"natten\.compat\.v017"):
            natten.na2d(X, X, X, 3, 2, causal)


def test_nested_tensors_are_refused_where_they_cannot_run():
    nested = torch.nested.nested_tensor([torch.randn(8, 8, 2, 4)])
    with pytest.raises(NotImplementedError, match="nested"):
        natten.na2d(nested, nested, nested, 3)


def test_nested_inputs_must_fit_each_other():
    items = [torch.randn(1, 2, 8, 8, 4)]
    nested = torch.nested.nested_tensor(items)
    with pytest.raises(ArgumentError, match="all inputs to be nested"):
        natten.na2d_qk(nested, Q, 3)
    with pytest.raises(ArgumentError, match="as many items"):
        natten.na2d_qk(nested, torch.nested.nested_tensor(items * 2), 3)
    with pytest.raises(ArgumentError, match="`rpb` must be dense"):
        natten.na2d_qk(nested, nested, 3, rpb=nested)
    trained = torch.nested.nested_tensor(items, requires_grad=True)
    with pytest.raises(ArgumentError, match="Autograd is not supported"):
        natten.na2d_qk(trained, trained, 3)


def test_sparse_tensors_are_refused():
    with pytest.raises(NotImplementedError, match="`query` must be dense"):
        natten.na2d(X.to_sparse(), X, X, 3)


# --- misspelt and foreign keywords ---

PACKED = X[0, :, 0]
LAYER = NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)
RANKS = {
    1: (natten.na1d, natten.na1d_qk, natten.na1d_av, natten.na1d_varlen),
    2: (natten.na2d, natten.na2d_qk, natten.na2d_av, natten.na2d_varlen),
    3: (natten.na3d, natten.na3d_qk, natten.na3d_av, natten.na3d_varlen),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("kernel_sise", r"did you mean `kernel_size`\?"),
        ("is_casual", r"did you mean `is_causal`\?"),
        ("Dilation", r"did you mean `dilation`\?"),
        ("attn_mask", "there are no free masks; .*`kernel_size`.*`rpb`"),
        ("dropout_p", "drop out the weights between na*d_qk and na*d_av".replace("*", r"\*")),
        ("enable_gqa", "leave it out; `key` and `value`.*fewer heads"),
        ("window_size", 'use `kernel_size`.*`boundary="truncate"`'),
        ("padding_mode", "use `boundary`"),
        ("circular", 'use `boundary="circular"`'),
        ("cache_seqlens", "give the cached keys and values as `key`.*`query_offset` says"),
        ("xyz", r"its arguments are .*kernel_size.*dilation"),
    ],
)
def test_keywords_of_operators(rank, given, advice):
    """Messages name the function called, and the nearest right keyword or what to use instead."""
    fused = torch.randn(1, *(6,) * rank, 2, 4)
    first = fused.movedim(-2, 1)
    packed = fused[0].flatten(0, -3)
    layout = VarlenLayout([(6,) * rank])
    na, qk, av, varlen = RANKS[rank]
    attn = qk(first, first, 3)
    for function, args in (
        (na, (fused, fused, fused)),
        (qk, (first, first)),
        (av, (attn, first)),
        (varlen, (packed, packed, packed, layout)),
    ):
        with pytest.raises(ArgumentError, match=f"`{given}` is no argument of na{rank}d") as caught:
            function(*args, kernel_size=3, **{given: None})
        assert re.search(f"{function.__name__}: {advice}", str(caught.value))


GENERIC = natten.neighborhood_attention_generic
KEYWORDS = {
    "generic": (lambda: GENERIC(X, X, X, 3, strides=1), "neighborhood_attention_generic.*`stride`"),
    "attention": (
        lambda: natten.attention(X[0], X[0], X[0], attn_mask=None),
        "`attn_mask` is no argument of attention: there are no free masks",
    ),
    "attention lengths": (
        lambda: natten.attention(X[0], X[0], X[0], cu_seqlens_q=LENGTHS),
        "attention: use `cumulative_seqlen_Q`",
    ),
    "attention window": (
        lambda: natten.attention(X[0], X[0], X[0], max_seqlen_q=1),
        "attention: did you mean `max_seqlen_Q`",
    ),
    "merging": (
        lambda: natten.merge_attentions([X], [X[..., 0]], lse_tensor=1),
        "merge_attentions: did you mean `lse_tensors`",
    ),
    "unfused scale": (lambda: natten.na2d_qk(Q, Q, 3, scale=1.0), "na2d_qk: multiply the query"),
    "layer": (lambda: NeighborhoodAttention2D(8, 2, 3, qk_scal=1), "AttentionND: did.*`qk_scale`"),
    "layer dropout": (lambda: NeighborhoodAttention2D(8, 2, 3, dropout=0.1), "`attn_drop`"),
    "forward": (lambda: LAYER(X.flatten(-2), bakend=None), r"AttentionND\.forward: did.*`backend`"),
    "forward mask": (lambda: LAYER(X.flatten(-2), attn_mask=None), "no free masks"),
    "forward window": (lambda: LAYER(X.flatten(-2), kernel_size=3), "the layer's own, given when"),
    "forward lse": (lambda: LAYER(X.flatten(-2), return_lse=True), "returns its output only"),
    "missing": (lambda: natten.na2d(X, X, X), "na2d: missing a required argument: 'kernel_size'"),
    "missing unfused": (lambda: natten.na2d_qk(Q, Q), "na2d_qk: missing.*'kernel_size'"),
    "missing varlen": (
        lambda: natten.na1d_varlen(PACKED, PACKED, PACKED, VarlenLayout([8])),
        "na1d_varlen: missing a required argument: 'kernel_size'",
    ),
    "twice": (lambda: natten.na2d(X, X, X, 3, kernel_size=3), "na2d: multiple values.*kernel_size"),
    "too many": (lambda: natten.na2d(X, X, X, *range(30)), "na2d: too many positional arguments"),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords(name):
    call, message = KEYWORDS[name]
    with pytest.raises(ArgumentError, match=message.replace("ND", "2D")) as caught:
        call()
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_signatures_have_no_room_for_unknown_keywords():
    for function in (*RANKS[2][:3], GENERIC, natten.attention, natten.merge_attentions):
        assert "unknown" not in inspect.signature(function).parameters
