"""Make the tables and the chart of README and documentation from benchmarks/results/*.csv.

    python benchmarks/report.py            # write what changed
    python benchmarks/report.py --check    # write nothing; fail if something is stale

`<!-- table: NAME -->` and `<!-- /table -->` in a file mark where a table goes.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import limits
import spectrum
from cases import BF16, CASES, FP32, GROUPS, PACKED, PLAIN, Case, by
from models import MODES, PASSES
from records import RESULTS, read
from run import same_dtype

from natten.backends.hopper.widths import native
from natten.cli.tables import markdown
from natten.draw.canvas import (
    ATTENDED,
    BORDER,
    INK,
    QUERY,
    QUIET_INK,
    Key,
    Panel,
    Rect,
    Text,
    compose,
)  # fmt: skip
from natten.profiler import Problem
from natten.profiler.report import BOTH, FORWARD
from natten.simulator import DEVICES, Device, simulate

ROOT = Path(__file__).parents[1]
FILES = (
    "README.md",
    "docs/decoding.md",
    "docs/index.md",
    "docs/models.md",
    "docs/performance.md",
    "docs/simulator.md",
    "benchmarks/results/cpu.md",
    "benchmarks/results/h100.md",
    "benchmarks/results/h200.md",
)
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

README_CPU = ("nat", "dinat", "hdit", "1d", "video", "nat-bf16")
UPSTREAM, FLEX = "upstream hopper-fna", "flex attention"
PEERS = "peers-h100"
GPU = "h100"  # the name of its results, and of the simulator's device
SPECTRUM = "spectrum-h200"
NAMED = 0.2  # of the spectrum's problems, those below are named in the picture


class Times:
    """The medians of a file, in microseconds."""

    def __init__(self, name: str) -> None:
        self.records = read(name)
        self.medians = {
            (each.case, *_kind(each.backend), each.pass_, each.time): float(each.median_us)
            for each in self.records
        }

    @property
    def cases(self) -> list[str]:
        """The names of the cases, in the order of the file."""
        return list(dict.fromkeys(each.case for each in self.records))

    def of(self, case: str, backend: str, pass_: str, *kinds: str) -> float | None:
        """The median of the first kind that was measured."""
        found = (self.medians.get((case, backend, pass_, kind)) for kind in kinds)
        return next((each for each in found if each is not None), None)

    def machine(self) -> str:
        """Device, versions, commit and date in one line, because a file comes from one run."""
        about = {(r.device, r.versions, r.commit, r.date) for r in self.records}
        return "; ".join(
            ", ".join(filter(None, (device, versions, commit and f"commit {commit}", date)))
            for device, versions, commit, date in sorted(about)
        )


def _kind(backend: str) -> tuple[str]:
    """The backend's name in tables: "natten" for all of ours, "dense" for all that are dense."""
    first = backend.split()[0]
    return (first,) if first in ("natten", "dense") else (backend,)


def cpu_table(names: Sequence[str] | None = None) -> list[str]:
    """Ours beside dense attention on a CPU; for all cases also with targets and memory."""
    times, whole = Times("cpu"), names is None
    rows = [["case", "dense ms, forward / forward+backward", "natten ms", "dense / natten"]]
    rows[0] += ["target", "peak extra memory over inputs"] if whole else []
    memory = {r.case: r.peak_over_inputs for r in times.records if r.peak_over_inputs}
    for name in names or times.cases:
        case = CASES["cpu"][name]
        ours, dense = (
            [times.of(name, backend, pass_, "eager") for pass_ in (FORWARD, BOTH)]
            for backend in ("natten", "dense")
        )
        row = [case.describe(FP32), _pair(dense, _ms), _pair(ours, _ms)]
        half = [times.of(name, same_dtype(case.dtype), each, "eager") for each in (FORWARD, BOTH)]
        if half[0] is not None:
            row[1] += f"; {_pair(half, _ms)} in {str(case.dtype).removeprefix('torch.')}"
        row += [_pair_over(dense, ours, "{:.2f}x")]
        if whole:
            target = case.target
            row += [f"{1 / target[0]:.2f}x / {1 / target[1]:.2f}x" if target else ""]
            row += [f"{memory[name]}x" if name in memory else ""]
        rows.append(row)
    return [*_table(rows), "", f"{times.machine()}; float32 unless said, medians of one run."]


