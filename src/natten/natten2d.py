"""Where 0.14 to 0.17 had the 2-D module."""

from natten.modules import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention", "NeighborhoodAttention2D"]

NeighborhoodAttention = NeighborhoodAttention2D
