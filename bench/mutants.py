"""Do the tests notice? mutmut's faults, one at a time in a copy of the tree, each against the tests that run its line.

    SAMPLE=200 SEED=1 make mutants

draws SAMPLE faults, prints those that no test noticed, each with its line, and `K of N mutants killed`. The last table
is in bench/mutants.md. Which tests run a line is measured once for each state of the code, with coverage.py, over the
tests that are not slow, and kept in the folder of temporary files. LIMIT=30 keeps to tests of 30 s together per fault.
"""

import ast
import difflib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import coverage
import libcst
import pytest
from mutmut.configuration import config
from mutmut.mutation.file_mutation import Mutation, create_mutations

ROOT = Path(__file__).absolute().parent.parent
LIMIT = float(os.environ.get("LIMIT", "inf"))


def main() -> None:
    sample, seed, jobs = (int(os.environ.get(*setting)) for setting in (("SAMPLE", 200), ("SEED", 1), ("JOBS", 2)))
    tests = Tests(measured())
    mutants = drawn(sample, random.Random(seed))
    # The copies and the server are started once. A mutant's process is a fork of the server, which has torch already.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        ["torch", "torchvision", "timm", "sklearn.linear_model", "matplotlib.pyplot", "pytest"]
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: Queue[Path] = Queue()
        for i in range(jobs):
            copies.put(copy_of_tree(Path(folder) / str(i)))

        def survives(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return mutant.survives(copy, tests, forks)
            finally:
                copies.put(copy)

        survivors = []
        for i, (mutant, alive) in enumerate(zip(mutants, pool.map(survives, mutants)), 1):
            survivors += [mutant] * alive
            print(f"{i}/{len(mutants)} {'SURVIVED' if alive else 'killed'} {mutant.where}", file=sys.stderr, flush=True)
    print("| where | the line | in its place | tests |\n|---|---|---|---|")
    print(*(mutant.row(tests) for mutant in survivors), sep="\n")
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} mutants killed")


# Faults


@dataclass(frozen=True)
class Mutant:
    path: str  # from the root
    before: str
    after: str  # the whole file with the fault

    @property
    def change(self) -> tuple[int, list[str], list[str]]:
        """The first line's number, the lines that go, the lines that come."""
        a, b = self.before.splitlines(), self.after.splitlines()
        blocks = [
            code for code in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if code[0] != "equal"
        ]
        start, end, first, last = blocks[0][1], blocks[-1][2], blocks[0][3], blocks[-1][4]
        return start + 1, a[start:end], b[first:last]

    @property
    def where(self) -> str:
        return f"{self.path}:{self.change[0]}"

    def row(self, tests: "Tests") -> str:
        _, gone, come = self.change
        cells = [" ".join(line.strip() for line in lines).replace("|", r"\|") for lines in (gone, come)]
        return f"| {self.where} | `{cells[0]}` | `{cells[1]}` | {len(tests.of(self))} |"

    def survives(self, copy: Path, tests: "Tests", forks) -> bool:
        chosen = tests.of(self)
        if not chosen:
            return True
        (copy / self.path).write_text(self.after)
        try:
            process = forks.Process(target=run_tests, args=(copy, chosen))
            process.start()
            process.join(60 + 10 * sum(tests.seconds[test] for test in chosen))
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)  # a fault that makes a test endless is noticed
                process.join()
            return process.exitcode == 0
        finally:
            (copy / self.path).write_text(self.before)


def drawn(sample: int, rng: random.Random) -> list[Mutant]:
    """Of all files' faults in one pot; pyproject.toml lists the files."""
    places = [ROOT / path for path in config().source_paths]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    sources = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    pot = []
    for path, text in sources.items():
        module, mutations, *_ = create_mutations(path, text)
        pot += [(path, module, mutation) for mutation in mutations if not of_words(mutation)]
    chosen = rng.sample(pot, min(sample, len(pot)))
    return [
        Mutant(path, sources[path], module.deep_replace(mutation.original_node, mutation.mutated_node).code)
        for path, module, mutation in chosen
    ]


def of_words(mutation: Mutation) -> bool:
    """A string with a space is a text for people."""
    node = mutation.original_node
    return isinstance(node, libcst.SimpleString) and " " in node.value


