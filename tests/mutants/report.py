"""The score: printed, and kept in docs/mutants_results.md."""

import tomllib
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from selection import CHECKS

GOAL = 0.95
PLACE = ("file", "function", "before", "after")
COLUMNS = ("file", "mutants", "caught", "equivalent", "survived", "judged")
HEAD = """# The mutation score

Written by `make mutants`; [mutants.md](mutants.md) says how. A run replaces the rows of its files.
The reason for each equivalent mutant stands in `tests/mutants/equivalent.toml`.
"""


def write(root: Path, mutants, results) -> int:
    """Prints the score and writes it down. The exit status is 1 below the goal."""
    listed = tomllib.loads((root / "tests/mutants/equivalent.toml").read_text())["equivalent"]
    reasons = {tuple(entry[name] for name in PLACE): entry["reason"] for entry in listed}
    survivors = [m for m in mutants if results.of(m)["outcome"] == "survived"]
    equivalent = [m for m in survivors if m.place in reasons]
    unexplained = [m for m in survivors if m.place not in reasons]
    files = dict.fromkeys(m.file for m in mutants)
    stale = {p for p in reasons if p[0] in files} - {m.place for m in equivalent}
    counted = len(mutants) - len(equivalent)
    score = 1 - len(unexplained) / counted
    rows = counts(files, mutants, equivalent, unexplained)
    total = f"{counted - len(unexplained)} of {counted} caught ({score:.1%})"
    total += f", {len(equivalent)} equivalent and not counted."
    print("\n\n".join(["", total, table(rows.values()), *map(diff, unexplained)]))
    for entry in sorted(stale):
        print("Stale in equivalent.toml, no such survivor:", *entry, sep="\n  ")
    record(root / "docs/mutants_results.md", rows)
    return int(score < GOAL or bool(stale))


def counts(files, mutants, equivalent, unexplained) -> dict[str, tuple[str, ...]]:
    """File -> its row of `COLUMNS`."""
    sums = [Counter(m.file for m in group) for group in (mutants, equivalent, unexplained)]
    rows, day = {}, f"{datetime.now(UTC):%Y-%m-%d}"
    for file in files:
        total, same, survived = (group[file] for group in sums)
        caught = total - same - survived
        rows[file] = (f"`{file}`", str(total), str(caught), str(same), str(survived), day)
    return rows


def table(rows) -> str:
    lines = [COLUMNS, ("---", *["--:"] * 4, "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def record(path: Path, rows: dict[str, tuple[str, ...]]):
    """The rows that `path` has of other files stay; those of files that are gone go."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = [tuple(line.strip("| ").split(" | ")) for line in lines if line.startswith("| `")]
    every = {row[0].strip("`"): row for row in cells} | rows
    ordered = [every[file] for file in CHECKS if file in every]
    text = f"{HEAD}\n{table(ordered)}\n\n{versions()}\n"
    path.write_text(text, encoding="utf-8")


def diff(mutant) -> str:
    return f"@@ {mutant.file}:{mutant.line} {mutant.function}\n- {mutant.before}\n+ {mutant.after}"


def versions() -> str:
    names = ("cosmic-ray", "jax", "hypothesis", "pytest")
    return "The last run: " + ", ".join(f"{name} {version(name)}" for name in names) + "."
