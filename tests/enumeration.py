"""A tiny world, listed: every sequence of three tokens, and exact sums over all of them.

Two prompts, three tokens, at most three response slots. A policy is a table of logits, one row a
prefix, so that each entry of a gradient is judged by itself. Nothing here calls a loss, an
advantage or a KL estimator of the kernel; stage 2 fills in what a rollout carries.
"""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppo_kernel.evaluation import evaluate, full_sequences, predicting_slots, response_logprobs
from ppo_kernel.iteration import Collected
from ppo_kernel.models import Decoder
from ppo_kernel.types import Prompts, Rollout

VOCABULARY, LENGTH, PROMPTS = 3, 3, 2
WORLDS = {"EOS": (1,), "no EOS": ()}
PREFIXES = VOCABULARY ** (LENGTH + 3)


def prefix_codes(tokens, mask):
    """Which tokens were read up to each slot: 1, then one base-V digit a token, [B, S]."""
    code, codes = jnp.ones(tokens.shape[0], tokens.dtype), []
    for token, valid in zip(tokens.T, mask.T, strict=True):
        code = jnp.where(valid, code * VOCABULARY + token, code)
        codes.append(code)
    return jnp.stack(codes, axis=1)


class TablePolicy(eqx.Module):
    """Any policy there is: logits of its own after every prefix. A hidden state is a row of them.

    So each entry of the gradient is judged by itself, prefix by prefix.
    """

    table: Float[Array, "prefixes V"]

    def hidden(self, tokens, mask, start=0):
        return self.table[prefix_codes(tokens, mask)[:, start:]]

    def unembed(self, hidden):
        return hidden

    def prefill(self, tokens, mask, capacity):
        del capacity
        code = prefix_codes(tokens, mask)[:, -1]
        return self.table[code], code

    def decoder(self):
        def step(tokens, code):
            code = code * VOCABULARY + tokens
            return self.table[code], code

        return Decoder(step, self.unembed)


class TableCritic(eqx.Module):
    """A number after every prefix; also a reward a token that knows no later one."""

    table: Float[Array, " prefixes"]

    def __call__(self, tokens, mask, start=0):
        return self.table[prefix_codes(tokens, mask)[:, start:]]


class World(NamedTuple):
    """Every sequence of every prompt (R rows), and every batch of one sequence a prompt."""

    models: tuple
    prompts: Prompts
    rows: Collected
    batches: np.ndarray
    scores: dict[str, Array]

    @property
    def probabilities(self):
        return jnp.exp(jnp.sum(self.rows.rollout.logprobs, axis=1))


@cache
def world(name: str) -> World:
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape))

    policy, reference = (TablePolicy(drawn(PREFIXES, VOCABULARY)) for _ in range(2))
    critic, reward = TableCritic(drawn(PREFIXES)), TableCritic(drawn(PREFIXES))
    # The first prompt is one token, left-padded; the second is two.
    prompts = Prompts(
        jnp.array([[0, 2], [2, 0]], jnp.int32),
        jnp.array([[False, True], [True, True]]),
        jnp.array([3, 10], jnp.int32),
    )
    sequences = leaves(WORLDS[name])
    rollout = listed(prompts, sequences, WORLDS[name])
    rows = scored(policy, reference, critic, rollout)
    count = len(sequences)
    batches = np.array(list(product(range(count), range(count, 2 * count))))
    rewards = jnp.where(rollout.mask, reward(*full_sequences(rollout))[:, -LENGTH:], 0.0)
    scores = {"a sequence": drawn(2 * count), "a token": rewards}
    return World((policy, reference, critic), prompts, rows, batches, scores)


@eqx.filter_jit
def scored(policy, reference, critic, rollout) -> Collected:
    """What the shipped stage 2 says of the listed rows, and their log-probabilities."""
    hidden = policy.hidden(*full_sequences(rollout))
    logprobs, _ = response_logprobs(policy, rollout, hidden, temperature=1.0)
    rollout = replace(rollout, logprobs=logprobs, behaviour_logprobs=logprobs)
    return Collected(
        rollout, logprobs, evaluate(policy, reference, critic, rollout, temperature=1.0)
    )


