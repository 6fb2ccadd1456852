"""Train a small neighborhood attention network on handwritten digits and draw what it attends.

    python examples/digits.py

Every pixel of an 8x8 digit is a token. Layers attend a 3x3 window, with dilation 1 and 2 in turn.
It needs scikit-learn, rich and matplotlib, which ``pip install .[demo]`` brings.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from natten import NeighborhoodAttention2D, na2d_qk

matplotlib.use("Agg")  # write files, open no window
import matplotlib.pyplot as plt

GOAL = 0.97


class Block(nn.Module):
    """Neighborhood attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = NeighborhoodAttention2D(
            dim, heads, kernel_size, dilation=dilation, rel_pos_bias=True
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """A classifier of images whose pixels are tokens, with blocks of alternating dilation."""

    def __init__(self, dim: int = 32, heads: int = 4, dilations: tuple[int, ...] = (1, 2, 1, 2)):
        super().__init__()
        self.stem = nn.Conv2d(1, dim, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(Block(dim, heads, 3, dilation) for dilation in dilations)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).movedim(1, -1)  # [batch, height, width, channels]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    columns = TextColumn("training"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=steps)
        for epoch in range(epochs):
            order = torch.randperm(len(images))
            for chosen in order.split(64):
                loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                text = f"epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}"
                progress.update(task, advance=1, description=text)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


@torch.no_grad()
def attention_weights(model: Classifier, images: Tensor, depth: int) -> Tensor:
    """How strongly each token attends the tokens of its window: ``[batch, 8, 8, 9]``.

    The layer's fused operator does not keep these weights, so the unfused one computes them again.
    """
    x = model.stem(images).movedim(1, -1)
    for block in model.blocks[:depth]:
        x = block(x)
    layer = model.blocks[depth].attention
    qkv = layer.qkv(model.blocks[depth].norm1(x))
    qkv = qkv.unflatten(-1, (3, layer.num_heads, layer.head_dim))
    query, key, _ = qkv.movedim(-2, 1).unbind(-2)  # [batch, heads, height, width, head_dim]
    scores = na2d_qk(query * layer.scale, key, layer.kernel_size, layer.dilation, rpb=layer.rpb)
    return scores.softmax(-1).mean(1)  # over the heads


@torch.no_grad()
def draw(model: Classifier, images: Tensor, path: Path) -> None:
    """One column per digit: the image, then what one of its tokens attends in two layers."""
    layers = (0, len(model.blocks) - 1)
    weights = [attention_weights(model, images, depth) for depth in layers]
    guesses = model(images).argmax(-1).tolist()
    figure, axes = plt.subplots(
        3, len(images), figsize=(1.3 * len(images), 4.8), layout="constrained", squeeze=False
    )
    figure.suptitle("Orange: a token. Blue: what it attends, darker where the weight is larger.")
    for column, image in enumerate(images[:, 0].numpy()):
        row, col = divmod(int(image[2:6, 2:6].argmax()), 4)
        token = row + 2, col + 2  # the darkest token near the middle
        for row, ax in enumerate(axes[:, column]):
            ax.imshow(image, cmap="gray_r", vmax=1 if row == 0 else 2.5)
            ax.set(xticks=[], yticks=[])
            ax.add_patch(square(token, edgecolor="#f2762e", linewidth=2, zorder=3))
        axes[0, column].set_xlabel(f"read as {guesses[column]}")
        for ax, depth, weight in zip(axes[1:, column], layers, weights):
            rule = model.blocks[depth].attention.neighborhood
            attended = rule.window_tokens_of(image.shape)[token].tolist()
            shares = weight[column][token]
            for index, share in zip(attended, (shares / shares.max()).tolist()):
                at = divmod(index, image.shape[1])
                ax.add_patch(square(at, facecolor=(0.1, 0.4, 0.9, share), edgecolor="#5b9df5"))
    axes[0, 0].set_ylabel("image")
    for ax, depth in zip(axes[1:, 0], layers):
        layer = model.blocks[depth].attention
        ax.set_ylabel(f"block {depth + 1}\ndilation {layer.dilation[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def square(token: tuple[int, int], **look: object) -> plt.Rectangle:
    """The outline of a token, given as row and column."""
    return plt.Rectangle((token[1] - 0.5, token[0] - 0.5), 1, 1, **{"facecolor": "none", **look})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="the picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    train_images, train_labels, test_images, test_labels = load()
    model = Classifier()
    start = time.perf_counter()
    train(model, train_images, train_labels, options.epochs)
    reached = accuracy(model, test_images, test_labels)
    print(f"test accuracy {reached:.2%} after {time.perf_counter() - start:.0f} s of training")
    one_of_each = [int((test_labels == digit).nonzero()[0]) for digit in range(10)]
    draw(model, test_images[one_of_each], options.output)
    print(f"wrote {options.output}")
    if reached < GOAL:
        print(f"the accuracy is below the goal of {GOAL:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
