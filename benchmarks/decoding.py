"""Time the attention of LTX-2.5's video decoder, and its last stage's layer whole and in parts.

    python benchmarks/decoding.py --out benchmarks/results/ltx-h200.csv     # needs a GPU, 90 GB

The cases ``ltx-1`` to ``ltx-5`` are calls of ``na3d``, of which sampled queries are compared with
float64 first. The layer is what diffusers has around such a call: projections, norms and rotary
positions. ``AttendInParts`` of ``examples/ltx.py`` computes it for some frames at a time. Outputs
are compared with those of the whole, and the memory that each way adds to the input is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from cases import CASES, GROUPS, Case
from records import Record, write
from run import about, times
from torch import Tensor, nn

import natten
from natten.profiler import choose_backend, measure
from natten.profiler.report import FORWARD
from natten.profiler.tune import computed_over_needed

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from ltx import AttendInParts

SAMPLES = 64  # queries that are compared with float64, beside those in the corners
TOLERANCE = 1e-2  # of a root mean square error over the root mean square, in bfloat16
FRAMES = (40, 16, 8)  # in one part
WARMUP = 1


class Layer(nn.Module):
    """An attention layer of the decoder, with the names that diffusers has for its parts."""

    def __init__(self, channels: int, kernel_size: tuple[int, int, int], head_dim: int) -> None:
        super().__init__()
        self.kernel_size, self.head_dim = kernel_size, head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[batch, frames, height, width, heads, head_dim]``."""
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        query = self.norm_q(query) * self.head_dim**-0.5
        return rotate(query), rotate(self.norm_k(key)), value


def rotate(x: Tensor) -> Tensor:
    """Turn a quarter of the channels by the time, and the others by height and width, in pairs."""
    time = x.shape[-1] // 4
    space = (x.shape[-1] - time) // 2
    found = []
    for axis, part in enumerate(x.split((time, space, space), -1), start=1):
        half = part.shape[-1] // 2
        speed = 10000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[axis], device=x.device)[:, None] * speed
        angle = angle.view(-1, *(1,) * (x.dim() - axis - 2), half)
        pairs = torch.view_as_complex(part.float().unflatten(-1, (half, 2)))
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        found.append(torch.view_as_real(turned).flatten(-2).to(x.dtype))
    return torch.cat(found, -1)


def attend_whole(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in one part, as diffusers computes it."""
    query, key, value = layer.project_qkv(x)
    out = natten.na3d(query, key, value, kernel_size=layer.kernel_size, scale=1.0)
    return layer.to_out[0](out.flatten(-2))


def error(out: Tensor, wanted: Tensor) -> float:
    """The root mean square of the error over that of the values."""
    difference, size = (x.norm(dtype=torch.float64).item() for x in (out - wanted, wanted))
    return difference / size


def check(case: Case, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Raise an error unless queries in the corners and at random places are float64's."""
    rule, scale = case.problem("cpu").rule, case.dim**-0.5
    places = torch.stack([torch.randint(n, (SAMPLES,)) for n in case.shape], 1).tolist()
    places += torch.cartesian_prod(*(torch.tensor([0, n - 1]) for n in case.shape)).tolist()
    limits = [
        torch.stack(rule.windows(axis, torch.arange(n), n), 1).tolist()
        for axis, n in enumerate(case.shape)
    ]
    found, wanted = [], []
    for place in places:
        window = (0, *(slice(*axis[x]) for axis, x in zip(limits, place)))
        keys, values = (x[window].flatten(0, -3).double() for x in (key, value))
        scores = torch.einsum("hd,khd->hk", query[(0, *place)].double(), keys) * scale
        wanted.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
        found.append(out[(0, *place)].double())
    ratio = error(torch.stack(found), torch.stack(wanted))
    if not ratio < TOLERANCE:
        raise RuntimeError(f"{case.name}: wrong by {ratio:.3g}")


@torch.no_grad()
def measure_stage(case: Case, device: torch.device) -> Iterator[Record]:
    """The times of one call of ``na3d``, after a check."""
    problem = case.problem(device.type)
    inputs = problem.inputs()
    call = partial(natten.na3d, **inputs, kernel_size=problem.rule.kernel_size)
    check(case, **inputs, out=call())
    backend = choose_backend(problem, None)
    computed = computed_over_needed(problem, backend, None)
    waste = " ".join(f"{kernel}={ratio:.3f}" for kernel, ratio in computed.items())
    who = case.name, f"natten {backend}", FORWARD
    for kind, timing in times(call, device).items():
        numbers = f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"
        yield Record(*who, kind, *numbers, waste, **about(device))


@torch.no_grad()
def measure_layer(case: Case, device: torch.device) -> Iterator[Record]:
    """Times and memory of the layer, whole and in parts, after a comparison."""
    torch.cuda.empty_cache()
    channels = case.heads * case.dim
    layer = Layer(channels, case.problem("cpu").rule.kernel_size, case.dim)
    layer = layer.to(device, case.dtype)
    x = torch.randn(1, *case.shape, channels, device=device, dtype=case.dtype)
    ways: dict[str, Callable[[], Tensor]] = {"layer whole": partial(attend_whole, layer, x)}
    for frames in FRAMES:
        ways[f"layer {frames} frames"] = partial(AttendInParts(frames), layer, x)
    wanted = None
    for name, way in ways.items():
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = way()
        added = torch.cuda.max_memory_allocated(device) - before
        wanted = out if wanted is None else wanted
        ratio = max(error(*pair) for pair in zip(out.split(8, 1), wanted.split(8, 1)))
        if not ratio < TOLERANCE:
            raise RuntimeError(f"{name}: differs from the whole by {ratio:.3g}")
        del out
        timing = measure.eager_time(way, device, WARMUP, seconds=1.0)
        numbers = f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"
        memory = f"{added / (3 * x.numel() * x.element_size()):.3f}"
        yield Record(case.name, name, FORWARD, "eager", *numbers, "", memory, **about(device))


def main(arguments: list[str] | None = None) -> int:
    """Measure all stages and the layer, and write each result when it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    torch.manual_seed(0)
    device = torch.device("cuda")
    write(args.out, [])
    cases = [CASES["cuda"][name] for name in GROUPS["ltx"]]
    stages = (measure_stage(case, device) for case in cases)
    for record in chain(*stages, measure_layer(cases[-1], device)):
        write(args.out, [record], new=False)
        text = f"{record.median_us:>12} us  +-{record.spread_us}  {record.peak_over_inputs}"
        print(f"{record.case:8}{record.backend:18}{record.time:7}{text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
