"""The results from a slot on are those of the whole sequence, for less work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

SETTINGS = {
    "scanned": {"num_layers": 3},
    "one layer": {"num_layers": 1},
    "all layers in one turn": {"num_layers": 3, "unroll": 3},
    "everything kept": {"num_layers": 2, "unroll": 8, "remat": None},
}
ROWS, SLOTS, START = 3, 7, 4


def draw(settings):
    rng = np.random.default_rng(0)
    config = oracle.trunk_config(**settings)
    models = oracle.draw_policy(config, rng), oracle.draw_critic(config, 0, rng)
    tokens = jnp.asarray(rng.integers(0, 13, (ROWS, SLOTS)), jnp.int32)
    mask = jnp.asarray(rng.random((ROWS, SLOTS)) < 0.7).at[:, 0].set(True)
    along = [jnp.asarray(rng.standard_normal((ROWS, SLOTS - START, *size))) for size in ((8,), ())]
    return models, tokens, mask, along


def with_gradients(function, models, along):
    outputs, backward = jax.vjp(function, models)
    return jax.tree.leaves((outputs, backward(tuple(along))))


@pytest.mark.parametrize("name", SETTINGS)
def test_results_and_gradients_are_those_of_the_whole_sequence(float64, name):
    models, tokens, mask, along = draw(SETTINGS[name])

    def from_slot(models):
        policy, critic = models
        return policy.hidden(tokens, mask, START), critic(tokens, mask, START)

    def whole(models):
        policy, critic = models
        return policy.hidden(tokens, mask)[:, START:], critic(tokens, mask)[:, START:]

    got, want = (with_gradients(f, models, along) for f in (from_slot, whole))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_the_last_of_the_layers_in_one_turn_skips_what_is_not_read(float64):
    """Its output product and the three of its MLP are of the slots that are read alone."""
    (policy, _), tokens, mask, _ = draw(SETTINGS["all layers in one turn"])
    program = jax.jit(lambda policy: policy.hidden(tokens, mask, START)).lower(policy)
    rows = ROWS * (SLOTS - START)
    narrow = re.findall(rf"dot_general.*-> tensor<{rows}x(\d+)xf64>", program.as_text())
    width, inner = policy.trunk.config.hidden_size, policy.trunk.config.intermediate_size
    assert sorted(int(n) for n in narrow) == [width, width, inner, inner]
