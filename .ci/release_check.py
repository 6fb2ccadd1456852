"""Install each file of dist in a fresh environment, and try it from outside of the repository.

    make release-check

The environments borrow PyTorch and what it needs from this Python, so that they are small and made
in seconds. Other packages come along; ``USE`` imports none of those that natten can do without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

DIST = Path(__file__).parents[1] / "dist"
USE = """
import importlib.metadata, pathlib, sys
sys.modules |= dict.fromkeys(("numpy", "rich", "matplotlib", "triton"))  # importing these fails
import torch, natten
from natten.compat import v017

version, = sys.argv[1:]
needed = [each for each in importlib.metadata.requires("natten") if "extra ==" not in each]
assert needed == ["torch>=2.6"], needed
assert natten.__version__ == importlib.metadata.version("natten") == version, natten.__version__
assert pathlib.Path(natten.__file__).is_relative_to(sys.prefix), natten.__file__
assert pathlib.Path(natten.__file__).with_name("py.typed").exists()
q, k, v = (torch.randn(1, 9, 8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
out, wanted = (natten.na2d(q, k, v, (3, 5), backend=name) for name in (None, "reference"))
torch.testing.assert_close(out, wanted)
for found, right in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted))):
    torch.testing.assert_close(found, right)
layer = torch.compile(natten.NeighborhoodAttention1D(8, 2, 3), fullgraph=True, backend="aot_eager")
assert layer(torch.randn(1, 6, 8)).shape == (1, 6, 8)
assert v017.NeighborhoodAttention2D(8, 2, 3)(torch.randn(1, 6, 6, 8)).shape == (1, 6, 6, 8)
assert natten.draw.draw_neighborhood((6, 6), 3).startswith("<svg")
"""


def check(file: Path) -> None:
    """End this program with an error unless ``file`` installs and works."""
    version = file.name.removesuffix(".tar.gz").split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        scripts = Path(folder, "Scripts" if os.name == "nt" else "bin")
        own = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}

        def run(program: str, *arguments: str) -> str:
            command = [str(scripts / program), *arguments]
            done = subprocess.run(command, cwd=folder, env=own, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{file.name}: {program} ended with {done.returncode}\n{done.stdout}")
            return done.stdout

        packages = run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(packages.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # A natten that is installed in this Python is ignored, and stays there.
        run("python", "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", str(file))
        run("python", "-W", "ignore:Failed to initialize NumPy", "-c", USE, version)
        assert f"natten: {version}" in run("natten", "env")
    print(f"{file.name} installs and works")


if __name__ == "__main__":
    files = sorted(DIST.iterdir())
    if len(files) != 2:
        sys.exit(f"dist must hold one sdist and one wheel, got {[file.name for file in files]}")
    for each in files:
        check(each)
