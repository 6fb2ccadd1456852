"""Problems drawn at random, and calls of the public functions that compute them."""

from helpers import Case
from hypothesis import strategies as st

import natten

FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


@st.composite
def axes(draw, largest=14):
    """One axis: keys, queries, and the rule's arguments but the offset."""
    boundary = draw(st.sampled_from(("shift", "truncate", "circular")))
    causal = boundary != "circular" and draw(st.booleans())
    length, d = draw(st.integers(1, largest)), draw(st.integers(1, 3))
    if boundary == "truncate":
        k = draw(st.integers(1, length + 3))
        s = draw(st.integers(1, k))
    elif boundary == "circular":
        s = draw(st.integers(1, min(3, largest // d)))
        length = s * d * draw(st.integers(1, min(3, largest // (s * d))))
        k = draw(st.integers(s, length // d))
    else:
        d = min(d, length)
        k = draw(st.integers(1, length // d))
        s = draw(st.integers(1, k))
    r = draw(st.sampled_from((1, 1, 2, 3)))
    offset = draw(st.integers(0, r * length - 1))
    queries = draw(st.integers(1, r * length - offset))
    return length, queries, (k, s, d, causal, boundary, r), offset


@st.composite
def cases(draw):
    """Problems of parts, finer queries and borders."""
    rank = draw(st.integers(1, 3))
    space, queries, options, offset = zip(*(draw(axes((14, 9, 5)[rank - 1])) for _ in range(rank)))
    kernel_size, stride, dilation, causal, boundary, fine = zip(*options)
    is_part, kv_heads = draw(st.booleans()), draw(st.integers(1, 2))
    return Case(
        space, kernel_size, stride, dilation, causal, draw(st.integers(0, 2)),
        kv_heads * draw(st.integers(1, 2)), kv_heads, draw(st.integers(1, 4)),
        draw(st.integers(1, 4)), draw(st.sampled_from((0, 0, 2))), draw(st.booleans()), boundary,
        fine, offset if is_part else None, queries if is_part else None,
    )  # fmt: skip


def run(case, inputs=None, backend=None, **options):
    """Output and LSE of a case; ``options`` replace its arguments."""
    inputs = case.inputs() if inputs is None else inputs
    q, k, v, rpb, ak, av, key_mask, additional_mask = inputs
    rule = case.rule
    given = {
        "kernel_size": rule.kernel_size, "stride": rule.stride, "dilation": rule.dilation,
        "is_causal": rule.is_causal, "boundary": rule.boundary,
        "queries_per_key": rule.queries_per_key, "query_offset": rule.query_offset, "rpb": rpb,
        "additional_keys": ak, "additional_values": av, "key_mask": key_mask,
        "additional_mask": additional_mask, "backend": backend, "return_lse": True,
    }  # fmt: skip
    return FUSED[rule.rank](q, k, v, **(given | options))
