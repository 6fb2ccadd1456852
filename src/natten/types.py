"""Where 0.17 to 0.21 had the type names; they live in :mod:`natten.legacy.types`."""

from .legacy.types import *  # noqa: F403
