"""Imports go down the floors of the house: what a file imports stands on a lower floor than itself, and no circle."""

import ast
from pathlib import Path

import pytest

from tests.harness import ROOT

# The longest prefix that fits a path tells its floor (CONTRIBUTING.md has the map).
FLOORS = {
    "main_": 10,
    "engine_": 9,
    "util/probe/": 8,
    "util/sweep/": 6,
    "util/report/": 7,
    "util/predict/": 6,
    "util/train/": 5,
    "util/cli/": 4,
    "util/data/": 3,
    "util/checkpoint.py": 2,
    "util/log.py": 2,
    "util/": 1,
    # What the flags are, which every room may be handed.
    "util/cli/flags.py": 1,
    "util/cli/values.py": 1,
    "util/cli/settings.py": 1,
    "util/errors.py": 0,
    "util/seed.py": 0,
    "util/choices.py": 0,
    "util/data_specs.py": 0,
    "models/": 0,
    "augment/": 0,
}
# models/loading.py reads checkpoints with the one reader that executes nothing in them.
ALLOWED = {("models/loading.py", "util/checkpoint.py")}
FILES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("main_*.py", "engine_*.py", "util/**/*.py", "models/**/*.py", "augment/*.py")
    for path in ROOT.glob(pattern)
)


def floor(path: str) -> int:
    return FLOORS[max((prefix for prefix in FLOORS if path.startswith(prefix)), key=len)]


def file_of(module: str) -> str | None:
    """The file of this project that a dotted name is; None for other packages."""
    path = module.replace(".", "/")
    return next((p for p in (f"{path}.py", f"{path}/__init__.py") if p in FILES), None)


def imports_of(path: str) -> set[str]:
    """Files of the project that `path` imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if file_of(part) else node.module for part in parts]
        else:
            continue
        found.update(file for name in names if (file := file_of(name)))
    return found - {path}


EDGES = {path: imports_of(path) for path in FILES}


def test_the_walk_sees_the_projects_imports():
    assert {"util/data/loader.py", "engine_finetune.py"} <= EDGES["main_finetune.py"]
    assert floor("util/train/loop.py") == 5 and floor("util/optim.py") == 1 and floor("util/seed.py") == 0


@pytest.mark.parametrize("path", FILES)
def test_a_file_imports_from_lower_floors_or_its_own_room(path):
    for target in EDGES[path]:
        same_room = Path(target).parent == Path(path).parent and Path(path).parent != ROOT
        ground = floor(path) == floor(target) == 0
        lower = floor(target) < floor(path)
        assert lower or (same_room and floor(target) == floor(path)) or ground or (path, target) in ALLOWED, target


def test_no_imports_in_a_circle():
    done, path = set(), []

    def visit(file: str) -> None:
        assert file not in path, " -> ".join([*path[path.index(file) :], file])
        if file in done:
            return
        path.append(file)
        for target in sorted(EDGES[file]):
            visit(target)
        done.add(path.pop())

    for file in FILES:
        visit(file)
