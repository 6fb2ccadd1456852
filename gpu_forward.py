"""Check and time the Hopper forward kernel; one run on an H200 settles the open variants.

    python gpu_forward.py            everything, under 2 minutes; full log in $OUT/forward.log

Phase 1, in parallel processes: about 40 small problems against the float64 oracle, and every
variant of every timed row against the Triton backend. Phase 2, alone on the GPU: times by CUDA
graph of what was right, beside dense cuDNN. A process that says nothing for 45 s is killed, its
variant is reported as a hang, and the rest goes on. "own programs": a program per tile,
not programs that take tiles in turn.

Predictions (graph time, forward; H200, ideal = dense cuDNN x kept fraction):
see benchmarks/results/hopper-log.md, section "Forward 2".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "src"))
OUT = pathlib.Path(os.environ.get("OUT", "/tmp"))
SILENCE = 45.0

# name: shape, batch, heads, head dim, window, stride, dilation, causal
ROWS = {
    "1d": ((32768,), 1, 1, 128, (2048,), 1, 1, False),
    "1d-s256": ((32768,), 1, 1, 128, (2048,), 256, 1, False),
    "nat": ((56, 56), 64, 2, 32, (7, 7), 1, 1, False),
    "nat-d64": ((56, 56), 64, 2, 64, (7, 7), 1, 1, False),
    "dinat": ((28, 28), 64, 4, 32, (7, 7), 1, 4, False),
    "hdit": ((64, 64), 16, 8, 64, (13, 13), 1, 1, False),
    "video": ((16, 32, 32), 2, 12, 64, (7, 11, 11), 1, 1, False),
    "flux": ((256, 256), 1, 24, 128, (80, 80), 1, 1, False),
    "flux-s16": ((256, 256), 1, 24, 128, (80, 80), (16, 16), 1, False),
    "hunyuan": ((30, 48, 80), 1, 24, 128, (18, 24, 24), 1, 1, False),
    "hunyuan-s": ((30, 48, 80), 1, 24, 128, (18, 24, 24), (16, 8, 8), 1, False),
    "causal": ((30, 32, 32), 1, 24, 128, (30, 16, 16), 1, 1, (True, False, False)),
}
SMALL = ("nat", "nat-d64", "dinat", "hdit", "video", "1d", "1d-s256")

# shape, batch, heads, heads_kv, dim, value dim, window, stride, dilation, causal, extra, dtype,
# memory ("plain", "packed" query/key/value, "heads-first", "odd": TMA can not read it), variant
CHECKS = [
    ((200,), 1, 1, 1, 64, 64, 31, 1, 1, False, 0, "bf16", "plain", ""),
    ((333,), 2, 3, 1, 128, 128, 100, 1, 1, False, 0, "bf16", "packed", ""),
    ((1000,), 1, 2, 2, 128, 128, 300, 64, 1, False, 7, "fp16", "plain", "pair"),
    ((777,), 1, 2, 2, 64, 64, 700, 1, 1, True, 0, "fp16", "plain", ""),
    ((512,), 2, 2, 1, 32, 32, 20, 5, 4, True, 3, "bf16", "plain", "pair"),
    ((70,), 3, 2, 2, 256, 256, 70, 1, 1, False, 0, "bf16", "plain", ""),
    ((17, 19), 1, 2, 2, 64, 64, (7, 7), 1, 1, False, 0, "bf16", "plain", ""),
    ((17, 19), 1, 2, 2, 64, 64, (7, 7), 1, 1, False, 0, "bf16", "plain", "pair"),
    ((17, 19), 1, 2, 2, 64, 64, (7, 7), 1, 1, False, 0, "bf16", "plain", "stages3"),
    ((17, 19), 1, 2, 2, 64, 64, (7, 7), 1, 1, False, 0, "bf16", "plain", "solo3"),
    ((17, 19), 3, 2, 1, 32, 32, (7, 7), 2, 1, (False, True), 3, "fp16", "plain", "solo4"),
    ((300,), 1, 2, 1, 64, 64, 77, 1, 1, True, 9, "fp16", "plain", "solo2"),
    ((9, 13, 17), 1, 2, 2, 64, 64, (5, 7, 9), 1, 1, False, 0, "bf16", "plain", "solo2"),
    ((56, 56), 1, 2, 2, 32, 32, (7, 7), 1, 1, False, 0, "bf16", "plain", ""),
    ((28, 28), 2, 4, 2, 32, 32, (7, 7), 1, 4, False, 0, "fp16", "plain", ""),
    ((24, 36), 1, 2, 2, 64, 64, (5, 7), 1, (2, 3), False, 0, "bf16", "packed", ""),
    ((24, 36), 1, 2, 2, 64, 64, (5, 7), 2, (2, 3), (True, False), 9, "fp16", "plain", "pair"),
    ((31, 45), 2, 6, 2, 128, 128, (13, 20), 1, 1, False, 0, "bf16", "packed", ""),
    ((31, 45), 1, 2, 2, 128, 128, (13, 20), 1, 1, False, 0, "fp16", "heads-first", "pair"),
    ((40, 40), 1, 2, 2, 128, 128, (16, 24), (4, 8), 1, False, 0, "bf16", "plain", ""),
    ((33, 40), 1, 2, 1, 128, 64, (9, 11), (3, 2), 1, (False, True), 130, "bf16", "plain", ""),
    ((33, 40), 1, 2, 1, 32, 256, (9, 11), (3, 2), 1, (True, True), 64, "fp16", "plain", ""),
    ((33, 40), 1, 2, 1, 256, 128, (9, 11), 1, 1, False, 1, "bf16", "plain", ""),
    ((45, 33), 1, 1, 1, 256, 256, (20, 11), 1, 1, False, 0, "fp16", "plain", "pair"),
    ((8, 9), 2, 2, 2, 64, 64, (8, 9), 1, 1, False, 0, "bf16", "plain", ""),
    ((18, 19), 2, 2, 2, 64, 64, (8, 9), 1, 1, False, 0, "bf16", "odd", ""),
    ((3, 100), 1, 2, 2, 64, 64, (2, 50), 1, 1, False, 0, "bf16", "plain", ""),
    ((100, 3), 1, 2, 2, 64, 64, (50, 2), 1, 1, (True, False), 0, "bf16", "plain", ""),
    ((1, 300), 1, 2, 2, 64, 64, (1, 50), 1, 1, False, 0, "fp16", "plain", ""),
    ((9, 13, 17), 1, 2, 2, 64, 64, (5, 7, 9), 1, 1, False, 0, "bf16", "plain", ""),
    ((9, 13, 17), 1, 2, 2, 64, 64, (5, 7, 9), 1, 1, False, 0, "bf16", "plain", "pair"),
    ((10, 24, 30), 1, 2, 1, 128, 128, (6, 12, 16), 1, 1, False, 5, "fp16", "packed", ""),
    ((10, 24, 30), 1, 2, 2, 128, 128, (6, 12, 16), (2, 4, 4), 1, False, 0, "bf16", "plain", ""),
    (
        (8, 16, 32),
        1,
        2,
        2,
        128,
        128,
        (8, 8, 16),
        1,
        1,
        (True, False, False),
        0,
        "bf16",
        "plain",
        "",
    ),
    (
        (8, 18, 20),
        1,
        2,
        2,
        64,
        64,
        (4, 5, 5),
        1,
        (2, 3, 4),
        (True, False, True),
        0,
        "bf16",
        "plain",
        "",
    ),
    ((5, 6, 7), 3, 2, 2, 32, 32, (5, 6, 7), 1, 1, False, 0, "fp16", "plain", "pair"),
    ((6, 20, 20), 1, 2, 2, 256, 256, (3, 9, 9), 1, 1, False, 0, "bf16", "plain", ""),
    ((12, 16, 16), 1, 2, 2, 128, 128, (12, 16, 16), 1, 1, True, 0, "bf16", "plain", "pair"),
    ((12, 16, 16), 1, 2, 2, 32, 32, (3, 3, 3), 3, 1, False, 0, "bf16", "plain", "stages3"),
]


def rule_of(shape, window, stride, dilation, causal):
    from natten.neighborhood import Neighborhood

    return Neighborhood.create(len(shape), window, stride, dilation, causal)


def vary(tiles, variant, dim):
    """Tiles as a variant has them."""
    keys = 64 if dim > 64 else 0
    for word in filter(None, variant.split("+")):
        if word.startswith("stages"):
            tiles = tiles._replace(stages=int(word[-1]))
        elif word.startswith("solo"):  # one warpgroup a program, so many programs at once
            tiles = tiles._replace(groups=1, programs=int(word[-1]), stages=2)
            if keys and math.prod(tiles.key) > keys:
                half = [i for i, n in enumerate(tiles.key) if n > 1][-1]
                tiles = tiles._replace(
                    key=tuple(n // 2 if i == half else n for i, n in enumerate(tiles.key))
                )
        elif word == "pair":
            tiles = tiles._replace(groups=2, programs=1)
    return tiles


def variants(name):
    """Label, tiles and whether each tile has a program of its own, of what is timed in a row."""
    from natten.backends.hopper import tiles as T

    shape, _, _, d, window, stride, dilation, causal = ROWS[name]
    rule = rule_of(shape, window, stride, dilation, causal)
    ranked = T.candidates("forward", rule, shape, shape, d, d)
    best, found = ranked[0], {}
    words = ["", "stages3" if best.stages == 2 else "stages2"]
    if name in ("1d", "1d-s256", "hunyuan-s", "flux"):
        words.append("solo2")
    if best.groups == 1:
        words.append("pair")
    for word in words:
        found[word or "default"] = vary(best, word, d), False
    found["own programs"] = best, True
    shapes = [best[:2]]
    for tiles in ranked:
        if tiles[:2] not in shapes and len(shapes) < (4 if d == 128 else 5):
            shapes.append(tiles[:2])
            q, k = ("x".join(map(str, x)) for x in tiles[:2])
            found[f"q{q} k{k} s{tiles.split} {tiles.groups}x{tiles.programs}"] = tiles, False
    return {
        label: (tiles, own)
        for i, (label, (tiles, own)) in enumerate(found.items())
        if T._shared(tiles, T.mask(rule, shape, tiles), d, d, False) <= T._SHARED
        and (tiles, own) not in list(found.values())[:i]
    }


@contextlib.contextmanager
def using(tensors, rule, scale, tiles, own=False):
    """Inside, ``forward`` of these tensors has these tiles."""
    from natten import tuning
    from natten.backends.hopper import plan, tiles as T

    q, k, v, ek = tensors
    key = T.key("forward", rule, tuple(q.shape[1:-2]), (), q.shape[-1], v.shape[-1], 2)
    with tuning.trial(key, list(tiles)):
        if own:
            launch = plan.plan_for(q, k, v, ek, rule, scale).forward
            launch.grid = (launch.numbers[-5], 1, 1)
        yield


def say(**what):
    print(json.dumps(what), flush=True)


def rms_ratio(x, ref):
    x, ref = x.double(), ref.double()
    return ((x - ref).square().mean() / ref.square().mean()).sqrt().item()


def poison():
    """Every new tensor starts as NaN."""
    import torch

    plain = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda *a, **k: plain(*a, **k).fill_(math.nan)


def check(index):
    import torch

    from natten.backends import hopper, reference

    (
        shape,
        batch,
        heads,
        kv,
        d,
        dv,
        window,
        stride,
        dilation,
        causal,
        extra,
        dtype,
        memory,
        variant,
    ) = CHECKS[index]
    torch.manual_seed(index)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def random(*size):
        return torch.randn(size, device="cuda", dtype=dtype)

    if memory == "packed":
        packed = random(batch, *shape, heads * d + kv * d + kv * dv)
        q, k, v = packed.split([heads * d, kv * d, kv * dv], -1)
        q, k, v = q.unflatten(-1, (heads, d)), k.unflatten(-1, (kv, d)), v.unflatten(-1, (kv, dv))
    elif memory == "heads-first":
        q, k, v = (
            random(batch, h, *shape, c).movedim(1, -2) for h, c in ((heads, d), (kv, d), (kv, dv))
        )
    elif memory == "odd":
        q, k = random(batch, *shape, heads, d + 1)[..., 1:], random(batch, *shape, kv, d, 2)[..., 0]
        v = random(batch, *shape, 1, dv).expand(-1, *(-1,) * len(shape), kv, -1)
    else:
        q, k, v = (
            random(batch, *shape, heads, d),
            random(batch, *shape, kv, d),
            random(batch, *shape, kv, dv),
        )
    ek, ev = (random(batch, extra, kv, d), random(batch, extra, kv, dv)) if extra else (None, None)
    rule = rule_of(shape, window, stride, dilation, causal)
    scale = d**-0.5
    from natten.backends import Problem

    reason = hopper.unsupported(
        Problem("attention", q.device, dtype, d, dv, tuple(q.shape), rule, scale)
    )
    if reason:
        return {"error": "unsupported: " + reason}
    from natten.backends.hopper.tiles import candidates

    ways = candidates("forward", rule, shape, shape, d, dv)
    tiles = vary(next(t for t in ways if "pair" not in variant or t.groups == 2), variant, d)
    poison()
    from natten.backends.hopper import plan

    results, whole = [], plan._processors
    for count in (whole(q.device), 1):  # with one processor, programs take many tiles
        plan._processors = lambda _, count=count: count
        with using((q, k, v, ek), rule, scale, tiles):
            results.append(hopper.forward(q, k, v, None, ek, ev, rule, scale))
            results.append(hopper.forward(q, k, v, None, ek, ev, rule, scale))
    plan._processors = whole
    (out, lse), *others = results
    same = all(torch.equal(out, a) and torch.equal(lse, b) for a, b in others)
    torch.cuda.synchronize()
    double = [None if x is None else x.double() for x in (q, k, v, None, ek, ev)]
    ref, ref_lse = reference.forward(*double, rule, scale)
    error, lse_error = rms_ratio(out, ref), rms_ratio(lse, ref_lse)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
    return {
        "error": error,
        "lse": lse_error,
        "same": same,
        "ok": error < limit and lse_error < 1e-3 and same,
        "nan": int(out.isnan().sum()),
        "bad": int(((out - ref).abs() > 0.1).sum()),
        "tiles": str(tuple(tiles)),
    }


def inputs(name):
    import torch

    shape, batch, heads, d, *_ = ROWS[name]
    torch.manual_seed(0)
    return [
        torch.randn(batch, *shape, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    ]


def verify(name, labels):
    """Each variant of a row against the Triton backend."""
    import torch

    from natten.backends import hopper
    from natten.backends import triton as portable

    shape, _, _, d, window, stride, dilation, causal = ROWS[name]
    rule, scale = rule_of(shape, window, stride, dilation, causal), d**-0.5
    q, k, v = inputs(name)
    say(start=labels[0])
    ref, ref_lse = portable.forward(q, k, v, None, None, None, rule, scale)
    torch.cuda.synchronize()
    poison()
    for label, (tiles, own) in variants(name).items():
        if label not in labels:
            continue
        say(start=label)
        try:
            with using((q, k, v, None), rule, scale, tiles, own):
                out, lse = hopper.forward(q, k, v, None, None, None, rule, scale)
            torch.cuda.synchronize()
            error, lse_error = rms_ratio(out, ref), rms_ratio(lse, ref_lse)
            ok = error < 1e-2 and lse_error < 1e-3
            say(label=label, ok=ok, error=error, lse=lse_error)
        except Exception as problem:  # reported, not timed
            say(label=label, ok=False, error=f"{type(problem).__name__}: {str(problem)[-300:]}")
            if "CUDA" in str(problem) or "illegal" in str(problem):
                os._exit(1)


def graph_ms(function, budget=0.12):
    import torch

    function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    calls = max(1, min(20, int(3e-3 / (time.perf_counter() - begin))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times, spent = [], 0.0
    while len(times) < 3 or (spent < budget and len(times) < 30):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / calls)
        spent += times[-1] * calls / 1e3
    return statistics.median(times)


def host_us(call):
    import torch

    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(40):
            call()
        times.append((time.perf_counter() - begin) / 40 * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def profile(call):
    """Where the host's time goes, microseconds a call."""
    import cProfile
    import pstats

    import torch

    q = torch.zeros(1024, device="cuda")
    found = [f"x+1 {host_us(lambda: q + 1):.1f} us"]
    record = cProfile.Profile()
    record.enable()
    for _ in range(200):
        call()
    record.disable()
    torch.cuda.synchronize()
    stats = pstats.Stats(record).stats
    rows = sorted(stats.items(), key=lambda x: -x[1][2])[:14]
    for (file, line, name), (_, calls, own, total, _) in rows:
        found.append(
            f"{own / 200 * 1e6:6.1f} own {total / 200 * 1e6:6.1f} all {calls // 200} x {name} {pathlib.Path(file).name}:{line}"
        )
    return found


