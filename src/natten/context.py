"""Where 0.17 to 0.21 had the switches; they live in :mod:`natten.legacy.switches`."""

from .legacy.switches import *  # noqa: F403
