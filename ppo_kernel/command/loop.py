"""The stages of a run: what they report, and the PPO stage itself."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ..io.padding import left_pad
from ..models.protocol import Policy
from ..trainer.ppo import PPOBatch, PPOTrainer
from ..trainer.supervised import Report, shuffled
from .display import Display
from .run_folder import RunFolder

Evaluate = Callable[[Policy], dict[str, float]]
"""policy -> metrics on held-out prompts."""


def random_streams(
    seed: int, *, keys: int, generators: int
) -> tuple[list[Key[Array, ""]], list[np.random.Generator]]:
    """All randomness of a run, each stream apart from the others and from those of other seeds.

    `seed + 1` would be apart from `seed`, but not from the first stream of the next run.
    """
    return (
        list(jax.random.split(jax.random.key(seed), keys)),
        [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(generators)],
    )


def reporter(stage: str, num_steps: int, *, display: Display, run: RunFolder) -> Report:
    """Begin a supervised stage; what `fit` calls to show and to record its metrics."""
    display.stage(stage, num_steps)
    run.rewind(stage.replace(" ", "_"), -1)

    def report(step: int, metrics: dict[str, float]) -> None:
        display.update(stage, step, metrics)
        run.metrics(stage.replace(" ", "_"), step, metrics)

    return report


def prompt_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    *,
    pad_id: int,
    width: int,
    rng: np.random.Generator,
    start: int = 0,
) -> Iterator[PPOBatch]:
    """Endless batches of prompts, every one once an epoch, in a new order each.

    `rng` decides the order alone, so the batches from number `start` on are what a run that goes
    on there would have seen.

    Raises:
        ValueError: there are fewer prompts than a batch takes.
    """
    order = shuffled(len(prompts), batch_size, rng, what="prompts")
    for indices in itertools.islice(order, start, None):
        tokens, mask = left_pad([prompts[i] for i in indices], pad_id=pad_id, width=width)
        yield PPOBatch(jnp.asarray(tokens), jnp.asarray(mask))


def ppo_stage(
    trainer: PPOTrainer,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    num_iterations: int,
    display: Display,
    run: RunFolder,
    rng: np.random.Generator,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 10,
    checkpoint: Path | None = None,
    save_every: int = 10,
) -> None:
    """Run PPO up to `num_iterations`, from wherever `trainer` is, recording each.

    The training state is saved at `checkpoint` every `save_every` iterations and after the last.
    """
    config, done = trainer.config, trainer.iteration
    data = prompt_batches(
        prompts, config.num_prompts, pad_id=trainer.policy_model.pad_token_id, width=width,
        rng=rng, start=done,
    )  # fmt: skip
    display.stage("ppo", num_iterations)
    run.rewind("ppo", done)
    judged: dict[str, float] = {}
    for step in range(done + 1, num_iterations + 1):
        start = time.perf_counter()
        metrics = trainer.train_step(next(data))
        seconds = time.perf_counter() - start
        tokens = metrics["response_length"] * config.train_batch_size
        metrics |= {"tokens_per_second": tokens / seconds, "reward": metrics["mean_reward"]}
        if evaluate is not None and (step % evaluate_every == 0 or step == num_iterations):
            judged = evaluate(trainer.policy.model)
            metrics |= judged
        run.metrics("ppo", step, metrics)
        display.update("ppo", step, metrics | judged)
        if checkpoint is not None and (step % save_every == 0 or step == num_iterations):
            trainer.save_checkpoint(checkpoint)
