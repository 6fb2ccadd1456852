"""Where 0.14 to 0.17 had the 3-D module."""

from natten.modules import NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]