def clock(jobs):
    """Times of variants, ``row|label`` each."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from natten.backends import hopper
    from natten.backends import triton as portable

    row, tensors = None, []
    for job in jobs:
        name, label = job.split("|")
        shape, batch, heads, d, window, stride, dilation, causal = ROWS[name]
        rule, scale = rule_of(shape, window, stride, dilation, causal), d**-0.5
        say(start=job)
        if name != row:
            row, tensors, options = name, inputs(name), variants(name)
        q, k, v = tensors
        try:
            if label == "cudnn":
                flat = [x.flatten(1, -3).transpose(1, 2).contiguous() for x in tensors]
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    say(label=job, ms=graph_ms(lambda: F.scaled_dot_product_attention(*flat)))
                del flat
                continue
            if label == "triton":
                say(
                    label=job,
                    ms=graph_ms(lambda: portable.forward(q, k, v, None, None, None, rule, scale)),
                )
                continue
            tiles, own = options[label]
            call = lambda: hopper.forward(q, k, v, None, None, None, rule, scale)
            with using((q, k, v, None), rule, scale, tiles, own):
                found = {"label": job, "ms": graph_ms(call)}
                if label == "default" and name in SMALL:
                    found["host_us"] = host_us(call)
                    if name == "nat":
                        found["profile"] = profile(call)
            say(**found)
        except Exception as problem:
            say(label=job, error=f"{type(problem).__name__}: {str(problem)[-200:]}")
            if "CUDA" in str(problem) or "illegal" in str(problem):
                os._exit(1)


def waste(name, tiles):
    """Products computed over products needed."""
    import torch

    from natten.backends.hopper import tiles as T

    shape, _, _, d, window, stride, dilation, causal = ROWS[name]
    rule, needed = (
        rule_of(shape, window, stride, dilation, causal),
        math.prod(rule_of(shape, window, stride, dilation, causal).dilation),
    )
    for axis, (length, x) in enumerate(zip(shape, rule.dilation)):
        n = length // x
        first, last = rule.windows(axis, torch.arange(n), n, n)
        needed *= int((last - first).sum())
    return T.computed_pairs("forward", rule, shape, shape, tiles) / needed


class Runner:
    """Worker processes that are killed when they go silent."""

    def __init__(self):
        self.log = open(OUT / "forward.log", "w")
        self.lock = threading.Lock()

    def lines(self, *command):
        """Messages of a worker; ends with its start label if it hung or died."""
        process = subprocess.Popen(
            [sys.executable, __file__, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        inbox, current = queue.Queue(), None
        threading.Thread(
            target=lambda: [inbox.put(x) for x in process.stdout] + [inbox.put(None)], daemon=True
        ).start()
        while True:
            try:
                line = inbox.get(timeout=SILENCE)
            except queue.Empty:
                process.kill()
                yield {
                    "label": current,
                    "error": f"HANG: nothing for {SILENCE:.0f} s",
                    "dead": True,
                }
                return
            if line is None:
                if process.wait() and current is not None:
                    yield {"label": current, "error": "died, see forward.log", "dead": True}
                return
            with self.lock:
                if (
                    line.startswith(("{", "Traceback", "  File"))
                    or "rror" in line
                    or "fatal" in line
                ):
                    self.log.write(" ".join(command[:2]) + ": " + line)
                    self.log.flush()
            if line.startswith("{"):
                message = json.loads(line)
                if "start" in message:
                    current = message["start"]
                else:
                    current = None
                    yield message


def main():
    began = time.time()
    runner = Runner()
    right = {name: [] for name in ROWS}
    wrong, failed, passed = [], [], 0
    names = {name: variants(name) for name in ROWS}

    def verify_row(name):
        todo, deaths = list(names[name]), 0
        while todo and deaths < 3:
            before = len(todo)
            for message in runner.lines("verify", name, *todo):
                label = message["label"]
                deaths += message.get("dead", False)
                if label in todo:
                    todo.remove(label)
                if message.get("ok"):
                    right[name].append(label)
                else:
                    wrong.append(f"{name} {label}: {message.get('error')} lse {message.get('lse')}")
            if len(todo) == before:
                wrong.append(f"{name}: worker gives nothing for {todo}")
                break

    def check_some(part):
        nonlocal passed
        todo = [str(i) for i in range(part, len(CHECKS), 4)]
        while todo:
            before = len(todo)
            for message in runner.lines("check", *todo):
                label = message["label"]
                if label in todo:
                    todo.remove(label)
                if message.get("ok"):
                    passed += 1
                else:
                    failed.append((label, message))
            if len(todo) == before:
                failed.append((str(todo), {"error": "worker gives nothing"}))
                break

    threads = [threading.Thread(target=verify_row, args=(name,)) for name in ROWS]
    threads += [threading.Thread(target=check_some, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"phase 1: {time.time() - began:.0f} s")
    table, notes, profiled = [], [], []
    order = (
        "hunyuan",
        "flux",
        "hunyuan-s",
        "flux-s16",
        "1d",
        "1d-s256",
        "video",
        "hdit",
        "nat",
        "nat-d64",
        "dinat",
        "causal",
    )
    todo = [
        f"{name}|{label}"
        for name in order
        if name in ROWS
        for label in ("cudnn", "triton", *right[name])
    ]
    dense = {}
    while todo and time.time() - began < 150:
        before = len(todo)
        for message in runner.lines("time", *todo):
            if message["label"] in todo:
                todo.remove(message["label"])
            name, label = message["label"].split("|")
            if "ms" not in message:
                notes.append(f"{name} {label}: {message.get('error')}")
                continue
            if label == "cudnn":
                window, shape = ROWS[name][4], ROWS[name][0]
                kept = math.prod(w / n for w, n in zip(window, shape))
                dense[name] = message["ms"] * kept * (0.5 if name == "causal" else 1)
            more = wasted = ""
            if label in names[name]:
                tiles, _ = names[name][label]
                wasted = f"{waste(name, tiles):.2f}"
                if label == "default":
                    more = f"q{tiles.query} k{tiles.key} s{tiles.split} {tiles.groups}x{tiles.programs} stages{tiles.stages}".replace(
                        ", ", ","
                    )
            if "host_us" in message:
                more += f" host {message['host_us']:.0f} us"
            if "profile" in message:
                profiled.extend(message["profile"])
            ideal = dense.get(name, math.nan)
            table.append((name, label, message["ms"], ideal / message["ms"], wasted, more))
            if time.time() - began > 152:
                break
        if len(todo) == before:
            break
    notes += [f"not timed: {len(todo)}, first {todo[0]}"] if todo else []
    lines = [f"checks: {passed} of {len(CHECKS)} right"]
    for label, message in failed:
        what = CHECKS[int(label)] if label.isdigit() else ""
        lines.append(
            f"  FAIL {label} {what}: "
            + str({k: v for k, v in message.items() if k != "label"})[:260]
        )
    lines += (
        ["wrong or failed variants:"]
        + ["  " + w[:260] for w in wrong]
        + ["  " + n[:260] for n in notes]
    )
    lines += ["host, nat:", *("  " + x for x in profiled)]
    lines.append(f"{'row':10} {'variant':26} {'us':>9} {'ideal/us':>8} {'waste':>6}")
    for name, label, ms, efficiency, wasted, more in table:
        lines.append(f"{name:10} {label:26} {ms * 1e3:9.1f} {efficiency:8.2f} {wasted:>6} {more}")
    lines.append(f"total {time.time() - began:.0f} s")
    text = "\n".join(lines)
    (OUT / "forward.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "check":
        for each in sys.argv[2:]:
            say(start=each)
            try:
                say(label=each, **check(int(each)))
            except Exception as issue:
                say(label=each, error=f"{type(issue).__name__}: {str(issue)[-250:]}")
                if "CUDA" in str(issue) or "illegal" in str(issue):
                    os._exit(1)
    elif sys.argv[1] == "verify":
        verify(sys.argv[2], sys.argv[3:])
    elif sys.argv[1] == "time":
        clock(sys.argv[2:])
