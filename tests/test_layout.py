"""Where tests stand: tests/util/data/test_loader.py is of util/data/loader.py; the others are listed here."""

import re

import pytest

from tests.harness import ROOT

FILES = sorted((ROOT / "tests").rglob("test_*.py"))
# What these are of crosses the modules.
CROSS_CUTTING = {
    "test_bench.py",
    "test_contributing.py",
    "test_crop_pct.py",
    "test_docs_commands.py",
    "test_docs_python.py",
    "test_families.py",
    "test_faults.py",
    "test_fuzz.py",
    "test_gpu.py",
    "test_host_sync.py",
    "test_hostile_checkpoints.py",
    "test_hostile_images.py",
    "test_imports.py",
    "test_layout.py",
    "test_recipes.py",
    "test_resume.py",
    "test_self_describing.py",
    "test_wiring.py",
}


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT / "tests")) for path in FILES])
def test_each_test_file_is_of_a_module_or_crosses_several(path):
    module = ROOT / path.replace("test_", "")
    assert module.is_file() != (path in CROSS_CUTTING), module


def test_no_file_is_listed_that_is_gone():
    assert {path for path in CROSS_CUTTING if (ROOT / "tests" / path).is_file()} == CROSS_CUTTING


def test_each_test_that_readme_promises_exists():
    promised = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    written = {name for path in FILES for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())}
    assert len(promised) > 20 and promised <= written, promised - written
