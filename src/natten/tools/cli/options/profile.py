"""Time neighborhood attention beside dense attention.

It measures the default GPU, or the CPU where there is no GPU. The table shows
the median time of a call from Python ("eager") and of its kernels alone in a
CUDA graph ("graph"), the speed-up over the fastest dense attention of the same
queries and keys, how close the time is to the ideal, which is dense time times
the fraction of query-key pairs that are needed, and the rates of needed
products and of memory.

Dense attention that would take minutes, or more memory than there is, is left
out with a line that says so.
"""

from __future__ import annotations

import argparse
import re

from ..outputs import output
from ..parser import Choice
from . import add_json, add_layer_arguments, add_per_axis, not_negative, positive

USAGE = "-i N [N ...] [-w N [N ...]] [options]"
EPILOG = """examples:
  a 2-D layer of NAT, forward:
    natten profile -i 56 56 -w 7 7 -b 4 -n 2 -d 32
  forward and backward of a causal 1-D window on the CPU, with a CSV file:
    natten profile -i 2048 -w 256 -c 1 --backprop --device cpu --csv times.csv
  HunyuanVideo with the stride that needs no masks, on a GPU:
    natten profile -i 30x48x80 -w 18x24x24 -s 16x8x8 -n 24 -d 128 --dtype bf16
  a frame of a video, causal in time, after three frames in a cache of keys:
    natten profile -i 4 32 32 -w 4 7 7 -c true 0 0 --query-offset 3 0 0
  features that are upsampled, with queries eight times as fine as keys:
    natten profile -i 28x28 -w 9 --queries-per-key 8 -n 4 -d 32 --dim-value 384
  list the tiles that the GPU kernels could use, without a GPU:
    natten profile -i 256x256 -w 80 --dtype bf16 --backend triton --dry-run
  try the best ten of them and use the fastest from now on, on a GPU:
    natten profile -i 256x256 -w 80 -n 24 -d 128 --dtype bf16 --optimize
  dense attention alone, by cuDNN, on a GPU:
    natten profile -i 4096 -d 128 --dtype bf16 --backend cudnn

Tuned tiles are kept in $NATTEN_CACHE, else $XDG_CACHE_HOME/natten, else where
the system keeps caches; natten env says where that is.
"""
DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def device(text: str) -> str:
    """Parse ``cpu``, ``cuda``, or ``cuda:0`` and the like."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, or cuda:0 and so on, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten profile``, named as in NATTEN's profiler."""
    parser.epilog = EPILOG
    add_layer_arguments(parser, head_dim=64)
    problem = parser.add_argument_group("problem")
    problem.add_argument(
        "--heads-kv", type=positive, metavar="N", help="heads of key and value; default: as --heads"
    )
    problem.add_argument(
        "--dim-value", type=positive, metavar="N", help="head dim of the value; default: as --dim"
    )
    problem.add_argument(
        "--add-kv", type=not_negative, default=0, metavar="N",
        help="additional keys and values that every query attends; default: 0",
    )  # fmt: skip
    dtypes = Choice({**{short: short for short in DTYPES}, **{v: k for k, v in DTYPES.items()}})
    problem.add_argument(
        "--dtype", type=dtypes, metavar="NAME",
        help="fp64, fp32, bf16 or fp16, or PyTorch's names; default: bf16 on a GPU, fp32 on a CPU",
    )  # fmt: skip
    problem.add_argument(
        "--device", type=device, metavar="NAME",
        help="cpu, cuda, or cuda:0 and so on; default: cuda where there is a GPU",
    )  # fmt: skip
    problem.add_argument("--backprop", action="store_true", help="also time forward and backward")

    how = parser.add_argument_group("how it is computed")
    how.add_argument(
        "--backend", metavar="NAME",
        help="hopper, triton, sdpa, tiled, reference; one of NATTEN's (cutlass-fna, hopper-fna, "
        "blackwell-fna, flex-fna), with which natten chooses; or dense attention alone on a GPU: "
        "cudnn, fav2, xformers",
    )  # fmt: skip
    how.add_argument("--fmha-backend", metavar="NAME", help="accepted; has no effect here")
    for prefix, kernel in (("", "forward"), ("backward-", "backward")):
        for tile in ("q-tile", "kv-tile"):
            add_per_axis(
                how, f"--{prefix}{tile}", type=positive,
                help=f"tile of the {kernel} kernels, one size per axis, as --dry-run lists them",
            )  # fmt: skip
    how.add_argument(
        "--schedule", type=Choice(("non", "coop", "pp")), metavar="NAME",
        help="non, coop or pp: accepted; has no effect here",
    )  # fmt: skip
    how.add_argument("--persistent", action="store_true", help="accepted; has no effect here")
    how.add_argument("--compile", action="store_true", help="time ours under torch.compile")

    what = parser.add_argument_group("what is done")
    what.add_argument(
        "--warmup-steps", type=not_negative, metavar="N",
        help="calls before those that count; default: 10 on a GPU, 2 on a CPU",
    )  # fmt: skip
    what.add_argument(
        "--dense", action=argparse.BooleanOptionalAction,
        help="time dense attention however long it takes, or do not time it; "
        "default: time it where that takes less than half a minute",
    )  # fmt: skip
    what.add_argument("--dry-run", action="store_true", help="list tiles and exit")
    what.add_argument(
        "--max-configs", type=not_negative, default=10, metavar="N",
        help="tiles to list, or to try, of each kernel; 0 means all; default: 10",
    )  # fmt: skip
    what.add_argument(
        "--optimize", action="store_true",
        help="try tiles on a GPU, remember the fastest, and profile with them",
    )  # fmt: skip
    what.add_argument(
        "--optimize-warmup-steps", type=not_negative, default=5, metavar="N",
        help="calls of each tile before those that count; default: 5",
    )  # fmt: skip
    add_json(what, "everything, every single time too,")
    what.add_argument(
        "--csv", type=output, metavar="FILE",
        help="append one line per time to a file, or write them instead of the tables to -",
    )  # fmt: skip