def copy_of_tree(folder: Path) -> Path:
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(copy: Path, chosen: list[str]) -> None:
    """In a process of its own, whose exit status is pytest's. No byte code: two faults may share size and second."""
    os.setsid()
    os.chdir(copy)
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path) != ROOT)]
    first = chosen[0].split("::")[0]  # to import one file takes less time than all
    for part in ([t for t in chosen if t.startswith(first)], [t for t in chosen if not t.startswith(first)]):
        if part and (status := pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy), *part])):
            os._exit(status)
    os._exit(0)


# Which tests run which line


class Tests:
    def __init__(self, prefix: Path):
        self.data = coverage.CoverageData(f"{prefix}.coverage")
        self.data.read()
        passed = json.loads(Path(f"{prefix}.json").read_text())
        self.seconds = {test: seconds for test, (seconds, _) in passed.items()}
        self.users: dict[str, set[str]] = {test: {test} for test in passed}  # of a context: a test, or a shared fixture
        for test, (_, fixtures) in passed.items():
            for name in fixtures:
                self.users.setdefault(f"fixture {name}", set()).add(test)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that run the statement; those of the module's own test file first, quick ones first."""
        contexts = self.data.contexts_by_lineno(f"{ROOT}/{mutant.path}")
        number, gone, _ = mutant.change
        lines = statement(mutant.before, number, number + max(len(gone), 1) - 1)
        found = {context for line in lines for context in contexts.get(line, [])}
        if found == {""}:  # what runs at import: every test of the file
            found = {context for contexts_of in contexts.values() for context in contexts_of}
        tests = set().union(*(self.users.get(context, set()) for context in found))
        own = "tests/" + re.sub(r"(\w+\.py)$", r"test_\1", mutant.path)
        order = sorted(tests, key=lambda test: (not test.startswith(own), self.seconds[test], test))
        spent = itertools.accumulate(self.seconds[test] for test in order)
        return [test for i, (test, seconds) in enumerate(zip(order, spent)) if i == 0 or seconds <= LIMIT]


def statement(text: str, first: int, last: int) -> range:
    """The lines of the smallest statement, or head of one with a body, around both; a function counts as a whole."""
    best = range(first, last + 1)
    spans = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            end = body[0].lineno - 1 if body and not is_function and first < body[0].lineno else node.end_lineno
            if node.lineno <= first and last <= end:
                spans.append(range(node.lineno, end + 1))
    return min(spans, key=len, default=best)


def measured() -> Path:
    """Runs the tests that are not slow under coverage.py, once for each state of the code."""
    state = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        if ".venv" not in path.parts:
            state.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    prefix = Path(tempfile.gettempdir()) / f"noisevit-mutants-{state.hexdigest()[:12]}"
    if not Path(f"{prefix}.json").is_file():
        command = [
            "-m",
            "coverage",
            "run",
            f"--rcfile={os.devnull}",
            f"--data-file={prefix}.coverage",
            f"--include={ROOT}/*",
        ]
        command += [
            "--omit=*/.venv/*,*/tests/*",
            "-m",
            "pytest",
            "-p",
            "bench.mutants",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
        ]
        environ = os.environ | {"TESTS_TO": f"{prefix}.json", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environ, stdout=sys.stderr)
    return prefix


PASSED: dict[str, tuple[float, list[str]]] = {}  # seconds and the names of its fixtures


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    coverage.Coverage.current().switch_context(item.nodeid)
    item.session.context = item.nodeid
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """What a shared fixture runs counts for all tests that have it."""
    if fixturedef.scope == "function":
        return (yield)
    outer, request.session.context = request.session.context, f"fixture {fixturedef.argname}"
    coverage.Coverage.current().switch_context(request.session.context)
    try:
        return (yield)
    finally:
        request.session.context = outer
        coverage.Coverage.current().switch_context(outer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and report.passed:
        PASSED[item.nodeid] = (report.duration, list(item.fixturenames))
    return report


def pytest_sessionfinish():
    if "TESTS_TO" in os.environ:
        Path(os.environ["TESTS_TO"]).write_text(json.dumps(PASSED))


if __name__ == "__main__":
    main()
