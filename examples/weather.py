"""Train a small network to forecast the waves of an ocean on a globe, and draw its forecast.

    python examples/weather.py

The data are made first: shallow water on a rotating sphere with land, by finite differences. The
network sees the height of the water in frames that are three hours apart, so it has to infer the
currents from what has changed. Its windows span time, latitude and longitude: time is causal,
latitude ends, longitude goes around the globe, and land is masked. It needs rich and matplotlib,
which ``pip install .[demo]`` brings.
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
from torch import Tensor, nn

from natten import NeighborhoodAttention3D

matplotlib.use("Agg")  # write files, open no window
import matplotlib.pyplot as plt

HOURS = 3  # from frame to frame
HISTORY = 4  # frames that the network sees
AHEAD = 4  # frames of a forecast
GOAL = 0.5  # of persistence's error, on average over these frames

# The ocean lies between 75 degrees south and north. Lengths are in meters, times in seconds.
SPACING = 3.75  # degrees
LATITUDE = torch.arange(-75 + SPACING / 2, 75, SPACING)[:, None]  # [latitudes, 1]
LONGITUDE = torch.arange(SPACING / 2, 360, SPACING)  # [longitudes]
RADIUS, ROTATION, GRAVITY, DEPTH = 6.371e6, 7.292e-5, 9.81, 400.0
STEP = 900.0
# Latitude and longitude of the middle of each continent, and its half axes, in degrees.
CONTINENTS = (
    (45, 70, 22, 34), (-15, 95, 32, 17), (35, 230, 28, 45), (-5, 205, 28, 16), (-28, 305, 13, 20)
)  # fmt: skip


def bump(latitude: Tensor, longitude: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """``exp(-r * r)`` around a point, where r is 1 on the ellipse with these half axes.

    Everything is in degrees, and the result is ``[..., latitudes, longitudes]``.
    """
    eastward = (LONGITUDE - longitude + 180) % 360 - 180
    return torch.exp(-(((LATITUDE - latitude) / height) ** 2) - (eastward / width) ** 2)


def is_sea() -> Tensor:
    """Where no continent is, bool ``[latitudes, longitudes]``."""
    continents = torch.tensor(CONTINENTS)[..., None, None].unbind(1)
    return (bump(*continents) < math.exp(-1)).all(0)


def simulate(runs: int, frames: int) -> Tensor:
    """Heights of the water above its mean in meters, ``[runs, frames, latitudes, longitudes]``.

    A run begins with water at rest, piled up or missing at random points. The equations are the
    linear ones of shallow water, on Arakawa's C grid: heights are in the middle of cells, and the
    currents ``u`` and ``v`` are those through their eastern and northern sides. Each of the three
    is computed from the newest of the others, which keeps waves from growing.
    """
    sea, latitude = is_sea(), LATITUDE.deg2rad()
    open_east, open_north = sea & east(sea), sea & north(sea)  # no water flows through a coast
    open_north[-1] = False
    dy = RADIUS * math.radians(SPACING)
    dx = dy * latitude.cos()
    northern = latitude + math.radians(SPACING / 2)
    side, coriolis = northern.cos(), 2 * ROTATION * northern.sin()  # length of a side in dy

    at_latitude, at_longitude, height, width, sign = torch.rand(5, runs, 12, 1, 1)
    piles = bump(160 * at_latitude - 80, 360 * at_longitude, 12 + 10 * height, 15 + 20 * width)
    h = ((sign - 0.5).sign() * piles).sum(1) * sea
    u, v = torch.zeros_like(h), torch.zeros_like(h)
    kept = []
    for _ in range(frames):
        kept.append(h)
        for _ in range(round(HOURS * 3600 / STEP)):
            outflow = (u - west(u) + side * v - south(side * v)) / dx
            h = h - STEP * DEPTH * outflow
            turned = coriolis * v
            turned = (turned + east(turned) + south(turned) + east(south(turned))) / 4
            u = u + STEP * (turned - GRAVITY * (east(h) - h) / dx) * open_east
            turned = coriolis * (u + west(u) + north(u) + west(north(u))) / 4
            v = v - STEP * (turned + GRAVITY * (north(h) - h) / dy) * open_north
    return torch.stack(kept, 1)


def east(x: Tensor) -> Tensor:
    """What the cell to the east has, around the globe."""
    return x.roll(-1, -1)


def west(x: Tensor) -> Tensor:
    return x.roll(1, -1)


def north(x: Tensor) -> Tensor:
    """What the cell to the north has. The last row gets the first one, which a wall hides."""
    return x.roll(-1, -2)


def south(x: Tensor) -> Tensor:
    return x.roll(1, -2)


class Block(nn.Module):
    """Neighborhood attention, then a two-layer perceptron, each added to its input.

    The equations are linear, so attention gets its input as it is, without a norm.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = NeighborhoodAttention3D(
            dim,
            heads,
            kernel_size=(2, 3, 5),  # time, latitude, longitude
            is_causal=(True, False, False),
            boundary=("truncate", "truncate", "circular"),
            rel_pos_bias=True,
        )
        nn.init.normal_(self.attention.rpb)  # so that heads look in different directions
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, sea: Tensor) -> Tensor:
        x = x + self.attention(x, key_mask=sea)
        return x + self.mlp(self.norm(x))


