"""SFT, reward model and PPO on a model folder, each stage finished once and for all."""

from dataclasses import replace

import numpy as np
from jaxtyping import Array, Key

from ..io.checkpoint import has_checkpoint
from ..io.folders import has_weights
from .display import Display
from .evaluate import Evaluator, as_prompts
from .outcome import compare, held_out_metrics, print_outcome, sample_rows
from .ppo import PPOActorCritic, PPOTrainer
from .preferences import pair_batches, preference_accuracy, preference_loss
from .pretrained import CausalLM, RewardModel
from .run_folder import RunFolder
from .settings import TrainSettings
from .sft import next_token_loss
from .stages import ppo_stage, random_streams, reporter
from .supervised import batches, fit
from .training_data import TrainingData


def run_training(
    settings: TrainSettings, data: TrainingData, display: Display, run: RunFolder
) -> dict[str, float]:
    """All stages that the folder does not have yet; returns the figures that are also printed.

    Every stage reads what the one before has written, so that one that was stopped in between goes
    on as if it had not been.

    Raises:
        FileNotFoundError, ValueError: a model that is not there or does not fit.
        FloatingPointError: a loss is not finite.
    """
    (ppo_key, evaluator_key), (_, sft_rng, reward_rng, ppo_rng) = streams(settings.seed)
    given = None
    if settings.reward_model is not None:
        given = RewardModel.from_pretrained(
            settings.reward_model, compute_dtype=settings.compute_dtype
        )
    policy = _policy(given, settings, data, display, run, rng=sft_rng)
    reward = given or _reward_model(policy, settings, data, display, run, rng=reward_rng)
    return _ppo(
        policy, reward, settings, data, display, run,
        key=ppo_key, evaluator_key=evaluator_key, rng=ppo_rng,
    )  # fmt: skip


def streams(seed: int) -> tuple[list[Key[Array, ""]], list[np.random.Generator]]:
    """(keys of PPO and of the evaluator, generators of split, SFT, reward model and prompts)"""
    return random_streams(seed, keys=2, generators=4)


def _policy(
    given: RewardModel | None,
    settings: TrainSettings,
    data: TrainingData,
    display: Display,
    run: RunFolder,
    *,
    rng: np.random.Generator,
) -> CausalLM:
    """Stage 1: the policy that PPO starts from."""
    base = CausalLM.from_pretrained(settings.model, compute_dtype=settings.compute_dtype)
    if given is not None:
        # Asked before hours of SFT: do they fit each other?
        PPOActorCritic(base, given, settings.ppo)
    if settings.sft is None:
        return base
    folder, config = run.path / "sft", data.sft_fit
    if not has_weights(folder):
        trained = fit(
            base.model,
            next_token_loss,
            batches(data.examples, data.num_read, config, rng),
            config,
            report=reporter("sft", config.num_steps, display=display, run=run),
        )
        base.with_model(trained).save_pretrained(folder)
    return CausalLM.from_pretrained(folder, compute_dtype=settings.compute_dtype)


def _reward_model(
    policy: CausalLM,
    settings: TrainSettings,
    data: TrainingData,
    display: Display,
    run: RunFolder,
    *,
    rng: np.random.Generator,
) -> RewardModel:
    """Stage 2: what people prefer, from the policy's trunk."""
    folder, config = run.path / "reward_model", data.reward_fit
    if not has_weights(folder):
        start = RewardModel.on(policy)
        trained = fit(
            start.model,
            preference_loss,
            pair_batches(data.pairs, config, rng),
            config,
            report=reporter("reward model", config.num_steps, display=display, run=run),
        )
        accuracy = preference_accuracy(
            trained, data.held_out_pairs, width=max(config.widths), batch_size=config.batch_size
        )
        run.metrics("reward_model", config.num_steps, {"held_out_accuracy": accuracy})
        display.print(
            f"reward model: right on {accuracy:.1%} of {len(data.held_out_pairs)} held-out pairs"
        )
        start.with_model(trained).save_pretrained(folder)
    return RewardModel.from_pretrained(folder, compute_dtype=settings.compute_dtype)


def _ppo(
    policy: CausalLM,
    reward: RewardModel,
    settings: TrainSettings,
    data: TrainingData,
    display: Display,
    run: RunFolder,
    *,
    key: Key[Array, ""],
    evaluator_key: Key[Array, ""],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Stage 3, and what it has changed."""
    width = max(map(len, data.prompts + data.held_out_prompts))
    models = PPOActorCritic(policy, reward, settings.ppo)
    trainer = PPOTrainer(config=settings.ppo, actor_critic_model=models, rng_key=key)
    generation = settings.ppo.generation(width, policy.eos_token_ids, policy.pad_token_id)
    evaluator = Evaluator(
        as_prompts(data.held_out_prompts, pad_id=policy.pad_token_id, width=width),
        reference=policy.model,
        reward=models.reward(),
        tokenizer=data.tokenizer,
        config=replace(generation, samples_per_prompt=1, decode_slots=None),
        key=evaluator_key,
    )
    before = evaluator(policy.model)
    run.samples("before", sample_rows(before))
    checkpoint = run.path / "checkpoint"
    if has_checkpoint(checkpoint):
        trainer.load_checkpoint(checkpoint)
    ppo_stage(
        trainer, data.prompts, width=width, num_iterations=settings.num_iterations,
        display=display, run=run, rng=rng, checkpoint=checkpoint, save_every=settings.save_every,
        evaluate=lambda policy: held_out_metrics(evaluator(policy)),
        evaluate_every=settings.evaluate_every,
    )  # fmt: skip
    after = evaluator(trainer.policy.model)
    run.samples("after", sample_rows(after))
    figures = compare(before, after)
    run.rewind("result", 0)
    run.metrics("result", settings.num_iterations, figures)
    run.curves()
    trainer.save_model(run.path / "policy")
    print_outcome(display, before, after, figures)
    return figures