def gpu_table(gpu: str = GPU) -> list[str]:
    """Ours beside dense cuDNN attention on a GPU."""
    times = Times(gpu)
    rows = [
        [
            "case", "dense cuDNN us, forward / forward+backward", "ideal us",
            "natten us, graph", "natten us, eager", "dense / natten, graph",
            "ideal / natten, graph",
        ]
    ]  # fmt: skip
    for name in times.cases:
        dense, graph, eager = (
            [times.of(name, backend, pass_, kind) for pass_ in (FORWARD, BOTH)]
            for backend, kind in (("dense", "graph"), ("natten", "graph"), ("natten", "eager"))
        )
        kept = _kept(CASES["cuda"][name])
        ideal = [None if each is None else each * kept for each in dense]
        columns = [_pair(each, _us) for each in (dense, ideal, graph, eager)]
        ratios = _pair_over(dense, graph, "{:.1f}x"), _pair_over(ideal, graph)
        rows.append([_label(name), *columns, *ratios])
    return [*_table(rows), "", f"{times.machine()}; bfloat16 unless said, medians of one run."]


def plain_table() -> list[str]:
    """Plain attention beside cuDNN's."""
    times = Times("plain-h200")
    rows = [["plain attention", "cuDNN us, forward / backward", "natten us", "cuDNN / natten"]]
    for name in times.cases:
        dense, ours = (
            [times.of(name, backend, pass_, "graph") for pass_ in ("forward", "backward")]
            for backend in ("dense", "natten")
        )
        columns = _pair(dense, _us), _pair(ours, _us), _pair_over(dense, ours)
        rows.append([PLAIN[name].describe(), *columns])
    return [*_table(rows), "", f"{times.machine()}; bfloat16, kernel times, medians in turn."]


def packed_table() -> list[str]:
    """Packed documents in one launch beside the same attention one by one."""
    times = Times("packed-h200")
    who = {"hopper": "hopper us", "triton": "triton us", "one by one": "one by one us"}
    rows = [["packed", *who.values(), "dense us", "one by one / hopper", "host us"]]
    for name in times.cases:
        ours, portable, apart, dense = (
            [times.of(name, each, pass_, "graph") for pass_ in ("forward", "backward")]
            for each in (*who, "dense")
        )
        host = times.of(name, "hopper", BOTH, "host")
        rows.append(
            [
                PACKED[name].describe(), *(_pair(each, _us) for each in (ours, portable, apart)),
                _pair(dense, _us), _pair_over(apart, ours), "" if host is None else _us(host),
            ]
        )  # fmt: skip
    return [*_table(rows), "", f"{times.machine()}; bfloat16, medians in turn."]


MODELS = {
    "nat": "NAT-tiny", "nat-rpb": "NAT-tiny, with a bias", "dinat-rpb": "DiNAT-tiny, with a bias",
    "swin": "Swin-tiny (timm)", "vit": "ViT-small (timm)",
}  # fmt: skip


def models_table(gpu: str = "h200") -> list[str]:
    """Images a second of whole models, and the share of attention."""
    with open(RESULTS / "models" / f"{gpu}.csv", newline="", encoding="utf-8") as file:
        rows = {(row["model"], row["mode"], row["pass"]): row for row in csv.DictReader(file)}
    ways = [(mode, pass_) for pass_ in PASSES for mode in MODES]
    titles = [f"{pass_}, {mode}" for mode, pass_ in ways]
    table = [["images a second", *titles, "attention in training, in graphs"]]
    for name, title in MODELS.items():
        found = [rows.get((name, *way)) for way in ways]
        speeds = [
            "" if each is None else f"{float(each['images_per_second']):.0f}" for each in found
        ]
        share = rows.get((name, "graphs", "training"), {}).get("attention_share", "0")
        # Swin's attention is products and a softmax, whose kernels have no names of their own.
        table.append([title, *speeds, f"{float(share):.0%}" if float(share) else ""])
    row = next(iter(rows.values()))
    about = f"{row['device']}, {row['versions']}, batch {row['batch']}"
    return [*_table(table), "", f"{about}; bfloat16 autocast, medians of steps."]


def portable_table(gpu: str = GPU) -> list[str]:
    """The portable kernels where the default is another backend."""
    times, default = Times(f"{gpu}-triton"), Times(gpu)
    titles = (
        "triton us, graph",
        "triton us, eager",
        "default us, graph",
        "triton, computed / needed",
    )
    rows, waste = [["case", *titles]], _waste(times)
    for name in times.cases:
        cells = [
            [each.of(name, "natten", pass_, kind) for pass_ in (FORWARD, BOTH)]
            for each, kind in ((times, "graph"), (times, "eager"), (default, "graph"))
        ]
        rows.append([_label(name), *(_pair(each, _us) for each in cells), waste[name]])
    return [*_table(rows), "", f"{times.machine()}; bfloat16 unless said, medians of one run."]


