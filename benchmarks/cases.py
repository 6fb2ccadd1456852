"""The problems that are measured, by name.

``GROUPS`` has the names of the cases in each group: "cuda" and "cpu" for the tables, "strides",
which compares strides of two layers, and "ltx", the layers of a video decoder. ``PLAIN`` has cases
of plain attention, ``PACKED`` of packed documents. ``SPECTRUM`` are the problems of many users,
which ``spectrum.py`` measures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch

from natten import Neighborhood
from natten.neighborhood import Dense, Rule
from natten.profiler import Problem

Sizes = int | tuple[int, ...]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem.

    ``target`` limits our time on a CPU as a fraction of dense time, for forward and for
    forward+backward. ``about`` says what has such a layer. ``kv_heads`` and ``value_dim`` are
    those of the query where they are None. Only ``spectrum.py`` measures a ``bias``.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    heads: int
    dim: int
    kernel_size: Sizes
    stride: Sizes = 1
    dilation: Sizes = 1
    is_causal: bool | tuple[bool, ...] = False
    dtype: torch.dtype = BF16
    target: tuple[float, float] | None = None
    about: str = field(default="", compare=False)
    kv_heads: int | None = None
    value_dim: int | None = None
    num_additional: int = 0
    bias: bool = False

    def describe(self, usual: torch.dtype) -> str:
        """The problem in words; the dtype is named only if it is not the usual one."""
        rule = self.problem("cpu").rule
        parts = [
            f"{len(self.shape)}-D {by(self.shape)}",
            f"batch {self.batch}",
            f"{self.heads} head"
            + "s" * (self.heads > 1)
            + (f" ({self.kv_heads} of keys)" if self.kv_heads else ""),
            f"d {self.dim}" + (f", {self.value_dim} of values" if self.value_dim else ""),
            f"window {by(rule.kernel_size)}",
            f"stride {by(rule.stride)}" if max(rule.stride) > 1 else "",
            f"dilation {by(rule.dilation)}" if max(rule.dilation) > 1 else "",
            "causal along the first axis" if rule.is_causal[0] else "",
            f"{self.num_additional} additional tokens" if self.num_additional else "",
            "bias" if self.bias else "",
            str(self.dtype).removeprefix("torch.") if self.dtype is not usual else "",
        ]
        return ", ".join(part for part in parts if part)

    def problem(self, device: str) -> Problem:
        """The problem for the profiler."""
        rule = Neighborhood.create(
            len(self.shape), self.kernel_size, self.stride, self.dilation, self.is_causal
        )
        return Problem(
            self.shape, rule, self.batch, self.heads, self.kv_heads or self.heads, self.dim,
            self.value_dim or self.dim, self.num_additional, self.dtype, torch.device(device),
        )  # fmt: skip

    def inputs(self, device: str, requires_grad: bool = False) -> dict[str, torch.Tensor]:
        """Random tensors of a call, by the names of its arguments; on "meta" they have no data."""
        problem = self.problem(device)
        inputs = problem.inputs(requires_grad)
        if self.bias:
            sizes = (2 * size - 1 for size in problem.rule.kernel_size)
            inputs["rpb"] = torch.randn(
                self.heads, *sizes, device=device, dtype=self.dtype, requires_grad=requires_grad
            )
        return inputs


def by(sizes: tuple[int, ...]) -> str:
    """``8x16`` for ``(8, 16)``."""
    return "x".join(map(str, sizes))


@dataclass(frozen=True)
class PlainCase:
    """Plain attention of sequences of one length."""

    name: str
    batch: int
    length: int
    heads: int
    dim: int
    causal: bool = False

    def describe(self) -> str:
        """The problem in words."""
        sizes = f"batch {self.batch}, {self.length} tokens, {self.heads} heads, d {self.dim}"
        return sizes + ", causal" * self.causal


@dataclass(frozen=True)
class PackedCase:
    """Packed documents of random sizes, from ``least`` to ``most``; without a ``window`` packed
    sequences of plain attention."""

    name: str
    about: str
    number: int
    least: tuple[int, ...]
    most: tuple[int, ...]
    heads: int
    dim: int
    window: int | tuple[int, ...] | None = None
    causal: bool = False

    @property
    def layouts(self) -> list[tuple[int, ...]]:
        """The documents' token layouts."""
        draw = random.Random(0)
        sizes = list(zip(self.least, self.most))
        return [tuple(draw.randint(*each) for each in sizes) for _ in range(self.number)]

    @property
    def rule(self) -> Rule:
        """Who attends whom in a document as long as ``most``."""
        if self.window is None:
            return Dense(self.causal)
        return Neighborhood.create(len(self.most), self.window)

    def describe(self) -> str:
        """The problem in words."""
        sizes = " to ".join("x".join(map(str, each)) for each in (self.least, self.most))
        rule = f", window {self.window}" if self.window else ", causal" * self.causal
        return f"{self.number} {self.about}, {sizes}, {self.heads} heads, d {self.dim}{rule}"


