"""Law 6: the expected estimator is the exact policy gradient, by enumeration of a tiny world.

Every batch that an iteration could sample (one sequence a prompt) is listed with its probability.
The shipped `learn` makes one gradient of each, and the sum of probability times gradient is the
expectation, to rounding: no weight or advantage is touched on the way.

A KL penalty has two exact counterparts, which differ from the second token on:

    in the reward   gradient of KL(sequence) = sum_s d(s) KL(s), with d(s) free to move
    in the loss     sum_s d(s) * gradient of KL(s), with d(s) the frozen distribution of prefixes

where KL(s) is that of the next token after prefix s. Only the first sees that a token leads to
prefixes where policy and reference disagree.
"""

from functools import cache
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from enumeration import (
    LENGTH,
    PROMPTS,
    WORLDS,
    TablePolicy,
    divergence,
    entropy,
    exact_gradient,
    gradient_over_prefixes,
    next_logprobs,
    objective,
    reverse_divergence,
    sequence_kl,
    slope,
    world,
)

from ppo_kernel.advantages import gae, whitened
from ppo_kernel.config import GenerationConfig, IterationConfig
from ppo_kernel.iteration import learn
from ppo_kernel.learner.state import Learner
from ppo_kernel.losses import fixed_mean, sequence_mean, token_mean
from ppo_kernel.ops.kl import k1, k2, k3, with_gradient_of
from ppo_kernel.rollout.generate import generate

KL_COEF = 0.3
FIXED_MEAN = fixed_mean(LENGTH)
REPORTING = Learner(optax.trace(decay=0.0), optax.trace(decay=0.0))
"""Its optimizers keep the last gradient as their state."""
HYPERPARAMS = {
    "gamma": 1.0, "lam": 1.0, "clip_ratio_low": 1.0, "clip_ratio_high": 1e6, "value_clip": None,
    "kl_coef": KL_COEF, "actor": {"max_grad_norm": None}, "critic": {"max_grad_norm": None},
    "rate": 0.0,
}  # fmt: skip


@cache
def expectation(config: IterationConfig, advantage_estimator):
    """(state, batches, scores, probabilities, hyperparams) -> expected gradient and metrics."""

    @eqx.filter_jit
    def expected(state, batches, scores, probabilities, hyperparams):
        def estimator(batch, scores):
            after, metrics = learn(
                state, batch, scores, hyperparams,
                config=config, advantage_estimator=advantage_estimator,
            )  # fmt: skip
            return after.actor_optimizer_state.trace, metrics

        estimates = jax.vmap(estimator)(batches, scores)
        return jax.tree.map(lambda x: jnp.tensordot(probabilities, x, 1), estimates)

    return expected


def expected_estimate(name, scores, *, probabilities=None, hyperparams=None, advantages=gae,
                      **settings):  # fmt: skip
    """Expected (gradient, metrics) of the shipped `learn`, over every batch of the world."""
    w = world(name)
    settings = {"reduction": FIXED_MEAN, "kl_estimator": None, "num_epochs": 1} | settings
    config = IterationConfig(
        GenerationConfig(max_new_tokens=LENGTH, eos_token_ids=WORLDS[name]), **settings
    )
    hyperparams = tiny.hyperparams(**(HYPERPARAMS | (hyperparams or {})))
    policy, _, critic = w.models
    state = REPORTING.init(policy, critic, jax.random.key(0), hyperparams)
    probabilities = w.probabilities if probabilities is None else probabilities
    return expectation(config, advantages)(
        state, jax.tree.map(lambda x: x[w.batches], w.rows), jnp.asarray(scores)[w.batches],
        jnp.prod(probabilities[w.batches], axis=1), hyperparams,
    )  # fmt: skip


def distance(estimate, exact):
    """How far minus the loss gradient is from an exact one, in units of its norm."""
    # `fixed_mean` divides by the number of sequences and slots.
    ours = jax.tree.map(lambda x: -PROMPTS * LENGTH * x, estimate)
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, ours, exact))
    return float(gap / optax.tree.norm(exact))


def combined(first, scale, second):
    return jax.tree.map(lambda a, b: a + scale * b, first, second)