def flex_table(gpu: str = GPU) -> list[str]:
    """The portable kernels beside FlexAttention, in one run."""
    times = Times(f"flex-{gpu}")
    rows = [
        [
            "case", "triton us, graph, forward / forward+backward", "FlexAttention us, graph",
            "triton us, eager", "FlexAttention us, eager", "Flex / triton, graph",
        ]
    ]  # fmt: skip
    for name in times.cases:
        cells = [
            [times.of(name, backend, pass_, kind) for pass_ in (FORWARD, BOTH)]
            for kind in ("graph", "eager")
            for backend in ("natten", FLEX)
        ]
        ratio = _pair_over(cells[1], cells[0])
        rows.append([_label(name), *(_pair(each, _us) for each in cells), ratio])
    return [*_table(rows), "", f"{times.machine()}; medians of one run."]


def short_gpu_table() -> list[str]:
    """Kernel times on a GPU, and how much faster than dense attention it is than others are."""
    ours, peers = Times(GPU), Times(PEERS)
    rows = [
        [
            "case", "what has such a layer", "natten us, forward / forward+backward",
            "dense / natten", "dense / upstream, forward", "dense / FlexAttention, forward",
        ]
    ]  # fmt: skip
    for name in ours.cases:
        case = CASES["cuda"][name]
        dense, times = (
            [ours.of(name, backend, pass_, "graph") for pass_ in (FORWARD, BOTH)]
            for backend in ("dense", "natten")
        )
        layout, window = _short(case)
        others = [_speedup(peers, name, backend) for backend in (UPSTREAM, FLEX)]
        rows.append(
            [
                f"{name}: {layout}, {window}", case.about, _pair(times, _us),
                _pair_over(dense, times, "{:.1f}x"),
                *("" if each is None else f"{each:.1f}x" for each in others),
            ]
        )  # fmt: skip
    machines = f"natten: {ours.machine()}; the others: {peers.machine()}"
    table = markdown(rows[0], rows[1:], left=2)
    return [*table, "", f"{machines}; bfloat16 unless said, medians of one run."]


# What each can do: the first column is ours.
_COMPARISON = """
a token attends | a window around itself | a window around itself
    | the keys that a function of yours allows
    | the tokens of its block; every second layer moves the blocks | every token
work grows with | tokens times window | tokens times window | visited blocks of 128x128 pairs
    | tokens times block | the square of the tokens
layouts | 1-D, 2-D, 3-D | 1-D, 2-D, 3-D | 1-D; you put pixels in the order of tiles | 2-D, 3-D | any
windows at a border | shift, are cut, or go around | shift | do what you write
    | are padded and masked | there are none
dilation, stride, causality per axis | yes | yes | what you write | no | no
relative positional bias | yes | to 0.17 | yes | yes | as a tensor of all pairs
masks of keys | yes | no | yes | yes | as a tensor of all pairs
attention weights as a tensor | yes | to 0.17 | no | yes | no
queries that are a part of the layout, or finer than keys | yes | no | yes | no | yes
on a CPU | forward and backward | forward, experimental | forward | yes | yes
on a GPU | NVIDIA, compute capability 8.0 and newer
    | NVIDIA, 5.0 and newer, with kernels for Blackwell | where Triton runs | any | any
to install | one wheel for all, no build | a wheel for each PyTorch and CUDA, or a build
    | in PyTorch | plain PyTorch | in PyTorch
"""


def comparison_table() -> list[str]:
    """What ours, other implementations and other kinds of attention can do, and their speed."""
    header = [
        "", "natten", "[upstream NATTEN](https://github.com/SHI-Labs/NATTEN) 0.21",
        "[FlexAttention](https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html)",
        "[Swin](https://arxiv.org/abs/2103.14030)'s windows", "dense attention (SDPA)",
    ]  # fmt: skip
    lines = _COMPARISON.strip().replace("\n    ", " ").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    peers, speeds = Times(PEERS), []
    for times, backend in ((Times(GPU), "natten"), (peers, UPSTREAM), (peers, FLEX)):
        found = [_speedup(times, name, backend) for name in peers.cases]
        known = [each for each in found if each is not None]
        speeds.append(f"{min(known):.1f}x to {max(known):.1f}x in {len(known)} cases")
    rows.append(["times as fast as dense, forward, H100", *speeds, "not measured", "1"])
    return markdown(header, rows, left=len(header))


def model_table(names: Sequence[str]) -> list[str]:
    """A layer beside dense attention on a GPU, and beside other implementations."""
    ours, peers = Times(GPU), Times(PEERS)
    rows = [
        [
            "case", "dense cuDNN us, forward / forward+backward", "natten us", "dense / natten",
            "dense / upstream, forward", "dense / FlexAttention, forward",
        ]
    ]  # fmt: skip
    for name in names:
        dense, times = (
            [ours.of(name, backend, pass_, "graph") for pass_ in (FORWARD, BOTH)]
            for backend in ("dense", "natten")
        )
        others = (_speedup(peers, name, backend) for backend in (UPSTREAM, FLEX))
        rows.append(
            [
                _label(name), _pair(dense, _us), _pair(times, _us),
                _pair_over(dense, times, "{:.1f}x"),
                *("" if each is None else f"{each:.1f}x" for each in others),
            ]
        )  # fmt: skip
    return [*_table(rows), "", f"{ours.machine()}; the others: {peers.machine()}."]