_SHARED = "the same; groups of neighboring queries share a window"
GPU = [
    Case("1d", (32768,), 1, 1, 128, 2048, about="a long sequence, one head"),
    Case("1d-s256", (32768,), 1, 1, 128, 2048, 256, about=_SHARED),
    Case("nat", (56, 56), 64, 2, 32, 7, about="the first stage of NAT-tiny"),
    Case("nat-fp16", (56, 56), 64, 2, 32, 7, dtype=FP16, about="the same in float16"),
    Case("nat-d64", (56, 56), 64, 2, 64, 7, about="the same with 64 channels a head"),
    Case("dinat", (28, 28), 64, 4, 32, 7, 1, 4, about="the second stage of DiNAT-tiny"),
    Case("hdit", (64, 64), 16, 8, 64, 13, about="an hourglass diffusion transformer"),
    Case("video", (16, 32, 32), 2, 12, 64, (7, 11, 11), about="a small video model"),
    Case(
        "causal", (30, 32, 32), 1, 24, 128, (30, 16, 16), is_causal=(True, False, False),
        about="a video model that is causal in time",
    ),
    Case("flux", (256, 256), 1, 24, 128, 80, about="FLUX, an image of 4096x4096 pixels"),
    Case("flux-s16", (256, 256), 1, 24, 128, 80, 16, about=_SHARED),
    Case("hunyuan", (30, 48, 80), 1, 24, 128, (18, 24, 24), about="HunyuanVideo"),
    Case("hunyuan-s", (30, 48, 80), 1, 24, 128, (18, 24, 24), (16, 8, 8), about=_SHARED),
]  # fmt: skip

# Two layers with every kind of stride, to be compared with the simulator's order.
_FLUX = {f"flux-s{s}": ((256, 256), 1, 24, 128, 80, s) for s in (2, 4, 8, 40, 80)}
_HUNYUAN = {
    f"hunyuan-s{by(s)}": ((30, 48, 80), 1, 24, 128, (18, 24, 24), s)
    for s in ((2, 2, 2), (4, 4, 4), (6, 8, 8), (18, 24, 24), (1, 8, 8))
}
STRIDES = [
    *(case for case in GPU if case.name.startswith(("flux", "hunyuan"))),
    *(Case(name, *each) for name, each in (_FLUX | _HUNYUAN).items()),
]

# The five stages of LTX-2.5's video decoder, for 121 frames of 1088x1920 pixels. Dense attention
# over all tokens of the last one would take minutes.
LTX = [
    Case("ltx-1", (18, 34, 60), 1, 32, 64, (3, 7, 7)),
    Case("ltx-2", (18, 68, 120), 1, 16, 64, (3, 7, 7)),
    Case("ltx-3", (35, 68, 120), 1, 8, 64, (3, 5, 5)),
    Case("ltx-4", (69, 136, 240), 1, 8, 64, (3, 5, 5)),
    Case("ltx-5", (121, 272, 480), 1, 4, 64, 11),
]

