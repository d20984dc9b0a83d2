"""Weight decay shrinks matrices, and leaves norms and biases alone, stacked as they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import tiny

from ppo_kernel.trainer.config import PPOConfig
from ppo_kernel.trainer.supervised import FitConfig

LINEAR = {f"attention.{name}" for name in ("query", "key", "value", "output")} | {
    f"mlp.{name}" for name in ("gate", "up", "down")
}
TRUNK = {".trunk.embedding"} | {f".trunk.blocks.{name}.weight" for name in LINEAR}
WITH_ALL = {"qkv_bias": True, "qk_norm": True}
MODELS = {
    "policy": (lambda: tiny.language_model(**WITH_ALL), TRUNK | {".output"}),
    "critic": (lambda: tiny.value_model(**WITH_ALL), TRUNK),
    "somebody else's": (
        lambda: tiny.RecurrentPolicy(jax.random.key(0)),
        {".embedding", ".cell.weight_ih", ".cell.weight_hh"},
    ),
}


def ppo():
    return PPOConfig(weight_decay=0.1).learner()


OPTIMIZERS = {
    "fit": lambda: FitConfig(
        num_steps=8, batch_size=1, widths=(4,), learning_rate=1.0, weight_decay=0.1
    ).optimizer(),
    "actor": lambda: ppo().actor_optimizer,
    "critic": lambda: ppo().critic_optimizer,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_matrices_decay_and_nothing_else(optimizer, model):
    init, decayed = MODELS[model]
    parameters = eqx.filter(init(), eqx.is_inexact_array)
    # No parameter is zero, so that what decays moves.
    parameters = jax.tree.map(lambda x: x + 0.5, parameters)
    transformation = OPTIMIZERS[optimizer]()
    state = transformation.init(parameters)
    gradient = jax.tree.map(jnp.zeros_like, parameters)
    with jax.numpy_dtype_promotion("standard"):
        # The first step of a warm-up has the rate 0.
        _, state = transformation.update(gradient, state, parameters)
        moves, _ = transformation.update(gradient, state, parameters)
    flat, _ = jax.tree_util.tree_flatten_with_path(moves)
    assert {jax.tree_util.keystr(path) for path, move in flat if jnp.any(move != 0.0)} == decayed
    assert len(flat) > len(decayed) + 1, "norms or biases are among the parameters"


def test_a_supervised_stage_of_one_step_is_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 2, got 1"):
        FitConfig(num_steps=1, batch_size=1, widths=(4,), learning_rate=1.0)
    FitConfig(num_steps=2, batch_size=1, widths=(4,), learning_rate=1.0).optimizer()
