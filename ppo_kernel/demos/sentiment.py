"""RLHF from nothing on human judgements of sentiment: SFT, reward model, PPO, on two CPU cores.

The policy learns to write movie-review snippets. A reward model learns from about 20 human ratings
per text. PPO raises the reward of the policy's continuations of snippets that neither model has
seen. The VADER scorer, which takes no part in the training, judges the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Array, Key
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ..command.display import Display, table
from ..command.loop import PPOStage, run_ppo
from ..command.pipeline import random_streams
from ..command.report import (
    MEANS,
    Evaluator,
    Samples,
    compare,
    held_out_metrics,
    print_comparison,
    sample_rows,
    standard_error,
)
from ..command.run_folder import RunFolder, reporter
from ..config import GenerationConfig
from ..evaluation import ModelReward
from ..models import TransformerConfig
from ..trainer.actor_critic import PPOActorCritic
from ..trainer.config import PPOConfig
from ..trainer.ppo import PPOTrainer
from ..trainer.preferences import score_sequences
from ..trainer.pretrained import CausalLM, RewardModel
from ..trainer.sft import next_token_loss, perplexity
from ..trainer.supervised import FitConfig, batches, fit
from ..types import Prompts
from .human_ratings import load_ratings
from .rated_texts import augment, pair_accuracy, rated_texts_loss, ridge_baseline
from .sentiment_data import DROPPED, SentimentData, prepare, split_prompts

PROMPT_SLOTS, NEW_TOKENS = 8, 24


def _transformer(width: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=2 * width, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=width // 4, tie_embeddings=True, max_positions=128,
    )  # fmt: skip


@dataclass(frozen=True)
class SentimentSettings:
    """Sizes and schedules; the defaults take less than ten minutes on two cores."""

    policy: TransformerConfig = _transformer(128)
    reward_model: TransformerConfig = _transformer(64)
    sft: FitConfig = FitConfig(num_steps=1000, batch_size=32, widths=(26, 48), learning_rate=3e-3)
    reward: FitConfig = FitConfig(
        num_steps=450, batch_size=128, widths=(22, 48), learning_rate=3e-3, average=0.99
    )
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            learning_rate_actor=5e-4, learning_rate_critic=1e-3, train_batch_size=128,
            num_minibatches=2, num_ppo_epochs=2, kl_coeff=0.1, kl_target=7.0, kl_horizon=1280.0,
            max_seq_len=PROMPT_SLOTS + NEW_TOKENS, max_new_tokens=NEW_TOKENS,
            missing_eos_penalty=0.2,
        )
    )  # fmt: skip
    num_iterations: int = 50
    prompt_tokens: tuple[int, int] = (2, 6)
    num_evaluation_prompts: int = 256


def fit_sft(
    data: SentimentData,
    settings: SentimentSettings,
    display: Display,
    run: RunFolder,
    *,
    key: Key[Array, ""],
    rng: np.random.Generator,
) -> CausalLM:
    """Stage 1: a language model of movie-review snippets, from random weights; consumes `key`."""
    model = CausalLM.init(key, settings.policy, tokenizer=data.tokenizer)
    report = reporter("sft", settings.sft.num_steps, display=display, run=run)
    stream = batches(data.train_movies, [0.0] * len(data.train_movies), settings.sft, rng)
    trained = fit(model.model, next_token_loss, stream, settings.sft, report=report)
    return model.with_model(trained)


def fit_reward_model(
    data: SentimentData,
    settings: SentimentSettings,
    display: Display,
    run: RunFolder,
    *,
    key: Key[Array, ""],
    rng: np.random.Generator,
) -> RewardModel:
    """Stage 2: Bradley-Terry on all pairs of human-rated texts of a batch; consumes `key`."""
    start = RewardModel.on(CausalLM.init(key, settings.reward_model, tokenizer=data.tokenizer))
    report = reporter("reward model", settings.reward.num_steps, display=display, run=run)
    dropped = data.tokenizer.id_of(DROPPED)
    stream = batches(
        data.train, data.train_ratings, settings.reward, rng,
        augment=lambda tokens, rng: augment(tokens, rng, dropped),
    )  # fmt: skip
    trained = fit(start.model, rated_texts_loss, stream, settings.reward, report=report)
    return start.with_model(trained)


def reward_model_report(
    model: RewardModel, data: SentimentData, width: int = 64
) -> dict[str, float]:
    """Accuracy on held-out human pairs by rating gap, beside the bag-of-words baseline.

    Keys: `{model}_{pairs}_gap_{gap}` with pairs over all held-out texts, or among movie snippets.
    """
    scorers = {
        "reward_model": score_sequences(model.model, data.held_out, width=width),
        "ridge": ridge_baseline(
            data.train, data.train_ratings, data.held_out,
            vocab_size=model.model.trunk.config.vocab_size,
        ),
    }  # fmt: skip
    kept = {"all": np.ones(len(data.held_out), bool), "movie": data.held_out_domains == "movie"}
    return {
        f"{name}_{pairs}_gap_{gap:g}": pair_accuracy(
            scores[rows], data.held_out_ratings[rows], min_gap=gap
        )[0]
        for name, scores in scorers.items()
        for pairs, rows in kept.items()
        for gap in (0.0, 0.5, 1.0, 2.0)
    }


class Judge:
    """The independent second judge: VADER's compound score in [-1, 1] of prompt and response."""

    def __init__(self):
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in texts])


