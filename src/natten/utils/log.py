"""The package's logger, "natten"; its level can be set by the environment's NATTEN_LOG_LEVEL."""

from __future__ import annotations

import logging
import os


def get_logger(name: str = "natten") -> logging.Logger:
    """A logger below "natten"; NATTEN_LOG_LEVEL (debug, info, ...) sets the level of "natten"."""
    level = os.environ.get("NATTEN_LOG_LEVEL", "").upper()
    if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        logging.getLogger("natten").setLevel(level)
    return logging.getLogger(name if name.startswith("natten") else f"natten.{name}")
