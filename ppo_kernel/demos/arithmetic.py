"""RL from a verifiable reward: two-digit addition, from half right to right, on two CPU cores.

SFT from random weights stops when the policy answers about half of the problems; PPO then sees
problems without answers, and a Python function that says whether an answer is right. A problem
is text such as `37+45=`, read digit by digit; the answer is `82` and EOS, most significant digit
first, nothing padded or reversed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array, Key

from ..command.display import Display, table
from ..command.loop import PPOStage, run_ppo
from ..command.pipeline import random_streams
from ..command.report import Evaluator, Samples
from ..command.run_folder import RunFolder, reporter
from ..config import GenerationConfig
from ..io.tokenizer import Tokenizer
from ..models import TransformerConfig
from ..models.protocol import Policy
from ..trainer.actor_critic import PPOActorCritic
from ..trainer.config import PPOConfig
from ..trainer.ppo import PPOTrainer
from ..trainer.pretrained import CausalLM
from ..trainer.sft import next_token_loss
from ..trainer.supervised import FitConfig, batches, fit
from ..trainer.text_reward import PythonReward
from ..types import Prompts
from .sums import (
    ANSWER_WIDTH,
    EOS,
    PROMPT_WIDTH,
    Problem,
    Problems,
    exact,
    make_tokenizer,
    question,
    solved,
    split_problems,
)

NUM_ITERATIONS = 260


def decay(iteration: int) -> float:
    """Schedule of PPO's learning rates: from 1 to a tenth over the default number of iterations."""
    return max(0.1, 1.0 - iteration / NUM_ITERATIONS)


@dataclass(frozen=True)
class ArithmeticSettings:
    """Sizes and schedules; the defaults take less than five minutes on two cores.

    Attributes:
        policy: sizes of the policy, and of the critic that starts as its copy.
        sft: settings of stage 1; `num_steps` is an upper bound.
        sft_stops_at: stage 1 ends when this share of greedy answers is right, on problems that
            it is not trained on (they are prompts of PPO, not the held-out ones).
        ppo: settings of stage 2.
        num_iterations: of PPO.
        operands: the smallest and the largest; all of one length in the default task.
        sft_share, held_out_share: parts of the problems; PPO gets the rest.
        num_stop_problems: how many problems the stop of stage 1 is decided on.
    """

    policy: TransformerConfig = TransformerConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=16, tie_embeddings=True, max_positions=64,
    )  # fmt: skip
    sft: FitConfig = FitConfig(
        num_steps=2000, batch_size=128, widths=(PROMPT_WIDTH + ANSWER_WIDTH,), learning_rate=3e-3
    )
    sft_stops_at: float = 0.42
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            learning_rate_actor=6e-4, learning_rate_critic=1e-3, learning_rate_schedule=decay,
            train_batch_size=1024, samples_per_prompt=8, num_minibatches=8, num_ppo_epochs=2,
            lambda_gae=1.0, value_clip=None, kl_coeff=0.0, entropy_coeff=0.003,
            max_seq_len=PROMPT_WIDTH + ANSWER_WIDTH, max_new_tokens=ANSWER_WIDTH,
        )
    )  # fmt: skip
    num_iterations: int = NUM_ITERATIONS
    operands: tuple[int, int] = (10, 99)
    sft_share: float = 0.4
    held_out_share: float = 0.1
    num_stop_problems: int = 512


