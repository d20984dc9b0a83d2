"""Stage 2: rollout -> what the policy, the reference and the critic say of it, teacher-forced."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .models.heads import ValueHead, ValueModel
from .models.protocol import Critic, Policy, vocabulary_size
from .ops.logprobs import logprobs_from_hidden
from .types import Evaluation, Rollout, Scalar


def full_sequences(rollout: Rollout) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Prompts and responses of a `rollout` side by side: token ids, and which slots hold one.

    Response slots count up to `lengths`, whatever the loss mask leaves out.
    """
    slots = jnp.arange(rollout.tokens.shape[1], dtype=rollout.lengths.dtype)[None]
    written = slots < rollout.lengths[:, None]
    tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
    return tokens, jnp.concatenate([rollout.prompt_mask, written], axis=1)


def predicting_slots(x: Float[Array, "B S *rest"], num_tokens: int) -> Float[Array, "B T *rest"]:
    """The `num_tokens` entries of `x` that predict the response: slots P - 1 up to S - 2."""
    start = x.shape[1] - num_tokens - 1
    return x[:, start : start + num_tokens]


def response_logprobs(
    policy: Policy,
    rollout: Rollout,
    hidden: Float[Array, "B rest D"],
    *,
    temperature: Scalar,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities of the response tokens and entropies, given the policy's hidden states.

    Only response positions pass the output head.

    Args:
        policy: its output head is applied.
        rollout: B sequences.
        hidden: the policy's, of `full_sequences(rollout)` or the `response_hidden` of it.
        temperature, chunk_size: as in `logprobs_from_hidden`, which has the formulas and errors.

    Returns:
        (logprobs, entropies), nats; 0 in slots past the end of a response.
    """
    length = rollout.tokens.shape[1]
    rows = predicting_slots(hidden, length)
    logprobs, entropies = logprobs_from_hidden(
        rows, rollout.tokens, policy.unembed, temperature=temperature, chunk_size=chunk_size
    )
    written = jnp.arange(length, dtype=rollout.lengths.dtype)[None] < rollout.lengths[:, None]
    return jnp.where(written, logprobs, 0.0), jnp.where(written, entropies, 0.0)


def response_values(
    values: Float[Array, "B rest"], rollout: Rollout
) -> tuple[Float[Array, "B T"], Float[Array, " B"]]:
    """V_t before each response token, and the value after the last one.

        V_t = value(slot P - 1 + t),   bootstrap = value(slot P - 1 + length)

    Args:
        values: the critic's, after reading each slot, or the last T + 1 of them.
        rollout: says where the response starts and ends.

    Returns:
        (values [B, T], bootstrap values [B]), reward units.
    """
    length = rollout.tokens.shape[1]
    start = values.shape[1] - length - 1
    last = jnp.take_along_axis(values, start + rollout.lengths[:, None], axis=1)
    return predicting_slots(values, length), jnp.squeeze(last, axis=1)


def response_hidden(policy: Policy, rollout: Rollout) -> Float[Array, "B rest D"]:
    """The policy's hidden states from the last prompt slot on: all that a loss reads.

    Args:
        policy: asked for slots P - 1 to S - 1.
        rollout: B sequences.

    Returns:
        T + 1 states per sequence.
    """
    return policy.hidden(*full_sequences(rollout), _last_prompt_slot(rollout))


def critic_values(
    critic: Critic | ValueHead,
    rollout: Rollout,
    policy_hidden: Callable[[], Float[Array, "B rest D"]],
) -> Float[Array, "B rest"]:
    """Values of a separate critic, or of a `ValueHead` on the policy's hidden states.

    Args:
        critic: a model [B, S] -> [B, S], or a `ValueHead`.
        rollout: B sequences.
        policy_hidden: gives `response_hidden`; called only for a `ValueHead`.

    Returns:
        Values from the last slot of the prompts on, T + 1 a sequence, reward units.
    """
    if isinstance(critic, ValueHead):
        return critic(policy_hidden())
    return critic(*full_sequences(rollout), _last_prompt_slot(rollout))


def _last_prompt_slot(rollout: Rollout) -> int:
    return rollout.prompt_tokens.shape[1] - 1


def evaluate(
    policy: Policy,
    reference: Policy,
    critic: Critic | ValueHead | None,
    rollout: Rollout,
    *,
    temperature: Scalar,
    chunk_size: int | None = None,
) -> Evaluation:
    """Reference log-probabilities and values of a rollout.

    Args:
        policy: used only where the critic is a head on its trunk.
        reference: the frozen policy; tempered like the policy itself.
        critic: a model [B, S] -> [B, S], a `ValueHead`, or None: then every value is 0.
        rollout: B sequences.
        temperature, chunk_size: as in `response_logprobs`.

    Returns:
        `Evaluation`, all in at least float32.

    Raises:
        ValueError: the reference has another vocabulary than the policy, or a `ValueModel` has a
            smaller one.
    """
    _check_vocabularies(policy, reference, critic)
    logprobs, _ = response_logprobs(
        reference,
        rollout,
        response_hidden(reference, rollout),
        temperature=temperature,
        chunk_size=chunk_size,
    )
    if critic is None:
        return Evaluation(logprobs, jnp.zeros_like(logprobs), jnp.zeros_like(logprobs[:, 0]))
    values = critic_values(critic, rollout, lambda: response_hidden(policy, rollout))
    return Evaluation(logprobs, *response_values(values, rollout))


def _check_vocabularies(
    policy: Policy, reference: Policy, critic: Critic | ValueHead | None
) -> None:
    size, frozen_size = vocabulary_size(policy), vocabulary_size(reference)
    if frozen_size != size:
        raise ValueError(
            f"the reference has a vocabulary of {frozen_size} tokens, the policy one of {size}: a "
            "KL between them means nothing; take a reference with the policy's vocabulary."
        )
    # A critic of another class does not say which ids it knows.
    if isinstance(critic, ValueModel) and len(critic.trunk.embedding) < size:
        raise ValueError(
            f"the critic knows {len(critic.trunk.embedding)} token ids, the policy writes {size}; "
            "give its embedding as many rows."
        )


class ModelReward(eqx.Module):
    """A reward model as a `RewardFn`: its value after the last token of the response.

    A plain `eqx.Module`, so its parameters enter the compiled iteration as arguments. The
    reward model reads the policy's token ids; one with another tokenizer goes through text,
    outside the program.
    """

    model: Critic

    def __call__(self, rollout: Rollout) -> Float[Array, " B"]:
        """One score a sequence; that of the prompt alone where the response is empty."""
        values = self.model(*full_sequences(rollout), _last_prompt_slot(rollout))
        return response_values(values, rollout)[1]
