"""Samples of a policy on held-out prompts, measured; and two policies side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ..config import GenerationConfig
from ..evaluation import response_hidden, response_logprobs
from ..functions import RewardFn
from ..io.tokenizer import Tokenizer
from ..models.protocol import Policy
from ..rollout.generate import generate
from ..trainer.text_reward import PythonReward, rollout_texts
from ..types import Prompts, Rollout
from .display import Display, table

MEANS = {
    "reward": "reward",
    "distinct_2": "distinct-2",
    "sft_perplexity": "perplexity under the SFT model",
    "length": "length, tokens",
}
"""Figure of `compare` -> its label in a table."""


@dataclass(frozen=True)
class Samples:
    """Responses to a fixed set of prompts, at temperature 1, with their measurements.

    Attributes:
        prompts, responses: text.
        scores: of the reward, one per response.
        sequence_kl: sum over a response of log policy - log reference, nats; its mean estimates
            the KL divergence per sequence.
        reference_nll: mean negative log-likelihood per token under the reference, nats.
        lengths: response tokens, EOS included.
        distinct_2: distinct token pairs / all token pairs over all responses.
    """

    prompts: list[str]
    responses: list[str]
    scores: Float[np.ndarray, " B"]
    sequence_kl: Float[np.ndarray, " B"]
    reference_nll: float
    lengths: Int[np.ndarray, " B"]
    distinct_2: float

    @property
    def reference_perplexity(self) -> float:
        """exp(reference_nll)."""
        return float(np.exp(self.reference_nll))


class Evaluator:
    """Samples a policy on the same prompts with the same noise every time.

    Args:
        prompts: left-padded.
        reference: the frozen policy.
        reward: scores a rollout; a JAX one is compiled.
        tokenizer: ids to text.
        config: settings of the rollout.
        key: of the noise; every call uses it, so that two policies are compared on equal noise.
    """

    def __init__(
        self,
        prompts: Prompts,
        *,
        reference: Policy,
        reward: RewardFn | PythonReward,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        key: Key[Array, ""],
    ):
        self.prompts, self.reference = prompts, reference
        self.tokenizer, self.config, self.key = tokenizer, config, key
        self._reward = reward if isinstance(reward, PythonReward) else eqx.filter_jit(reward)
        self._sample = eqx.filter_jit(self._sampled)

    def _sampled(self, policy: Policy, reference: Policy) -> tuple[Rollout, Float[Array, "B T"]]:
        rollout = generate(policy, self.prompts, self.key, config=self.config)
        hidden = response_hidden(reference, rollout)
        logprobs, _ = response_logprobs(reference, rollout, hidden, temperature=1.0)
        return rollout, logprobs

    def __call__(self, policy: Policy) -> Samples:
        """Sample and measure."""
        rollout, reference_logprobs = self._sample(policy, self.reference)
        mask, tokens = np.asarray(rollout.mask), np.asarray(rollout.tokens)
        reference = np.asarray(reference_logprobs)
        ratio = np.where(mask, np.asarray(rollout.logprobs) - reference, 0.0)
        rows = [row[valid].tolist() for row, valid in zip(tokens, mask, strict=True)]
        prompts, responses = rollout_texts(self.tokenizer, rollout, skip_special_tokens=False)
        return Samples(
            prompts=prompts,
            responses=responses,
            scores=np.asarray(self._reward(rollout)),
            sequence_kl=ratio.sum(axis=1),
            reference_nll=float(-reference[mask].mean() if mask.any() else 0.0),
            lengths=np.asarray(rollout.lengths),
            distinct_2=distinct_n(rows, 2),
        )


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams / all n-grams over all sequences; 0 where there is none.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def standard_error(x: Float[np.ndarray, " B"]) -> float:
    """Standard deviation / sqrt(n), the uncertainty of a mean."""
    return float(np.std(x) / max(len(x), 1) ** 0.5)


def device_description() -> str:
    """Device count and kind, JAX version."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def held_out_metrics(samples: Samples) -> dict[str, float]:
    """Metrics on held-out prompts while PPO runs."""
    return {
        "held_out_reward": float(samples.scores.mean()),
        "held_out_kl": float(samples.sequence_kl.mean()),
    }


def sample_rows(samples: Samples) -> list[dict[str, Any]]:
    """Rows of `samples.jsonl`."""
    return [
        {"prompt": p, "response": r, "reward": float(s), "kl": float(k)}
        for p, r, s, k in zip(
            samples.prompts, samples.responses, samples.scores, samples.sequence_kl, strict=True
        )
    ]


def compare(before: Samples, after: Samples) -> dict[str, float]:
    """Figures of two policies on the same prompts: reward, KL, diversity, perplexity, length."""
    deviation = float(before.scores.std())
    gain = float(after.scores.mean() - before.scores.mean())
    return {
        "reward_before": float(before.scores.mean()),
        "reward_after": float(after.scores.mean()),
        "reward_gain_in_sft_deviations": gain / max(deviation, 1e-9),
        "kl_per_sequence": float(after.sequence_kl.mean()),
        "distinct_2_before": before.distinct_2,
        "distinct_2_after": after.distinct_2,
        "distinct_2_kept": after.distinct_2 / max(before.distinct_2, 1e-9),
        "sft_perplexity_before": before.reference_perplexity,
        "sft_perplexity_after": after.reference_perplexity,
        "length_before": float(before.lengths.mean()),
        "length_after": float(after.lengths.mean()),
    }


def print_comparison(
    display: Display,
    before: Samples,
    after: Samples,
    figures: dict[str, float],
    *,
    means: Mapping[str, str] = MEANS,
) -> None:
    """Eight prompts with both responses, and the means of all."""
    rows = [
        [prompt.strip(), first.strip(), second.strip()]
        for prompt, first, second in zip(
            before.prompts[:8], before.responses, after.responses, strict=False
        )
    ]
    display.print(table("Held-out prompts", ["prompt", "SFT", "PPO"], rows))
    rows = [
        [label, f"{figures[f'{key}_before']:.3f}", f"{figures[f'{key}_after']:.3f}"]
        for key, label in means.items()
    ]
    display.print(table("Mean over the held-out prompts", ["", "SFT", "PPO"], rows))
