"""An advantage estimator of your own: judged by a plain loop, then used in the iteration.

`pytest examples` runs it. The judging is ten lines: a NumPy loop that says what you mean, and one
property test. `assert_matches` calls the function eager, jitted and vmapped, on drawn rewards,
values and masks (empty rows and holes among them), and a failure names the function, the case and
the largest difference.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from ppo_kernel import (
    GenerationConfig,
    Hyperparams,
    IterationConfig,
    LanguageModel,
    OptimizerHyperparams,
    Prompts,
    TransformerConfig,
    compile_iteration,
)
from ppo_kernel.testing import assert_matches, masks, reals


def rloo(rewards, values, mask, bootstrap_values, *, gamma, lam, groups):
    """REINFORCE with a leave-one-out baseline: the mean return of the prompt's other samples.

    There is no discount, no lambda and no critic in it. Source: Ahmadian et al. 2024, "Back to
    Basics", eq. 8, https://arxiv.org/abs/2402.14740.
    """
    del values, bootstrap_values, gamma, lam
    total = jnp.sum(jnp.where(mask, rewards, 0.0), axis=1)
    same = (groups[:, None] == groups[None, :]).astype(total.dtype)
    others = (same @ total - total) / (jnp.sum(same, axis=1) - 1.0)
    advantages = jnp.where(mask, (total - others)[:, None], 0.0)
    return advantages, advantages


def rloo_in_numpy(rewards, values, mask, bootstrap_values, *, groups, **_):
    advantages = np.zeros_like(rewards)
    for b, group in enumerate(groups):
        others = [i for i, other in enumerate(groups) if other == group and i != b]
        baseline = np.mean([rewards[i][mask[i]].sum() for i in others])
        advantages[b][mask[b]] = rewards[b][mask[b]].sum() - baseline
    return advantages, advantages


GROUPS = np.array([7, 3, 3, 7], np.int32)


@settings(deadline=None)  # the first case compiles
@given(reals((4, 6)), reals((4, 6)), masks((4, 6)), reals((4,)))
def test_rloo_is_what_the_loop_says(rewards, values, mask, bootstrap_values):
    assert_matches(
        rloo, rloo_in_numpy, rewards, values, mask, bootstrap_values,
        gamma=1.0, lam=1.0, groups=GROUPS,
    )  # fmt: skip


def test_rloo_in_the_iteration():
    """Passing it is all it takes: after one step the rewarded token is more likely."""
    shape = TransformerConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    policy = LanguageModel.init(jax.random.key(0), shape)
    prompts = Prompts(
        jnp.full((4, 2), 5, jnp.int32), jnp.ones((4, 2), bool), jnp.arange(4, dtype=jnp.int32)
    )
    generation = GenerationConfig(max_new_tokens=6, samples_per_prompt=2)
    config = IterationConfig(generation, num_epochs=1, kl_estimator=None)
    hyperparams = Hyperparams(actor=OptimizerHyperparams(learning_rate=0.01))
    ppo = compile_iteration(config=config, advantage_estimator=rloo)
    state = ppo.init(policy, None, jax.random.key(1), hyperparams)

    def threes(rollout):
        return jnp.sum((rollout.tokens == 3) & rollout.mask, axis=1).astype(jnp.float32)

    state, metrics = ppo.step(state, policy, prompts, hyperparams, threes)
    assert float(metrics["skipped_minibatches"]) == 0.0

    @eqx.filter_jit
    def likelihood(policy):
        last = policy.hidden(prompts.tokens, prompts.mask)[:, -1]
        return jax.nn.softmax(policy.unembed(last))[0, 3]

    assert likelihood(state.policy) > likelihood(policy)
