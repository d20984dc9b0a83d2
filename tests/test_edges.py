"""Numerical edges of the iteration: the right answer, or a counter; never a silent NaN."""

import dataclasses
from functools import cache

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import Array, Float

from ppo_kernel.config import Hyperparams
from ppo_kernel.iteration import collect, compile_iteration, learn
from ppo_kernel.models import LanguageModel
from ppo_kernel.ops.kl import k3
from ppo_kernel.scoring import full_sequences, response_logprobs
from ppo_kernel.types import Rollout

NAN, INF = float("nan"), float("inf")
SETTINGS = {
    "learning_rate_actor": 1e-2, "learning_rate_critic": 1e-2, "dual_clip": 3.0, "kl_coef": 0.1,
    "entropy_coef": 0.01, "missing_eos_penalty": 1.0, "score_clip": 5.0,
}  # fmt: skip
STEPS = 4  # of `tiny.iteration_config`: 2 epochs of 2 minibatches


class TableReward(eqx.Module):
    """Scores that are an argument of the program, so that one program takes any of them."""

    scores: Float[Array, " B"]

    def __call__(self, rollout: Rollout) -> Float[Array, " B"]:
        del rollout
        return self.scores


class BanningPolicy(eqx.Module):
    """A policy that never writes some tokens: their logits are -inf."""

    model: LanguageModel
    banned: tuple[int, ...] = eqx.field(static=True, default=(4, 5, 6))

    def hidden(self, tokens, mask):
        return self.model.hidden(tokens, mask)

    def unembed(self, hidden):
        return self.model.unembed(hidden).at[:, jnp.array(self.banned)].set(-jnp.inf)

    def prefill(self, tokens, mask, capacity):
        return self.model.prefill(tokens, mask, capacity)

    def decoder(self):
        return self.model.decoder()


@cache
def inputs():
    """(state, reference, prompts, hyper-parameters, reward) of the program below."""
    hyperparams = Hyperparams(**SETTINGS)
    reward = TableReward(jnp.linspace(-1.0, 1.0, 8))
    return (
        tiny.start(hyperparams), tiny.language_model(seed=8), tiny.prompts(), hyperparams, reward
    )  # fmt: skip


@cache
def compiled_step():
    config = tiny.iteration_config(loss_kl=k3, microbatch_size=2, bootstrap_truncated=True)
    return compile_iteration(config=config).step


def run(state, *others):
    state, metrics = compiled_step()(jax.tree.map(jnp.copy, state), *others)
    return state, {name: float(value) for name, value in metrics.items()}


def trained(state):
    return (
        state.policy, state.critic, state.actor_optimizer_state, state.critic_optimizer_state
    )  # fmt: skip


def assert_unchanged(after, before):
    chex.assert_trees_all_equal(trained(after), trained(before))


def assert_finite(state, metrics):
    chex.assert_tree_all_finite(metrics)
    chex.assert_tree_all_finite(trained(state))


def test_nothing_is_counted_where_nothing_is_wrong():
    state, metrics = run(*inputs())
    assert_finite(state, metrics)
    counters = [name for name in metrics if name.startswith(("nonfinite", "skipped", "clamped"))]
    assert len(counters) == 7
    assert not any(metrics[name] for name in counters), metrics


PLANTS = {
    "policy": (lambda i: i[0].policy.output, "nonfinite_logprobs"),
    "critic": (lambda i: i[0].critic.head.weight, "nonfinite_values"),
    "reference": (lambda i: i[1].trunk.norm.weight, "nonfinite_logprobs"),
    "score": (lambda i: i[4].scores, "nonfinite_scores"),
    "actor moments": (lambda i: i[0].actor_optimizer_state.mu.output, "nonfinite_parameters"),
    "critic moments": (
        lambda i: i[0].critic_optimizer_state.nu.head.weight, "nonfinite_parameters"
    ),
} | {
    name: (lambda i, name=name: getattr(i[3], name), "skipped_minibatches")
    for name in (
        "learning_rate_actor", "learning_rate_critic", "clip_ratio_low", "clip_ratio_high",
        "dual_clip", "value_clip", "gamma", "lam", "kl_coef", "entropy_coef", "value_coef",
        "max_grad_norm_actor", "max_grad_norm_critic", "missing_eos_penalty", "score_clip",
    )
} | {"temperature": (lambda i: i[3].temperature, "nonfinite_logprobs")}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_nan_is_counted_and_trains_nothing(name):
    where, counter = PLANTS[name]
    planted = eqx.tree_at(where, inputs(), replace_fn=lambda x: x.at[(0,) * x.ndim].set(NAN))
    after, metrics = run(*planted)
    assert metrics[counter] >= 1, metrics
    if counter != "nonfinite_parameters":
        assert metrics["skipped_minibatches"] == STEPS
        assert_unchanged(after, planted[0])


