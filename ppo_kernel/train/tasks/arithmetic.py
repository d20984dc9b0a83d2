"""RL from a verifiable reward: two-digit addition, from half right to right, on two CPU cores.

SFT from random weights stops when the policy answers about half of the problems; PPO then sees
problems without answers, and a Python function that says whether an answer is right. A problem
is text such as `37+45=`, read digit by digit; the answer is `82` and EOS, most significant digit
first, nothing padded or reversed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers.models import BPE

from ...config import GenerationConfig
from ...io.tokenizer import Tokenizer
from ...models import TransformerConfig
from ...models.base import Policy
from ..config import PPOConfig
from ..display import Display, table
from ..evaluate import Evaluator, Samples, as_prompts
from ..ppo import PPOActorCritic, PPOTrainer, PythonReward
from ..pretrained import CausalLM
from ..run_folder import RunFolder
from ..sft import next_token_loss
from ..stages import ppo_stage, reporter
from ..supervised import FitConfig, batches, fit

EOS = "</s>"
ALPHABET = "0123456789+="
PROMPT_WIDTH = len("99+99=")
ANSWER_WIDTH = len("198") + 1
"""Tokens of the longest answer, EOS included."""

Problem = tuple[int, int]


@dataclass(frozen=True)
class ArithmeticSettings:
    """Sizes and schedules; the defaults fit into five minutes on two cores.

    Attributes:
        policy: sizes of the policy, and of the critic that starts as its copy.
        sft: settings of stage 1; `num_steps` is an upper bound.
        sft_stops_at: stage 1 ends when this share of sampled answers is right, on problems that
            it is not trained on (they are prompts of PPO, not the held-out ones).
        ppo: settings of stage 2.
        num_iterations: of PPO.
        limit: operands are below it.
        sft_share, held_out_share: parts of the problems; PPO gets the rest.
        num_stop_problems: how many problems the stop of stage 1 is decided on.
    """

    policy: TransformerConfig = TransformerConfig(
        vocab_size=16, hidden_size=96, intermediate_size=192, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=24, tie_embeddings=True, max_positions=64,
    )  # fmt: skip
    sft: FitConfig = FitConfig(
        num_steps=4000, batch_size=128, widths=(PROMPT_WIDTH + ANSWER_WIDTH,), learning_rate=2e-3
    )
    sft_stops_at: float = 0.42
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            learning_rate_actor=1e-3, learning_rate_critic=2e-3, train_batch_size=512,
            samples_per_prompt=4, num_minibatches=4, num_ppo_epochs=2, kl_coeff=0.0,
            max_seq_len=PROMPT_WIDTH + ANSWER_WIDTH, max_new_tokens=ANSWER_WIDTH,
        )
    )  # fmt: skip
    num_iterations: int = 150
    limit: int = 100
    sft_share: float = 0.3
    held_out_share: float = 0.1
    num_stop_problems: int = 512


@dataclass(frozen=True)
class Problems:
    """Three parts without a common problem; `a+b` and `b+a` are in the same part."""

    sft: list[Problem]
    ppo: list[Problem]
    held_out: list[Problem]


def make_tokenizer() -> Tokenizer:
    """One token a character, and EOS, which pads as well: every other id is seen in the text."""
    vocabulary = {token: i for i, token in enumerate([EOS, *ALPHABET])}
    backend = tokenizers.Tokenizer(BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS])
    return Tokenizer.of(backend, eos_token=EOS, pad_token=EOS)


def split_problems(settings: ArithmeticSettings, seed: int) -> Problems:
    """All problems, split at random; a pair of operands is in one part in both orders."""
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(settings.limit) for b in range(a, settings.limit)]
    bounds = np.cumsum([settings.sft_share, settings.held_out_share]) * len(pairs)
    parts = np.split(rng.permutation(len(pairs)), bounds.round().astype(int))

    def both_orders(part: np.ndarray) -> list[Problem]:
        chosen = sorted({p for i in part for p in (pairs[i], pairs[i][::-1])})
        return [chosen[i] for i in rng.permutation(len(chosen))]

    sft, held_out, ppo = (both_orders(part) for part in parts)
    return Problems(sft, ppo, held_out)


def question(problem: Problem) -> str:
    """What the policy reads."""
    return f"{problem[0]}+{problem[1]}="


def exact(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward: 1 for the right number as Python writes it, 0 for all else; no partial credit."""

    def answer(prompt: str) -> str:
        left, right = prompt.removesuffix("=").split("+")
        return str(int(left) + int(right))

    return [
        float(response == answer(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


class Examiner:
    """Asks a policy a fixed set of problems; shares of exact answers.

    Args:
        problems: what is asked.
        reference: the KL is measured from it.
        tokenizer: of the policy.
        seed: of the sampling noise; used for every call.
    """

    def __init__(
        self, problems: Sequence[Problem], *, reference: Policy, tokenizer: Tokenizer, seed: int
    ):
        prompts = as_prompts(
            tokenizer.encode([question(problem) for problem in problems]),
            pad_id=tokenizer.pad_id, width=PROMPT_WIDTH,
        )  # fmt: skip

        def evaluator(top_k: int | None) -> Evaluator:
            return Evaluator(
                prompts,
                reference=reference,
                reward=PythonReward(exact, tokenizer),
                tokenizer=tokenizer,
                config=GenerationConfig(
                    ANSWER_WIDTH, (tokenizer.eos_id,), tokenizer.pad_id, top_k=top_k
                ),
                key=jax.random.key(seed),
                traceable=False,
            )

        self.sampled, self.greedy = evaluator(None), evaluator(1)
        """policy -> `Samples` at temperature 1, and of the likeliest tokens."""
