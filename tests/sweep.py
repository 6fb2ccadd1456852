"""A random sweep of problems on a GPU against the float64 oracle.

    python tests/sweep.py [--problems 1000] [--backend triton] [--seconds 600] [--seed 0]
    python tests/sweep.py --masked  # problems with masks of keys only

This is not a test file of pytest, because it compiles kernels for minutes. Problems of one kind
run the same compiled kernels, as far as they can (dtype, head dims, tiles, which axes are strided
or causal, boundaries, queries per key), and differ in sizes, windows and offsets; two each have the
same windows. In about a third of them queries are a part of the layout or finer than keys, or
windows are truncated or circular. Where the portable backend has a kernel of small windows, it
runs. Outputs are poisoned before every call. It prints failures, the worst errors, and a summary,
also when its time is over.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import multiprocessing
import os
import queue
import random
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from helpers import reference
from torch import Tensor

from natten import backends
from natten.backends import Problem
from natten.backends.rings import runner_of
from natten.backends.triton import small_tiles
from natten.inputs import Gradients, Inputs
from natten.neighborhood import BOUNDARIES, Dense, Neighborhood
from natten.varlen import VarlenLayout

# RMS of the error over RMS of the value; gradients may have twice as much.
RATIO = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TILES = {  # tokens: shapes by rank; registers and shared memory limit the tokens
    64: {1: (64,), 2: (8, 8), 3: (4, 4, 4)},
    32: {1: (32,), 2: (4, 8), 3: (2, 4, 4)},
    16: {1: (16,), 2: (4, 4), 3: (2, 2, 4)},
}
MOST = {1: 300, 2: 30, 3: 10}  # tokens of an axis


class Kind(NamedTuple):
    """The properties of problems for which kernels are compiled."""

    operation: str  # "fused", "dense", "packed" or "unfused"
    rank: int
    dtype: torch.dtype
    dim: int
    value_dim: int
    strided: tuple[bool, ...]
    causal: tuple[bool, ...]
    unit: int | None  # the axis that has one token
    rpb: bool
    additional: bool
    masked: bool  # where the backend has masks
    tile: tuple[int, ...]
    boundary: tuple[str, ...]
    per_key: tuple[int, ...]
    part: bool  # queries are a part of the layout


def kinds(backend: str) -> list[Kind]:
    """Kinds that cover what a backend supports."""
    rng, wider = random.Random(0), random.Random(1)
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    dims = [(32, 32), (64, 64), (128, 128), (24, 24), (96, 96), (7, 40), (256, 64), (1, 512)]
    operations = ["fused"] * 5 + ["dense", "packed", "unfused"]
    if backend == "hopper":
        dims = [(32, 32), (64, 64), (128, 128), (48, 48), (96, 72)]
        dims += [(256, 256), (32, 128), (160, 136), (136, 200), (248, 64)]  # dK and dV apart
        dims += [(64, 512), (32, 384), (8, 320)]  # slices of values
        dims += [(20, 20), (12, 40), (7, 250)]  # copies of channels
        dtypes, operations = dtypes[:2], ["fused"] * 4 + ["dense", "packed"]
    found = []
    count = max(64, len(operations) * len(dims)) if backend == "hopper" else 64
    for i, (dim, value_dim) in zip(range(count), itertools.cycle(dims)):
        operation = operations[i // len(dims) % len(operations)]
        rank = 1 if operation == "dense" else i % 3 + 1
        dtype = dtypes[i // 3 % len(dtypes)]
        widest = 1 << (max(dim, value_dim) - 1).bit_length()
        strided = tuple(rng.random() < 0.5 for _ in range(rank))
        causal = tuple(rng.random() < 0.3 for _ in range(rank))
        found.append(
            Kind(
                operation, rank, dtype, dim, value_dim, strided, causal,
                rng.choice([0, rank - 1]) if rank > 1 and rng.random() < 0.2 else None,
                operation == "fused" and rng.random() < 0.4,
                operation == "fused" and rng.random() < 0.3,
                operation in ("fused", "dense") and (i + i // len(dims)) % 4 == 0,
                TILES[max(16, min(64, 16384 // widest // dtype.itemsize))][rank],
                *random_borders(operation, causal, wider),
            )
        )  # fmt: skip
    if backend == "hopper":  # parts of rings are padded
        found += [with_rings(kind, wider) for kind in found[: len(found) // 3]]
    else:
        found += [with_small_heads(*each) for each in enumerate(found[:20])]
    rng.shuffle(found)  # a sweep that is cut off has kinds of all sorts
    return found


def with_rings(kind: Kind, rng: random.Random) -> Kind:
    """The kind with a circular axis or more, and with queries that are the whole layout."""
    rank = kind.rank
    boundary = [rng.choice(("circular", "circular", *BOUNDARIES[:2])) for _ in range(rank)]
    boundary[rng.randrange(rank)] = "circular"
    causal = tuple(c and b != "circular" for c, b in zip(kind.causal, boundary))
    return kind._replace(
        causal=causal, unit=None, boundary=tuple(boundary), per_key=(1,) * rank, part=False
    )


def with_small_heads(number: int, kind: Kind) -> Kind:
    """The kind with heads that the kernel of small windows has, and without what it has not."""
    dtype, dim = (torch.bfloat16, torch.float16)[number % 2], (16, 32, 64)[number // 2 % 3]
    return kind._replace(
        dtype=dtype, dim=dim, value_dim=dim, additional=False, tile=TILES[64][kind.rank],
        per_key=(1,) * kind.rank,
    )  # fmt: skip


def random_borders(
    operation: str, causal: tuple[bool, ...], rng: random.Random
) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
    """Boundaries and queries per key of each axis, and whether queries are a part of the layout."""
    rank = len(causal)
    if operation not in ("fused", "unfused") or rng.random() < 0.55:
        return ("shift",) * rank, (1,) * rank, False
    others = [[*BOUNDARIES[:2], *BOUNDARIES[1:] * (not is_causal)] for is_causal in causal]
    boundary = tuple(rng.choice(names) for names in others)
    per_key = tuple(rng.choice([1, 1, 1, 2, 3, 8]) for _ in causal)
    is_usual = boundary == ("shift",) * rank and per_key == (1,) * rank
    return boundary, per_key, is_usual or rng.random() < 0.7


def random_rule(
    kind: Kind, rng: random.Random, alike: random.Random
) -> tuple[list[int], list[int], Neighborhood]:
    """Token layouts of queries and of keys, which may have odd sizes, and windows that fit; those
    of which ``alike`` is the same have the same windows, and layouts of about the same size."""
    axes, most_keys = [], alike.choice([300, 300, 9])
    for axis in range(kind.rank):
        boundary, r = kind.boundary[axis], kind.per_key[axis]
        n = 1 if axis == kind.unit else alike.randint(2, max(2, MOST[kind.rank] // r))
        d = alike.randint(1, min(alike.choice([1, 1, 4]), n))
        if BACKEND == "hopper" and (r > 1 or kind.operation == "packed"):  # no kernel has both
            d = 1
        fitting = n // d
        if boundary == "truncate":
            fitting += alike.choice([0, 3, n])
        k = alike.randint(1, min(fitting, most_keys))
        strided = kind.strided[axis] and k > 1 and n > 1
        if kind.strided[axis] and not strided and fitting > 1:
            k, strided = 2, True
        s = alike.randint(2, k) if strided else 1
        if axis != kind.unit:
            n += rng.choice([0, 1, 2])
        if boundary == "circular":  # the stride divides the ring
            n = -(-n // (s * d)) * s * d
        offset = rng.randint(0, r * n - 1) if kind.part else 0
        queries = rng.randint(1, r * n - offset) if kind.part else r * n
        axes.append((queries, n, k, s, d, offset))
    space, key_space, window, stride, dilation, first = map(list, zip(*axes))
    rule = Neighborhood.create(
        kind.rank, window, stride, dilation, kind.causal, kind.boundary, kind.per_key,
        first if kind.part else None,
    )  # fmt: skip
    rule.check(space, key_space)
    return space, key_space, rule


BACKEND = "triton"


def has_small_kernel(inputs: Inputs, rule: Any, scale: float) -> bool:
    """Whether the portable backend has the kernel of small windows for a problem."""
    query, key, value = inputs[:3]
    if not isinstance(rule, Neighborhood) or inputs.additional_keys is not None:
        return False
    sizes = query.shape[1:-2], key.shape[1:-2], query.shape[-1], value.shape[-1], query.itemsize
    return small_tiles.choose(rule, *sizes, inputs.rpb is not None, scale) is not None


def ratio(expected: Tensor, actual: Tensor, value_dim: int = 1, terms: int = 1) -> float:
    """RMS of the error over RMS of the value; infinite if only one of them is finite."""
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), finite):
        return math.inf
    if not finite.any():
        return 0.0
    error = (expected.double() - actual.double())[finite].square().mean().sqrt()
    # Inputs are of size 1, so even a sum that cancels to 0 keeps their rounding errors. Gradients
    # may keep those of delta, a sum over value_dim products with the rounded output. So many terms
    # of a sum have rounding errors of their own.
    least = 0.1 * (max(1.0, value_dim / 16) * terms) ** 0.5
    size = expected.double()[finite].square().mean().sqrt().clamp(min=least)
    return float((error / size).detach())


def poison() -> None:
    """Let the memory that a call allocates hold NaN."""

    def poisoned(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = allocate(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return allocated

    Tensor.new_empty = poisoned(Tensor.new_empty)  # type: ignore[method-assign]
    torch.empty_like = poisoned(torch.empty_like)


def tensor(rng: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """A random tensor; in a third of the cases heads and batch are swapped in memory."""
    if rng.random() < 0.33:
        moved = (shape[-2], *shape[:-2], shape[-1])
        return torch.randn(moved, dtype=dtype, device=DEVICE).movedim(0, -2)
    return torch.randn(shape, dtype=dtype, device=DEVICE)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def masked(inputs: Inputs, rng: random.Random) -> tuple[Inputs, Inputs]:
    """The inputs with masks that hide a tenth or a half of the keys, and maybe of additional ones;
    and with NaN in what they hide."""
    hides = rng.choice([0.1, 0.5])

    def mask(x: Tensor) -> Tensor:
        batch = rng.choice([1, x.shape[0]])
        return torch.rand(batch, *x.shape[1:-2], device=DEVICE) >= hides

    def dirty(x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(~mask[..., None, None], math.nan)

    key_mask = mask(inputs.key)
    inputs = inputs._replace(key_mask=key_mask)
    key, value = dirty(inputs.key, key_mask), dirty(inputs.value, key_mask)
    hidden = inputs._replace(key=key, value=value)
    additional = inputs.additional_keys, inputs.additional_values
    if additional[0] is None or additional[1] is None or rng.random() < 0.3:
        return inputs, hidden
    own = mask(additional[0])
    keys, values = (dirty(x, own) for x in additional if x is not None)
    hidden = hidden._replace(
        additional_keys=keys, additional_values=values, additional_mask=own
    )  # fmt: skip
    return inputs._replace(additional_mask=own), hidden


def check(kind: Kind, rng: random.Random, alike: random.Random) -> dict[str, float]:
    """The error ratios of all results of a random problem of a kind."""
    space, key_space, rule = random_rule(kind, rng, alike)
    module: Any = backends.named(BACKEND)
    if kind.operation == "unfused":
        return check_unfused(kind, module, space, key_space, rule, rng)
    batch, kv_heads = rng.choice([1, 2]), rng.choice([1, 2])
    heads, dtype = kv_heads * rng.choice([1, 1, 3]), kind.dtype
    rule_: Any = Dense(kind.causal[0]) if kind.operation == "dense" else rule
    if kind.operation == "dense":
        key_space = [rng.randint(1, 200)]
    options: dict[str, Any] = {"tiles": kind.tile * 4} if BACKEND == "triton" else {}
    if kind.operation == "packed":
        layout = VarlenLayout([random_rule(kind, rng, rng)[1] for _ in range(rng.randint(1, 4))])
        batch, space, key_space = 1, [layout.total_tokens], [layout.total_tokens]
        options["documents"] = layout.documents(rule, torch.device(DEVICE))
        device = torch.device(DEVICE)
        problem = Problem("packed", device, dtype, kind.dim, kind.value_dim, rule=rule)
        chosen = backends.choose(BACKEND, problem).name
        module = importlib.import_module(f"natten.backends.{chosen}.fused")  # triton's takes tiles
    num_additional = rng.randint(1, 20) if kind.additional else 0
    inputs = Inputs(
        tensor(rng, dtype, batch, *space, heads, kind.dim),
        tensor(rng, dtype, batch, *key_space, kv_heads, kind.dim),
        tensor(rng, dtype, batch, *key_space, kv_heads, kind.value_dim),
        tensor(rng, dtype, heads, *(2 * k - 1 for k in rule.kernel_size)) if kind.rpb else None,
        tensor(rng, dtype, batch, num_additional, kv_heads, kind.dim) if num_additional else None,
        tensor(rng, dtype, batch, num_additional, kv_heads, kind.value_dim)
        if num_additional
        else None,
    )
    scale = rng.choice([kind.dim**-0.5, 0.3, rng.uniform(0.01, 1)])
    clean = inputs
    if kind.masked and module.masks:
        clean, inputs = masked(inputs, rng)
    if kind.operation == "fused":
        problem = Problem.of("attention", inputs, rule, scale)
        # What the backend does not run, another one does, as in a call.
        module = runner_of(backends.choose(BACKEND, problem), problem)
    exact = Inputs(*(x if x is None or x.dtype == torch.bool else x.double() for x in clean))
    if kind.operation == "packed":
        leaves = [x.requires_grad_() for x in exact[:3]]
        out, lse = packed_oracle(leaves, layout, rule, scale)
    else:
        out, lse = reference.forward(exact, rule_, scale)
    of_forward = options
    if BACKEND == "triton" and kind.operation == "fused" and has_small_kernel(inputs, rule, scale):
        of_forward = {}
    found, found_lse = module.forward(inputs, rule_, scale, **of_forward)
    grad_out = torch.randn_like(out).to(dtype)
    grad_lse = torch.randn_like(lse, dtype=torch.float32) if rng.random() < 0.5 else None
    if kind.operation == "packed":
        exponents = torch.zeros_like(lse) if grad_lse is None else grad_lse.double()
        given = (grad_out.double(), exponents)
        grads = torch.autograd.grad((out, lse), leaves, given)
    else:
        # delta = sum(dO * O) - dL is of the output as it is stored. Where weights are near 0 and 1,
        # gradients hold little else than its rounding.
        of_lse = (grad_out.double() * (out - found.double())).sum(-1)
        of_lse += 0.0 if grad_lse is None else grad_lse.double()
        grads = reference.backward(grad_out.double(), of_lse, exact, out, lse, rule_, scale)
    errors = {"out": ratio(out, found), "lse": ratio(lse, found_lse)}
    if BACKEND == "hopper" and kind.operation != "packed":  # masked keys have another's backward
        problem = Problem.of("gradient", inputs, rule_, scale)
        module = runner_of(backends.choose(BACKEND, problem), problem)
    found_grads = module.backward(
        grad_out, grad_lse, inputs, found, found_lse, rule_, scale, **options
    )
    value_dim = kind.value_dim if kind.operation == "packed" else 1  # others have the same delta
    for name, expected, actual in zip(Gradients._fields, grads, found_grads):
        if expected is not None:
            # The gradient of a single key's bias is 0, a term of every query.
            is_zero = name == "rpb" and rule.window_tokens == 1 and not num_additional
            terms = batch * math.prod(space) if is_zero else 1
            errors[name] = ratio(expected, actual, value_dim, terms) / 2
    return errors


def packed_oracle(
    leaves: list[Tensor], layout: VarlenLayout, rule: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """The oracle of packed attention, one document after another."""
    from natten.functional import neighborhood_attention_generic
    from natten.neighborhood import fit_window

    results = []
    for shape, *qkv in zip(layout, *(layout.unpack(x[0]) for x in leaves)):
        window = fit_window(shape, rule.kernel_size, rule.stride, rule.dilation)
        q, k, v = (x[None] for x in qkv)
        options = {"scale": scale, "backend": "reference", "return_lse": True}
        out, lse = neighborhood_attention_generic(q, k, v, *window, rule.is_causal, **options)
        results.append((out.flatten(1, -3), lse.flatten(1, -2)))
    outputs, exponents = zip(*results)
    return torch.cat(outputs, 1), torch.cat(exponents, 1)


def check_unfused(
    kind: Kind,
    module: Any,
    space: list[int],
    key_space: list[int],
    rule: Neighborhood,
    rng: random.Random,
) -> dict[str, float]:
    """Check the five unfused maps; masked slots hold NaN and must not be read."""
    batch, heads = rng.choice([1, 2]), rng.choice([1, 3])
    x, y = (tensor(rng, kind.dtype, batch, *each, heads, kind.dim) for each in (space, key_space))
    attn = tensor(rng, kind.dtype, batch, *space, heads, rule.window_tokens)
    masked = ~rule.attended_slots(space, key_space, DEVICE)[..., None, :]
    attn = attn.masked_fill(masked, math.nan)
    rpb = tensor(rng, kind.dtype, heads, *(2 * k - 1 for k in rule.kernel_size))
    calls = {
        "qk": (x, y),
        "av": (attn, y),
        "av_transposed": (attn, x, key_space),
        "rpb_bias": (rpb, space, key_space),
        "rpb_bias_transposed": (attn[0], key_space),
    }
    errors = {}
    for name, args in calls.items():
        exact = (z.double() if isinstance(z, Tensor) else z for z in args)
        expected = getattr(reference, name)(*exact, rule)
        errors[name] = ratio(expected, getattr(module, name)(*args, rule))
    return errors


def traits(kind: Kind) -> list[str]:
    """What the summary counts."""
    return [
        kind.operation,
        *sorted({f"{each} axes" for each in kind.boundary} - {"shift axes"}),
        *["parts"] * kind.part,
        *["finer queries"] * (max(kind.per_key) > 1),
        *["biases"] * kind.rpb,
        *["masks"] * kind.masked,
    ]


def work(backend: str, jobs: Any, results: Any) -> None:
    """Run jobs, ``(kind, seed, seed of problems that are alike)``, and send ``(kind, seed, errors
    or message)``."""
    global BACKEND
    BACKEND = backend
    torch.set_num_threads(1)
    poison()
    if "TRITON_INSTRUMENTATION_MODE" in os.environ:  # Triton's sanitizer needs memory, too
        import triton

        triton.set_allocator(
            lambda size, align, _: torch.empty(size, dtype=torch.int8, device="cuda")
        )
    for kind, seed, alike in iter(jobs.get, None):
        torch.manual_seed(seed)
        try:
            results.put((kind, seed, check(kind, *map(random.Random, (seed, alike)))))
        except Exception as error:
            results.put((kind, seed, f"{type(error).__name__}: {str(error)[:300]}"))
            if has_no_gpu():
                break


def has_no_gpu() -> bool:
    """Whether this process has lost its GPU, as it does for good where a kernel fails."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> None:
    """Run the sweep; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--backend", default="triton", choices=("triton", "hopper"))
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="stop after so many")
    parser.add_argument("--masked", action="store_true", help="only problems with masks of keys")
    args = parser.parse_args()
    start, pool = time.time(), kinds(args.backend)
    if args.masked:
        pool = [kind for kind in pool if kind.masked]
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    # Jobs that run at once are of different kinds, so that no two processes compile the same
    # kernels; later jobs find these on disk.
    for seed in range(args.seed, args.seed + args.problems):
        round_, number = divmod(seed, len(pool))
        jobs.put((pool[number], seed, f"{number} {round_ // 2}"))
    workers = []
    for _ in range(args.processes):
        jobs.put(None)
        workers.append(context.Process(target=work, args=(args.backend, jobs, results)))
        workers[-1].start()
    total = failures = 0
    done: Counter[str] = Counter()
    worst: dict[tuple[str, str], float] = {}
    while total < args.problems and time.time() - start < args.seconds:
        try:
            kind, seed, errors = results.get(timeout=5)
        except queue.Empty:
            print(f"{total} of {args.problems}, {time.time() - start:.0f} s", flush=True)
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        total += 1
        done.update(traits(kind))
        if isinstance(errors, str):
            failures += 1
            print("ERROR", seed, kind, errors, flush=True)
            continue
        bad = {name: f"{e:.1e}" for name, e in errors.items() if not e <= RATIO[kind.dtype]}
        if bad:
            failures += 1
            print("BAD", bad, seed, kind, flush=True)
        for name, e in errors.items():
            at = str(kind.dtype)[6:], name
            worst[at] = max(worst.get(at, 0.0), e)
    for worker in workers:
        worker.terminate()
    table = "  ".join(f"{dtype} {name} {e:.1e}" for (dtype, name), e in sorted(worst.items()))
    print(table)
    print(f"{args.backend}: {total} problems {dict(done)}, {failures} failures", end=", ")
    print(f"{time.time() - start:.0f} s")
    jobs.cancel_join_thread()  # jobs that nobody takes are not waited for
    raise SystemExit(failures > 0 or total < args.problems)


if __name__ == "__main__":
    main()
