"""Where 0.17 had the unfused operators' parts; :mod:`natten.functional` has the operators."""

from natten.legacy.nested import *  # noqa: F403
