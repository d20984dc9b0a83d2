"""The command line: `ppo-kernel train` on your models and texts, `ppo-kernel demo` on ours."""

import enum
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .command.settings import TrainSettings

_EXTRA = ("tyro", "rich", "tensorboardX", "matplotlib", "vaderSentiment", "requests")


class Task(enum.Enum):
    """The jobs of `demo`."""

    sentiment = "sentiment"
    arithmetic = "arithmetic"


@dataclass(frozen=True)
class Demo:
    """Run a whole job on this machine: SFT from nothing, reward, PPO; writes a run folder."""

    task: Task = Task.sentiment
    """sentiment: movie-review snippets and human judgements. arithmetic: a reward in Python."""
    seed: int = 0
    """Of all randomness."""
    output: Path | None = None
    """The run folder; by default runs/<task>-<time>."""


def demo(arguments: Demo) -> None:
    """Run the task with a live view."""
    # Imported here: --help waits for JAX, as the package does, but not for TensorBoard and what the
    # tasks need, which take longer.
    from .command.display import Display
    from .command.report import device_description
    from .command.run_folder import RunFolder

    if arguments.task is Task.sentiment:
        from .demos.sentiment import run_sentiment as run_task
    else:
        from .demos.arithmetic import run_arithmetic as run_task

    name = f"{arguments.task.value}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = arguments.output or Path("runs") / name
    start = time.monotonic()
    try:
        run_folder = RunFolder(folder)
    except ValueError as error:
        sys.exit(f"ppo-kernel demo: {error}")
    with run_folder as run, Display() as display:
        display.print(f"{arguments.task.value} on {device_description()}, writing to {folder}")
        run_task(display, run, seed=arguments.seed)
        display.print(f"{time.monotonic() - start:.0f} s; {folder} has the curves and the models")


def train(settings: TrainSettings) -> None:
    """Run the stages that the output folder does not have yet, with a live view."""
    from .command.display import Display
    from .command.pipeline import Pipeline
    from .command.report import device_description
    from .command.run_folder import RunFolder

    start, folder = time.monotonic(), settings.output
    try:
        pipeline = Pipeline(settings)
        if pipeline.finished:
            print(f"{folder} is finished: {folder / 'policy'} has the policy")
            return
        run_folder = RunFolder(folder, resume=pipeline.config)
    except (ValueError, OSError) as error:
        sys.exit(f"ppo-kernel train: {error}")
    with run_folder as run, Display() as display:
        display.print(f"training on {device_description()}, writing to {folder}")
        for note in (pipeline.data.summary(), *pipeline.data.notes):
            display.print(note)
        pipeline.run(display, run)
        display.print(f"{time.monotonic() - start:.0f} s; {folder} has the curves and the models")


def main() -> None:
    """Entry point of `ppo-kernel`."""
    try:
        _main(sys.argv[1:])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.exit(f"ppo-kernel needs {missing}: pip install 'ppo-kernel[demo]'")


def _main(arguments: list[str]) -> None:
    from .command.flags import choose, flags_of, settings_of

    chosen = choose({"train": flags_of(TrainSettings), "demo": Demo}, arguments)
    if isinstance(chosen, Demo):
        try:
            demo(chosen)
        except OSError as error:
            sys.exit(f"ppo-kernel demo: {error}")
        return
    try:
        settings = settings_of(TrainSettings, chosen)
    except ValueError as error:
        sys.exit(f"ppo-kernel train: {error}")
    try:
        train(settings)
    except (FloatingPointError, OSError) as error:
        sys.exit(f"ppo-kernel train: {error}")
    except KeyboardInterrupt:
        command = shlex.join(["ppo-kernel", *arguments])
        print(f"stopped; to go on from what {settings.output} has: {command}")
        sys.exit(130)


if __name__ == "__main__":
    main()
