"""Errors for unknown keywords, which say which one was meant or what to use instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import ArgumentError

# Keywords of other libraries' attention, and what to use here.
ELSEWHERE = {
    "attention_mask": "use `key_mask`, which is bool, True where a key may be attended",
    "attn_mask": "there are no free masks; `key_mask` takes keys away, who attends whom follows "
    "from `kernel_size`, `stride`, `dilation`, `is_causal` and `boundary`, or from the lengths of "
    "packed sequences, and `rpb` is a bias by relative position",
    "batch_first": "the batch always comes first",
    "cache_seqlens": "give the cached keys and values as `key` and `value`; `query_offset` says "
    "how many of them come before the queries",
    "causal": "use `is_causal`",
    "circular": 'use `boundary="circular"`',
    "cu_seqlens_k": "use `cumulative_seqlen_KV`",
    "cu_seqlens_q": "use `cumulative_seqlen_Q`",
    "dropout": "a layer has `attn_drop` and `proj_drop`; without one, drop out the weights between "
    "na*d_qk and na*d_av",
    "dropout_p": "drop out the weights between na*d_qk and na*d_av; a layer has `attn_drop`",
    "enable_gqa": "leave it out; `key` and `value` of fused operators may have fewer heads than "
    "`query`",
    "key_padding_mask": "use `key_mask`, which is the opposite, True where a key may be attended",
    "need_weights": "na*d_qk and softmax give the weights",
    "padding_mode": 'use `boundary`, which is "shift", "truncate" or "circular"',
    "scale": "multiply the query by it before",
    "softmax_scale": "use `scale`",
    "window_size": "use `kernel_size`, the number of tokens in a window; with "
    '`boundary="truncate"` it is cut at the ends, as local windows are elsewhere',
}


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature without ``**unknown``, which only collects keywords that are refused."""
    signature = inspect.signature(function)
    known = [each for name, each in signature.parameters.items() if name != "unknown"]
    return signature.replace(parameters=known)


def unknown_keyword(
    function: str,
    name: str,
    allowed: Iterable[str],
    elsewhere: Mapping[str, str] = ELSEWHERE,
) -> ArgumentError:
    """The error of a call with a keyword that ``function`` does not have.

    Args:
        function: the name of the function, for the message.
        name: the keyword.
        allowed: the keywords that the function has.
        elsewhere: keywords that are not misspelt, and what to say about them.
    """
    allowed = list(allowed)
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in allowed], 1)
    if name in elsewhere:
        advice = f"{elsewhere[name]}."
    elif near:
        meant = next(each for each in allowed if each.lower() == near[0])
        advice = f"did you mean `{meant}`?"
    else:
        advice = f"its arguments are {', '.join(allowed)}."
    return ArgumentError(f"`{name}` is no argument of {function}: {advice}")


def check_call(
    function: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Bind the arguments of a call to the parameters of a signature.

    Raises:
        ArgumentError: the signature does not take the arguments.
    """
    open_ended = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    for name in kwargs:
        if name not in signature.parameters and not open_ended:
            raise unknown_keyword(function, name, signature.parameters) from None
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{function}: {error}.") from None