# Problems that users have, from papers, model code and issues; FLUX and HunyuanVideo are in GPU.
_CAUSAL_TIME = (True, False, False)
SPECTRUM = {
    case.name: case
    for case in (
        Case("nat-s1-rpb", (56, 56), 64, 2, 32, 7, bias=True),
        Case("nat-s2", (28, 28), 64, 4, 32, 7),
        Case("nat-s4", (7, 7), 64, 16, 32, 7),
        Case("nat-s3-rpb", (14, 14), 64, 8, 32, 7, bias=True),
        Case("nat-fp32", (56, 56), 64, 2, 32, 7, dtype=FP32),
        Case("dinat-s1", (56, 56), 64, 2, 32, 7, 1, 8),
        Case("dinatL-384", (96, 96), 8, 6, 32, 11),
        Case("hdit-128", (128, 128), 4, 4, 64, 7),
        Case("stylenat-256", (256, 256), 4, 2, 32, 7),
        Case("stylenat-512-d16", (512, 512), 2, 4, 16, 7),
        Case("w3", (128, 128), 4, 8, 64, 3),
        Case("blocked8", (64, 64), 16, 8, 64, 8, 8),
        Case("w13-s4", (64, 64), 16, 8, 64, 13, 4),
        Case("near-full", (64, 64), 4, 16, 64, 60),
        Case("full", (64, 64), 4, 16, 64, 64),
        Case("cosmos-a", (24, 44, 80), 1, 32, 128, (24, 4, 16), 1, (1, 11, 5)),
        Case("cosmos-c", (24, 44, 80), 1, 32, 128, (24, 12, 24), (1, 4, 8)),
        Case("wan", (21, 45, 80), 1, 40, 128, (9, 17, 25)),
        Case("wan-s", (21, 45, 80), 1, 40, 128, (9, 15, 24), (3, 5, 8)),
        Case("wan-extra", (21, 45, 80), 1, 40, 128, (9, 17, 25), num_additional=512),
        Case("ltx-vae", (9, 64, 96), 1, 16, 64, (3, 7, 7)),
        Case("weather", (13, 91, 180), 1, 8, 48, (5, 7, 7)),
        Case("mri", (48, 48, 48), 1, 8, 32, 5),
        Case("causal-t", (16, 32, 32), 2, 12, 64, (16, 11, 11), is_causal=_CAUSAL_TIME),
        Case("anyup", (224, 224), 1, 4, 32, 9, 1, 8, value_dim=384),
        Case("gqa-2d", (64, 64), 4, 32, 128, 17, kv_heads=8),
        Case("d96", (64, 64), 8, 8, 96, 13),
        Case("d72", (64, 64), 8, 16, 72, 13),
        Case("d256", (64, 64), 4, 8, 256, 13),
        Case("d20", (64, 64), 8, 8, 20, 13),
        Case("fp32-d64", (64, 64), 8, 8, 64, 13, dtype=FP32),
        Case("fp16-rpb", (64, 64), 8, 8, 64, 13, dtype=FP16, bias=True),
        Case("audio-64", (16384,), 4, 8, 64, 65),
        Case("lm-1k", (8192,), 4, 32, 128, 1024, is_causal=True),
        Case("lm-128", (8192,), 8, 16, 64, 128, is_causal=True),
        Case("one-head", (128, 128), 1, 1, 64, 15),
        Case("flux-w31-txt", (128, 128), 1, 24, 128, 31, num_additional=512),
        Case("hunyuan-w9", (30, 45, 80), 1, 24, 128, (7, 9, 9)),
        Case("k-row", (60, 100), 4, 12, 64, (1, 25)),
        Case("dv-512", (64, 64), 2, 8, 64, 9, value_dim=512),
        *(case for case in GPU if case.name in ("nat", "hdit", "video", "causal")),
        Case("ltx-11", (61, 136, 240), 1, 4, 64, 11),
        next(replace(case, name="ltx-full") for case in LTX if case.name == "ltx-5"),
    )
}
# The same layers with a dilation that divides the layout and with one that does not; groups are
# about as long, because what tiles waste at the end of an axis depends on that.
UNEVEN = {
    case.name: case
    for case in (
        Case("dil8-even", (56, 56), 64, 2, 32, 7, 1, 8),
        Case("dil8-uneven", (57, 57), 64, 2, 32, 7, 1, 8),
        Case("dil3-even", (63, 63), 16, 4, 64, 9, 1, 3),
        Case("dil3-uneven", (64, 64), 16, 4, 64, 9, 1, 3),
        Case("dil2-3d-even", (16, 50, 82), 1, 12, 128, (6, 9, 9), 1, (1, 2, 2)),
        Case("dil2-3d-uneven", (16, 49, 81), 1, 12, 128, (6, 9, 9), 1, (1, 2, 2)),
        Case("dil-cosmos-even", (24, 66, 95), 1, 16, 128, (24, 4, 16), 1, (1, 11, 5)),
        Case("dil-cosmos-uneven", (24, 64, 93), 1, 16, 128, (24, 4, 16), 1, (1, 11, 5)),
    )
}

