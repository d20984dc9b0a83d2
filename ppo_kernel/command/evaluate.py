"""What a policy writes on held-out prompts, and how far it is from where it started."""

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..config import GenerationConfig
from ..evaluation import response_hidden, response_logprobs
from ..io.padding import left_pad
from ..io.tokenizer import Tokenizer
from ..models.protocol import Policy
from ..rollout.generate import generate
from ..trainer.text_reward import PythonReward, decode
from ..types import Prompts, RewardFn, Rollout


@dataclass(frozen=True)
class Samples:
    """Responses to a fixed set of prompts, at temperature 1, with what is measured on them.

    Attributes:
        prompts, responses: text.
        scores: of the reward, one a response.
        sequence_kl: log policy - log reference summed over a response, nats; its mean estimates
            the KL divergence a sequence.
        reference_nll: mean negative log-likelihood a token under the reference, nats.
        lengths: response tokens, EOS included.
        distinct_2: distinct token pairs / all token pairs over all responses.
    """

    prompts: list[str]
    responses: list[str]
    scores: Float[np.ndarray, " B"]
    sequence_kl: Float[np.ndarray, " B"]
    reference_nll: float
    lengths: np.ndarray
    distinct_2: float

    @property
    def reference_perplexity(self) -> float:
        """exp of the mean negative log-likelihood a token under the reference."""
        return float(np.exp(self.reference_nll))


class Evaluator:
    """Samples a policy on the same prompts with the same noise every time.

    Args:
        prompts: left-padded.
        reference: the frozen policy.
        reward: scores a rollout; a JAX one is compiled.
        tokenizer: ids to text.
        config: settings of the rollout.
        key: of the noise; used for every call, so that two policies are compared on equal draws.
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
        mask = np.asarray(rollout.mask)
        scores = np.asarray(self._reward(rollout))
        ratio = np.where(mask, np.asarray(rollout.logprobs) - np.asarray(reference_logprobs), 0.0)
        nll = -np.asarray(reference_logprobs)[mask].mean() if mask.any() else 0.0
        return Samples(
            prompts=decode(self.tokenizer, rollout.prompt_tokens, rollout.prompt_mask),
            responses=decode(self.tokenizer, rollout.tokens, rollout.mask),
            scores=scores,
            sequence_kl=ratio.sum(axis=1),
            reference_nll=float(nll),
            lengths=np.asarray(rollout.lengths),
            distinct_2=distinct_n(
                [
                    row[valid].tolist()
                    for row, valid in zip(np.asarray(rollout.tokens), mask, strict=True)
                ],
                2,
            ),
        )


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams / all n-grams over all sequences; 0 for none.

    Source: Li et al. 2016, section 4, https://arxiv.org/abs/1510.03055.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def as_prompts(sequences: Sequence[Sequence[int]], *, pad_id: int, width: int) -> Prompts:
    """Token sequences as left-padded prompts, numbered from 0. Raises as `left_pad` does."""
    tokens, mask = left_pad(sequences, pad_id=pad_id, width=width)
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens), dtype=jnp.int32))


def standard_error(x: Float[np.ndarray, " B"]) -> float:
    """Standard deviation / sqrt(n): how far a mean over the samples may be off."""
    return float(np.std(x) / max(len(x), 1) ** 0.5)


def device_description() -> str:
    """Device kind and count, JAX version: what a figure was measured on."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
