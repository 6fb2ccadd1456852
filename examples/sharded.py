"""Train on a layout that is split over several ranks, and compare every step with one device.

    torchrun --nproc-per-node 2 examples/sharded.py

A small network of two layers of neighborhood attention learns to remove the noise of an image.
Every rank has a few rows of it. Ranks exchange the keys and values that windows reach beyond these
rows, and all else is computed token by token. Beside it, each rank trains the same network on the
whole image, which shows that losses and gradients are equal.

It uses NCCL where every rank has a GPU of its own, and gloo on a CPU elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import natten.distributed

HEIGHT, WIDTH = 24, 20
ATOL = {torch.float64: 1e-12, torch.float32: 1e-4}  # steps carry differences on
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser(nn.Module):
    """A network of pixels as tokens; ``attend`` decides where they lie."""

    def __init__(self, dim: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(3, dim)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.outward = nn.Linear(dim, 3)

    def forward(self, image: Tensor, attend: Attention) -> Tensor:
        x = self.inward(image)  # [batch, height, width, dim]
        for qkv, proj in zip(self.qkv, self.proj):
            query, key, value = qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            x = x + proj(attend(query, key, value).flatten(-2))
        return self.outward(x)


def picture(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """An image of smooth waves, ``[1, height, width, 3]``, with noise and without."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    clean = torch.stack([(y / 4).sin(), (x / 5).cos(), ((x + y) / 6).sin()], -1)[None]
    clean = clean.to(device, dtype)
    return clean + 0.5 * torch.randn(clean.shape, dtype=dtype).to(device), clean


def join() -> torch.device:
    """Join torchrun's group if no group is there yet, and return this rank's device."""
    local = int(os.environ["LOCAL_RANK"])
    is_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if is_gpu else "gloo")
    device = torch.device("cuda", local) if dist.get_backend() == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def main(arguments: list[str] | None = None) -> int:
    """Train, and return 0 if every loss and gradient equals that of one device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        parser.error("run it by: torchrun --nproc-per-node 2 examples/sharded.py")
    started = not dist.is_initialized()
    device = join()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    mesh = dist.init_device_mesh(device.type, (ranks,), mesh_dim_names=("rows",))

    torch.manual_seed(0)  # the same weights and noise everywhere
    split_model = Denoiser().to(device, dtype)
    whole_model = copy.deepcopy(split_model)
    noisy, clean = picture(dtype, device)
    sizes = [len(rows) for rows in torch.arange(HEIGHT).tensor_split(ranks)]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def split_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return natten.distributed.na2d(
            query, key, value, kernel_size=7, mesh=mesh, shard={0: "rows"}, sizes={0: sizes}
        )

    def whole_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return natten.na2d(query, key, value, kernel_size=7)

    split_steps = torch.optim.AdamW(split_model.parameters(), lr=1e-2)
    whole_steps = torch.optim.AdamW(whole_model.parameters(), lr=1e-2)
    largest = 0.0
    for step in range(1, args.steps + 1):
        # Each rank's loss is a share of the whole one, which is their sum.
        found = split_model(noisy[:, own], split_attend)
        loss = (found - clean[:, own]).square().sum() / clean.numel()
        split_steps.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        for parameter in split_model.parameters():
            dist.all_reduce(parameter.grad)

        expected = (whole_model(noisy, whole_attend) - clean).square().mean()
        whole_steps.zero_grad()
        expected.backward()

        pairs = [(total, expected.detach())]
        for a, b in zip(split_model.parameters(), whole_model.parameters()):
            pairs.append((a.grad, b.grad))
        largest = max(largest, *((a - b).abs().max().item() for a, b in pairs))
        split_steps.step()
        whole_steps.step()
        if rank == 0:
            print(
                f"step {step:2}/{args.steps}  loss {total.item():.6f} on {ranks} ranks, "
                f"{expected.item():.6f} on one"
            )
    is_equal = largest <= ATOL[dtype]
    if rank == 0:
        verdict = "are equal" if is_equal else "differ"
        print(f"Losses and gradients {verdict}: at most {largest:.1e} apart, in {dtype}.")
    if started:
        dist.destroy_process_group()
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
