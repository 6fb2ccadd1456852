"""A random sweep of fused problems on a GPU against the float64 oracle.

    python tests/sweep.py [problems] [seed]

Not a pytest file: it compiles many kernel variants. It prints what fails, then a summary.
"""

from __future__ import annotations

import math
import random
import sys
import time

import torch

from natten import backends
from natten.backends import reference
from natten.neighborhood import Dense, Neighborhood

RATIO = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def ratio(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """RMS of the error over RMS of the value; infinite if anything is NaN."""
    if not torch.isfinite(actual).all():
        return math.inf
    error = (expected.double() - actual.double().cpu()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp(min=1e-3))


def random_problem(rng: random.Random, dims: list[int]) -> dict:
    """Shapes, windows and options, odd sizes included."""
    rank = rng.choice([1, 2, 3])
    space = [rng.randint(1, [300, 30, 10][rank - 1]) for _ in range(rank)]
    dilation = [rng.randint(1, min(rng.choice([1, 4]), n)) for n in space]
    kernel = [rng.randint(1, n // d) for n, d in zip(space, dilation)]
    stride = [rng.choice([1, rng.randint(1, k)]) for k in kernel]
    causal = [rng.random() < 0.25 for _ in space]
    kv_heads = rng.choice([1, 2])
    return {
        "rule": Neighborhood.create(rank, kernel, stride, dilation, causal),
        "space": space,
        "batch": rng.choice([1, 2]),
        "kv_heads": kv_heads,
        "heads": kv_heads * rng.choice([1, 1, 3]),
        "dim": rng.choice(dims),
        "value_dim": rng.choice(dims),
        "extra": rng.choice([0, 0, 0, 5]),
        "rpb": rng.random() < 0.3,
        "dense": rank == 1 and rng.random() < 0.3,
        "view": rng.random() < 0.3,
        "grad_lse": rng.random() < 0.5,
        "dtype": rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]),
    }


def check(p: dict, device: str) -> dict[str, float]:
    """Error ratios of output, LSE and gradients."""
    rule, dtype, batch = p["rule"], p["dtype"], p["batch"]

    def make(*shape: int) -> torch.Tensor:
        if p["view"] and len(shape) > 2:  # heads and batch swapped in memory
            return torch.randn(shape[-2], *shape[:-2], shape[-1], dtype=dtype).movedim(0, -2)
        return torch.randn(shape, dtype=dtype)

    space, key_space = p["space"], p["space"]
    if p["dense"]:
        rule, key_space = Dense(any(rule.is_causal)), [random.randint(1, 200)]
    rpb_shape = [2 * k - 1 for k in p["rule"].kernel_size]
    inputs = [
        make(batch, *space, p["heads"], p["dim"]),
        make(batch, *key_space, p["kv_heads"], p["dim"]),
        make(batch, *key_space, p["kv_heads"], p["value_dim"]),
        make(p["heads"], *rpb_shape) if p["rpb"] and not p["dense"] else None,
        make(batch, p["extra"], p["kv_heads"], p["dim"]) if p["extra"] and not p["dense"] else None,
        make(batch, p["extra"], p["kv_heads"], p["value_dim"])
        if p["extra"] and not p["dense"]
        else None,
    ]
    scale = p["dim"] ** -0.5
    oracle = [None if x is None else x.double() for x in inputs]
    out, lse = reference.forward(*oracle, rule, scale)
    grad_out = torch.randn(out.shape, dtype=dtype)
    grad_lse = torch.randn(lse.shape) if p["grad_lse"] else None
    grads = reference.backward(
        grad_out.double(), None if grad_lse is None else grad_lse.double(),
        *oracle, out, lse, rule, scale,
    )  # fmt: skip

    problem = backends.Problem("attention", torch.device(device), dtype, p["dim"], p["value_dim"])
    module = backends.choose("", problem).module
    assert backends.choose("", problem).name == "triton"
    given = [None if x is None else x.to(device) for x in inputs]
    found, found_lse = module.forward(*given, rule, scale)
    found_grads = module.backward(
        grad_out.to(device), None if grad_lse is None else grad_lse.to(device),
        *given, found, found_lse, rule, scale,
    )  # fmt: skip
    errors = {"out": ratio(out, found), "lse": ratio(lse, found_lse)}
    names = ("dq", "dk", "dv", "drpb", "dek", "dev")
    for name, expected, actual in zip(names, grads, found_grads):
        if expected is not None:
            errors[name] = ratio(expected, actual) / 2
    return errors


def main() -> None:
    """Run the sweep."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    failures, start, worst = 0, time.time(), {}
    limit = float(sys.argv[3]) if len(sys.argv) > 3 else math.inf
    done = 0
    for i in range(count):
        if time.time() - start > limit:
            break
        # Head dims come in groups, so that kernels are compiled for few of them at a time.
        dims = [[32, 64, 128], [16, 24, 96], [12, 80, 256], [1, 7, 40]][i * 4 // count]
        p = random_problem(rng, dims)
        try:
            errors = check(p, device)
        except Exception as error:
            failures += 1
            print("ERROR", p, repr(error)[:500], flush=True)
            continue
        done += 1
        bad = {name: e for name, e in errors.items() if not e <= RATIO[p["dtype"]]}
        for name, e in errors.items():
            key = (str(p["dtype"])[6:], name)
            worst[key] = max(worst.get(key, 0.0), e)
        if bad:
            failures += 1
            print("BAD", {n: f"{e:.2e}" for n, e in bad.items()}, p, flush=True)
    for key, e in sorted(worst.items()):
        print(*key, f"{e:.1e}")
    print(f"{done} problems, {failures} failures, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
