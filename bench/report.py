"""Measurements as tables.

`python -m bench.report run FILE PLOT`: a pytest-benchmark JSON file as tables and a plot.
`python -m bench.report history [NAME ...]`: what was measured before, in `bench/history`.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

matplotlib.use("Agg")

COLUMNS = {
    "median": "{:,.2f} ms",
    "compile_s": "{:.2f} s",
    "tokens_per_s": "{:,.0f}",
    "gflop": "{:,.2f}",
    "mfu": "{:.1%}",
    "roofline_fraction": "{:.1%}",
    "temporary_mb": "{:,.1f} MB",
}
"""Column -> format; docs/benchmarks.md defines each."""

HISTORY = Path(__file__).parent / "history"
FIELDS = ("size", "machine", "measure", "values", "unit", "date", "note")
"""Of one measurement in `HISTORY`. Several values are runs, or what the note or measure says."""


def read(path: Path) -> list[dict]:
    """One flat row a benchmark: its group, its median in milliseconds, and its `extra_info`."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [
        {"group": b["group"], "median": 1e3 * b["stats"]["median"], **b["extra_info"]}
        for b in benchmarks
    ]


def print_tables(rows: list[dict], console: Console) -> None:
    """One table a group, and the machine's limits that the fractions refer to."""
    limits = {row["group"]: row["machine"] for row in rows}
    for group in dict.fromkeys(row["group"] for row in rows):
        machine = limits[group]
        console.print(
            f"\n{group}; measured limits: {machine['flops_per_s']:g} GFLOP/s, read "
            f"{machine['bytes_per_s']:g} GB/s, 8-row products {machine['matvec_bytes_per_s']:g} "
            "GB/s of weights"
        )
        table = Table()
        table.add_column("name")
        for column in COLUMNS:
            table.add_column(
                column.replace("_per_s", "/s").removesuffix("_s").replace("_", " "), justify="right"
            )
        for row in (row for row in rows if row["group"] == group):
            table.add_row(row["name"], *(_cell(row[name], COLUMNS[name]) for name in COLUMNS))
        console.print(table)


def print_history(name: str, console: Console) -> None:
    """The measurements of one file, one line each, by size and measure."""
    rows = json.loads((HISTORY / f"{name}.json").read_text())
    table = Table(title=name)
    for field in FIELDS:
        table.add_column(field, overflow="fold")
    for row in sorted(rows, key=lambda row: (row["size"], row["measure"])):
        cells = {**row, "values": ", ".join(f"{value:,}" for value in row["values"])}
        table.add_row(*(escape(cells[field]) for field in FIELDS))
    console.print(table)


def plot(rows: list[dict], path: Path) -> None:
    """Median times, and fractions of the roofline, one row of axes a group."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, grid = plt.subplots(
        len(groups), 2, figsize=(11, 2.6 * len(groups)), squeeze=False, layout="constrained"
    )
    for (left, right), group in zip(grid, groups, strict=True):
        chosen = [row for row in rows if row["group"] == group][::-1]
        names = [row["name"] for row in chosen]
        left.barh(names, [row["median"] for row in chosen], color="tab:blue")
        left.set(title=group, xlabel="median, ms", xscale="log")
        right.barh(names, [row["roofline_fraction"] for row in chosen], color="tab:orange")
        right.set(xlabel="fraction of the measured roofline", yticks=[])
        right.axvline(1.0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main() -> None:
    """Parse the flags, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("results", type=Path)
    run.add_argument("plot", type=Path)
    known = sorted(path.stem for path in HISTORY.glob("*.json"))
    history = commands.add_parser("history")
    history.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    flags = parser.parse_args()
    console = Console(width=150)
    if flags.command == "history":
        for name in flags.names or known:
            print_history(name, console)
        return
    rows = read(flags.results)
    print_tables(rows, console)
    plot(rows, flags.plot)
    print(f"Plot: {flags.plot}")


if __name__ == "__main__":
    main()
