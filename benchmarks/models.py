"""Time whole models: images a second, and the share of the GPU's time that attention takes.

    python benchmarks/models.py                                    # all, in all modes
    python benchmarks/models.py --models nat,swin --modes eager --out models.csv

NAT-tiny and DiNAT-tiny, with a bias and without, stand beside timm's Swin-tiny and ViT-small, which
are left out where timm is not installed. All have 22 to 29 million parameters and random weights.
A training step is forward, loss, backward and AdamW; bfloat16 comes from autocast. "compiled" is
`torch.compile`, "graphs" is its mode "reduce-overhead", which keeps what it launches in CUDA
graphs, so that the GPU does not wait for the host. Times are medians of steps. The profiler's share
counts kernels of attention alone, by their names: no projections, and nothing that a compiler has
merged into other kernels.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import natten
from natten.profiler.machine import device_name, versions

DEPTHS, HEADS, HEAD_DIM, WINDOW, CLASSES = (3, 4, 18, 5), (2, 4, 8, 16), 32, 7, 1000
# Every second layer of DiNAT is dilated as far as its stage's layout allows at 224 pixels.
DILATIONS = (8, 4, 2, 1)
STEPS, WARMUP = 20, 5
# Parts of the names of kernels of PyTorch's attention: flash, memory-efficient, cuDNN.
DENSE = ("flash", "fmha", "sdpa", "attention")


class Block(nn.Module):
    """Neighborhood attention and a perceptron, each with a norm before and a residual."""

    def __init__(self, heads: int, dilation: int, bias: bool) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = natten.NeighborhoodAttention2D(
            width, heads, WINDOW, dilation=dilation, rel_pos_bias=bias
        )
        self.perceptron = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[batch, height, width, channels]``, also of the result."""
        x = x + self.attention(self.norms[0](x))
        return x + self.perceptron(self.norms[1](x))


class Halve(nn.Module):
    """A convolution to half the height and width, and another number of channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[batch, height, width, channels]``, also of the result."""
        return self.convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Nat(nn.Module):
    """NAT-tiny (Hassani et al., 2022) or, dilated, DiNAT-tiny (Hassani and Shi, 2022)."""

    def __init__(self, dilated: bool, bias: bool) -> None:
        super().__init__()
        widths = [heads * HEAD_DIM for heads in HEADS]
        layers: list[nn.Module] = [Halve(3, widths[0] // 2)]
        before = [widths[0] // 2, *widths]
        for depth, heads, dilation, *sizes in zip(DEPTHS, HEADS, DILATIONS, before, widths):
            layers += [Halve(*sizes), nn.LayerNorm(sizes[1])]
            dilations = [dilation if dilated and i % 2 else 1 for i in range(depth)]
            layers += [Block(heads, each, bias) for each in dilations]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(widths[-1]))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, 3, height, width]``."""
        tokens = self.layers(images.permute(0, 2, 3, 1))
        logits: Tensor = self.head(tokens.mean((1, 2)))
        return logits


def timms(name: str) -> nn.Module:
    """A model of timm with random weights."""
    model: nn.Module = importlib.import_module("timm").create_model(name, num_classes=CLASSES)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nat": lambda: Nat(False, False),
    "nat-rpb": lambda: Nat(False, True),
    "dinat-rpb": lambda: Nat(True, True),
    "swin": lambda: timms("swin_tiny_patch4_window7_224"),
    "vit": lambda: timms("vit_small_patch16_224"),
}
TIMM = "swin", "vit"
# What a mode makes of a model.
MODES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "compiled": torch.compile,
    "graphs": partial(torch.compile, mode="reduce-overhead"),
}
PASSES = "inference", "training"


class Row(NamedTuple):
    """A model's speed; also the columns of the file."""

    model: str
    mode: str
    pass_: str
    images_per_second: float
    milliseconds: float
    attention_share: float
    batch: int
    device: str
    versions: str


def step_of(model: Any, images: Tensor, training: bool) -> Callable[[], Any]:
    """A call that infers, or that trains for one step."""
    model.train(training)
    device, labels = images.device.type, torch.arange(len(images), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def infer() -> Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            logits: Tensor = model(images)
            return logits

    def train() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels % CLASSES)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return train if training else infer


def milliseconds(step: Callable[[], Any], steps: int) -> float:
    """The median time of a step on the GPU."""
    for _ in range(WARMUP):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for event in events:
        event.record()
        if event is not events[-1]:
            step()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def ours() -> set[str]:
    """The names of natten's kernels."""
    modules = [m for name, m in sys.modules.items() if name.startswith("natten.")]
    values = [each for module in modules for each in vars(module).values()]
    return {each.__name__ for each in values if type(each).__name__.endswith("JITFunction")}


def attention_share(step: Callable[[], Any], steps: int = 3) -> float:
    """Which part of the GPU's time is kernels of attention."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    names, every, attention = ours(), 0.0, 0.0
    for kernel in found.key_averages():
        if kernel.is_user_annotation:
            continue
        time = kernel.self_device_time_total if kernel.device_type == DeviceType.CUDA else 0.0
        every += time
        if kernel.key in names or any(part in kernel.key.lower() for part in DENSE):
            attention += time
    return attention / every


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print each row as soon as it is there, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = {"models": tuple(MODELS), "modes": tuple(MODES), "passes": PASSES}
    for name, known in options.items():
        parser.add_argument(f"--{name}", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--batch", type=int, default=128, help="images at once")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many are timed")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args(arguments)
    models, modes, passes = (getattr(args, name).split(",") for name in options)
    for (name, known), given in zip(options.items(), (models, modes, passes)):
        if unknown := set(given) - set(known):
            parser.error(f"--{name}: unknown {sorted(unknown)}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU, so there is nothing to measure")
    of_timm = [name for name in models if name in TIMM]
    if of_timm and importlib.util.find_spec("timm") is None:
        print(f"without {', '.join(of_timm)}: timm is not installed")
        models = [name for name in models if name not in TIMM]
    rows, used = [], " ".join(f"{name}={each}" for name, each in versions().items())
    print(f"{'model':12}{'mode':10}{'pass':11}{'images/s':>10}{'ms':>9}{'attention':>11}")
    for name in models:
        for mode in modes:
            torch.manual_seed(0)
            model = MODELS[name]().cuda()
            images = torch.randn(args.batch, 3, 224, 224, device="cuda")
            torch.compiler.reset()  # it compiles the same code for few models only
            run = MODES[mode](model)
            for pass_ in passes:
                step = step_of(run, images, pass_ == "training")
                ms = milliseconds(step, args.steps)
                row = Row(
                    name, mode, pass_, round(1e3 * args.batch / ms, 1), round(ms, 3),
                    round(attention_share(step), 4),
                    args.batch, device_name(images.device), used,
                )  # fmt: skip
                rows.append(row)
                print(
                    f"{name:12}{mode:10}{pass_:11}{row.images_per_second:10.0f}{ms:9.2f}"
                    f"{row.attention_share:11.1%}",
                    flush=True,
                )
    if args.out:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([column.rstrip("_") for column in Row._fields])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