def leaves(eos: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every response: up to its EOS, or full."""
    cut = set()
    for tokens in product(range(VOCABULARY), repeat=LENGTH):
        ends = [t + 1 for t, token in enumerate(tokens) if token in eos]
        cut.add(tokens[: min(ends, default=LENGTH)])
    return sorted(cut)


def listed(prompts: Prompts, sequences: list, eos: tuple[int, ...]) -> Rollout:
    """A rollout of all sequences after all prompts; its log-probabilities are not filled in."""
    count = len(sequences)
    lengths = np.array([len(x) for x in sequences])
    tokens = np.array([(*x, *[0] * (LENGTH - len(x))) for x in sequences], np.int32)
    ended = np.array([x[-1] in eos for x in sequences])
    zeros = jnp.zeros((PROMPTS * count, LENGTH))
    return Rollout(
        prompt_tokens=jnp.repeat(prompts.tokens, count, axis=0),
        prompt_mask=jnp.repeat(prompts.mask, count, axis=0),
        sample_ids=jnp.repeat(prompts.sample_ids, count),
        tokens=jnp.tile(tokens, (PROMPTS, 1)),
        mask=jnp.tile(np.arange(LENGTH)[None] < lengths[:, None], (PROMPTS, 1)),
        lengths=jnp.tile(jnp.asarray(lengths, jnp.int32), PROMPTS),
        terminated=jnp.tile(ended, PROMPTS),
        logprobs=zeros,
        behaviour_logprobs=zeros,
    )


def next_logprobs(policy, rollout):
    """log p(v | prefix) before every response slot, [R, T, V], without the kernel's log-softmax."""
    hidden = predicting_slots(policy.hidden(*full_sequences(rollout)), LENGTH)
    return jax.nn.log_softmax(policy.unembed(hidden))


def sequence_logprobs(policy, rollout):
    """log p(sequence | prompt), [R]."""
    each = next_logprobs(policy, rollout)
    chosen = jnp.take_along_axis(each, rollout.tokens[..., None], axis=2)[..., 0]
    return jnp.sum(jnp.where(rollout.mask, chosen, 0.0), axis=1)


@jax.jit
def objective(policy, reference, rollout, totals, kl_coef):
    """Sum over prompts and sequences of p (total - kl_coef log p / p_reference)."""
    logprobs = sequence_logprobs(policy, rollout)
    log_ratios = logprobs - sequence_logprobs(reference, rollout)
    return jnp.sum(jnp.exp(logprobs) * (totals - kl_coef * log_ratios))


slope = jax.jit(jax.grad(objective))


def exact_gradient(name, totals, kl_coef=0.0):
    policy, reference, _ = world(name).models
    return slope(policy, reference, world(name).rows.rollout, totals, kl_coef)


def sequence_kl(name):
    """KL(policy || reference) of whole sequences, summed over the prompts."""
    w = world(name)
    return -objective(*w.models[:2], w.rows.rollout, jnp.zeros(len(w.probabilities)), 1.0)


def gradient_over_prefixes(name, quantity):
    """Gradient of sum_s d(s) quantity(log p(. | s), log reference(. | s)), d(s) frozen."""
    w = world(name)
    rollout, probabilities = w.rows.rollout, w.probabilities

    @jax.jit
    @jax.grad
    def gradient(policy):
        each = quantity(next_logprobs(policy, rollout), next_logprobs(w.models[1], rollout))
        # The sequences that go through a prefix have its probability in total.
        return jnp.sum(jnp.where(rollout.mask, probabilities[:, None] * each, 0.0))

    return gradient(w.models[0])


def entropy(logp, _):
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def divergence(logp, logq):
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def reverse_divergence(logp, logq):
    return divergence(logq, logp)
