"""Where 0.15 had ``NoneType``; it lives in :mod:`natten.legacy.types`."""

from natten.legacy.types import NoneType

__all__ = ["NoneType"]
