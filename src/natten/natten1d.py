"""Where 0.14 to 0.17 had the 1-D module."""

from natten.modules import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]
