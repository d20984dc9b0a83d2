"""The live view of a run: progress bars and the newest metrics."""

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "judge": "judge",
    "exact": "exact",
    "kl_divergence": "KL",
    "entropy": "entropy",
    "response_length": "length",
    "tokens_per_second": "tokens/s",
}


class Display:
    """A live view: one bar per stage and the newest metrics. A context manager.

    On a terminal it redraws in place; elsewhere it prints a line every few seconds, so that a
    log file stays readable.
    """

    def __init__(self, console: Console | None = None):
        # Texts of a model are printed as they are: "[/INST]" is no markup.
        self.console = console or Console(markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._newest = Text()
        view = Group(self._progress, self._newest)
        self._live = Live(view, console=self.console, refresh_per_second=4)
        self._tasks: dict[str, TaskID] = {}
        self._printed = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps."""
        self._tasks[name] = self._progress.add_task(name, total=total)
        if not self.console.is_terminal:
            self.console.print(f"{name}: {total} steps")

    def update(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        shown = "  ".join(
            f"{label} {metrics[key]:.4g}" for key, label in _SHOWN.items() if key in metrics
        )
        task = self._tasks[name]
        self._progress.update(task, completed=step)
        self._newest.plain = f"{name} {step}  {shown}"
        last = step == self._progress.tasks[task].total
        if not self.console.is_terminal and (last or time.monotonic() - self._printed > 5.0):
            self._printed = time.monotonic()
            left = self._progress.tasks[task].time_remaining
            ending = "" if left is None else f"  left {left:.0f} s"
            self.console.print(f"{name} {step}  {shown}{ending}", soft_wrap=True)

    def print(self, *items: object) -> None:
        """Print above the live view."""
        self.console.print(*items)


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table of text, first column left-aligned."""
    made = Table(title=title, title_justify="left", show_lines=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
