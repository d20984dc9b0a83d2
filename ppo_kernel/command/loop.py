"""The PPO stage of a run: batches of prompts, steps, evaluations, checkpoints."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ..models.protocol import Policy
from ..trainer.batch import PPOBatch
from ..trainer.ppo import PPOTrainer
from ..trainer.supervised import shuffled
from ..types import Prompts
from .display import Display
from .run_folder import RunFolder


@runtime_checkable
class Evaluate(Protocol):
    """Measures a policy on held-out prompts."""

    def __call__(self, policy: Policy) -> dict[str, float]:
        """Metrics by name."""
        ...


@dataclass(frozen=True)
class PPOStage:
    """Length, data and intervals of the PPO stage.

    Attributes:
        prompts: token ids.
        width: slots that prompts are padded to.
        num_iterations: at which the stage ends.
        rng: decides the order of the prompts.
        evaluate: measures the policy every `evaluate_every` iterations; None for never.
        evaluate_every: iterations from one evaluation to the next.
        checkpoint: where the training state is saved; None for nowhere.
        save_every: iterations from one checkpoint to the next.
    """

    prompts: Sequence[Sequence[int]]
    width: int
    num_iterations: int
    rng: np.random.Generator
    evaluate: Evaluate | None = None
    evaluate_every: int = 10
    checkpoint: Path | None = None
    save_every: int = 10

    def is_due(self, step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every`, or the last."""
        return step % every == 0 or step == self.num_iterations


def prompt_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    *,
    pad_id: int,
    width: int,
    rng: np.random.Generator,
    start: int = 0,
) -> Iterator[PPOBatch]:
    """Endless batches of prompts: each prompt once per epoch, in a new order every epoch.

    `rng` decides the order alone, so the batches from number `start` on are those that a run
    resumed there would have seen.

    Raises:
        ValueError: there are fewer prompts than a batch takes.
    """
    order = shuffled(len(prompts), batch_size, rng, what="prompts")
    for indices in itertools.islice(order, start, None):
        batch = Prompts.from_ids([prompts[i] for i in indices], pad_id, width)
        yield PPOBatch(batch.tokens, batch.mask)


def run_ppo(stage: PPOStage, trainer: PPOTrainer, *, display: Display, run: RunFolder) -> None:
    """Run PPO from the trainer's iteration to the last, recording each.

    The training state is saved when it is due and after the last iteration.
    """
    config, done = trainer.config, trainer.iteration
    data = prompt_batches(
        stage.prompts, config.num_prompts, pad_id=trainer.policy_model.pad_token_id,
        width=stage.width, rng=stage.rng, start=done,
    )  # fmt: skip
    display.stage("ppo", stage.num_iterations)
    run.rewind("ppo", done)
    judged: dict[str, float] = {}
    for step in range(done + 1, stage.num_iterations + 1):
        start = time.perf_counter()
        metrics = trainer.train_step(next(data))
        seconds = time.perf_counter() - start
        tokens = metrics["response_length"] * config.train_batch_size
        metrics |= {"tokens_per_second": tokens / seconds, "reward": metrics["mean_reward"]}
        if stage.evaluate is not None and stage.is_due(step, stage.evaluate_every):
            judged = stage.evaluate(trainer.policy.model)
            metrics |= judged
        run.metrics("ppo", step, metrics)
        display.update("ppo", step, metrics | judged)
        if stage.checkpoint is not None and stage.is_due(step, stage.save_every):
            trainer.save_checkpoint(stage.checkpoint)
