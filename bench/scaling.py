"""How the cost of a stage grows with T, B, V, L and devices: `python -m bench.scaling`.

Every point is a process of its own (`bench.step`), so that none inherits another's memory. The
exponent is the slope of log(time) over log(value) by least squares.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.sizes import parse_size, positive
from bench.work import WORK

matplotlib.use("Agg")

FIELDS = {"T": "response", "B": "batch", "V": "vocab", "L": "layers", "devices": None}
"""Axis -> the field of a size that it changes."""

VALUES = {
    "T": [64, 128, 256, 512, 1024],
    "B": [4, 8, 16, 32],
    "V": [2_000, 8_000, 32_000],
    "L": [2, 4, 8, 16],
    "devices": [1, 2, 4],
}


def points(axis: str, values: list[int], flags: argparse.Namespace) -> list[dict]:
    """Measure each value; what `bench.step` prints, with the value and attention's share."""
    measured = []
    for value in values:
        field = FIELDS[axis]
        shape = flags.shape if field is None else f"{flags.shape},{field}={value}"
        command = [sys.executable, "-m", "bench.step", "--shape", shape, "--stage", flags.stage]
        command += ["--dtype", flags.dtype, "--rounds", str(flags.rounds)]
        command += ["--mesh", str(value)] if field is None else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        point = json.loads(done.stdout.splitlines()[-1])
        work = WORK[flags.stage](parse_size(shape), 4)
        measured.append(point | {"value": value, "attention_share": work.attention_share})
        print(f"{axis} = {value}: {1e3 * point['median_s']:.1f} ms", file=sys.stderr)
    return measured


def exponents(measured: list[dict]) -> dict[str, float]:
    """Slopes: of the time, of the time without attention's share, of the time over counted FLOPs.

    The share is attention's part of the counted FLOPs, so the second one takes it that attention
    runs as fast as the rest.
    """
    value, seconds, share, work = (
        np.array([point[key] for point in measured], float)
        for key in ("value", "median_s", "attention_share", "gflop")
    )
    return {
        "time": slope(value, seconds),
        "without_attention": slope(value, seconds * (1 - share)),
        "time_per_flop": slope(value, seconds / work),
    }


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def print_tables(runs: dict[str, list[dict]], flags: argparse.Namespace) -> None:
    """One table an axis, with its exponents below."""
    console = Console(width=110)
    for axis, measured in runs.items():
        table = Table(title=f"{flags.stage} of {flags.shape} against {axis}")
        for column in (axis, "median", "compile", "tokens/s", "MFU", "attention", "temporary"):
            table.add_column(column, justify="right")
        for point in measured:
            table.add_row(
                f"{point['value']:,}", f"{1e3 * point['median_s']:,.1f} ms",
                f"{point['compile_s']:.1f} s", f"{point['tokens_per_s']:,.0f}",
                f"{point['mfu']:.1%}", f"{point['attention_share']:.1%}",
                "-" if point["temporary_mb"] is None else f"{point['temporary_mb']:,.0f} MB",
            )  # fmt: skip
        console.print(table)
        fitted = exponents(measured)
        console.print(
            f"exponent of the time {fitted['time']:.2f}, without attention's share "
            f"{fitted['without_attention']:.2f}, of the time per counted FLOP "
            f"{fitted['time_per_flop']:+.2f}\n"
        )


def plot(runs: dict[str, list[dict]], flags: argparse.Namespace) -> None:
    """Time against each axis, both logarithmic, with the fitted power law."""
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.2 * len(runs), 3.2), squeeze=False, layout="constrained"
    )
    for panel, (axis, measured) in zip(axes[0], runs.items(), strict=True):
        value = np.array([point["value"] for point in measured], float)
        seconds = np.array([point["median_s"] for point in measured])
        exponent, constant = np.polyfit(np.log(value), np.log(seconds), 1)
        panel.plot(value, seconds, "o", color="tab:blue")
        panel.plot(value, np.exp(constant) * value**exponent, color="tab:gray", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel=axis, title=f"exponent {exponent:.2f}")
    axes[0, 0].set_ylabel(f"{flags.stage}, median seconds")
    figure.savefig(flags.plot, dpi=120)
    print(f"Plot: {flags.plot}")


def main() -> None:
    """Parse the flags, measure every axis, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny,epochs=1", help="what the other axes stay at")
    parser.add_argument("--stage", default="step", choices=sorted(WORK))
    parser.add_argument("--axes", nargs="+", default=list(FIELDS), choices=FIELDS)
    parser.add_argument("--values", nargs="+", type=positive, help="instead of the defaults")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--plot", type=Path, default=Path(".benchmarks/scaling.png"))
    flags = parser.parse_args()
    flags.plot.parent.mkdir(parents=True, exist_ok=True)
    runs = {axis: points(axis, flags.values or VALUES[axis], flags) for axis in flags.axes}
    flags.plot.with_suffix(".json").write_text(json.dumps(runs, indent=1))
    print_tables(runs, flags)
    plot(runs, flags)


if __name__ == "__main__":
    main()
