"""Benchmarks against a saved baseline, as ratios to a calibration kernel timed between its rounds.

`python -m bench.regression save RESULTS BASELINE`, later `... check RESULTS BASELINE`: a machine
that is slow today slows the kernel too, and the ratio stays.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def read(results: Path) -> tuple[str, dict[str, float]]:
    """The kind of machine, and name of a benchmark -> its fastest round over the kernel's fastest.

    A baseline holds for a kind: an accelerator's, or the maker of the processor.

    Raises:
        ValueError: no file of pytest-benchmark, or one without a benchmark.
    """
    found = json.loads(results.read_text()) if results.is_file() else {}
    if not found.get("benchmarks"):
        raise ValueError(f"{results} has no benchmarks; `make bench` writes them.")
    benchmarks, info = found["benchmarks"], found["machine_info"]
    device = benchmarks[0]["extra_info"]["device"]
    kind = info["cpu"].get("vendor_id_raw", info["machine"]) if device == "cpu" else device
    # The fastest rounds are those that other processes disturbed least.
    return kind, {
        f"{b['group']}: {b['extra_info']['name']}": b["stats"]["min"]
        / b["extra_info"]["calibration_s"]
        for b in benchmarks
    }


def compare(
    now: dict[str, float], baseline: dict[str, float], tolerance: float
) -> list[tuple[str, float, float, str]]:
    """(name, baseline, now, verdict) of every benchmark that both have."""
    rows = []
    for name in sorted(now.keys() & baseline.keys()):
        change = now[name] / baseline[name]
        verdict = "slower" if change > tolerance else "faster" if change * tolerance < 1 else "same"
        rows.append((name, baseline[name], now[name], verdict))
    return rows


def check(results: Path, baseline: Path, tolerance: float) -> int:
    """Print the comparison; 1 if anything is slower than the tolerance allows, 2 without data."""
    if not baseline.exists():
        print(f"No baseline at {baseline}; `make bench-baseline` saves one.")
        return 2
    (kind, now), kinds = read(results), json.loads(baseline.read_text())
    if kind not in kinds:
        print(f"{baseline} has {sorted(kinds)} and not {kind!r}; `make bench-baseline` saves it.")
        return 2
    saved = kinds[kind]
    rows = compare(now, saved, tolerance)
    if not rows:
        print(f"{results} and {baseline} have no benchmark in common.")
        return 2
    title = f"{kind}: ratios to the calibration kernel; slower means above {tolerance:g} x"
    table = Table(title=title)
    for column in ("benchmark", "baseline", "now", "change", "verdict"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for name, before, after, verdict in rows:
        table.add_row(name, f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f} x", verdict)
    Console(width=120).print(table)
    missing = sorted(now.keys() ^ saved.keys())
    if missing:
        print(f"Only on one side, not compared: {', '.join(missing)}.")
    return int(any(verdict == "slower" for *_, verdict in rows))


def save(results: Path, baseline: Path) -> int:
    """Write the ratios; other kinds of machine, and benchmarks that did not run, keep theirs."""
    kind, now = read(results)
    kinds = json.loads(baseline.read_text()) if baseline.exists() else {}
    saved = {name: float(f"{value:.5g}") for name, value in now.items()}
    kinds[kind] = kinds.get(kind, {}) | saved
    baseline.write_text(json.dumps(kinds, indent=1, sort_keys=True) + "\n")
    print(f"Saved {len(saved)} ratios of {kind} to {baseline}.")
    return 0


def main() -> int:
    """Parse the flags, save or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("save", "check"))
    parser.add_argument("results", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--tolerance", type=float, default=1.3)
    flags = parser.parse_args()
    if flags.action == "save":
        return save(flags.results, flags.baseline)
    return check(flags.results, flags.baseline, flags.tolerance)


if __name__ == "__main__":
    sys.exit(main())
