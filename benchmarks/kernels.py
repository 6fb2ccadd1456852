"""Compile the default kernels without a GPU: registers, spills, shared memory.

    python benchmarks/kernels.py                             # everything CI checks
    python benchmarks/kernels.py --target 90 --variants NAT  # some, with the Triton that is installed

Targets are NVIDIA compute capabilities (80, 86, 90, 100) and AMD's gfx942 for the portable kernels,
90a for the Hopper kernels. What spills fails, and so does what has more shared memory than the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from compiled import Variant, call_hopper, call_portable, compile_calls
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/kernels.md"
FP16 = torch.float16

PORTABLE = [
    Variant("NAT", (56, 56), 7, 32),
    Variant("NAT fp16 bias", (56, 56), 7, 32, dtype=FP16, bias=True),
    Variant("HDiT", (64, 64), 13, 64),
    Variant("HDiT fp32", (64, 64), 13, 64, dtype=torch.float32),
    Variant("FLUX", (256, 256), 80, 128),
    Variant("FLUX strided", (256, 256), 80, 128, stride=16),
    Variant("1-D causal", (32768,), 2048, 128, causal=True),
    Variant("video", (16, 32, 32), (7, 11, 11), 64),
    Variant("Hunyuan", (30, 48, 80), (18, 24, 24), 128),
    Variant("extra", (64, 64), 13, 128, extra=5),
]
HOPPER = [
    Variant("1-D", (32768,), 2048, 128),
    Variant("1-D strided", (32768,), 2048, 128, stride=256),
    Variant("NAT", (56, 56), 7, 32),
    Variant("NAT wide", (56, 56), 7, 64, dtype=FP16),
    Variant("DiNAT", (28, 28), 7, 32, dilation=4, dtype=FP16),
    Variant("HDiT", (64, 64), 13, 64),
    Variant("video", (16, 32, 32), (7, 11, 11), 64),
    Variant("FLUX", (256, 256), 80, 128),
    Variant("FLUX strided", (256, 256), 80, 128, stride=16),
    Variant("Hunyuan", (30, 48, 80), (18, 24, 24), 128),
    Variant("Hunyuan strided", (30, 48, 80), (18, 24, 24), 128, stride=(16, 8, 8)),
    Variant("causal", (30, 32, 32), (30, 16, 16), 128, causal=(True, False, False)),
    Variant("wide", (64, 64), 13, 256),
    Variant("extra", (64, 64), 13, 128, value_dim=64, extra=5),
]
