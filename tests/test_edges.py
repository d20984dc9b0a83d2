"""Numerical edges of the iteration: the right answer, or a counter; never a silent NaN.

Numbers are planted in one program; `test_edge_programs.py` has the edges with their own.
"""

from dataclasses import fields
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from edges import K3_LOSS, SETTINGS, STEPS, assert_finite, assert_unchanged
from jaxtyping import Array, Float

from ppo_kernel.config import Hyperparams, OptimizerHyperparams
from ppo_kernel.iteration import collect, learn
from ppo_kernel.program import compile_iteration
from ppo_kernel.types import Rollout

NAN, INF = float("nan"), float("inf")


class TableReward(eqx.Module):
    """Evaluation that are an argument of the program, so that one program takes any of them."""

    scores: Float[Array, " B"]

    def __call__(self, rollout: Rollout) -> Float[Array, " B"]:
        del rollout
        return self.scores


@cache
def inputs():
    """(state, reference, prompts, hyper-parameters, reward) of the program below."""
    hyperparams = tiny.hyperparams(**SETTINGS)
    reward = TableReward(jnp.linspace(-1.0, 1.0, 8))
    return (
        tiny.start(hyperparams), tiny.language_model(seed=8), tiny.prompts(), hyperparams, reward
    )  # fmt: skip


@cache
def compiled_step():
    config = tiny.iteration_config(**K3_LOSS, microbatch_size=2, bootstrap_truncated=True)
    return compile_iteration(config=config).step


def run(state, *others):
    state, metrics = compiled_step()(jax.tree.map(jnp.copy, state), *others)
    return state, {name: float(value) for name, value in metrics.items()}


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
        "clip_ratio_low", "clip_ratio_high", "dual_clip", "value_clip", "gamma", "lam", "kl_coef",
        "entropy_coef", "value_coef", "missing_eos_penalty", "score_clip",
    )
} | {
    f"{side}.{name}": (
        lambda i, side=side, name=name: getattr(getattr(i[3], side), name), "skipped_minibatches"
    )
    for side in ("actor", "critic") for name in ("learning_rate", "max_grad_norm")
} | {"temperature": (lambda i: i[3].temperature, "nonfinite_logprobs")}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_nan_is_counted_and_trains_nothing(name):
    where, counter = PLANTS[name]
    planted = eqx.tree_at(where, inputs(), replace_fn=lambda x: x.at[(0,) * x.ndim].set(NAN))
    after, metrics = run(*planted)
    assert metrics[counter] >= 1, metrics
    planted_parameters = 1 if name in ("policy", "critic") else 0
    if counter != "nonfinite_parameters":
        assert metrics["nonfinite_parameters"] == planted_parameters
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
    numbers = [(OptimizerHyperparams, field.name) for field in fields(OptimizerHyperparams)]
    numbers += [(Hyperparams, field.name) for field in fields(Hyperparams)]
    for record, name in numbers:
        for value in (NAN, INF, -INF) if name not in ("actor", "critic") else ():
            with pytest.raises(ValueError, match=f"{name} must be finite.*got {value}"):
                record(**{name: value})
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


def test_a_prompt_without_a_token_is_counted_and_changes_no_other():
    state, reference, prompts, *others = inputs()
    emptied = eqx.tree_at(lambda p: p.mask, prompts, prompts.mask.at[2].set(False))
    _, metrics = run(state, reference, emptied, *others)
    assert metrics["empty_prompts"] == 1
    assert all(np.isfinite(x) for x in metrics.values()), metrics
    rows = np.arange(8) != 2
    sample = jax.jit(
        lambda p: collect(state, reference, p, others[0], config=tiny.iteration_config()).rollout
    )
    for got, want in zip(*(jax.tree.leaves(sample(p)) for p in (emptied, prompts)), strict=True):
        np.testing.assert_array_equal(got[rows], want[rows])


def test_rows_without_a_token_change_nothing_for_the_others():
    """Whatever stands in their masked places, NaN included."""

    def emptied(collected, value):
        rows = jnp.array([1, 6])
        collected = eqx.tree_at(
            lambda c: (c.rollout.mask, c.rollout.lengths), collected,
            replace_fn=lambda x: x.at[rows].set(jnp.zeros((), x.dtype)),
        )  # fmt: skip
        return eqx.tree_at(
            lambda c: (c.rollout.logprobs, c.old_logprobs, c.evaluation.values), collected,
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