def floor_table() -> list[str]:
    """The least time that each GPU case needs, and how much longer ours takes."""
    times, device = Times(GPU), DEVICES[GPU]
    rows = [
        [
            "case", "kept", "MB moved", "TFLOP needed", "computed / needed", "floor us", "set by",
            "natten us", "floor / natten",
        ]
    ]  # fmt: skip
    waste = _waste(times)
    for name in times.cases:
        case = CASES["cuda"][name]
        problem = case.problem("cpu")
        floor, limit = _floor(problem, device)
        ours = times.of(name, "natten", FORWARD, "graph")
        rows.append(
            [
                name, f"{_kept(case):.1%}", f"{problem.bytes() / 1e6:.0f}",
                f"{problem.flops() / 1e12:.3g}", waste.get(name, "not recorded"),
                _us(floor), limit, _us(ours), "" if ours is None else f"{floor / ours:.2f}",
            ]
        )  # fmt: skip
    return _table(rows)


def _floor(problem: Problem, device: Device) -> tuple[float, str]:
    """The least time of a forward pass in microseconds, and what sets it."""
    pairs = problem.needed_pairs * problem.batch * problem.heads
    floors = {
        "memory": problem.bytes() / device.bandwidth / 1e6,
        "products": problem.flops() / device.tflops / 1e6,
        "exponentials": pairs / device.exponentials / 1e6,
    }
    limit = max(floors, key=floors.__getitem__)
    return floors[limit], limit


def ltx_table(gpu: str = "h200") -> list[str]:
    """The stages of LTX-2.5's decoder, and the least time that each needs."""
    rows = [["stage", "floor us", "natten us", "floor / natten", "computed / needed"]]
    floors = {
        name: _floor(CASES["cuda"][name].problem("cpu"), DEVICES[gpu])[0] for name in GROUPS["ltx"]
    }
    if not (RESULTS / f"ltx-{gpu}.csv").exists():
        rows += [[_label(name), _us(floor), "", "", ""] for name, floor in floors.items()]
        return [*_table(rows), "", "The times of these stages are not measured yet."]
    times = Times(f"ltx-{gpu}")
    waste = _waste(times)
    for name, floor in floors.items():
        ours = times.of(name, "natten", FORWARD, "graph")
        pairs = f"{float(waste[name].removeprefix('forward=')):.1f}"
        rows.append([_label(name), _us(floor), _us(ours), f"{floor / ours:.2f}", pairs])
    return [*_table(rows), "", f"{times.machine()}; forward, kernel times, medians of one run."]


def spectrum_table() -> list[str]:
    """The problems of users beside the least time that each could take."""
    if not _is_measured(SPECTRUM):
        return ["They are not measured yet."]
    times = Times(SPECTRUM)
    shares, waste, rows = spectrum.shares(times.records), _waste(times), [
        [
            "problem", "backend", "floor us, forward / backward", "natten us",
            "floor / natten", "dense / natten, forward / forward+backward", "computed / needed",
        ]
    ]  # fmt: skip
    for name in times.cases:
        case, passes = spectrum.known(name), ("forward", "backward")
        dense, ours = (
            [times.of(name, backend, pass_, "graph") for pass_ in (FORWARD, BOTH)]
            for backend in ("dense", "natten")
        )
        floors = [spectrum.floor_us(case, pass_) for pass_ in passes]
        found = [shares[pass_].get(name) for pass_ in passes]
        taken = [None if x is None else floor / x for floor, x in zip(floors, found)]
        backends = [r.backend for r in times.records if r.case == name and "natten" in r.backend]
        rows.append(
            [
                f"{name}: {case.describe(BF16)}", backends[-1].removeprefix("natten "),
                _pair(floors, _us), _pair(taken, _us),
                " / ".join("-" if x is None else f"{x:.2f}" for x in found),
                _pair_over(dense, ours, "{:.1f}x"), waste.get(name, ""),
            ]
        )  # fmt: skip
    return [*_table(rows), "", f"{times.machine()}; bfloat16 unless said, medians of one run."]


