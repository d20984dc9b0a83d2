"""RLHF from nothing on human judgements of sentiment: SFT, reward model, PPO, on two CPU cores.

The policy learns to write movie-review snippets, a reward model learns what 20 people a text
found positive, and PPO moves the policy there from the first words of snippets that neither has
seen. The VADER scorer, which the training never sees, judges the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from jaxtyping import Array, Key
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ..command.display import Display, table
from ..command.evaluate import Evaluator, Samples, as_prompts, standard_error
from ..command.loop import ppo_stage, random_streams, reporter
from ..command.outcome import MEANS, compare, held_out_metrics, print_outcome, sample_rows
from ..command.run_folder import RunFolder
from ..config import GenerationConfig
from ..evaluation import ModelReward
from ..io.tokenizer import Tokenizer
from ..models import TransformerConfig
from ..trainer.config import PPOConfig
from ..trainer.ppo import PPOActorCritic, PPOTrainer
from ..trainer.pretrained import CausalLM, RewardModel
from ..trainer.reward_model import pair_accuracy, reward_model_loss, ridge_baseline, score_sequences
from ..trainer.sft import next_token_loss, perplexity
from ..trainer.supervised import FitConfig, batches, fit
from .human_ratings import RatedText, load_ratings

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
DROPPED = "<unk>"
PROMPT_SLOTS, NEW_TOKENS = 8, 24


def _transformer(width: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=2 * width, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=width // 4, tie_embeddings=True, max_positions=128,
    )  # fmt: skip


@dataclass(frozen=True)
class SentimentSettings:
    """Sizes and schedules; the defaults fit into ten minutes on two cores."""

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


@dataclass(frozen=True)
class Data:
    """Token sequences (BOS ... EOS) and ratings, split by text."""

    tokenizer: Tokenizer
    train: list[list[int]]
    train_ratings: list[float]
    train_movies: list[list[int]]
    held_out: list[list[int]]
    held_out_ratings: np.ndarray
    held_out_domains: np.ndarray


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, lower-cased: the data is small and case says little."""
    backend = tokenizers.Tokenizer(BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, DROPPED, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return Tokenizer.of(backend, eos_token=EOS, pad_token=PAD, bos_token=BOS)


def prepare(
    ratings: Sequence[RatedText], settings: SentimentSettings, rng: np.random.Generator
) -> Data:
    """Split the texts nine to one; the tokenizer is made from the larger part.

    Each distinct text, and each review or article that texts were cut from, is on one side.
    """
    unique = list({rated.text.lower(): rated for rated in ratings}.values())
    sources = sorted({rated.source for rated in unique})
    picked = rng.permutation(len(sources))[: len(sources) // 10]
    held_out_sources = {sources[i] for i in picked}
    held_out = [rated for rated in unique if rated.source in held_out_sources]
    train = [rated for rated in unique if rated.source not in held_out_sources]
    tokenizer = train_tokenizer([rated.text for rated in train], settings.policy.vocab_size)

    def encode(rated: Sequence[RatedText]) -> list[list[int]]:
        return [[*ids, tokenizer.id_of(EOS)] for ids in tokenizer.encode([r.text for r in rated])]

    sequences = encode(train)
    return Data(
        tokenizer=tokenizer,
        train=sequences,
        train_ratings=[rated.rating for rated in train],
        train_movies=[s for s, r in zip(sequences, train, strict=True) if r.domain == "movie"],
        held_out=encode(held_out),
        held_out_ratings=np.array([rated.rating for rated in held_out]),
        held_out_domains=np.array([rated.domain for rated in held_out]),
    )


def augment(tokens: Sequence[int], rng: np.random.Generator, dropped_id: int) -> Sequence[int]:
    """What the reward model trains on: often only a prefix, and always with words missing.

    PPO shows it unfinished texts, and with 20,000 texts it would otherwise learn them by heart.
    """
    if rng.random() < 0.3 and len(tokens) > 6:
        tokens = tokens[: int(rng.integers(6, len(tokens)))]
    missing = rng.random(len(tokens)) < 0.2
    missing[0] = False
    return np.where(missing, dropped_id, tokens).tolist()


def fit_sft(
    data: Data,
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
    data: Data,
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
    trained = fit(start.model, reward_model_loss, stream, settings.reward, report=report)
    return start.with_model(trained)


def reward_model_report(model: RewardModel, data: Data, width: int = 64) -> dict[str, float]:
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


def split_prompts(
    data: Data, settings: SentimentSettings, rng: np.random.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts to train on, prompts to evaluate on): the first words of held-out movie snippets."""
    low, high = settings.prompt_tokens
    movies = [data.held_out[i] for i in np.flatnonzero(data.held_out_domains == "movie")]
    # BOS and at least one token must be left to write before EOS.
    movies = [tokens for tokens in movies if len(tokens) > high + 2]
    prompts = [tokens[: 1 + rng.integers(low, high + 1)] for tokens in movies]
    count = settings.num_evaluation_prompts
    return prompts[count:], prompts[:count]


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
    data = prepare(load_ratings(), settings, split_rng)
    run.config(task="sentiment", seed=seed, settings=settings)
    sft = fit_sft(data, settings, display, run, key=sft_key, rng=sft_rng)
    movies = np.flatnonzero(data.held_out_domains == "movie")
    held_out_perplexity = perplexity(sft.model, [data.held_out[i] for i in movies], width=64)
    reward_model = fit_reward_model(data, settings, display, run, key=reward_key, rng=reward_rng)
    accuracy = reward_model_report(reward_model, data)
    _print_accuracy(display, accuracy)

    train_prompts, evaluation_prompts = split_prompts(data, settings, prompt_rng)
    trainer = PPOTrainer(
        config=settings.ppo,
        actor_critic_model=PPOActorCritic(sft, reward_model, settings.ppo),
        rng_key=ppo_key,
    )
    evaluator = Evaluator(
        as_prompts(evaluation_prompts, pad_id=sft.pad_token_id, width=PROMPT_SLOTS),
        reference=sft.model,
        reward=ModelReward(reward_model.model),
        tokenizer=data.tokenizer,
        config=GenerationConfig(NEW_TOKENS, sft.eos_token_ids, sft.pad_token_id),
        key=evaluator_key,
    )
    judge = Judge()
    before = evaluator(sft.model)
    ppo_stage(
        trainer, train_prompts, width=PROMPT_SLOTS,
        num_iterations=settings.num_iterations, display=display, run=run, rng=ppo_rng,
        evaluate=lambda policy: _judged(evaluator(policy), judge),
    )  # fmt: skip
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
    """The figures that say whether PPO did what it should, to the judge as well."""
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
    print_outcome(display, before, after, figures, means=MEANS | {"judge": "independent judge"})
    display.print(
        f"reward +{figures['reward_gain_in_sft_deviations']:.2f} standard deviations of the SFT "
        f"policy's scores, judge {figures['judge_gain']:+.3f}, "
        f"KL {figures['kl_per_sequence']:.2f} nats a sequence, "
        f"distinct-2 {figures['distinct_2_kept']:.0%} of the SFT policy's"
    )