class Forecaster(nn.Module):
    """The height of the water a frame later, for every frame, from it and those before it.

    A token is a patch of 2x2 cells. It is made of the heights in and around it, how they have
    changed since the frame before, where there is sea, and the latitude.
    """

    def __init__(self, scale: float, dim: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.scale = scale  # of heights, in meters
        sea = is_sea()
        self.register_buffer("sea", sea)
        self.register_buffer("tokens", F.max_pool2d(sea[None, None].float(), 2) > 0)
        self.register_buffer("where", torch.stack([sea.float(), LATITUDE.expand(sea.shape) / 75]))
        self.embed = nn.Conv2d(4, dim, kernel_size=4, stride=2)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, 4)
        nn.init.zeros_(self.head.weight)  # to begin near persistence

    def forward(self, heights: Tensor) -> Tensor:
        """``heights`` and the result are ``[batch, time, latitudes, longitudes]``, in meters."""
        frames = heights[:, :, None] / self.scale
        changes = frames.diff(dim=1, prepend=frames[:, :1])
        where = self.where.expand(*frames.shape[:2], -1, -1, -1)
        x = torch.cat([frames, changes, where], 2).flatten(0, 1)  # [batch * time, 4, ...]
        x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        x = self.embed(x).movedim(1, -1).unflatten(0, heights.shape[:2])
        tokens = self.tokens.expand(-1, x.shape[1], -1, -1)
        for block in self.blocks:
            x = block(x, tokens)  # [batch, time, latitudes / 2, longitudes / 2, channels]
        change = F.pixel_shuffle(self.head(x).movedim(-1, 2), 2)[:, :, 0]
        return heights + self.scale * change * self.sea


def train(model: Forecaster, heights: Tensor, steps: int) -> None:
    """Learn to forecast the next frame of runs ``[runs, frames, latitudes, longitudes]``."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.15
    )
    columns = TextColumn("training"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=steps)
        for step in range(steps):
            run = torch.randint(len(heights), (2, 1))
            first = torch.randint(heights.shape[1] - HISTORY, (2, 1))
            clip = heights[run, first + torch.arange(HISTORY + 1)]
            predicted = model(clip[:, :-1])
            # The first frame has none before it, so nothing is known of its currents.
            loss = F.mse_loss(predicted[:, 1:], clip[:, 2:]) / F.mse_loss(
                clip[:, 1:-1], clip[:, 2:]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            text = f"step {step + 1}/{steps}, error {loss.sqrt().item():.2f} of persistence's"
            progress.update(task, advance=1, description=text)


@torch.no_grad()
def forecast(model: Forecaster, heights: Tensor, frames: int) -> Tensor:
    """The ``frames`` that follow, each forecast from those before it."""
    for _ in range(frames):
        heights = torch.cat([heights, model(heights[:, -HISTORY:])[:, -1:]], 1)
    return heights[:, -frames:]


def error(heights: Tensor, truth: Tensor) -> Tensor:
    """Root mean square over the sea, in meters, for each frame of ``[runs, frames, ...]``."""
    area = is_sea() * LATITUDE.deg2rad().cos()
    return (((heights - truth).square() * area).sum((-2, -1)) / area.sum()).mean(0).sqrt()


@torch.no_grad()
def draw(truth: Tensor, predicted: Tensor, errors: Tensor, path: Path) -> None:
    """A column for each frame: the truth, the forecast, and their difference.

    Args:
        truth, predicted: ``[frames, latitudes, longitudes]``.
        errors: of the forecast and of persistence, ``[2, frames]``.
        path: of the picture.
    """
    figure, axes = plt.subplots(
        3, len(truth), figsize=(13, 4.6), layout="constrained", sharex=True, sharey=True
    )
    figure.suptitle("Height of the water in meters. Errors are those of all unseen runs.")
    rows = {"truth": truth, "forecast": predicted, "difference": predicted - truth}
    extent = (0, 360, -75, 75)
    for (label, heights), row in zip(rows.items(), axes):
        row[0].set_ylabel(label)
        for height, ax in zip(heights, row):
            ax.set(facecolor="#b9ad98", xticks=range(0, 361, 90), yticks=(-60, -30, 0, 30, 60))
            image = ax.imshow(
                height.where(is_sea(), torch.nan).numpy(), cmap="RdBu_r",
                vmin=-0.8, vmax=0.8, origin="lower", extent=extent, interpolation="nearest",
            )  # fmt: skip
    for frame, (own, persistence) in enumerate(errors.T.tolist()):
        axes[0, frame].set_title(f"{HOURS * (frame + 1)} hours ahead")
        axes[-1, frame].set_xlabel(f"error {own:.3f}, persistence {persistence:.3f}")
    figure.colorbar(image, ax=axes, shrink=0.6, ticks=(-0.8, -0.4, 0, 0.4, 0.8))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--output", type=Path, default=Path("weather.png"), help="the picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    heights, unseen = simulate(64, frames=24), simulate(8, frames=HISTORY + 8 + AHEAD)
    print(f"made {len(heights)} runs of {HOURS * heights.shape[1]} hours to learn from")
    model = Forecaster(heights.std().item())
    start = time.perf_counter()
    train(model, heights, options.steps)
    print(f"trained for {time.perf_counter() - start:.0f} s")

    known, truth = unseen[:, :-AHEAD], unseen[:, -AHEAD:]
    predicted = forecast(model, known, AHEAD)
    errors = torch.stack([error(predicted, truth), error(known[:, -1:], truth)])
    for frame, (own, persistence) in enumerate(errors.T.tolist()):
        hours = HOURS * (frame + 1)
        print(f"{hours:2} hours ahead: error {own:.3f} m, persistence {persistence:.3f} m")
    draw(truth[0], predicted[0], errors, options.output)
    print(f"wrote {options.output}")
    own, persistence = errors.mean(1).tolist()
    print(f"error over {HOURS * AHEAD} hours: {own / persistence:.0%} of persistence's")
    if own > GOAL * persistence:
        print(f"this is above the goal of {GOAL:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
