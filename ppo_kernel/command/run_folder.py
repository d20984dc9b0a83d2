"""A run on disk: configuration, metrics, TensorBoard events, samples, curves, models."""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from ..trainer.supervised import Report
from .display import Display

CURVES = {
    "reward": "mean reward",
    "judge": "independent judge",
    "exact": "exact answers, held-out problems",
    "kl_divergence": "KL to the SFT policy, nats per sequence",
    "entropy": "entropy, nats per token",
    "response_length": "response length, tokens",
}
"""Metric of the `ppo` stage -> title of its panel in `curves.png`."""

_NO_METRICS = ("stage", "step", "time_s")
_LOCK = "run.lock"
_FILES = (
    *(_LOCK, "config.json", "metrics.jsonl", "samples.jsonl", "events.out.tfevents.*"),
    *(f"{name}.png" for name in ("curves", *CURVES)),
    *("sft", "reward_model", "policy", "checkpoint"),
    *(".config.json", ".metrics.jsonl", ".samples.jsonl", ".saving-*", ".replaced-*"),
)
"""Everything that a run writes into its folder, with what a killed one may leave."""


class RunFolder:
    """Writes one run; a context manager.

    Files: `config.json`, `metrics.jsonl` (one line per report: stage, step, time, metrics),
    TensorBoard events, `samples.jsonl`, `curves.png` and one PNG per curve; models and checkpoints
    go into sub-folders by their own writers. `run.lock` keeps other processes out while this one
    writes; the system releases it when the process ends, however it ends.

    Args:
        path: the folder.
        resume: settings of the run, written to its `config.json`; a folder with the beginning of
            the same run is continued. None takes an empty folder only.

    Raises:
        ValueError: the folder has a run of other settings, or anything that no run has written;
            or another process writes to it.
    """

    def __init__(self, path: str | Path, *, resume: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self._file = self.path / "metrics.jsonl"
        check_output(self.path, empty=resume is None)
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(_locked(self.path))
            if resume is not None:
                check_same_run(self.path, resume)
                self.config(**resume)
            self._lines = _read_lines(self._file)
            self._start = time.monotonic() - (self._lines[-1]["time_s"] if self._lines else 0.0)
            self._open()
            self._lock = stack.pop_all()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._lock.close()

    def config(self, **settings: Any) -> None:
        """Write `config.json`; dataclasses become dictionaries, functions their names."""
        _replace(self.path / "config.json", json.dumps(settings, indent=2, default=_plain) + "\n")

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics."""
        line = {"stage": stage, "step": step, "time_s": round(time.monotonic() - self._start, 3)}
        line |= dict(values)
        self._metrics.write(json.dumps(line) + "\n")
        self._record(line)
        self._lines.append(line)

    def rewind(self, stage: str, step: int) -> None:
        """Forget the metrics of a stage after `step`: it goes on from there."""
        kept = [line for line in self._lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) < len(self._lines):
            self._close()
            self._lines = kept
            self._open()

    def samples(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the samples of a stage to `samples.jsonl`, in the place of earlier ones."""
        path = self.path / "samples.jsonl"
        old = [line for line in _read_lines(path) if line["stage"] != stage]
        lines = old + [{"stage": stage} | dict(row) for row in rows]
        _replace(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))

    def curves(self) -> list[Path]:
        """Draw the curves of the `ppo` stage that were recorded; returns the files."""
        # Imported here: matplotlib takes a second that every other command would pay.
        from .plots import draw_curves

        lines = [line for line in self._lines if line["stage"] == "ppo"]
        history = {
            name: [(line["step"], line[name]) for line in lines if name in line] for name in CURVES
        }
        return draw_curves(history, CURVES, self.path)

    def _open(self) -> None:
        """Start the files of metrics with the lines there are."""
        _replace(self._file, "".join(json.dumps(line) + "\n" for line in self._lines))
        self._metrics = self._file.open("a", buffering=1, encoding="utf-8")
        # TensorBoard has no way to take back the events of one stage: they are written anew.
        for old in self.path.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = SummaryWriter(str(self.path))
        for line in self._lines:
            self._record(line)

    def _close(self) -> None:
        self._metrics.close()
        self._events.close()

    def _record(self, line: Mapping[str, Any]) -> None:
        for name in line.keys() - _NO_METRICS:
            self._events.add_scalar(f"{line['stage']}/{name}", line[name], line["step"])


def reporter(stage: str, num_steps: int, *, display: Display, run: RunFolder) -> Report:
    """Begin a supervised stage; returns the function that shows and records its metrics."""
    name = stage.replace(" ", "_")
    display.stage(stage, num_steps)
    run.rewind(name, -1)

    def report(step: int, metrics: dict[str, float]) -> None:
        display.update(stage, step, metrics)
        run.metrics(name, step, metrics)

    return report


def check_output(path: Path, *, empty: bool = False) -> None:
    """Refuse a folder with anything that no run has written, before something is overwritten.

    Args:
        path: of the folder, which need not exist.
        empty: refuse a run too.

    Raises:
        ValueError: names a file that is there.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file; choose a folder for the run.")
    found = sorted(x.name for x in path.iterdir()) if path.is_dir() else []
    if empty and found:
        raise ValueError(f"{path} is not empty, it has {found[0]}; choose another folder.")
    foreign = [name for name in found if not any(fnmatch(name, known) for known in _FILES)]
    if found and _LOCK not in found:
        foreign = foreign or found
    if foreign:
        raise ValueError(
            f"{path} has {foreign[0]}, which no run of ppo-kernel has written; choose a new folder "
            "for the run."
        )


def _locked(path: Path) -> TextIO:
    """The open lock file of the folder: held until it is closed, or the process ends."""
    lock = (path / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise ValueError(
            f"process {owner} is writing to {path}; wait for it, or choose another folder."
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def check_same_run(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other settings than those of its `config.json`.

    One that was stopped before its first metrics has nothing to go on with, and gives way.

    Raises:
        ValueError: the folder has a run without them, or with others: which, and their values.
    """
    file = path / "config.json"
    if not _read_lines(path / "metrics.jsonl"):
        return
    if not file.is_file():
        raise ValueError(f"{path} has a run without config.json; choose another folder.")
    old = _flat(json.loads(file.read_text(encoding="utf-8")))
    new = _flat(json.loads(json.dumps(settings, default=_plain)))
    differing = [name for name in old | new if old.get(name) != new.get(name)]
    if differing:
        some = (f"{x} was {old.get(x)!r}, now {new.get(x)!r}" for x in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        shown = "; ".join(some) + more
        raise ValueError(
            f"{path} has a run of other settings: {shown}. Give the same settings to go on with "
            "it, or choose another folder."
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: the keys joined by dots."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    parts = (_flat(value, f"{prefix}.{name}".lstrip(".")) for name, value in settings.items())
    return {name: value for part in parts for name, value in part.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What stands after the last newline was cut short when the run was killed.
    return [json.loads(line) for line in lines[:-1]]


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _plain(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        # Not asdict: that would copy, and recurse into, values that are not settings.
        return {field.name: vars(x)[field.name] for field in dataclasses.fields(x)}
    return getattr(x, "__name__", None) or str(x)
