"""Write ``data/signatures.json``: names and parameters of NATTEN's releases, read from its history.

    python tests/signatures.py path/to/NATTEN/.git

Names, their order and defaults are read from the sources; nothing is run. Names of its kernels and
of its profiler are left out (``INTERNAL``). Names that a module imports are kept if programs take
them from there (``EXPORTING``).

For each name the file holds releases and what the name was in them: parameters of a function, of a
class or of the ``apply`` of an autograd Function; ``= name`` for an import; ``class`` or ``value``.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

#: Releases and their commits; there was no 0.14.3.
RELEASES = {
    release: {"0.17.2": "16085d6", "0.21.7": "3ba2891"}.get(release, f"v{release}")
    for release in [
        *("0.14.1", "0.14.2", "0.14.4", "0.14.5", "0.14.6", "0.15.0", "0.15.1"),
        *("0.17.0", "0.17.1", "0.17.2", "0.17.3", "0.17.4", "0.17.5"),
        *("0.20.0", "0.20.1", "0.21.0", "0.21.1", "0.21.5", "0.21.6", "0.21.7"),
    ]
}
INTERNAL = re.compile(
    r"natten\.(backends|autotuner|token_permute)\.[a-z_]+\.|natten\.(profil|libnatten)"
    r"|.*\.(can_run_|cutlass_|flex_f|reference_|na\dd_(cutlass|flex|reference)|_(?!_version__))"
    r"|.*\.(amp_fwd|amp_bwd|torch_ver|logger|log|libnatten|ConfigT)$"
)
EXPORTING = re.compile(r"natten(\.(functional|utils|backends|token_permute|na(tten)?[123]d))?$")
DATA = Path(__file__).parent / "data" / "signatures.json"


def parameters(function: ast.FunctionDef, skip: int = 0) -> str:
    """Names and defaults of parameters, without the first ``skip``."""
    function.args.args = function.args.args[skip:]
    for each in ast.walk(function.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(function.args)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a module, also those under ``if`` and ``try``."""
    for each in body:
        yield each
        for part in ("body", "handlers", "orelse"):
            if isinstance(each, (ast.If, ast.Try, ast.ExceptHandler)):
                yield from statements(getattr(each, part, []))


def of_class(each: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """A class and its public methods, or a Function's ``apply``."""
    methods = {m.name: m for m in each.body if isinstance(m, ast.FunctionDef)}
    is_function = any(ast.unparse(base).endswith("Function") for base in each.bases)
    if is_function and "forward" in methods:
        yield f"{each.name}.apply", parameters(methods["forward"], 1)
        return
    yield each.name, parameters(methods["__init__"], 1) if "__init__" in methods else "class"
    for name, method in methods.items():
        if not name.startswith("_"):
            static = any(ast.unparse(x) == "staticmethod" for x in method.decorator_list)
            yield f"{each.name}.{name}", parameters(method, 0 if static else 1)


def names(module: str, is_package: bool, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names that a module defines or imports from NATTEN."""
    package = module if is_package else module.rpartition(".")[0]
    for each in statements(tree.body):
        if isinstance(each, ast.FunctionDef):
            yield each.name, parameters(each)
        elif isinstance(each, ast.ClassDef):
            yield from of_class(each)
        elif isinstance(each, ast.ImportFrom) and EXPORTING.match(module):
            above = package.split(".")[: 1 - each.level or None] if each.level else []
            source = ".".join([*above, *([each.module] if each.module else [])])
            if source.split(".")[0] == "natten":
                for alias in each.names:
                    yield alias.asname or alias.name, f"= {source}.{alias.name}"
        elif isinstance(each, (ast.Assign, ast.AnnAssign)):
            targets = each.targets if isinstance(each, ast.Assign) else [each.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, "value"


def main(directory: str) -> None:
    def git(*arguments: str) -> str:
        command = ["git", f"--git-dir={directory}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    found: dict[str, dict[str, str]] = {}
    for release, commit in RELEASES.items():
        for path in git("ls-tree", "-r", "--name-only", commit).splitlines():
            inside = re.match(r"(?:src/)?(natten/.*)\.py$", path)
            if inside is None:
                continue
            parts = PurePosixPath(inside[1]).parts
            module = ".".join(parts).removesuffix(".__init__")
            if INTERNAL.match(f"{module}."):
                continue
            tree = ast.parse(git("show", f"{commit}:{path}"))
            for name, what in names(module, parts[-1] == "__init__", tree):
                if not INTERNAL.match(f"{module}.{name}"):
                    found.setdefault(f"{module}.{name}", {})[release] = what
    order = list(RELEASES)
    table: dict[str, dict[str, str]] = {}
    for name, by_release in sorted(found.items()):
        spans: list[list[str]] = []
        for release, what in by_release.items():
            last = order[order.index(release) - 1]
            if spans and spans[-1][1:] == [last, what]:
                spans[-1][1] = release
            else:
                spans.append([release, release, what])
        table[name] = {f"{first} {last}": what for first, last, what in spans}
    DATA.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
