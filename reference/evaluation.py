"""Stage 2, one sequence at a time."""

import numpy as np
from jaxtyping import Bool, Float64, Int

from .models.heads import Model, hidden_states, unembed, values_from_hidden
from .ops.logprobs import entropy, token_logprobs
from .types import Evaluation, Rollout


def full_sequence(rollout: Rollout, b: int) -> tuple[Int[np.ndarray, " S"], Bool[np.ndarray, " S"]]:
    """Prompt and response of sequence b, and which slots are filled."""
    written = [t < rollout.lengths[b] for t in range(rollout.tokens.shape[1])]
    tokens = np.concatenate([rollout.prompt_tokens[b], rollout.tokens[b]])
    return tokens, np.concatenate([rollout.prompt_mask[b], np.array(written, bool)])


def response_logits(
    policy: Model, rollout: Rollout, b: int, temperature: float
) -> Float64[np.ndarray, "T V"]:
    """Tempered logits that predict response token t: those of the slot before it."""
    start, length = rollout.prompt_tokens.shape[1] - 1, rollout.tokens.shape[1]
    hidden = hidden_states(policy, *full_sequence(rollout, b))
    return unembed(policy, hidden[start : start + length]) / temperature


def response_logprobs(
    policy: Model, rollout: Rollout, *, temperature: float
) -> tuple[Float64[np.ndarray, "B T"], Float64[np.ndarray, "B T"]]:
    """(log-probability of each response token, entropy of its distribution), 0 past the end."""
    logprobs, entropies = np.zeros(rollout.tokens.shape), np.zeros(rollout.tokens.shape)
    for b, length in enumerate(rollout.lengths):
        logits = response_logits(policy, rollout, b, temperature)[:length]
        logprobs[b, :length] = token_logprobs(logits, rollout.tokens[b, :length])
        entropies[b, :length] = entropy(logits)
    return logprobs, entropies


def slot_values(
    critic: Model, policy: Model, rollout: Rollout, b: int
) -> Float64[np.ndarray, " S"]:
    """Value after reading each slot; a critic without a trunk reads the policy's."""
    owner = policy if critic.config is None else critic
    return values_from_hidden(critic, hidden_states(owner, *full_sequence(rollout, b)))


def response_values(
    critic: Model, policy: Model, rollout: Rollout
) -> tuple[Float64[np.ndarray, "B T"], Float64[np.ndarray, " B"]]:
    """(value before each response token, value after the last one), 0 past the end."""
    start = rollout.prompt_tokens.shape[1] - 1
    before, after = np.zeros(rollout.tokens.shape), np.zeros(len(rollout.lengths))
    for b, length in enumerate(rollout.lengths):
        values = slot_values(critic, policy, rollout, b)
        for t in range(length):
            before[b, t] = values[start + t]
        after[b] = values[start + length]
    return before, after


def evaluate(
    policy: Model, reference: Model, critic: Model | None, rollout: Rollout, *, temperature: float
) -> Evaluation:
    """Reference log-probabilities and values; without a critic every value is 0."""
    logprobs, _ = response_logprobs(reference, rollout, temperature=temperature)
    if critic is None:
        return Evaluation(logprobs, np.zeros_like(logprobs), np.zeros(len(logprobs)))
    return Evaluation(logprobs, *response_values(critic, policy, rollout))


def model_reward(reward_model: Model, rollout: Rollout) -> Float64[np.ndarray, " B"]:
    """The reward model's value after the last token."""
    return response_values(reward_model, reward_model, rollout)[1]
