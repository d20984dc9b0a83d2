"""A run of the mutants replaces the rows of its own files in the results, and keeps the others."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "mutants"))

import report


def row(file, day):
    return (f"`{file}`", "4", "3", "1", "0", day)


def test_rows_of_other_files_stay_and_those_of_files_that_are_gone_go(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "versions", lambda: "The last run: none.")
    path = tmp_path / "results.md"
    first = {file: row(file, "day 1") for file in ("losses.py", "ops/kl.py", "gone.py")}
    monkeypatch.setattr(report, "CHECKS", dict.fromkeys([*first, "rewards.py"]))
    report.record(path, first)
    monkeypatch.setattr(report, "CHECKS", dict.fromkeys(["ops/kl.py", "losses.py", "rewards.py"]))
    report.record(path, {"losses.py": row("losses.py", "day 2")})
    table = report.table([row("ops/kl.py", "day 1"), row("losses.py", "day 2")])
    assert path.read_text() == f"{report.HEAD}\n{table}\n\nThe last run: none.\n"
