"""Learning curves as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_curves(
    history: Mapping[str, Sequence[tuple[int, float]]], titles: Mapping[str, str], folder: Path
) -> list[Path]:
    """One PNG per metric, and `curves.png` with all of them.

    Args:
        history: metric -> (step, value) pairs.
        titles: metric -> title; what has no history is left out.
        folder: where the files go.

    Returns:
        The files written; none where there is nothing to draw.
    """
    drawn = {name: title for name, title in titles.items() if history.get(name)}
    if not drawn:
        return []
    files = []
    for name, title in drawn.items():
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        _curve(axes, history[name], title)
        files.append(_saved(figure, folder / f"{name}.png"))
    figure, grid = plt.subplots(
        1, len(drawn), figsize=(4 * len(drawn), 3.2), layout="constrained", squeeze=False
    )
    for axes, (name, title) in zip(grid[0], drawn.items(), strict=True):
        _curve(axes, history[name], title)
    return [*files, _saved(figure, folder / "curves.png")]


def _curve(axes: Axes, points: Sequence[tuple[int, float]], title: str) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, linewidth=1.5, marker="." if len(points) < 30 else None)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("PPO iteration")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
