"""Versions, devices and backends, with the reason why each does not run.

Paste what this prints into an issue.
"""

from __future__ import annotations

import argparse

from . import add_json

USAGE = "[--json [FILE]]"
EPILOG = """examples:
  natten env
  natten env --json environment.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten env``."""
    parser.epilog = EPILOG
    add_json(parser, "it")
