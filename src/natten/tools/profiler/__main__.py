"""``python -m natten.profiler`` is ``natten profile``."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
