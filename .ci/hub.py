"""Write the package as a folder that Hugging Face's ``kernels`` loads.

    make hub    # the folder `hub`; HUB= is another one

The layout is that of a repository of kernels on the Hub: ``build/torch-BACKEND`` is the package and
a file of metadata. ``kernels`` picks the folder of the backend that PyTorch has, and names the
module by the ``id`` in the metadata. The folders differ only in that file, because the package is
the same everywhere.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "natten"
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")
INTERFACE = 1  # the version that callers ask the Hub for, as in get_kernel("...", version=1)


def write(folder: Path) -> None:
    """Write the package into ``folder`` for all backends, in place of what was written before."""
    release = runpy.run_path(str(PACKAGE / "version.py"))["__version__"]
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        if variant.exists():
            shutil.rmtree(variant)
        shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "name": "natten",
            "id": f"natten_{release.replace('.', '_')}_{backend}",
            "version": INTERFACE,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        text = json.dumps(metadata, indent=2) + "\n"
        (variant / "metadata.json").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/hub.py FOLDER")
    write(Path(sys.argv[1]))
    print(
        f"wrote {sys.argv[1]}; LOCAL_KERNELS=shi-labs/natten={Path(sys.argv[1]).resolve()} uses it"
    )
