"""What must not matter to an update, and what it must not compute."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from edges import BanningPolicy
from jaxtyping import Array, Float, Int

from ppo_kernel.config import IterationConfig
from ppo_kernel.learner.epochs import update
from ppo_kernel.learner.state import Learner
from ppo_kernel.losses import ppo_policy_loss
from ppo_kernel.models.protocol import Critic, Policy
from ppo_kernel.ops.kl import k1
from ppo_kernel.types import Experience, Rollout

LENGTHS, WIDTH = (3, 1, 6, 2, 1, 2, 4, 1), 6
SETTINGS = {"num_epochs": 2, "num_minibatches": 2, "kl_estimator": k1, "kl_in_loss": True}
SWEPT = {"entropy_coef": 0.1, "kl_coef": 0.1, "rate": 0.01}


class AbsentAtPads(eqx.Module):
    """A critic that has no value where there is no token."""

    model: Critic

    def __call__(self, tokens, mask, start=0) -> Float[Array, "B rest"]:
        return jnp.where(mask[:, start:], self.model(tokens, mask, start), jnp.nan)


class Wrapped(eqx.Module):
    """A policy that is another one."""

    model: Policy

    def hidden(self, tokens, mask, start=0):
        return self.model.hidden(tokens, mask, start)

    def unembed(self, hidden):
        return self.model.unembed(hidden)

    def prefill(self, tokens, mask, capacity):
        return self.model.prefill(tokens, mask, capacity)

    def decoder(self):
        return self.model.decoder()


class Noting(Wrapped):
    """It notes the shapes that it is traced with."""

    note: Callable = eqx.field(static=True)

    def hidden(self, tokens, mask, start=0):
        self.note(tokens.shape)
        return self.model.hidden(tokens, mask, start)


class BrokenAt(Wrapped):
    """It gives no number for sequences of so many slots."""

    slots: Int[Array, ""]

    def hidden(self, tokens, mask, start=0):
        factor = jnp.where(tokens.shape[1] == self.slots, jnp.nan, 1.0)
        return factor * self.model.hidden(tokens, mask, start)


def language_model():
    return tiny.language_model(num_layers=1)


def value_model():
    return tiny.value_model(num_layers=1)


def experience(lengths=LENGTHS) -> Experience:
    """Responses of these lengths to prompts of 1 to 4 tokens; every number is drawn."""
    rng, rows = np.random.default_rng(3), len(lengths)
    prompts, lengths = tiny.prompts(), jnp.array(lengths, jnp.int32)
    mask = jnp.arange(WIDTH, dtype=jnp.int32)[None] < lengths[:, None]

    def normal():
        drawn = jnp.asarray(rng.standard_normal((rows, WIDTH)), jnp.zeros(()).dtype)
        return jnp.where(mask, drawn, 0.0)

    tokens = jnp.asarray(rng.integers(2, tiny.VOCABULARY, (rows, WIDTH)), jnp.int32)
    logprobs = -jnp.abs(normal())
    rollout = Rollout(
        prompts.tokens[:rows], prompts.mask[:rows], prompts.sample_ids[:rows],
        jnp.where(mask, tokens, tiny.PAD), mask, lengths, lengths < WIDTH, logprobs, logprobs,
    )  # fmt: skip
    return Experience(
        rollout=rollout, old_logprobs=logprobs, reference_logprobs=logprobs,
        old_values=normal(), advantages=normal(), returns=normal(),
    )  # fmt: skip


def updated(
    experience: Experience, policy=None, critic=None, learner=None, hyperparams=None, **settings
):
    """(state, metrics) of an update from a fixed start."""
    policy = language_model() if policy is None else policy
    critic = value_model() if critic is None else critic
    learner, hyperparams = learner or Learner(), hyperparams or tiny.hyperparams(**SWEPT)
    config = IterationConfig(tiny.generation(max_new_tokens=WIDTH), **(SETTINGS | settings))
    state = learner.init(policy, critic, jax.random.key(0), hyperparams)
    return UPDATE(state, experience, hyperparams, config=config)


def assert_same(got, want):
    """Parameters, moments and metrics, whatever the models are wrapped in."""
    for a, b in zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (got, want)),
                    strict=True):  # fmt: skip
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


UPDATE = eqx.filter_jit(update)
FIELDS = ("old_logprobs", "reference_logprobs", "old_values", "advantages", "returns")


@pytest.mark.parametrize("name", FIELDS)
def test_what_stands_in_a_masked_place_changes_nothing(float64, name):
    whole = experience()
    planted = jnp.where(whole.rollout.mask, getattr(whole, name), jnp.nan)
    assert_same(updated(replace(whole, **{name: planted})), updated(whole))


def test_a_critic_without_values_at_pads_is_no_edge(float64):
    plain = updated(experience())
    assert_same(updated(experience(), critic=AbsentAtPads(value_model())), plain)
    assert plain[1]["skipped_minibatches"] == 0


def unclamped_loss(inputs, **settings):
    """That of REINFORCE: 0 * -inf at a pad unless the log-probability there is cleared."""
    return -inputs.logprobs * inputs.advantages, {}


@pytest.mark.parametrize("loss", [ppo_policy_loss, unclamped_loss])
def test_a_policy_that_cannot_write_the_pad_is_no_edge(float64, loss):
    """Its log-probability there is -inf."""
    never = BanningPolicy(language_model(), banned=(tiny.PAD,))
    state, metrics = updated(experience(), policy=never, learner=Learner(policy_loss=loss))
    assert metrics["skipped_minibatches"] == 0
    for leaf in jax.tree.leaves(eqx.filter((state.policy, metrics), eqx.is_inexact_array)):
        assert jnp.isfinite(leaf).all()


def test_a_reduction_may_leave_any_weight_at_a_pad(float64):
    def untidy(mask):
        return jnp.where(mask, 0.25, jnp.nan)

    def tidy(mask):
        return jnp.where(mask, 0.25, 0.0)

    assert_same(updated(experience(), reduction=untidy), updated(experience(), reduction=tidy))


@pytest.mark.parametrize("size", [None, 1, 2])
def test_no_more_than_a_microbatch_is_computed_at_once(float64, size):
    seen = []
    updated(experience(), policy=Noting(language_model(), seen.append), microbatch_size=size)
    assert {rows for rows, _ in seen} == {size or len(LENGTHS) // 2}


@pytest.mark.parametrize("size", [1, 4])
def test_response_widths_do_not_change_the_update(float64, size):
    settings = {"num_minibatches": 1, "num_epochs": 1, "microbatch_size": size}
    plain = updated(experience(), **settings)
    assert_same(updated(experience(), response_widths=(2, 5, 99), **settings), plain)


@pytest.mark.parametrize(
    ("size", "lengths", "needed"),
    [
        (1, (2, 4, 2, 3), {3, 6}),
        (1, (1, 1, 1, 1), {1}),
        # Sorted by length, those of one token share a micro-batch.
        (2, (6, 1, 1, 6), {1, 6}),
        (4, (1, 3, 2, 1), {3}),
    ],
)
def test_a_microbatch_takes_the_narrowest_width_that_holds_it(float64, size, lengths, needed):
    """Where a width is broken, somebody notices if and only if some micro-batch takes it."""
    for width in (1, 3, WIDTH):
        policy = BrokenAt(language_model(), jnp.array(4 + width))
        _, metrics = updated(
            experience(lengths), policy=policy, response_widths=(1, 3), microbatch_size=size,
            num_minibatches=1, num_epochs=1,
        )  # fmt: skip
        assert bool(metrics["skipped_minibatches"]) == (width in needed), width


def test_metrics_of_one_token_are_its_own(float64):
    """A mean over one token divides by one."""
    lone = experience((1,))
    _, metrics = updated(lone, num_minibatches=1, num_epochs=1)
    logits = language_model()
    hidden = logits.hidden(lone.rollout.prompt_tokens, lone.rollout.prompt_mask)[:, -1]
    probabilities = jax.nn.softmax(logits.unembed(hidden))
    want = -jnp.sum(probabilities * jnp.log(probabilities))
    np.testing.assert_allclose(metrics["entropy"], want, rtol=1e-10)


def test_weight_decay_of_bfloat16_parameters_is_computed_in_float32():
    policy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), language_model())
    decay = optax.GradientTransformation(
        init=lambda parameters: (),
        update=lambda gradients, state, parameters: (
            jax.tree.map(lambda x: 0.1 * x, parameters), state,
        ),
    )  # fmt: skip
    learner = Learner(actor_optimizer=decay)
    hyperparams = tiny.hyperparams(0.0, actor={"learning_rate": 1.0})
    state, _ = updated(
        experience(), policy=policy, learner=learner, hyperparams=hyperparams,
        num_epochs=1, num_minibatches=1,
    )  # fmt: skip
    for got, before in zip(*map(jax.tree.leaves, (state.policy, policy)), strict=True):
        wide = before.astype(jnp.float32)
        want = (wide - jnp.float32(0.1) * wide).astype(jnp.bfloat16)
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def test_steps_below_the_last_digit_of_bfloat16_parameters_add_up():
    """A step of 2e-5 is a twelfth of what moves a weight of 0.1 at all."""
    policy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), language_model())
    ones = optax.GradientTransformation(
        init=lambda parameters: (),
        update=lambda gradients, state, parameters: (jax.tree.map(jnp.ones_like, gradients), state),
    )
    rate, epochs = 2e-5, 100
    state, _ = updated(
        experience(), policy=policy, learner=Learner(actor_optimizer=ones),
        hyperparams=tiny.hyperparams(0.0, actor={"learning_rate": rate}),
        num_epochs=epochs, num_minibatches=1,
    )  # fmt: skip
    leaves = map(jax.tree.leaves, (state.policy, state.actor_remainder, policy))
    for got, remainder, before in zip(*leaves, strict=True):
        want = np.asarray(before, np.float64) - epochs * rate
        assert got.dtype == jnp.bfloat16
        assert remainder.dtype == jnp.float32
        np.testing.assert_allclose(
            np.asarray(got, np.float64) + np.asarray(remainder, np.float64), want, atol=1e-5
        )
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-5)
    assert state.critic_remainder is None
