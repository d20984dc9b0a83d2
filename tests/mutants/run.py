"""Breaks the kernel's maths one place at a time and counts what the tests catch.

A parent process imports the libraries once and forks a child for every mutant, so a child pays
for the kernel and its tests alone. Each worker has its own copy of the tree under `.mutants/`.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from functools import cache
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".mutants"
# Read when JAX is imported: what a mutation does not touch is compiled once.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(WORK / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import equinox  # noqa: E402, F401
import hypothesis.extra.numpy  # noqa: E402, F401
import jax.experimental  # noqa: E402, F401
import optax  # noqa: E402, F401
import orbax.checkpoint  # noqa: E402, F401
import pytest  # noqa: E402
import report  # noqa: E402
import tokenizers  # noqa: E402, F401
from kinds import Mutant, mutants_of  # noqa: E402
from selection import CHECKS, Selection, test_files  # noqa: E402

SECONDS_A_TEST = 300
"""A test that runs longer than this, several times the slowest one, caught an endless loop."""
PYTEST = {0: "survived", 1: "failed", 2: "not importable"}
SIGNALS = {signal.SIGALRM: "endless", signal.SIGSEGV: "crashed", signal.SIGABRT: "crashed"}


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; the next run goes on from here."))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="such as ppo_kernel/losses.py; all by default")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    wanted = [file.removeprefix("ppo_kernel/") for file in arguments.files] or list(CHECKS)
    unknown = set(wanted) - set(CHECKS)
    if unknown:
        parser.error(f"{sorted(unknown)} are not mutated; choose from {list(CHECKS)}.")
    mutants = [m for file in wanted for m in mutants_of(ROOT / "ppo_kernel" / file, file)]
    results = Results(WORK / "results.jsonl")
    pending = [m for m in mutants if results.of(m) is None]
    print(f"{len(mutants)} mutants, {len(mutants) - len(pending)} of them known.", flush=True)
    trees = [copy_tree(i) for i in range(min(arguments.workers, len(pending)))]
    if pending:
        check_unbroken(trees[0], sorted({m.file for m in pending}))
        run_all(pending, trees, results)
    return report.write(ROOT, mutants, results)


class Results:
    """What is known, one line a mutant, appended as soon as it is known.

    A result holds while the meaning of the mutated file stays, and the tests that gave it: of a
    mutant that is caught the file with the test that caught it, of a survivor all of them.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {(x["file"], x["key"]): x for x in map(json.loads, lines)}

    def of(self, mutant: Mutant) -> dict | None:
        entry = self.known.get((mutant.file, mutant.key))
        holds = entry is not None and entry["tests"] == hash_of_tests(mutant.file, entry["by"])
        return entry if holds else None

    def add(self, mutant: Mutant, outcome: str, by: str, seconds: float):
        entry = {"file": mutant.file, "key": mutant.key, "tests": hash_of_tests(mutant.file, by),
                 "line": mutant.line, "after": mutant.after, "outcome": outcome, "by": by,
                 "seconds": round(seconds, 1)}  # fmt: skip
        self.known[entry["file"], entry["key"]] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


@cache
def hash_of_tests(file: str, by: str) -> str:
    """Of the test file of `by` or, without it, of all that judge `file`; and of the helpers."""
    names = [by.split("::")[0]] if by else test_files(file)
    helpers = [p for p in (ROOT / "tests").glob("*.py") if not p.name.startswith("test_")]
    paths = sorted({*helpers, *(ROOT / "tests" / name for name in names)})
    text = "".join(path.read_text(encoding="utf-8") for path in paths if path.exists())
    return sha256(text.encode() + (b"" if by else repr(CHECKS[file]).encode())).hexdigest()[:12]


def copy_tree(worker: int) -> Path:
    tree = WORK / f"tree-{worker}"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("ppo_kernel", "reference", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tree)
    return tree


def check_unbroken(tree: Path, files: list[str]):
    """The tests must pass on the kernel as it is; this also fills the caches."""
    for file in files:
        started = time.monotonic()
        _, status = os.waitpid(fork_tests(tree, file, ""), 0)
        outcome, by = read_outcome(tree, status)
        if outcome != "survived":
            log = (tree / "log.txt").read_text(errors="replace")
            sys.exit(f"{log}\nThe tests of {file} do not pass unmutated: {outcome}, {by}.")
        print(f"{file}: its tests pass in {time.monotonic() - started:.0f} s.", flush=True)


def run_all(pending: list[Mutant], trees: list[Path], results: Results):
    """One child a tree at a time; the next mutant goes where one has ended."""
    queue, running, done = iter(pending), {}, 0

    def start(tree: Path):
        mutant = next(queue, None)
        if mutant is not None:
            (tree / "ppo_kernel" / mutant.file).write_text(mutant.source, encoding="utf-8")
            pid = fork_tests(tree, mutant.file, mutant.function)
            running[pid] = tree, mutant, time.monotonic()

    def finish(pid: int, status: int):
        nonlocal done
        tree, mutant, started = running.pop(pid)
        outcome, by = read_outcome(tree, status)
        shutil.copy2(ROOT / "ppo_kernel" / mutant.file, tree / "ppo_kernel" / mutant.file)
        seconds, done = time.monotonic() - started, done + 1
        results.add(mutant, outcome, by, seconds)
        progress = f"{done}/{len(pending)} {mutant.file}:{mutant.line}"
        print(f"{progress} {outcome} {by} {seconds:.1f} s", flush=True)
        start(tree)

    try:
        for tree in trees:
            start(tree)
        while running:
            finish(*os.wait())
    finally:  # an interrupted run leaves no child behind
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def fork_tests(tree: Path, file: str, function: str) -> int:
    """A child that runs the tests of `file` in `tree`, those that name `function` first."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.chdir(tree)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # A mutant may have the size and the second of its original, all that a cache file knows.
        sys.dont_write_bytecode = bool(function)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        names = [f"tests/{name}" for name in test_files(file)]
        plugin = Selection(CHECKS[file], function, tree / "by.txt", SECONDS_A_TEST)
        # The parent has imported Hypothesis before pytest could rewrite its assertions.
        known = "ignore:Module already imported so cannot be rewritten"
        options = ["-x", "-q", "-W", known, "-p", "no:cacheprovider", "--rootdir", "."]
        status = int(pytest.main([*options, *names], plugins=[plugin]))
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def read_outcome(tree: Path, status: int) -> tuple[str, str]:
    """(outcome, the test that decided it)."""
    note = tree / "by.txt"
    by = note.read_text() if note.exists() else ""
    note.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(status)
    outcome = PYTEST.get(code) if code >= 0 else SIGNALS.get(-code)
    if outcome is None:
        # Out of memory, say: nothing that the tests have found.
        sys.exit(f"The tests ended with {code}, neither passed nor failed; see {tree / 'log.txt'}.")
    return outcome, "" if outcome == "survived" else by


if __name__ == "__main__":
    sys.exit(main())
