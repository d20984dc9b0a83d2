"""The shipped Transformer equals the hand-written one, forward and backward, in float64."""

from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import Phase, given, settings
from oracle import assert_near, model_to_reference, parameters_of

from ppo_kernel.models import RopeScaling
from reference.models import heads, transformer

STRETCHED = RopeScaling(8.0, 1.0, 4.0, 64)
SETTINGS = {
    "tied": {"tie_embeddings": True},
    "biased": {"qkv_bias": True, "norm_epsilon": 1e-2},
    "normed": {"qk_norm": True, "num_kv_heads": 1, "rope_theta": 100.0},
    "stretched": {"num_kv_heads": 4, "rope_scaling": STRETCHED, "num_layers": 3},
}
ROWS, SLOTS = 3, 6

drawn = settings(max_examples=4, phases=(Phase.explicit, Phase.reuse, Phase.generate))
seeds = st.integers(0, 2**32 - 1)


def draw_tokens(rng):
    """Tokens and a mask with holes anywhere."""
    tokens = rng.integers(0, 13, (ROWS, SLOTS))
    return tokens.astype(np.int32), rng.random((ROWS, SLOTS)) < 0.7


@cache
def compiled(name):
    """Outputs of a policy and a critic, and the gradients of their products with given arrays."""
    del name

    @jax.jit
    def run(policy, critic, tokens, mask, along):
        def product(models):
            policy, critic = models
            hidden = policy.hidden(tokens, mask)
            logits = policy.unembed(hidden.reshape(-1, hidden.shape[-1]))
            outputs = hidden, logits.reshape(*tokens.shape, -1), critic(tokens, mask)
            outputs = jax.tree.map(
                lambda x: jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0.0), outputs
            )
            return sum(jnp.sum(a * b) for a, b in zip(outputs, along, strict=True)), outputs

        return jax.grad(product, has_aux=True)((policy, critic))

    return run


@pytest.mark.parametrize("name", SETTINGS)
@drawn
@given(seed=seeds)
def test_outputs_and_gradients_equal_the_reference(float64, name, seed):
    rng = np.random.default_rng(seed)
    config = oracle.trunk_config(**SETTINGS[name])
    policy, critic = oracle.draw_policy(config, rng), oracle.draw_critic(config, 0, rng)
    tokens, mask = draw_tokens(rng)
    along = [rng.standard_normal((ROWS, SLOTS, *size)) for size in ((8,), (13,), ())]
    along = [np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0.0) for x in along]
    gradients, outputs = compiled(name)(policy, critic, tokens, mask, along)
    twin, critic_twin = model_to_reference(policy), model_to_reference(critic)
    expected_policy = expected_critic = None
    for b in range(ROWS):
        place = tokens[b], mask[b]
        hidden = heads.hidden_states(twin, *place)
        values = heads.values_from_hidden(critic_twin, heads.hidden_states(critic_twin, *place))
        for got, want in zip(outputs, (hidden, heads.unembed(twin, hidden), values), strict=True):
            assert_near(np.asarray(got)[b][mask[b]], want[mask[b]], "output", 1e-10)
        parts = (
            heads.policy_backward(along[0][b], along[1][b], twin, *place),
            heads.critic_backward(along[2][b], critic_twin, twin, *place)[0],
        )
        expected_policy = add(expected_policy, parts[0])
        expected_critic = add(expected_critic, parts[1])
    assert_near(parameters_of(gradients[0]), expected_policy, "policy gradient", 1e-10)
    assert_near(parameters_of(gradients[1]), expected_critic, "critic gradient", 1e-10)


def add(total, part):
    return part if total is None else oracle.tree_map(np.add, total, part)


@pytest.mark.parametrize("scaling", [None, STRETCHED, RopeScaling(32.0, 1.0, 4.0, 8192)])
def test_rotary_frequencies_equal_the_reference(scaling):
    config = oracle.trunk_config(head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    frequencies = transformer.rope_frequencies(oracle.config_of(config))
    np.testing.assert_allclose(
        config.period[0].rope.frequencies(config.head_dim), frequencies, rtol=1e-12
    )
