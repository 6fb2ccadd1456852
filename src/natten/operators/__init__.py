"""The operators and their derivatives, and the one door to the backends.

Every operator has two faces. Compiled, exported and traced code sees the torch.library operator,
with a fake implementation and a gradient formula. Eager code goes through a
``torch.autograd.Function`` around the same operator, because only a Function supports forward mode,
double backward and ``torch.func`` transforms; where nothing watches a call of fused attention, the
operator is left out. ONNX, which knows neither, gets plain PyTorch.

What users call checks its arguments, and comes in here: by a :class:`Call` of fused attention, by
``document_attention`` or ``sequence_attention`` of packed tensors, or by a linear map.
"""

from .composed import composed_attention, gathered_gradient
from .fused import Call, attention, simplified, unpack_call
from .linear import av, av_transposed, qk, rpb_bias, rpb_bias_transposed
from .packed import backend_for, document_attention, each_document, problem_of
from .schema import RULE_ARGUMENTS, Choice, unpack
from .sequences import (
    gathered_sequences,
    gathered_sequences_gradient,
    sequence_attention,
    unpack_sequences,
)
from .transforms import is_plain_call

__all__ = [
    "RULE_ARGUMENTS",
    "Call",
    "Choice",
    "attention",
    "av",
    "av_transposed",
    "backend_for",
    "composed_attention",
    "document_attention",
    "each_document",
    "gathered_gradient",
    "gathered_sequences",
    "gathered_sequences_gradient",
    "is_plain_call",
    "problem_of",
    "qk",
    "rpb_bias",
    "rpb_bias_transposed",
    "sequence_attention",
    "simplified",
    "unpack",
    "unpack_call",
    "unpack_sequences",
]