class Examiner:
    """Asks a policy a fixed set of problems; shares of exact answers.

    Args:
        problems: what is asked.
        reference: the KL is measured from it.
        tokenizer: of the policy.
        key: of the sampling noise; used for every call.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        reference: Policy,
        tokenizer: Tokenizer,
        key: Key[Array, ""],
    ):
        questions = tokenizer.encode([question(problem) for problem in problems])
        prompts = Prompts.from_ids(questions, tokenizer.id_of(EOS), PROMPT_WIDTH)

        def evaluator(top_k: int | None) -> Evaluator:
            return Evaluator(
                prompts,
                reference=reference,
                reward=PythonReward(exact, tokenizer),
                tokenizer=tokenizer,
                config=GenerationConfig(
                    ANSWER_WIDTH, (tokenizer.id_of(EOS),), tokenizer.id_of(EOS), top_k=top_k
                ),
                key=key,
            )

        self.sampled, self.greedy = evaluator(None), evaluator(1)
        """policy -> `Samples` at temperature 1, and of the likeliest tokens."""

    def __call__(self, policy: Policy) -> dict[str, float]:
        """Shares of exact answers, and the KL a sequence, nats."""
        sampled, greedy = self.sampled(policy), self.greedy(policy)
        return {
            "exact": float(sampled.scores.mean()),
            "exact_greedy": float(greedy.scores.mean()),
            "held_out_kl": float(sampled.sequence_kl.mean()),
        }


def fit_sft(
    problems: Problems,
    settings: ArithmeticSettings,
    display: Display,
    run: RunFolder,
    *,
    key: Key[Array, ""],
    rng: np.random.Generator,
) -> CausalLM:
    """Stage 1: problems with their answers, from random weights, until about half is right.

    Consumes `key`; `rng` orders the problems.
    """
    tokenizer = make_tokenizer()
    model_key, examiner_key = jax.random.split(key)
    model = CausalLM.init(model_key, settings.policy, tokenizer=tokenizer)
    sequences, num_read = solved(problems.sft, tokenizer)
    asked = problems.ppo[: settings.num_stop_problems]
    examiner = Examiner(asked, reference=model.model, tokenizer=tokenizer, key=examiner_key)
    trained = fit(
        model.model,
        next_token_loss,
        batches(sequences, num_read, settings.sft, rng),
        settings.sft,
        report=reporter("sft", settings.sft.num_steps, display=display, run=run),
        report_every=10,
        enough=lambda policy: bool(examiner.greedy(policy).scores.mean() >= settings.sft_stops_at),
    )
    return model.with_model(trained)


def run_arithmetic(
    display: Display, run: RunFolder, *, seed: int = 0, settings: ArithmeticSettings | None = None
) -> dict[str, float]:
    """The whole job; returns the figures that are also printed."""
    settings = settings or ArithmeticSettings()
    (sft_key, examiner_key, ppo_key), (split_rng, sft_rng, ppo_rng) = random_streams(
        seed, keys=3, generators=3
    )
    problems = split_problems(
        settings.operands, settings.sft_share, settings.held_out_share, split_rng
    )
    run.config(task="arithmetic", seed=seed, settings=settings)
    sft = fit_sft(problems, settings, display, run, key=sft_key, rng=sft_rng)
    tokenizer = make_tokenizer()
    examiner = Examiner(
        problems.held_out, reference=sft.model, tokenizer=tokenizer, key=examiner_key
    )
    before = examiner.sampled(sft.model), examiner.greedy(sft.model)
    trainer = PPOTrainer(
        config=settings.ppo,
        actor_critic_model=PPOActorCritic(sft, PythonReward(exact), settings.ppo),
        rng_key=ppo_key,
    )
    asked = tokenizer.encode([question(problem) for problem in problems.ppo])
    stage = PPOStage(asked, PROMPT_WIDTH, settings.num_iterations, ppo_rng, evaluate=examiner)
    run_ppo(stage, trainer, display=display, run=run)
    policy = trainer.policy.model
    after = examiner.sampled(policy), examiner.greedy(policy)
    figures = compare(before, after)
    sft.save_pretrained(run.path / "sft")
    trainer.save_model(run.path / "policy")
    trainer.save_checkpoint(run.path / "checkpoint")
    for stage, samples in (("before", before), ("after", after)):
        run.samples(stage, _rows(*samples))
    run.metrics("result", settings.num_iterations, figures)
    run.curves()
    _print_result(display, before[0], after[0], figures)
    return figures


def compare(before: tuple[Samples, Samples], after: tuple[Samples, Samples]) -> dict[str, float]:
    """The figures of the result, of (sampled, greedy) answers before and after PPO."""
    return {
        "held_out_problems": float(len(before[0].scores)),
        "exact_before": float(before[0].scores.mean()),
        "exact_after": float(after[0].scores.mean()),
        "exact_greedy_before": float(before[1].scores.mean()),
        "exact_greedy_after": float(after[1].scores.mean()),
        "kl_per_sequence": float(after[0].sequence_kl.mean()),
    }


def _rows(sampled: Samples, greedy: Samples) -> list[dict]:
    return [
        {"prompt": p, "response": r, "reward": float(s), "kl": float(k), "greedy": g}
        for p, r, s, k, g in zip(
            sampled.prompts, sampled.responses, sampled.scores, sampled.sequence_kl,
            greedy.responses, strict=True,
        )
    ]  # fmt: skip


def _print_result(
    display: Display, before: Samples, after: Samples, figures: dict[str, float]
) -> None:
    def marked(samples: Samples, row: int) -> list[str]:
        return [samples.responses[row], "right" if samples.scores[row] else "wrong"]

    rows = [
        [before.prompts[row], *marked(before, row), *marked(after, row)]
        for row in range(min(12, len(before.prompts)))
    ]
    display.print(table("Held-out problems, sampled", ["problem", "SFT", "", "PPO", ""], rows))
    rows = [
        [label, f"{figures[f'{key}_before']:.1%}", f"{figures[f'{key}_after']:.1%}"]
        for key, label in (("exact", "sampled at temperature 1"), ("exact_greedy", "greedy"))
    ]
    title = f"Exact answers on {figures['held_out_problems']:.0f} held-out problems"
    display.print(table(title, ["", "SFT", "PPO"], rows))
    display.print(f"KL {figures['kl_per_sequence']:.2f} nats per sequence, in the mean")
