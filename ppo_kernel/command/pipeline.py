"""SFT, reward model and PPO on a model folder; a finished stage is never run again."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Key

from ..io.checkpoint import has_checkpoint
from ..io.folders import has_weights
from ..models.heads import LanguageModel
from ..trainer.actor_critic import PPOActorCritic
from ..trainer.ppo import PPOTrainer, check_devices
from ..trainer.preferences import pair_batches, preference_accuracy, preference_loss
from ..trainer.pretrained import CausalLM, RewardModel
from ..trainer.sft import next_token_loss, perplexity
from ..trainer.supervised import batches, fit
from ..types import Prompts
from .data import load_data
from .display import Display
from .loop import PPOStage, run_ppo
from .report import Evaluator, compare, held_out_metrics, print_comparison, sample_rows
from .run_folder import RunFolder, check_output, check_same_run, reporter
from .settings import TrainSettings


def random_streams(
    seed: int, *, keys: int, generators: int
) -> tuple[list[Key[Array, ""]], list[np.random.Generator]]:
    """The randomness of a run: keys and generators, independent of each other and of other seeds.

    Were the second stage simply seeded with `seed + 1`, it would repeat the first stage of the
    run with the next seed.
    """
    return (
        list(jax.random.split(jax.random.key(seed), keys)),
        [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(generators)],
    )


class Pipeline:
    """SFT, reward model and PPO, resumed from the state of the output folder.

    A stage reads its model from the folder that the stage before has saved, even within one
    process. So a run that was stopped in between ends with the same numbers.

    Args:
        settings: of the run.

    Raises:
        FileNotFoundError: no model folder.
        ValueError: a mistake in a file, settings or models that do not fit each other, or an
            output folder with another run. Nothing has been written then.
    """

    def __init__(self, settings: TrainSettings):
        keys, generators = random_streams(settings.seed, keys=2, generators=4)
        self._ppo_key, self._evaluator_key = keys
        split_rng, self._sft_rng, self._reward_rng, self._prompt_rng = generators
        self.settings, self.folder = settings, settings.output
        _check_apart(settings)
        check_output(self.folder)
        self.data = load_data(settings, split_rng)
        self.config = settings.as_json(self.data.digests)
        check_same_run(self.folder, self.config)
        if not self.finished:
            self._load_models()

    @property
    def finished(self) -> bool:
        """Whether the folder has the policy that PPO ended with."""
        return has_weights(self.folder / "policy")

    def run(self, display: Display, run: RunFolder) -> dict[str, float]:
        """Run the stages whose models the folder does not have yet.

        Returns:
            The figures that are also printed.

        Raises:
            FloatingPointError: a loss is not finite.
            ValueError: scores or parameters of PPO are not finite.
        """
        if self.settings.sft is not None and not has_weights(self.folder / "sft"):
            self._fit_sft(display, run)
        reward = self._given_reward
        if reward is None:
            if not has_weights(self.folder / "reward_model"):
                self._fit_reward_model(display, run)
            reward = self._reward_model(self.folder / "reward_model")
        return self._run_ppo(reward, display, run)

    def _load_models(self) -> None:
        settings = self.settings
        has_sft = settings.sft is not None and has_weights(self.folder / "sft")
        self._policy = self._causal_lm(self.folder / "sft" if has_sft else settings.model)
        given = settings.reward_model
        self._given_reward = None if given is None else self._reward_model(given)
        # PPO would refuse these after hours of SFT.
        reward = self._given_reward or RewardModel.on(self._policy)
        width = self.data.prompt_width
        new_tokens = settings.ppo.generation(width, (), 0).max_new_tokens
        PPOActorCritic(self._policy, reward, settings.ppo).check_length(width, new_tokens)
        check_devices(settings.ppo, jax.device_count())

    def _causal_lm(self, folder: Path) -> CausalLM:
        return CausalLM.from_pretrained(folder, compute_dtype=self.settings.compute_dtype)

    def _reward_model(self, folder: Path) -> RewardModel:
        return RewardModel.from_pretrained(folder, compute_dtype=self.settings.compute_dtype)

    def _fit_sft(self, display: Display, run: RunFolder) -> None:
        """Stage 1: the policy that PPO starts from."""
        examples, config = self.data.examples.train, self.data.sft_fit
        report = reporter("sft", config.num_steps, display=display, run=run)
        before = self._held_out_perplexity(self._policy.model)
        run.metrics("sft", 0, {"held_out_perplexity": before})
        ids, num_read = [x.ids for x in examples], [float(x.num_read) for x in examples]
        stream = batches(ids, num_read, config, self._sft_rng)
        trained = fit(self._policy.model, next_token_loss, stream, config, report=report)
        after = self._held_out_perplexity(trained)
        run.metrics("sft", config.num_steps, {"held_out_perplexity": after})
        display.print(
            f"sft: perplexity of {len(self.data.examples.held_out)} held-out examples from "
            f"{before:.4g} to {after:.4g}"
        )
        self._policy.with_model(trained).save_pretrained(self.folder / "sft")
        self._policy = self._causal_lm(self.folder / "sft")

    def _held_out_perplexity(self, policy: LanguageModel) -> float:
        held_out, config = self.data.examples.held_out, self.data.sft_fit
        return perplexity(
            policy, [x.ids for x in held_out], [float(x.num_read) for x in held_out],
            width=max(config.widths), batch_size=config.batch_size,
        )  # fmt: skip

    def _fit_reward_model(self, display: Display, run: RunFolder) -> None:
        """Stage 2: a reward model from pairs, on the policy's trunk."""
        pairs, config = self.data.pairs, self.data.reward_fit
        report = reporter("reward model", config.num_steps, display=display, run=run)
        start = RewardModel.on(self._policy)
        stream = pair_batches(pairs.train, config, self._reward_rng)
        trained = fit(start.model, preference_loss, stream, config, report=report)
        accuracy = preference_accuracy(
            trained, pairs.held_out, width=max(config.widths), batch_size=config.batch_size
        )
        run.metrics("reward_model", config.num_steps, {"held_out_accuracy": accuracy})
        display.print(
            f"reward model: right on {accuracy:.1%} of {len(pairs.held_out)} held-out pairs"
        )
        start.with_model(trained).save_pretrained(self.folder / "reward_model")

    def _run_ppo(self, reward: RewardModel, display: Display, run: RunFolder) -> dict[str, float]:
        """Stage 3: PPO, and its comparison with the policy before."""
        settings, policy = self.settings, self._policy
        models = PPOActorCritic(policy, reward, settings.ppo)
        trainer = PPOTrainer(config=settings.ppo, actor_critic_model=models, rng_key=self._ppo_key)
        evaluator = self._evaluator(models)
        before = evaluator(policy.model)
        run.samples("before", sample_rows(before))
        checkpoint = self.folder / "checkpoint"
        if has_checkpoint(checkpoint):
            trainer.load_checkpoint(checkpoint)
        stage = PPOStage(
            self.data.prompts.train, self.data.prompt_width, settings.num_iterations,
            self._prompt_rng, evaluate=lambda policy: held_out_metrics(evaluator(policy)),
            evaluate_every=settings.evaluate_every,
            checkpoint=checkpoint, save_every=settings.save_every,
        )  # fmt: skip
        run_ppo(stage, trainer, display=display, run=run)
        after = evaluator(trainer.policy.model)
        run.samples("after", sample_rows(after))
        figures = compare(before, after)
        run.rewind("result", 0)
        run.metrics("result", settings.num_iterations, figures)
        run.curves()
        # Last: a folder that has it is finished.
        trainer.save_model(self.folder / "policy")
        print_comparison(display, before, after, figures)
        return figures

    def _evaluator(self, models: PPOActorCritic) -> Evaluator:
        policy, width = models.policy_model, self.data.prompt_width
        generation = models.config.generation(
            width, policy.eos_token_ids, policy.pad_token_id, policy.banned_token_ids
        )
        return Evaluator(
            Prompts.from_ids(self.data.prompts.held_out, policy.pad_token_id, width),
            reference=policy.model,
            reward=models.reward(),
            tokenizer=self.data.tokenizer,
            config=replace(generation, samples_per_prompt=1, decode_slots=None),
            key=self._evaluator_key,
        )


def _check_apart(settings: TrainSettings) -> None:
    """Refuse a model that lies in the output folder: the run would write over it."""
    output = settings.output.expanduser().resolve()
    for name, path in (("model", settings.model), ("reward_model", settings.reward_model)):
        if path is not None and path.expanduser().resolve().is_relative_to(output):
            raise ValueError(
                f"{name}={path} lies in output={settings.output}, where the run would write over "
                "it; choose another output folder."
            )
