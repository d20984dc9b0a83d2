"""Law 3: micro-batches, the mesh, padding and the order of the batch do not change the update."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ppo_kernel.config import Hyperparams
from ppo_kernel.learner.state import Learner
from ppo_kernel.program import compile_iteration
from ppo_kernel.sharding import make_mesh, place
from ppo_kernel.testing import NORM_TOLERANCES

MODELS = {
    "llama": {},
    "local-and-global": tiny.LOCAL_AND_GLOBAL,
    # Where nothing is rotated, a bias of the keys adds the same number to all logits of a query.
    # Its gradient is zero but for rounding, which Adam magnifies.
    "classic": tiny.CLASSIC | {"qkv_bias": False},
}


def _updated(batch, config, mesh=None, **model):
    hyperparams = tiny.hyperparams(rate=1e-2, entropy_coef=0.01)
    policy = tiny.language_model(**model)
    state = place(tiny.start(hyperparams, policy=policy), mesh, "parameter")
    reference = tiny.language_model(seed=8, **model)
    inputs = (place(reference, mesh, "parameter"), place(batch, mesh, "batch"))
    return tiny.one_step(state, *inputs, place(hyperparams, mesh, "parameter"), config, mesh=mesh)


@pytest.mark.parametrize("name", MODELS)
def test_law_3_microbatches_padding_and_batch_order_do_not_change_the_update(name, float64):
    batch, model = tiny.prompts(), MODELS[name]
    state, metrics = _updated(batch, tiny.iteration_config(), **model)
    shuffled = jax.tree.map(lambda x: x[::-1], batch)
    small_config = tiny.iteration_config(microbatch_size=1, logprob_chunk_size=3)
    variants = {
        "micro-batches of 2, another order": _updated(
            shuffled, tiny.iteration_config(microbatch_size=2), **model
        ),
        "micro-batches of 1, more padding, chunks": _updated(
            tiny.prompts(width=6), small_config, **model
        ),
    }
    moved = jax.tree.map(lambda a, b: a - b, state.policy, tiny.language_model(**model))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(moved)) > 1e-3
    for other_state, other_metrics in variants.values():
        tiny.assert_trees_close(other_state, state, 1e-9)
        tiny.assert_trees_close(other_metrics, metrics, 1e-9)


MESHES = {"fsdp": {}, "data-fsdp-tensor": {"data": 2, "tensor": 2}}


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_law_3_one_device_and_eight_give_the_same_update(name, axes, float64):
    batch, model, mesh = tiny.prompts(), MODELS[name], make_mesh(8, **MESHES[axes])
    config = tiny.iteration_config(num_minibatches=1)
    state, metrics = _updated(batch, config, **model)
    sharded, sharded_metrics = _updated(batch, config, mesh, **model)
    tiny.assert_trees_close(sharded, state, 1e-9)
    tiny.assert_trees_close(sharded_metrics, metrics, 1e-9)


REPORTING = Learner(optax.trace(decay=0.0), optax.trace(decay=0.0))
"""Its optimizers keep the last gradient as their state."""


def _padded(collected):
    """The same tokens with two more prompt slots and three more response slots."""
    rollout, evaluation = collected.rollout, collected.evaluation

    def pad(record, names, left, right):
        widths = ((0, 0), (left, right))
        return replace(record, **{name: jnp.pad(getattr(record, name), widths) for name in names})

    rollout = pad(rollout, ("prompt_tokens", "prompt_mask"), 2, 0)
    rollout = pad(rollout, ("tokens", "mask", "logprobs", "behaviour_logprobs"), 0, 3)
    evaluation = pad(evaluation, ("reference_logprobs", "values"), 0, 3)
    return replace(pad(collected, ("old_logprobs",), 0, 3), rollout=rollout, evaluation=evaluation)


def _gradients(state, collected, hyperparams, config, mesh=None):
    """Both models' gradients of one minibatch of fixed tokens, and the metrics."""
    learn = compile_iteration(config=config, learner=REPORTING, mesh=mesh).learn
    scores = tiny.even_tokens(collected.rollout)
    state, hyperparams = (
        place(jax.tree.map(jnp.copy, x), mesh, "parameter") for x in (state, hyperparams)
    )
    state, metrics = learn(state, *place((collected, scores), mesh, "batch"), hyperparams)
    return (state.actor_optimizer_state, state.critic_optimizer_state), metrics


def test_law_3_float32_gradients_on_fixed_tokens_do_not_change():
    policy, hyperparams = tiny.language_model(), Hyperparams(entropy_coef=0.01)
    config = tiny.iteration_config(num_epochs=1, num_minibatches=1)
    state = REPORTING.init(policy, tiny.value_model(), jax.random.key(3), hyperparams)
    collected = compile_iteration(config=config).collect(
        state, tiny.language_model(seed=8), tiny.prompts(), hyperparams
    )
    gradients, metrics = _gradients(state, collected, hyperparams, config)
    variants = (
        (jax.tree.map(lambda x: x[::-1], collected), replace(config, microbatch_size=2), None),
        (_padded(collected), replace(config, microbatch_size=8), make_mesh(8)),
    )
    for tokens, settings, mesh in variants:
        others, other_metrics = _gradients(state, tokens, hyperparams, settings, mesh)
        tiny.assert_trees_close(others, gradients, NORM_TOLERANCES["float32 gradient"])
        for name in metrics:
            np.testing.assert_allclose(
                other_metrics[name], metrics[name], rtol=2e-4, atol=2e-5, err_msg=name
            )
