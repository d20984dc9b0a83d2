"""A run on disk: configuration, metrics, TensorBoard events, samples, curves, models."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

CURVES = {
    "reward": "mean reward",
    "judge": "independent judge",
    "exact": "exact answers, held-out problems",
    "kl_divergence": "KL to the SFT policy, nats a sequence",
    "entropy": "entropy, nats a token",
    "response_length": "response length, tokens",
}
"""Metric of the `ppo` stage -> title of its panel in `curves.png`."""


class RunFolder:
    """Writes one run; a context manager.

    Files: `config.json`, `metrics.jsonl` (one line a report: stage, step, time, metrics),
    TensorBoard events, `samples.jsonl`, `curves.png` and one PNG a curve; models and checkpoints
    go into sub-folders by their own writers.

    Raises:
        ValueError: the folder has a run in it already.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if (self.path / "metrics.jsonl").exists():
            raise ValueError(f"{self.path} has a run in it; choose another folder or delete it.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._metrics = (self.path / "metrics.jsonl").open("w", buffering=1, encoding="utf-8")
        self._events = SummaryWriter(str(self.path))
        self._start = time.monotonic()
        self._history: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._events.close()

    def config(self, **settings: Any) -> None:
        """Write `config.json`; dataclasses become dictionaries, functions their names."""
        text = json.dumps(settings, indent=2, default=_plain)
        (self.path / "config.json").write_text(text + "\n", encoding="utf-8")

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics."""
        line = {"stage": stage, "step": step, "time_s": round(time.monotonic() - self._start, 3)}
        self._metrics.write(json.dumps(line | dict(values)) + "\n")
        history = self._history.setdefault(stage, {})
        for name, value in values.items():
            self._events.add_scalar(f"{stage}/{name}", value, step)
            history.setdefault(name, []).append((step, value))

    def samples(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append samples to `samples.jsonl`."""
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"stage": stage} | dict(row), ensure_ascii=False) + "\n")

    def curves(self) -> list[Path]:
        """Draw the curves of the `ppo` stage that were recorded; returns the files."""
        # Imported here: matplotlib takes a second that every other command would pay.
        from .plots import draw_curves

        return draw_curves(self._history.get("ppo", {}), CURVES, self.path)


def _plain(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        # Not asdict: that would copy, and recurse into, values that are not settings.
        return {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    return getattr(x, "__name__", None) or str(x)
