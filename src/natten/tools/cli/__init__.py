"""The ``natten`` command.

A command has two modules of its name: in ``options`` what it takes, and in this package what it
does, ``run(args) -> int``. The second imports PyTorch, so it is imported when it is to run.
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
from .messages import in_options
from .parser import Choice, Parser

__getattr__ = getter(__name__)
COMMANDS = {
    "profile": "time a problem beside dense attention; list, try and remember tiles",
    "simulate": "say how much a window can gain at most, and with which stride",
    "draw": "draw windows, masks and tiles",
    "env": "print versions, devices and backends, for a report of an issue",
    "help": "explain a command, as in natten help profile",
}
_EPILOG = (
    "commands:\n"
    + "".join(f"  {name:10}{text}\n" for name, text in COMMANDS.items())
    + """
examples:
  natten env
  natten profile -i 56 56 -w 7 7 -n 2 -d 32
  natten simulate -i 30 48 80 -w 18 24 24 -n 24
  natten draw -i 11 11 -w 5 --query 1 9
  natten help simulate

exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted
"""
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command, args = "natten", argparse.Namespace()
    try:
        if not words:
            _parser().print_help(sys.stderr)
            return 2
        if words[0] == "help":
            words = [*words[1:2], "--help"]
        # Options before the command are the program's, those after it the command's.
        name = _parser().parse(words[:1]).command
        command = f"natten {name}"
        args = _parser(name).parse(words[1:])
        code: int = importlib.import_module(f".{name}", __package__).run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # help, the version or an error has been printed
        return stop.code if isinstance(stop.code, int) else 1
    except ArgumentError as error:
        print(f"{command}: error: {in_options(str(error), args)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("natten: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, ImportError) as error:  # a full disk, a missing package
        if logging.getLogger("natten").isEnabledFor(logging.DEBUG):
            raise
        print(f"{command}: failed: {error} (NATTEN_LOG_LEVEL=debug shows where)", file=sys.stderr)
        return 1


def _parser(name: str = "") -> Parser:
    """The parser of a command's options, or of the program's."""
    if name:
        module = importlib.import_module(f".options.{name}", __package__)
        parser = Parser(f"natten {name}", module.__doc__ or "", module.USAGE)
        module.add_arguments(parser)
        return parser
    parser = Parser("natten", "Tools around neighborhood attention.", "[--version] command ...")
    parser.epilog = _EPILOG
    parser.add_argument("--version", action="version", version=f"natten {__version__}")
    parser.add_argument(
        "command", type=Choice(tuple(COMMANDS)), metavar="command", help="one of those below"
    )
    return parser