def pairs_table() -> list[str]:
    """Of the spectrum's problems, how long a pair takes that a Hopper kernel computes, beside one
    of cuDNN's dense attention."""
    if not _is_measured(SPECTRUM):
        return ["They are not measured yet."]
    times, found = Times(SPECTRUM), []
    forward = {
        (r.case, r.backend): r for r in times.records if (r.pass_, r.time) == (FORWARD, "graph")
    }
    dense = {name: float(r.median_us) for (name, who), r in forward.items() if who == "dense cudnn"}
    speeds = _dense_speeds(dense)
    for name in times.cases:
        ours, case = forward.get((name, "natten hopper")), spectrum.known(name)
        is_like_dense = name in dense or case.value_dim is None
        if ours is None or not ours.computed_over_needed or not is_like_dense:
            continue
        problem = case.problem("cpu")
        computed = float(ours.computed_over_needed.split()[0].removeprefix("forward="))
        pairs = computed * problem.needed_pairs * problem.batch * problem.heads
        of_pair = _us_of_pair(case, dense[name]) if name in dense else speeds[native(case.dim)]
        as_dense, taken = pairs * of_pair, float(ours.median_us)
        cells = f"{computed:.2f}", _us(as_dense), _us(taken), f"{as_dense / taken:.2f}"
        found.append((as_dense / taken, [f"{name}: {case.describe(BF16)}", *cells]))
    head = ["problem", "computed / needed", "so many pairs at cuDNN's speed, us", "natten us"]
    rows = [[*head, "cuDNN / natten"], *(row for _, row in sorted(found, reverse=True))]
    return [*_table(rows), "", f"{times.machine()}; forward, kernel times, medians of one run."]


def _dense_speeds(dense: dict[str, float]) -> dict[int, float]:
    """Microseconds of a pair of dense attention in the longest layout that was measured, by the
    width of kernels for its heads; ``dense`` has the times of problems."""
    cases = [case for case in map(spectrum.known, dense) if case.value_dim is None]
    cases.sort(key=lambda case: math.prod(case.shape))
    return {native(case.dim): _us_of_pair(case, dense[case.name]) for case in cases}


def _us_of_pair(case: Case, us: float) -> float:
    """Of dense attention that takes so long for a case."""
    problem = case.problem("cpu")
    return us / (problem.all_pairs * problem.batch * problem.heads)


def spectrum_summary(images: str) -> list[str]:
    """The picture of the spectrum, and what it says; ``images`` is its folder, from the page."""
    if not _is_measured(SPECTRUM):
        return ["They are not measured yet."]
    times = Times(SPECTRUM)
    shares = spectrum.shares(times.records)
    parts = []
    for pass_, found in shares.items():
        good = sum(share >= 0.5 for share in found.values())
        mean = statistics.geometric_mean(found.values())
        parts.append(f"{mean:.2f} {pass_} ({good} of {len(found)} problems reach 0.50)")
    slower = [
        name
        for name in times.cases
        for dense, ours in [[times.of(name, who, FORWARD, "graph") for who in ("dense", "natten")]]
        if dense is not None and ours is not None and dense < ours
    ]
    compared = sum(times.of(name, "dense", FORWARD, "graph") is not None for name in times.cases)
    return [
        f"![Floor over time of each problem, forward and backward]({images}/spectrum.svg)",
        "",
        f"Floor / natten, geometric mean: {', '.join(parts)}. Forward, dense attention is faster "
        f"in {len(slower) or 'none'} of the {compared} problems where it was measured"
        f"{': ' + ', '.join(slower) if slower else ''}.",
        "",
        f"{times.machine()}; kernel times, medians of one run.",
    ]


def _is_measured(name: str) -> bool:
    return (RESULTS / f"{name}.csv").exists()


def decoding_table(gpu: str = "h200") -> list[str]:
    """Time and memory of a layer of the decoder's last stage, whole and in parts."""
    if not (RESULTS / f"ltx-{gpu}.csv").exists():
        return ["They are not measured yet."]
    times = Times(f"ltx-{gpu}")
    rows = [["frames at once", "GB beside the input", "ms"]]
    for each in times.records:
        if each.backend.startswith("layer "):
            case = CASES["cuda"][each.case]
            gigabytes = 3 * case.problem("cpu").bytes() / 4 / 1e9  # of query, key and value
            rows.append(
                [
                    each.backend.removeprefix("layer ").removesuffix(" frames"),
                    f"{float(each.peak_over_inputs) * gigabytes:.1f}",
                    f"{float(each.median_us) / 1e3:.0f}",
                ]
            )
    return [*_table(rows), "", f"{times.machine()}; bfloat16, medians of one run."]


def _waste(times: Times) -> dict[str, str]:
    """Pairs computed per pair needed, for each case."""
    return {r.case: r.computed_over_needed for r in times.records if r.computed_over_needed}


def limit_table(name: str = GPU) -> list[str]:
    """How busy the kernels keep the resources that may limit them."""
    found = limits.read(name)
    titles = {
        "products": "tensor cores", "exponentials": "exponentials",
        "instructions": "instruction issue", "shared": "shared memory", "l2": "L2", "dram": "DRAM",
    }  # fmt: skip
    rows = [["case", "kernel", *(f"{title} %" for title in titles.values())]]
    for each in found:
        percents = (f"{float(getattr(each, name)):.0f}" for name in titles)
        rows.append([each.case, each.kernel, *percents])
    return [*_table(rows), "", found[0].about + "."]


