"""The score: printed, and kept in docs/mutants.md."""

import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path

GOAL = 0.95
PLACE = ("file", "function", "before", "after")
START, END = "<!-- results: written by `make mutants` -->", "<!-- end of results -->"


def write(root: Path, mutants, results, *, complete: bool) -> int:
    """Prints the score; a complete run also writes it down. The exit status is 1 below the goal."""
    listed = tomllib.loads((root / "tests/mutants/equivalent.toml").read_text())["equivalent"]
    reasons = {tuple(entry[name] for name in PLACE): entry["reason"] for entry in listed}
    survivors = [m for m in mutants if results.of(m)["outcome"] == "survived"]
    equivalent = [m for m in survivors if m.place in reasons]
    unexplained = [m for m in survivors if m.place not in reasons]
    files = dict.fromkeys(m.file for m in mutants)
    stale = {p for p in reasons if p[0] in files} - {m.place for m in equivalent}
    counted = len(mutants) - len(equivalent)
    score = 1 - len(unexplained) / counted
    total = f"{counted - len(unexplained)} of {counted} caught ({score:.1%})"
    total += f", {len(equivalent)} equivalent and not counted."
    parts = [total, table(files, mutants, equivalent, unexplained)]
    if unexplained:
        parts += ["Survivors:", "```diff\n" + "\n".join(map(diff, unexplained)) + "\n```"]
    print("\n\n".join(["", *parts]))
    for entry in sorted(stale):
        print("Stale in equivalent.toml, no such survivor:", *entry, sep="\n  ")
    if complete:
        parts += [f"Equivalent ({len(equivalent)}):", *(explained(m, reasons) for m in equivalent)]
        record(root / "docs/mutants.md", "\n\n".join([versions(), *parts]))
    return int(score < GOAL or bool(stale))


def table(files, mutants, equivalent, unexplained) -> str:
    counts = [Counter(m.file for m in group) for group in (mutants, equivalent, unexplained)]
    rows = ["| file | mutants | caught | equivalent | survived |", "|---|--:|--:|--:|--:|"]
    for file in files:
        total, same, survived = (count[file] for count in counts)
        rows.append(f"| `{file}` | {total} | {total - same - survived} | {same} | {survived} |")
    return "\n".join(rows)


def diff(mutant) -> str:
    return f"@@ {mutant.file}:{mutant.line} {mutant.function}\n- {mutant.before}\n+ {mutant.after}"


def explained(mutant, reasons) -> str:
    return f"```diff\n{diff(mutant)}\n```\n{reasons[mutant.place]}"


def versions() -> str:
    names = ("cosmic-ray", "jax", "hypothesis", "pytest")
    return "With " + ", ".join(f"{name} {version(name)}" for name in names) + "."


def record(path: Path, text: str):
    before, rest = path.read_text(encoding="utf-8").split(START)
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