_MAIN = {
    "nat": ((56, 56), 4, 2, 32, 7, 1, 1, (0.25, 0.25)),
    "dinat": ((28, 28), 4, 4, 32, 7, 1, 4, (1.0, 1.0)),
    "hdit": ((64, 64), 1, 4, 64, 13, 1, 1, (0.40, 0.30)),
    "1d": ((4096,), 1, 4, 64, 129, 1, 1, (0.15, 0.13)),
    "video": ((16, 28, 28), 1, 2, 32, 7, 1, 1, (0.30, 0.22)),
}
# From 1024 tokens on, a window of a quarter of the tokens or less is never slower than dense.
_QUARTER = {
    "quarter-1d-small": ((1024,), 1, 1, 32, 255),
    "quarter-1d": ((1024,), 4, 8, 64, 256),
    "quarter-2d-small": ((32, 32), 1, 2, 32, 16),
    "quarter-2d-window3": ((32, 32), 1, 1, 16, 3),
    "quarter-2d-dilated": ((32, 32), 4, 4, 64, 8, 1, 2),
    "quarter-2d": ((64, 64), 1, 2, 64, 31),
    "quarter-3d-small": ((8, 12, 12), 1, 2, 32, 6),
    "quarter-3d-dilated": ((8, 12, 12), 1, 1, 32, 3, 1, 2),
    "quarter-3d": ((8, 32, 32), 1, 2, 64, 7),
}
# Windows that hold three quarters of all pairs or more take at most 1 / 0.95 of dense time.
_NEAR = {
    "full-1d": ((2048,), 1, 4, 64, 2048),
    "full-2d": ((32, 32), 2, 4, 32, 32),
    "near-1d": ((2048,), 1, 4, 64, 1800),
    "near-1d-dilated": ((2048,), 1, 4, 64, 950, 1, 2),
    "near-2d-small": ((14, 14), 16, 4, 32, 12),
    "near-2d": ((64, 64), 1, 2, 32, 60),
    "near-2d-strided": ((48, 48), 1, 4, 64, 44, 4),
    "near-3d": ((16, 16, 16), 1, 2, 64, 15),
}
CPU = [
    *(Case(n, *each, dtype=FP32, target=target) for n, (*each, target) in _MAIN.items()),
    *(Case(f"{n}-bf16", *each) for n, (*each, _) in _MAIN.items()),
    *(Case(n, *each, dtype=FP32, target=(1.0, 1.0)) for n, each in _QUARTER.items()),
    *(Case(n, *each, dtype=FP32, target=(1.05, 1.05)) for n, each in _NEAR.items()),
    Case("near-2d-bf16", *_NEAR["near-2d"]),
]

PLAIN = {
    case.name: case
    for case in (
        PlainCase("plain-4k", 4, 4096, 16, 128),
        PlainCase("plain-4k-causal", 4, 4096, 16, 128, True),
        PlainCase("plain-16k", 1, 16384, 24, 128),
        PlainCase("plain-1k", 8, 1024, 16, 64),
        PlainCase("plain-1k-causal", 8, 1024, 16, 64, True),
        PlainCase("plain-vit", 64, 197, 12, 64),
        PlainCase("plain-d72", 16, 1024, 16, 72),
        PlainCase("plain-8k-causal", 2, 8192, 8, 64, True),
    )
}

PACKED = {
    case.name: case
    for case in (
        PackedCase("packed-images", "images", 64, (16, 16), (64, 64), 8, 64, 7),
        PackedCase("packed-small", "small images", 256, (14, 14), (28, 28), 4, 32, 7),
        PackedCase("packed-videos", "videos", 8, (8, 24, 24), (16, 48, 48), 12, 64, (5, 7, 7)),
        PackedCase("packed-texts", "texts", 64, (128,), (2048,), 16, 128),
        PackedCase("packed-causal", "texts", 64, (128,), (2048,), 16, 128, causal=True),
        PackedCase("packed-short", "short texts", 256, (16,), (256,), 12, 64),
    )
}

CASES = {
    "cuda": {case.name: case for case in GPU + STRIDES + LTX},
    "cpu": {case.name: case for case in CPU},
}
GROUPS = {
    name: [case.name for case in cases]
    for name, cases in (("cuda", GPU), ("cpu", CPU), ("strides", STRIDES), ("ltx", LTX))
}