def peer_table() -> list[str]:
    """Times of other implementations on an H100."""
    times = Times(PEERS)
    rows = [["case", "dense cuDNN", "upstream NATTEN", "upstream, eager", "FlexAttention"]]
    for name in times.cases:
        kinds = ("graph", ""), ("graph", ""), ("eager",), ("graph", "")
        backends = "dense", UPSTREAM, UPSTREAM, FLEX
        medians = [times.of(name, b, FORWARD, *kind) for b, kind in zip(backends, kinds)]
        rows.append([_label(name), *map(_us, medians)])
    return [*_table(rows), "", f"{times.machine()}."]


# Layers of arXiv 2504.16922: layout, window, stride, and its tile of queries and block of keys.
_GNA_3D = ((4, 8, 8), (2, 8, 8))
_GNA_2D = ((16, 16), (16, 8))
_GNA = (
    ("Cosmos", (16, 44, 80), (16, 32, 48), (1, 1, 1), _GNA_3D),
    ("Cosmos", (16, 44, 80), (16, 32, 48), (1, 1, 8), _GNA_3D),
    ("FLUX", (256, 256), (80, 80), (1, 1), _GNA_2D),
    ("FLUX", (256, 256), (80, 80), (16, 16), _GNA_2D),
    ("HunyuanVideo", (30, 48, 80), (18, 24, 24), (1, 1, 1), _GNA_3D),
    ("HunyuanVideo", (30, 48, 80), (18, 24, 24), (16, 8, 8), _GNA_3D),
)


def bounds_table() -> list[str]:
    """The largest gains of strides, with blocks on a fixed grid and with ours."""
    rows = [
        [
            "layer", "window", "stride", "by FLOPs", "fixed grid, interior", "fixed grid",
            "ours, interior", "ours", "ours without masks",
        ]
    ]  # fmt: skip
    for name, shape, window, stride, (q_tile, kv_tile) in _GNA:
        grid = simulate(shape, window, stride, q_tile=q_tile, kv_tile=kv_tile, aligned=True)
        ours = simulate(shape, window, stride, device=GPU)
        bounds = (
            ours.flop_bound, grid.interior_bound, grid.tile_bound, ours.interior_bound,
            ours.tile_bound,
        )  # fmt: skip
        rows.append(
            [
                f"{name} {by(shape)}", by(window), by(stride), *(f"{x:.1f}x" for x in bounds),
                "yes" if ours.is_full else "no",
            ]
        )  # fmt: skip
    return _table(rows)


