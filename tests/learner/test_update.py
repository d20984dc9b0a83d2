"""The update alone, on experience nobody collected: gradients, Adam, skips, micro-batches."""

from dataclasses import replace
from functools import cache

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny
from hypothesis import Phase, given, settings
from oracle import assert_near, model_to_reference, parameters_of, to_reference

import reference.config
import reference.derivatives
import reference.evaluation
import reference.learner.epochs
import reference.learner.gradient
import reference.learner.state
import reference.ops.kl
from ppo_kernel.config import GenerationConfig, IterationConfig
from ppo_kernel.learner.epochs import minibatch_order, update
from ppo_kernel.learner.state import Learner, iteration_keys
from ppo_kernel.ops.kl import k2
from ppo_kernel.types import Experience

ROWS, SHAPE, VOCABULARY = 4, (3, 4), 13
drawn = settings(max_examples=4, phases=(Phase.explicit, Phase.reuse, Phase.generate))
seeds = st.integers(0, 2**32 - 1)

GRADIENTS = optax.GradientTransformation(
    init=lambda parameters: jax.tree.map(jnp.zeros_like, parameters),
    update=lambda gradients, state, parameters=None: (gradients, gradients),
)
"""An optimizer whose state is the last gradient."""

HYPERPARAMS = {
    "actor": {"learning_rate": 0.02, "max_grad_norm": None}, "dual_clip": 1.4,
    "critic": {"learning_rate": 0.03, "max_grad_norm": None},
    "clip_ratio_low": 0.15, "clip_ratio_high": 0.3, "value_clip": 0.2, "kl_coef": 0.1,
    "entropy_coef": 0.05, "value_coef": 0.7, "temperature": 0.8,
}  # fmt: skip


def iteration_config(**settings_) -> IterationConfig:
    generation = GenerationConfig(max_new_tokens=SHAPE[1])
    return IterationConfig(generation=generation, kl_estimator=k2, kl_in_loss=True, **settings_)


REFERENCE_CONFIG = reference.config.IterationConfig(
    generation=reference.config.GenerationConfig(max_new_tokens=SHAPE[1]),
    kl_estimator=reference.ops.kl.k2,
    kl_slope=reference.derivatives.k2_slope,
    kl_in_loss=True,
)


def draw(seed, *, shared=False, learner=None, **changes):
    """(state, experience, hyper-parameters): ratios, values and advantages wherever they fall."""
    rng = np.random.default_rng(seed)
    trunk = oracle.trunk_config(num_layers=1)
    policy = oracle.draw_policy(trunk, rng)
    critic = oracle.draw_critic(None if shared else trunk, trunk.hidden_size, rng)
    rollout = oracle.draw_rollout(ROWS, SHAPE, VOCABULARY, rng)
    twin, critic_twin, record = map_twins(policy, critic, rollout)
    logprobs, _ = reference.evaluation.response_logprobs(twin, record, temperature=0.8)
    values, _ = reference.evaluation.response_values(critic_twin, twin, record)

    def near(x):
        return jnp.asarray(x + 0.3 * rng.standard_normal(x.shape))

    experience = Experience(
        rollout=rollout, old_logprobs=near(logprobs), reference_logprobs=near(logprobs),
        old_values=near(values), advantages=near(0 * values), returns=near(values),
    )  # fmt: skip
    hyperparams = tiny.hyperparams(**(HYPERPARAMS | changes))
    state = (learner or Learner()).init(policy, critic, jax.random.key(seed % 1000), hyperparams)
    return state, experience, hyperparams


def map_twins(policy, critic, rollout):
    return model_to_reference(policy), model_to_reference(critic), to_reference(rollout)


@cache
def compiled(config):
    @eqx.filter_jit
    def run(state, experience, hyperparams):
        return update(state, experience, hyperparams, config=config)

    return run


def reference_state(state, hyperparams):
    models = model_to_reference(state.policy), model_to_reference(state.critic)
    return reference.learner.state.TrainState.start(*models, float(hyperparams.kl_coef))