@pytest.mark.parametrize("name", WORLDS)
def test_law_6_the_listed_sequences_are_all_that_generate_draws(float64, name):
    """Their probabilities sum to 1, and evenly spaced noise draws each in proportion to its own."""
    w, steps = world(name), 12
    count = len(w.probabilities) // PROMPTS
    np.testing.assert_allclose(w.probabilities.reshape(PROMPTS, count).sum(axis=1), 1, rtol=1e-12)
    levels = (np.arange(steps) + 0.5) / steps
    noise = np.array(list(product(levels, repeat=LENGTH)))
    noise = jnp.tile(jnp.asarray(noise)[..., None], (PROMPTS, 1, 2))
    config = GenerationConfig(
        LENGTH, WORLDS[name], pad_token_id=0, samples_per_prompt=len(noise) // PROMPTS
    )
    drawn = eqx.filter_jit(generate)(
        w.models[0], w.prompts, jax.random.key(0), config=config, noise=noise
    )
    listed_rows = {key: i for i, key in enumerate(keys(w.rows.rollout, count))}
    places = np.array([listed_rows[key] for key in keys(drawn, len(noise) // PROMPTS)])
    np.testing.assert_allclose(drawn.logprobs, w.rows.rollout.logprobs[places], atol=1e-12)
    np.testing.assert_array_equal(drawn.terminated, w.rows.rollout.terminated[places])
    frequency = np.bincount(places, minlength=len(w.probabilities)) / (len(noise) / PROMPTS)
    # After every prefix a token gets its share of the levels, but for the one at each end.
    steps_p = np.where(w.rows.rollout.mask, np.exp(w.rows.rollout.logprobs), np.inf)
    low, high = (np.where(np.isinf(steps_p), 1.0, steps_p + x / steps) for x in (-1, 1))
    assert (np.clip(low, 0, 1).prod(axis=1) - 1e-9 <= frequency).all()
    assert (frequency <= np.clip(high, 0, 1).prod(axis=1) + 1e-9).all()


def keys(rollout, count):
    """What tells one row from another: its prompt, and the tokens of its response."""
    tokens = np.where(rollout.mask, rollout.tokens, -1)
    return [(i // count, *map(int, row)) for i, row in enumerate(tokens)]


@pytest.mark.parametrize("kind", ["a sequence", "a token"])
@pytest.mark.parametrize("name", WORLDS)
def test_law_6_expected_estimator_is_the_exact_policy_gradient(float64, name, kind):
    """With an arbitrary critic as the baseline, a penalty for a missing EOS, an entropy bonus."""
    w, terms = world(name), {"missing_eos_penalty": 0.7, "entropy_coef": 0.2}
    scores = w.scores[kind]
    totals = scores if kind == "a sequence" else jnp.sum(scores, axis=1)
    totals = totals - jnp.where(w.rows.rollout.terminated, 0.0, 0.7)
    gradient, metrics = expected_estimate(name, scores, hyperparams=terms)
    exact, bonus = exact_gradient(name, totals), gradient_over_prefixes(name, entropy)
    assert distance(gradient, combined(exact, 0.2, bonus)) < 1e-10
    assert distance(gradient, exact) > 1e-3, "the bonus shows"
    value = jnp.sum(w.probabilities * totals) / PROMPTS
    np.testing.assert_allclose(metrics["token_reward"], value, rtol=1e-10)


def test_law_6_the_exact_gradient_is_the_slope_of_the_objective(float64):
    """The judge judged: central differences of the objective along a random direction."""
    name, step = "EOS", 1e-5
    w = world(name)
    policy, *others = *w.models[:2], w.rows.rollout, w.scores["a sequence"], KL_COEF
    direction = TablePolicy(jnp.asarray(np.random.default_rng(1).normal(size=policy.table.shape)))
    ahead, behind = (objective(combined(policy, x, direction), *others) for x in (step, -step))
    along = jnp.sum(slope(policy, *others).table * direction.table)
    np.testing.assert_allclose((ahead - behind) / (2 * step), along, rtol=1e-6)


@pytest.mark.parametrize("name", WORLDS)
def test_law_6_k1_in_the_reward_is_the_gradient_of_the_sequence_kl(float64, name):
    w = world(name)
    scores = w.scores["a sequence"]
    gradient, metrics = expected_estimate(name, scores, kl_estimator=k1)
    assert distance(gradient, exact_gradient(name, scores, KL_COEF)) < 1e-10
    kl = sequence_kl(name)
    np.testing.assert_allclose(metrics["kl_divergence"], kl / PROMPTS, rtol=1e-10)


def test_law_6_k3_in_the_reward_has_the_value_of_the_kl_but_not_its_gradient(float64):
    """A reward is a constant: what k3 itself would change with the parameters is lost."""
    name = "EOS"
    w = world(name)
    scores = w.scores["a sequence"]
    gradient, metrics = expected_estimate(name, scores, kl_estimator=k3)
    x = w.rows.old_logprobs - w.rows.evaluation.reference_logprobs
    penalty = jnp.sum(jnp.where(w.rows.rollout.mask, jnp.exp(-x) - 1.0 + x, 0.0), axis=1)
    exact = exact_gradient(name, scores - KL_COEF * penalty)
    assert distance(gradient, exact) < 1e-10
    assert distance(gradient, exact_gradient(name, scores, KL_COEF)) > 1e-3
    value = (jnp.sum(w.probabilities * scores) - KL_COEF * sequence_kl(name)) / PROMPTS
    np.testing.assert_allclose(metrics["token_reward"], value, rtol=1e-10)


LOSS_KL = {
    # name: (estimator, is it unbiased in value, whose gradient it has)
    "k1": (k1, True, None),
    "k2": (k2, False, divergence),
    "k3": (k3, True, reverse_divergence),
    "k3 with the gradient of k2": (with_gradient_of(k3, k2), True, divergence),
}


@pytest.mark.parametrize("estimator", LOSS_KL)
def test_law_6_kl_in_the_loss_has_the_value_and_the_gradient_it_claims(float64, estimator):
    name = "EOS"
    w = world(name)
    shipped, unbiased, claimed = LOSS_KL[estimator]
    scores = w.scores["a sequence"]
    gradient, metrics = expected_estimate(name, scores, kl_estimator=shipped, kl_in_loss=True)
    expected = exact_gradient(name, scores)
    if claimed is not None:
        expected = combined(expected, -KL_COEF, gradient_over_prefixes(name, claimed))
    assert distance(gradient, expected) < 1e-10
    whole = exact_gradient(name, scores, KL_COEF)
    assert distance(gradient, whole) > 1e-3, "in the loss no KL sees what a token leads to"
    kl = sequence_kl(name)
    error = abs(float(PROMPTS * LENGTH * metrics["kl_loss"] / kl) - 1.0)
    assert error < 1e-10 if unbiased else error > 0.01


def restricted(name):
    """Probabilities of the sequences where only the two most likely tokens may be drawn."""
    w = world(name)
    p = np.exp(next_logprobs(w.models[0], w.rows.rollout))
    kept = np.where(p > p.min(axis=-1, keepdims=True), p, 0.0)
    kept = kept / kept.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(kept, np.asarray(w.rows.rollout.tokens)[..., None], 2)[..., 0]
    return jnp.asarray(np.where(w.rows.rollout.mask, chosen, 1.0).prod(axis=1))


BIASED = {
    "weights by the lengths drawn": {"reduction": token_mean},
    "weights by each length": {"reduction": sequence_mean},
    "whitening": {"advantages": whitened(gae)},
    "top-2 sampling": {},
}


@pytest.mark.parametrize("change", BIASED)
def test_law_6_what_it_excludes_does_bias_the_estimator(float64, change):
    """The law can fail: none of these is the exact gradient, at any scale."""
    name = "EOS"
    scores = world(name).scores["a sequence"]
    probabilities = restricted(name) if change == "top-2 sampling" else None
    gradient, _ = expected_estimate(name, scores, probabilities=probabilities, **BIASED[change])
    exact = exact_gradient(name, scores)
    # The sign of a loss is the other one: the same direction would have cosine -1.
    cosine = optax.tree.vdot(gradient, exact) / optax.tree.norm(gradient) / optax.tree.norm(exact)
    assert float(cosine) > -0.99