@pytest.mark.parametrize("name", ["policy", "critic", "reference"])
@pytest.mark.parametrize("value", [INF, -INF])
def test_a_planted_infinity_is_counted_and_trains_nothing(name, value):
    where, counter = PLANTS[name]
    planted = eqx.tree_at(where, inputs(), replace_fn=lambda x: x.at[(0,) * x.ndim].set(value))
    after, metrics = run(*planted)
    assert metrics[counter] >= 1, metrics
    assert metrics["skipped_minibatches"] == STEPS
    assert_unchanged(after, planted[0])


@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_score_is_counted_and_clipped(value):
    """With a clip of the scores it is as large as any other one beyond the clip."""
    planted = [
        eqx.tree_at(PLANTS["score"][0], inputs(), replace_fn=lambda x, v=v: x.at[0].set(v))
        for v in (value, np.sign(value) * 1e6)
    ]
    (state, metrics), (other, _) = (run(*each) for each in planted)
    assert metrics["nonfinite_scores"] == 1
    assert metrics["skipped_minibatches"] == 0
    assert_unchanged(state, other)


def test_hyperparameters_out_of_range_are_refused():
    for name in (field.name for field in dataclasses.fields(Hyperparams)):
        for value in (NAN, INF, -INF):
            with pytest.raises(ValueError, match=f"{name} must be finite.*got {value}"):
                Hyperparams(**{name: value})
    for name, value in (("gamma", 1.01), ("temperature", 0.0), ("dual_clip", 1.0), ("top_p", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be finite, a.*, got {value}"):
            Hyperparams(**{name: value})
    assert jax.jit(lambda x: Hyperparams(gamma=x).gamma)(2.0) == 2.0, "a traced one has no value"


def test_logits_of_10_000_are_no_edge():
    state, *others = inputs()
    sharp = eqx.tree_at(lambda s: s.policy.output, state, replace_fn=lambda x: 1e5 * x)
    logits = sharp.policy.unembed(sharp.policy.hidden(others[1].tokens, others[1].mask)[:, -1])
    assert float(jnp.abs(logits).max()) > 1e4
    state, metrics = run(sharp, sharp.policy, *others[1:])
    assert_finite(state, metrics)
    assert metrics["skipped_minibatches"] == 0
    assert metrics["kl_divergence"] == 0.0
    assert metrics["entropy"] < 1e-6


def one_step(config, policy, batch, **settings):
    hyperparams = Hyperparams(**(SETTINGS | settings))
    state = tiny.start(hyperparams, policy=policy)
    return tiny.one_step(state, policy, batch, hyperparams, config)


def test_tokens_that_the_policy_bans_are_no_edge():
    policy = BanningPolicy(tiny.language_model())
    state, metrics = one_step(tiny.iteration_config(loss_kl=k3), policy, tiny.prompts())
    assert_finite(state, metrics)
    assert metrics["skipped_minibatches"] == 0
    rollout = jax.jit(
        lambda: (
            collect(
                state, policy, tiny.prompts(), Hyperparams(), config=tiny.iteration_config()
            ).rollout
        )
    )()
    assert not np.isin(rollout.tokens[rollout.mask], policy.banned).any()


def test_tokens_that_the_reference_bans_are_infinitely_unlikely_and_counted():
    hyperparams, policy = Hyperparams(**SETTINGS), tiny.language_model()
    state = tiny.start(hyperparams, policy=policy)
    reference = BanningPolicy(policy)
    after, metrics = tiny.one_step(
        state, reference, tiny.prompts(), hyperparams, tiny.iteration_config()
    )
    assert metrics["nonfinite_logprobs"] >= 1
    assert metrics["kl_divergence"] == INF
    assert metrics["skipped_minibatches"] == STEPS
    assert_unchanged(after, state)


def test_a_vocabulary_of_one_and_a_response_of_eos_alone():
    """A batch of one, too: nothing can be learnt about tokens, and nothing breaks."""
    policy = tiny.language_model(vocab_size=1)
    batch = dataclasses.replace(tiny.prompts((2,)), tokens=jnp.zeros((1, 4), jnp.int32))
    config = tiny.iteration_config(
        tiny.generation(eos_token_ids=(0,)), num_minibatches=1, loss_kl=k3
    )
    state, metrics = one_step(config, policy, batch)
    assert_finite(state, metrics)
    expected = {
        "response_length": 1.0, "truncated_fraction": 0.0, "kl_divergence": 0.0, "entropy": 0.0,
        "approx_kl": 0.0, "actor_loss": 0.0, "grad_norm_actor": 0.0, "skipped_minibatches": 0.0,
        "reward_std": 0.0, "explained_variance": 0.0,
    }  # fmt: skip
    assert {name: float(metrics[name]) for name in expected} == expected
    rollout = collect(state, policy, batch, Hyperparams(), config=config).rollout
    np.testing.assert_array_equal(rollout.mask, [[True, False, False, False, False]])
    np.testing.assert_array_equal(rollout.logprobs, np.zeros((1, 5)))


@pytest.mark.parametrize("eos", [(13,), (1, 99)])
def test_an_eos_outside_of_the_vocabulary_is_refused(eos):
    config = tiny.iteration_config(tiny.generation(eos_token_ids=eos))
    with pytest.raises(ValueError, match=rf"eos_token_ids \[{eos[-1]}\] .* of 13 tokens"):
        one_step(config, tiny.language_model(), tiny.prompts())


def test_a_ban_of_every_token_is_refused():
    generation = tiny.generation(eos_token_ids=tuple(range(13)), min_new_tokens=1)
    with pytest.raises(ValueError, match=r"min_new_tokens=1 bans .* nothing is left"):
        one_step(tiny.iteration_config(generation), tiny.language_model(), tiny.prompts())


def test_a_pad_id_outside_of_the_vocabulary_changes_nothing():
    results = []
    for pad in (tiny.PAD, 10**6):
        config = tiny.iteration_config(tiny.generation(pad_token_id=pad))
        results.append(one_step(config, tiny.language_model(), tiny.prompts(pad=pad)))
    (state, metrics), (other, other_metrics) = results
    assert_finite(other, other_metrics)
    assert_unchanged(other, state)
    assert float(metrics["truncated_fraction"]) < 1, "some response must be padded"


def collected_and_learnt(change):
    """`learn` on a changed rollout: (state after, metrics, state before)."""
    state, reference, prompts, hyperparams, reward = inputs()
    config = tiny.iteration_config()
    collected = jax.jit(lambda s: collect(s, reference, prompts, hyperparams, config=config))(state)
    after, metrics = jax.jit(lambda s, c: learn(s, c, reward.scores, hyperparams, config=config))(
        state, change(collected)
    )
    return after, {name: float(value) for name, value in metrics.items()}, state


def test_a_batch_without_a_token_trains_nothing_and_is_counted():
    def empty(collected):
        return eqx.tree_at(
            lambda c: (c.rollout.mask, c.rollout.lengths), collected, replace_fn=jnp.zeros_like
        )

    after, metrics, before = collected_and_learnt(empty)
    assert_finite(after, metrics)
    assert metrics["empty_responses"] == 8
    assert metrics["skipped_minibatches"] == STEPS
    assert_unchanged(after, before)


def test_rows_without_a_token_change_nothing_for_the_others():
    """Whatever stands in their masked places, NaN included."""

    def emptied(collected, value):
        rows = jnp.array([1, 6])
        collected = eqx.tree_at(
            lambda c: (c.rollout.mask, c.rollout.lengths), collected,
            replace_fn=lambda x: x.at[rows].set(jnp.zeros((), x.dtype)),
        )  # fmt: skip
        return eqx.tree_at(
            lambda c: (c.rollout.logprobs, c.old_logprobs, c.scores.values), collected,
            replace_fn=lambda x: x.at[rows].set(value),
        )  # fmt: skip

    (after, metrics, _), (other, _, _) = (
        collected_and_learnt(lambda c, v=value: emptied(c, v)) for value in (0.0, NAN)
    )
    assert_finite(after, metrics)
    assert metrics["empty_responses"] == 2
    assert metrics["skipped_minibatches"] == 0
    assert_unchanged(other, after)


def test_overflowing_ratios_are_clamped_and_counted():
    def shifted(collected):
        first = jnp.where(jnp.arange(8) < 2, -1e4, 0.0)
        return eqx.tree_at(
            lambda c: c.old_logprobs, collected, replace_fn=lambda x: x.at[:, 0].add(first)
        )

    after, metrics, _ = collected_and_learnt(shifted)
    assert_finite(after, metrics)
    assert metrics["clamped_log_ratios"] == 4, "two tokens in two epochs"
    assert metrics["clamped_rollout_log_ratios"] == 2
    assert metrics["skipped_minibatches"] == 0


def test_a_constant_reward_has_no_advantage_and_no_noise():
    """Zero variance under whitening."""
    hyperparams = Hyperparams(**(SETTINGS | {"kl_coef": 0.0, "entropy_coef": 0.0, "lam": 1.0}))
    hyperparams = eqx.tree_at(lambda h: h.missing_eos_penalty, hyperparams, jnp.zeros(()))
    critic = jax.tree.map(jnp.zeros_like, tiny.value_model())
    state = tiny.start(hyperparams, critic=critic)

    def constant(rollout):
        return jnp.full(rollout.lengths.shape, 0.5)

    after, metrics = tiny.one_step(
        state, tiny.language_model(), tiny.prompts(), hyperparams, tiny.iteration_config(),
        reward=constant,
    )  # fmt: skip
    assert float(metrics["grad_norm_actor"]) == 0.0
    assert float(metrics["skipped_minibatches"]) == 0.0
    assert float(metrics["explained_variance"]) == 0.0
    assert_finite(after, metrics)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_computes_what_float32_does_to_its_rounding(param_dtype):
    narrow = tiny.language_model(
        param_dtype=param_dtype, compute_dtype="bfloat16", cache_dtype="bfloat16"
    )
    wide = _in_float32(narrow)
    config = tiny.iteration_config(recompute_old_logprobs=True)
    state, metrics = one_step(config, narrow, tiny.prompts())
    assert_finite(state, metrics)
    assert metrics["skipped_minibatches"] == 0
    assert state.policy.output.dtype == param_dtype
    for x in (*metrics.values(), *jax.tree.leaves(state.actor_optimizer_state.mu)):
        assert x.dtype == jnp.float32
    unchanged = tiny.start(Hyperparams(), policy=narrow)
    collected = jax.jit(lambda s: collect(s, narrow, tiny.prompts(), Hyperparams(), config=config))(
        unchanged
    )
    rollout = collected.rollout
    np.testing.assert_array_equal(collected.old_logprobs, collected.scores.reference_logprobs)
    hidden = wide.hidden(*full_sequences(rollout))
    exact, _ = response_logprobs(wide, rollout, hidden, temperature=1.0)
    # Log-probabilities of a few nats after some ten roundings of 2^-8.
    np.testing.assert_allclose(collected.old_logprobs, exact, atol=0.25)
    np.testing.assert_allclose(rollout.logprobs, exact, atol=0.25)


def _in_float32(model):
    config = dataclasses.replace(
        model.trunk.config, param_dtype="float32", compute_dtype="float32", cache_dtype="float32"
    )
    model = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    return dataclasses.replace(model, trunk=dataclasses.replace(model.trunk, config=config))