REPORTING = Learner(actor_optimizer=GRADIENTS, critic_optimizer=GRADIENTS)
MICROBATCHES = {size: iteration_config(num_epochs=1, microbatch_size=size) for size in (None, 2)}
SHARED = iteration_config(num_epochs=1)
STEPS = iteration_config(num_epochs=2, num_minibatches=2, microbatch_size=1)


@pytest.mark.parametrize("size", MICROBATCHES)
@drawn
@given(seed=seeds)
def test_gradient_of_a_minibatch_equals_the_reference(float64, size, seed):
    """In one piece or in micro-batches: the weights are those of the minibatch."""
    state, experience, hyperparams = draw(seed, learner=REPORTING)
    assert_gradients(state, experience, hyperparams, MICROBATCHES[size])


@drawn
@given(seed=seeds)
def test_gradient_of_a_shared_trunk_equals_the_reference(float64, seed):
    state, experience, hyperparams = draw(seed, learner=REPORTING, shared=True)
    assert_gradients(state, experience, hyperparams, SHARED)


def assert_gradients(state, experience, hyperparams, config):
    run = compiled(config)
    after, metrics = run(state, experience, hyperparams)
    expected = reference.learner.gradient.minibatch_gradients(
        reference_state(state, hyperparams), to_reference(experience), np.arange(ROWS),
        to_reference(hyperparams), config=REFERENCE_CONFIG,
    )  # fmt: skip
    assert_near(parameters_of(after.actor_optimizer_state), expected.policy, "policy")
    assert_near(parameters_of(after.critic_optimizer_state), expected.critic, "critic")
    for name, term in (expected.terms["policy"] | expected.terms["critic"]).items():
        assert_near(np.asarray(metrics[name]), np.asarray(term), name)


POISONS = {
    "nothing": None, "no advantage": ("advantages", np.nan), "no return": ("returns", np.nan),
    "overflow": ("returns", 1e200),
}  # fmt: skip
"""What spoils a minibatch; a finite target that overflows when squared spoils the critic alone."""


@pytest.mark.parametrize(
    ("name", "shared"), [*((name, False) for name in POISONS), ("overflow", True)]
)
@drawn
@given(seed=seeds, limits=st.tuples(*[st.floats(1e-3, 2.0)] * 2), row=st.sampled_from((0, 3)))
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_steps_equal_the_reference(float64, name, shared, seed, limits, row):
    """Clipping, Adam and skips."""
    sides = {
        side: HYPERPARAMS[side] | {"max_grad_norm": limit}
        for side, limit in zip(("actor", "critic"), limits, strict=True)
    }
    state, experience, hyperparams = draw(seed, shared=shared, **sides)
    if POISONS[name] is not None:
        experience = poison(experience, row, *POISONS[name])
    after, metrics = compiled(STEPS)(state, experience, hyperparams)
    key = iteration_keys(state).update
    order = np.asarray(minibatch_order(key, experience.rollout.sample_ids, 2, 2))
    expected, expected_metrics = reference.learner.epochs.update(
        reference_state(state, hyperparams), to_reference(experience), order,
        to_reference(hyperparams), config=REFERENCE_CONFIG,
    )  # fmt: skip
    for role, model, adam, twin, moments in (
        ("policy", after.policy, after.actor_optimizer_state, expected.policy,
         expected.actor_moments),
        ("critic", after.critic, after.critic_optimizer_state, expected.critic,
         expected.critic_moments),
    ):  # fmt: skip
        assert int(adam.count) == moments.count
        assert_near(parameters_of(adam.mu), moments.first, f"{role}, first moment")
        assert_near(parameters_of(adam.nu), moments.second, f"{role}, second moment")
        assert_near(parameters_of(model), twin.parameters, role)
    for name, number in expected_metrics.items():
        assert_near(np.asarray(metrics[name]), np.asarray(number), name)


def poison(experience, row, field="advantages", value=np.nan):
    """`experience` with a full response in that row, and a `value` at its first token."""
    rollout = experience.rollout
    rollout = replace(
        rollout,
        lengths=rollout.lengths.at[row].set(SHAPE[1]),
        mask=rollout.mask.at[row].set(True),
    )
    spoilt = getattr(experience, field).at[row, 0].set(value)
    return replace(experience, rollout=rollout, **{field: spoilt})