def distributed_table(name: str) -> list[str]:
    """Layouts on several GPUs, or their shards one after another on one of them."""
    with open(RESULTS / "distributed" / f"{name}.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    is_emulated = any("emulated" in each["scaling"] for each in found)
    titles = ["case", "scaling", "GPUs", "method", "pass", "one GPU us", "compute us"]
    titles += [
        "messages us",
        "together us",
        "efficiency",
        "one / shards" if is_emulated else "plan",
    ]
    rows = [titles]
    for each in found:
        last = 1 / float(each["sum_over_one"]) if is_emulated else float(each["expected"])
        times = (each[f"{x}_us"] for x in ("one", "compute", "messages", "together"))
        rows.append(
            [
                each["case"], each["scaling"].removesuffix(", emulated"), each["ranks"],
                each["method"], each["pass"], *(_us(float(x)) for x in times),
                f"{float(each['efficiency']):.2f}", f"{last:.2f}",
            ]
        )  # fmt: skip
    about = ", ".join(found[0][x] for x in ("device", "versions"))
    about += f", commit {found[0]['commit']}, {found[0]['date']}"
    return [*_table(rows), "", f"{about}; eager times of the slowest rank, medians."]


def stride_table() -> list[str]:
    """Measured beside predicted times of strides, fastest first."""
    if not (RESULTS / "strides.csv").exists():
        return ["The times of these strides are not measured yet."]
    times = Times("strides")
    rows = [["layer", "stride", "measured us", "predicted us", "measured / predicted"]]
    found = []
    for name in times.cases:
        case, measured = CASES["cuda"][name], times.of(name, "natten", FORWARD, "graph")
        if measured is not None:
            rule = case.problem("cpu").rule
            predicted = simulate(
                case.shape, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal,
                device=GPU, batch=case.batch, heads=case.heads, head_dim=case.dim,
            )  # fmt: skip
            layer = f"{by(case.shape)}, window {by(rule.kernel_size)}"
            found.append((layer, measured, by(rule.stride), predicted.time_us))
    for layer, measured, stride, predicted_us in sorted(found):
        cells = (stride, _us(measured), _us(predicted_us), f"{measured / predicted_us:.2f}")
        rows.append([layer, *cells])
    return [*_table(rows), "", f"{times.machine()}; forward, kernel times, medians of one run."]


TABLES: dict[str, Callable[[], list[str]]] = {
    "comparison": comparison_table,
    "cpu-short": lambda: cpu_table(README_CPU),
    "cpu": cpu_table,
    "gpu-short": short_gpu_table,
    "gpu": gpu_table,
    "portable": portable_table,
    "flex": flex_table,
    "floors": floor_table,
    "limits": limit_table,
    "limits-triton": partial(limit_table, "h200-triton"),
    "peers": peer_table,
    "bounds": bounds_table,
    "strides": stride_table,
    "gpu-h200": partial(gpu_table, "h200"),
    "portable-h200": partial(portable_table, "h200"),
    "flex-h200": partial(flex_table, "h200"),
    "distributed": partial(distributed_table, "h200-x2"),
    "emulated": partial(distributed_table, "h200-emulated"),
    "ltx": ltx_table,
    "model-1d": partial(model_table, ("1d", "1d-s256")),
    "model-flux": partial(model_table, ("flux", "flux-s16")),
    "model-hunyuan": partial(model_table, ("hunyuan", "hunyuan-s")),
    "model-nat": partial(model_table, ("nat",)),
    "decoding": decoding_table,
    "spectrum": spectrum_table,
    "pairs": pairs_table,
    "spectrum-readme": partial(spectrum_summary, "docs/images"),
    "spectrum-docs": partial(spectrum_summary, "images"),
    "plain": plain_table,
    "packed": packed_table,
    "models": models_table,
}


def chart(names: Sequence[str] | None) -> str:
    """A bar chart of forward speed over dense attention, each on its own machine.

    Args:
        names: of cases; None for all that other implementations were measured on.
    """
    ours, peers = Times(GPU), Times(PEERS)
    device = ours.records[0].device
    bars = (
        (ours, "natten", ATTENDED, f"natten, {device}"),
        (peers, UPSTREAM, "#94a3b8", "upstream NATTEN 0.21.6, H100"),
        (peers, FLEX, "#cbd5e1", "FlexAttention, H100"),
    )
    found = {
        name: [_speedup(times, name, backend) for times, backend, *_ in bars]
        for name in names or peers.cases
        if _speedup(ours, name, "natten") is not None
    }
    left, right, height, group = 230, 560, 13, 3 * 15 + 16
    scale = right / max(s for each in found.values() for s in each if s is not None)
    title = "How much faster than dense cuDNN attention on the same GPU, forward, kernel time"
    parts: list[Rect | Text] = [Text(0, 13, title, 14, INK, 700)]
    top = 36
    for name, speedups in found.items():
        layout, window = _short(CASES["cuda"][name])
        parts += [Text(0, top + 20, f"{name}: {layout}", 12, INK), Text(0, top + 36, window, 11)]
        for number, (speedup, (_, _, color, _)) in enumerate(zip(speedups, bars)):
            y = top + number * 15
            if speedup is None:
                parts.append(Text(left + scale + 6, y + 10, "not measured", 10))
                continue
            parts.append(Rect(left, y, speedup * scale, height, color, 3))
            label = left + max(speedup, 1) * scale + 6, y + 10, f"{speedup:.1f}x", 11
            parts.append(Text(*label, *((INK, 700) if number == 0 else (QUIET_INK, 400))))
        top += group
    parts.insert(0, Rect(left + scale, 30, 1, top - 36, QUIET_INK))
    parts.append(Text(left + scale - 22, top + 8, "dense = 1", 10))
    panel = Panel(parts, left + right + 50, top + 10, title)
    return compose([panel], [Key(color, False, label) for _, _, color, label in bars]).svg()


def spectrum_chart() -> str:
    """A dot per problem and pass: its floor, and the floor over the time. Low ones have names."""
    shares = spectrum.shares(Times(SPECTRUM).records)
    colors = {"hopper": ATTENDED, "triton": QUERY}
    width, height, left, top = 380, 380, 44, 30
    low, high = (1.0, 1e5), (0.025, 1.0)  # microseconds; the least and the largest share

    def x_of(floor: float) -> float:
        return left + width * math.log(floor / low[0]) / math.log(low[1] / low[0])

    def y_of(share: float) -> float:
        return top + height * math.log(high[1] / share) / math.log(high[1] / high[0])

    panels, backends = [], _backends(SPECTRUM)
    for pass_, found in shares.items():
        title = f"{pass_.capitalize()}: the floor over the time"
        parts: list[Rect | Text] = [Text(0, 13, title, 14, INK, 700)]
        for share in (1.0, 0.5, 0.2, 0.1, 0.05):
            parts.append(Rect(left, y_of(share), width, 1, BORDER))
            parts.append(Text(left - 32, y_of(share) + 4, f"{share:g}", 11))
        for exponent in range(6):
            label = ("1 us", "10 us", "100 us", "1 ms", "10 ms", "100 ms")[exponent]
            parts.append(Text(x_of(10**exponent) - 14, top + height + 18, label, 11))
        dots = {
            name: (x_of(spectrum.floor_us(spectrum.known(name), pass_)), y_of(share))
            for name, share in found.items()
        }
        parts += [
            Rect(x - 4, y - 4, 8, 8, colors[backends[name, pass_]], 4)
            for name, (x, y) in dots.items()
        ]
        labels: list[Text] = []
        for name in sorted(found, key=found.__getitem__):
            if found[name] < NAMED:
                labels.append(_label_at(*dots[name], name, labels, [*dots.values()]))
        parts += labels
        parts.append(Text(left + width - 130, top + height + 34, "floor of the problem", 11))
        panels.append(Panel(parts, left + width + 40, top + height + 40, title))
    keys = [Key(color, False, f"backend {name}") for name, color in colors.items()]
    return compose(panels, keys).svg()


def _label_at(
    x: float, y: float, name: str, labels: Sequence[Text], dots: Sequence[tuple[float, float]]
) -> Text:
    """The name of a dot, beside it where neither another name nor another dot is."""
    label = Text(0, 0, name, 10, INK)
    sides = [(7.0, 4.0), (-5 - label.width, 4.0)]
    sides += [(dx, dy) for dy in (16.0, -8.0) for dx in (-label.width / 2, 0.0, -label.width)]

    def is_free(at: Text) -> bool:
        right, top = at.x + at.width, at.y - at.size
        return not any(
            abs(at.y - other.y) < at.size and at.x < other.x + other.width and other.x < right
            for other in labels
        ) and not any(at.x - 4 < dx < right + 4 and top - 4 < dy < at.y + 4 for dx, dy in dots)

    found = [label._replace(x=x + dx, y=y + dy) for dx, dy in sides]
    return next(filter(is_free, found), found[0])


def _backends(name: str) -> dict[tuple[str, str], str]:
    """The backend of a case's pass, "forward" or "backward"."""
    found = {}
    for each in read(name):
        if each.backend.startswith("natten "):
            backends = each.backend.removeprefix("natten ").split("+")
            pass_, backend = (
                (FORWARD, backends[0]) if each.pass_ == FORWARD else ("backward", backends[-1])
            )
            found[each.case, pass_] = backend
    return found


# Pictures, and what makes them of the results that are there.
CHARTS: dict[str, Callable[[], str]] = {
    "docs/images/speed.svg": partial(chart, None),
    "docs/images/speed-short.svg": partial(chart, ("1d", "nat", "video", "flux", "hunyuan")),
}
if _is_measured(SPECTRUM):
    CHARTS["docs/images/spectrum.svg"] = spectrum_chart


def _speedup(times: Times, case: str, backend: str) -> float | None:
    dense = times.of(case, "dense", FORWARD, "graph", "")
    other = times.of(case, backend, FORWARD, "graph", "")
    return None if dense is None or other is None else dense / other


def _short(case: Case) -> tuple[str, str]:
    shape, *_, window = case.describe(case.dtype).partition(", window ")
    return shape.split(",")[0].split(" ")[1], f"window {window}"


def _label(name: str) -> str:
    return f"{name}: {CASES['cuda'][name].describe(BF16)}"


def _kept(case: Case) -> float:
    problem = case.problem("cpu")
    return problem.needed_pairs / problem.all_pairs


def _pair(values: Sequence[float | None], show: Callable[[float | None], str]) -> str:
    return " / ".join(map(show, values))


def _pair_over(
    above: Sequence[float | None], below: Sequence[float | None], form: str = "{:.2f}"
) -> str:
    return " / ".join(
        "-" if a is None or b is None else form.format(a / b) for a, b in zip(above, below)
    )


def _ms(us: float | None) -> str:
    return "-" if us is None else f"{us / 1000:.1f}"


def _us(us: float | None) -> str:
    return "-" if us is None else f"{us:.0f}"


def _table(rows: list[list[str]]) -> list[str]:
    return markdown(rows[0], rows[1:])


def generate() -> dict[str, str]:
    """The current contents of the files of README and documentation, by path."""

    def fill(match: re.Match[str]) -> str:
        body = "\n".join(TABLES[match.group(2)]())
        return f"{match.group(1)}{body}\n{match.group(3)}"

    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    charts = {name: draw() for name, draw in CHARTS.items()}
    return {name: TABLE.sub(fill, text) for name, text in texts.items()} | charts


def main(arguments: list[str] | None = None) -> int:
    """Write or check what :func:`generate` returns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    stale = []
    for name, text in generate().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    print("\n".join(f"{'stale' if check else 'wrote'} {name}" for name in stale) or "all current")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
