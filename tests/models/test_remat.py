"""What a layer keeps for its backward pass changes memory and time, and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest


@pytest.mark.parametrize(
    "settings",
    [{"remat": None}, {"remat": jax.checkpoint_policies.nothing_saveable}, {"unroll": 2}],
    ids=["everything kept", "nothing kept", "unrolled"],
)
def test_how_the_layers_are_compiled_does_not_change_the_gradient(float64, settings):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 13, (2, 5)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 5)) < 0.8)

    def gradient(**settings):
        policy = oracle.draw_policy(oracle.trunk_config(**settings), np.random.default_rng(1))

        def total(policy):
            hidden = jnp.sin(policy.hidden(tokens, mask))
            return jnp.sum(jnp.where(mask[..., None], hidden, 0.0))

        return jax.tree.leaves(jax.grad(total)(policy))

    for got, want in zip(gradient(**settings), gradient(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_the_mixed_values_are_kept_and_the_weights_are_not(float64):
    """Two products forward; backward q k^T once more, and one for each of dv, dp, dq and dk."""
    policy = oracle.draw_policy(oracle.trunk_config(), np.random.default_rng(0))
    tokens = jnp.zeros((2, 5), jnp.int32)
    gradient = jax.grad(lambda policy: jnp.sum(policy.hidden(tokens, tokens == 0)))
    assert jax.jit(gradient).lower(policy).as_text().count("batching_dims") == 2 + 1 + 4
