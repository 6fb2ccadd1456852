"""Where 0.17 had ``get_device_cc``; it lives in :mod:`natten.legacy.switches`."""

from natten.legacy.switches import get_device_cc

__all__ = ["get_device_cc"]
