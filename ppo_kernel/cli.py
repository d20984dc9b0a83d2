"""The command line: `ppo-kernel demo`."""

import enum
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


class Task(enum.Enum):
    """What `demo` trains."""

    sentiment = "sentiment"
    arithmetic = "arithmetic"


@dataclass(frozen=True)
class Demo:
    """Run a whole job on this machine: SFT from nothing, reward, PPO; writes a run folder."""

    task: Task = Task.sentiment
    """sentiment: movie-review snippets and human judgements. arithmetic: a reward in Python."""
    seed: int = 0
    """Everything random follows from it."""
    output: Path | None = None
    """The run folder; by default runs/<task>-<time>."""


def demo(arguments: Demo) -> None:
    """Run the task with a live view."""
    # Imported here: --help waits for JAX, as the package does, but not for TensorBoard and what the
    # tasks need, which take longer.
    from .train.display import Display
    from .train.evaluate import device_description
    from .train.run_folder import RunFolder

    if arguments.task is Task.sentiment:
        from .train.tasks.sentiment import run_sentiment as run_task
    else:
        from .train.tasks.arithmetic import run_arithmetic as run_task

    name = f"{arguments.task.value}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = arguments.output or Path("runs") / name
    start = time.monotonic()
    with RunFolder(folder) as run, Display() as display:
        display.print(f"{arguments.task.value} on {device_description()}, writing to {folder}")
        run_task(display, run, seed=arguments.seed)
        display.print(f"{time.monotonic() - start:.0f} s; {folder} has the curves and the models")


def main() -> None:
    """Entry point of `ppo-kernel`."""
    commands = {"demo": Demo}
    arguments = tyro.extras.subcommand_cli_from_dict(
        commands, description="PPO post-training of language models, in one compiled program."
    )
    demo(arguments)


if __name__ == "__main__":
    main()