@pytest.mark.parametrize("field", ["advantages", "returns"])
def test_a_gradient_that_is_not_finite_changes_nothing(float64, field):
    """Neither model moves, whichever of the two gradients it is; every step is counted."""
    state, experience, hyperparams = draw(5, actor={}, critic={})
    for row in range(ROWS):
        experience = poison(experience, row)
    broken = {name: jnp.zeros_like(experience.advantages) for name in ("advantages", "returns")}
    broken[field] = jnp.full_like(experience.advantages, jnp.inf)
    experience = replace(experience, **broken)
    after, metrics = compiled(STEPS)(state, experience, hyperparams)
    trained = "policy", "critic", "actor_optimizer_state", "critic_optimizer_state"
    for name in trained:
        got, want = (jax.tree.leaves(getattr(x, name)) for x in (after, state))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert float(metrics["skipped_minibatches"]) == 4
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_minibatches": 3}, "4 sequences do not divide into num_minibatches=3"),
        ({"num_minibatches": 1, "microbatch_size": 3}, "4 sequences does not divide .* of 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(float64, settings_, message):
    state, experience, hyperparams = draw(0)
    run = compiled(iteration_config(**settings_))
    with pytest.raises(ValueError, match=message):
        run(state, experience, hyperparams)


def test_a_run_starts_at_iteration_0_with_the_given_coefficient(float64):
    state, _, hyperparams = draw(0)
    assert int(state.iteration) == 0
    assert float(state.kl_coef) == float(hyperparams.kl_coef) == HYPERPARAMS["kl_coef"]


@pytest.mark.parametrize("kl_target", [None, 6.0])
def test_without_a_target_the_coefficient_of_the_settings_counts(float64, kl_target):
    """That of the state is the controller's."""
    run = compiled(SHARED)
    state, experience, hyperparams = draw(0)
    weak, strong = (
        replace(hyperparams, kl_coef=jnp.asarray(coef), kl_target=kl_target)
        for coef in (0.05, 10.0)
    )
    after = [run(state, experience, h)[0].policy for h in (weak, strong)]
    same = all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, after), strict=True))
    assert same == (kl_target is not None)


def test_a_state_shares_no_array_with_what_it_was_made_from(float64):
    """An iteration donates it, and some optimizers keep the parameters they were given."""
    keeps = optax.GradientTransformation(lambda params: params, optax.identity().update)
    state, _, hyperparams = draw(0)
    models = state.policy, state.critic
    after = Learner(keeps, keeps).init(*models, state.key, hyperparams)

    def places(tree):
        arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        return {x.unsafe_buffer_pointer() for x in arrays}

    assert not places(models) & places(after)


def test_moments_are_made_once(float64):
    """A copy of them would be the most that a run ever has in memory."""
    made = []

    def init(parameters):
        made.append(jax.tree.map(jnp.zeros_like, parameters))
        return made[-1]

    state, _, hyperparams = draw(0)
    optimizer = optax.GradientTransformation(init, optax.identity().update)
    after = Learner(optimizer, optimizer).init(state.policy, state.critic, state.key, hyperparams)
    kept = jax.tree.leaves((after.actor_optimizer_state, after.critic_optimizer_state))
    assert {id(x) for x in kept} <= {id(x) for x in jax.tree.leaves(made)}


@given(seed=seeds)
def test_every_epoch_is_another_permutation_and_follows_the_samples(seed):
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.permutation(1000)[:8], jnp.int32)
    order = orders(jax.random.key(seed % 997), ids)
    epochs = np.asarray(order).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(8), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    shuffled = jnp.asarray(rng.permutation(8))
    again = orders(jax.random.key(seed % 997), ids[shuffled])
    np.testing.assert_array_equal(ids[shuffled][again], ids[order])


@jax.jit
def orders(key, ids):
    return minibatch_order(key, ids, 3, 2)