def run_sentiment(
    display: Display, run: RunFolder, *, seed: int = 0, settings: SentimentSettings | None = None
) -> dict[str, float]:
    """The whole job; returns the figures that are also printed.

    Raises:
        RuntimeError, ValueError: the data cannot be had or is not what it should be.
    """
    settings = settings or SentimentSettings()
    keys, generators = random_streams(seed, keys=4, generators=5)
    sft_key, reward_key, ppo_key, evaluator_key = keys
    split_rng, sft_rng, reward_rng, prompt_rng, ppo_rng = generators
    data = prepare(load_ratings(), settings.policy.vocab_size, split_rng)
    run.config(task="sentiment", seed=seed, settings=settings)
    sft = fit_sft(data, settings, display, run, key=sft_key, rng=sft_rng)
    movies = np.flatnonzero(data.held_out_domains == "movie")
    held_out_perplexity = perplexity(sft.model, [data.held_out[i] for i in movies], width=64)
    reward_model = fit_reward_model(data, settings, display, run, key=reward_key, rng=reward_rng)
    accuracy = reward_model_report(reward_model, data)
    _print_accuracy(display, accuracy)

    train_prompts, evaluation_prompts = split_prompts(
        data, settings.prompt_tokens, settings.num_evaluation_prompts, prompt_rng
    )
    trainer = PPOTrainer(
        config=settings.ppo,
        actor_critic_model=PPOActorCritic(sft, reward_model, settings.ppo),
        rng_key=ppo_key,
    )
    evaluator = Evaluator(
        Prompts.from_ids(evaluation_prompts, sft.pad_token_id, PROMPT_SLOTS),
        reference=sft.model,
        reward=ModelReward(reward_model.model),
        tokenizer=data.tokenizer,
        config=GenerationConfig(NEW_TOKENS, sft.eos_token_ids, sft.pad_token_id),
        key=evaluator_key,
    )
    judge = Judge()
    before = evaluator(sft.model)
    stage = PPOStage(
        train_prompts, PROMPT_SLOTS, settings.num_iterations, ppo_rng,
        evaluate=lambda policy: _judged(evaluator(policy), judge),
    )  # fmt: skip
    run_ppo(stage, trainer, display=display, run=run)
    after = evaluator(trainer.policy.model)
    figures = accuracy | {"sft_held_out_perplexity": held_out_perplexity}
    figures |= figures_of(before, after, judge)
    _save(trainer, sft, reward_model, run)
    _print_result(display, before, after, figures)
    run.samples("before", _rows(before, judge))
    run.samples("after", _rows(after, judge))
    run.metrics("result", settings.num_iterations, figures)
    run.curves()
    return figures


def figures_of(before: Samples, after: Samples, judge: Judge) -> dict[str, float]:
    """`compare`, with the judge's scores."""
    scores = [judge(samples.prompts, samples.responses) for samples in (before, after)]
    return compare(before, after) | {
        "judge_before": float(scores[0].mean()),
        "judge_after": float(scores[1].mean()),
        "judge_gain": float(scores[1].mean() - scores[0].mean()),
        "judge_standard_error": standard_error(scores[1] - scores[0]),
    }


def _judged(samples: Samples, judge: Judge) -> dict[str, float]:
    scores = judge(samples.prompts, samples.responses)
    return held_out_metrics(samples) | {"judge": float(scores.mean())}


def _rows(samples: Samples, judge: Judge) -> list[dict]:
    scores = judge(samples.prompts, samples.responses)
    rows = zip(sample_rows(samples), scores, strict=True)
    return [row | {"judge": float(score)} for row, score in rows]


def _save(trainer: PPOTrainer, sft: CausalLM, reward_model: RewardModel, run: RunFolder) -> None:
    sft.save_pretrained(run.path / "sft")
    reward_model.save_pretrained(run.path / "reward_model")
    trainer.save_model(run.path / "policy")
    trainer.save_checkpoint(run.path / "checkpoint")


def _print_accuracy(display: Display, accuracy: dict[str, float]) -> None:
    rows = [
        [name.replace("_", " "), pairs]
        + [f"{accuracy[f'{name}_{pairs}_gap_{gap:g}']:.1%}" for gap in (0, 0.5, 1, 2)]
        for name in ("reward_model", "ridge")
        for pairs in ("all", "movie")
    ]
    title = "Right on held-out human pairs, by rating gap"
    columns = ["model", "pairs", "any gap", ">= 0.5", ">= 1", ">= 2"]
    display.print(table(title, columns, rows))


def _print_result(
    display: Display, before: Samples, after: Samples, figures: dict[str, float]
) -> None:
    print_comparison(display, before, after, figures, means=MEANS | {"judge": "independent judge"})
    display.print(
        f"reward +{figures['reward_gain_in_sft_deviations']:.2f} standard deviations of the SFT "
        f"policy's scores, judge {figures['judge_gain']:+.3f}, "
        f"KL {figures['kl_per_sequence']:.2f} nats per sequence, "
        f"distinct-2 {figures['distinct_2_kept']:.0%} of the SFT policy's"
    )
