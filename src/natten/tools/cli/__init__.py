"""The ``natten`` command.

A subcommand is a module of this package with ``add_arguments(parser)`` and ``run(args) -> int``;
its docstring is the description in its help.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from ..._submodules import getter
from ...errors import ArgumentError
from ...version import __version__

__getattr__ = getter(__name__)
COMMANDS = {
    "profile": "time one problem beside dense attention; list, try and remember tiles",
    "simulate": "say how much a window and its strides can gain, without running anything",
    "draw": "draw windows, masks and tiles",
    "env": "print versions, devices and backends, for a report of an issue",
}
_EXAMPLES = """examples:
  natten env
  natten profile -i 56 56 -w 7 7 -n 2 -d 32
  natten simulate -i 30 48 80 -w 18 24 24 -n 24
  natten draw -i 11 11 -w 5 --query 1 9
  natten simulate --help

exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.
    """
    command_parser = argparse.ArgumentParser(
        prog="natten",
        description="Tools around neighborhood attention.",
        epilog="commands:\n"
        + "".join(f"  {name:10}{text}\n" for name, text in COMMANDS.items())
        + "\n"
        + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command_parser.add_argument("--version", action="version", version=f"natten {__version__}")
    command_parser.add_argument("command", choices=COMMANDS, metavar="command")
    command_parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the command"
    )
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        command_parser.print_help(sys.stderr)
        return 2
    try:
        chosen = command_parser.parse_args(argv)
        command = importlib.import_module(f".{chosen.command}", __package__)
        parser = argparse.ArgumentParser(
            prog=f"natten {chosen.command}",
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
        code: int = command.run(parser.parse_args(chosen.arguments))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed help or usage
        return stop.code if isinstance(stop.code, int) else 1
    except ArgumentError as error:
        print(f"natten {chosen.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("natten: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, ImportError) as error:  # an unwritable file, a missing package
        if logging.getLogger("natten").isEnabledFor(logging.DEBUG):
            raise
        print(
            f"natten {chosen.command}: failed: {error} (NATTEN_LOG_LEVEL=debug shows where)",
            file=sys.stderr,
        )
        return 1
