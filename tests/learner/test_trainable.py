"""What is trained is a filter: gradients and moments of these leaves alone, the rest in place."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jaxtyping import Array, Float

from ppo_kernel.io.checkpoint import load_checkpoint, save_checkpoint
from ppo_kernel.learner.state import Learner
from ppo_kernel.models import ValueHead
from ppo_kernel.program import compile_iteration


class Layered(eqx.Module):
    """A recurrent policy with four layers on top, each an array of its own."""

    body: tiny.RecurrentPolicy
    layers: tuple[Float[Array, "D D"], ...]

    @classmethod
    def init(cls, key, width=32):
        keys = jax.random.split(key, 5)
        layers = tuple(jax.random.normal(k, (width, width)) / 8 for k in keys[1:])
        return cls(tiny.RecurrentPolicy(keys[0], width), layers)

    def _above(self, hidden):
        for layer in self.layers:
            hidden = hidden + jnp.tanh(hidden @ layer)
        return hidden

    def hidden(self, tokens, mask, start=0):
        return self._above(self.body.hidden(tokens, mask, start))

    def unembed(self, hidden):
        return self.body.unembed(hidden)

    def prefill(self, tokens, mask, capacity):
        hidden, cache = self.body.prefill(tokens, mask, capacity)
        return self._above(hidden), cache

    def decoder(self):
        decoder = self.body.decoder()

        def step(tokens, cache):
            hidden, cache = decoder.step(tokens, cache)
            return self._above(hidden), cache

        return decoder._replace(step=step)


def head_and_last_layers(models):
    nothing = jax.tree.map(lambda _: False, models)
    return eqx.tree_at(lambda m: (m.critic, *m.policy.layers[2:]), nothing, (True, True, True))


LEARNER = Learner(trainable=head_and_last_layers)
HEAD_ON_THE_TRUNK = 32


def started(learner=LEARNER, rate=1e-2):
    """(policy, state, hyper-parameters): the critic is a head on the policy's trunk."""
    policy = Layered.init(jax.random.key(0))
    head = ValueHead(jnp.full(HEAD_ON_THE_TRUNK, 0.1))
    hyperparams = tiny.hyperparams(rate=rate)
    return policy, learner.init(policy, head, jax.random.key(1), hyperparams), hyperparams


def arrays(tree):
    return [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]


def test_moments_are_those_of_the_trained_leaves():
    policy, state, _ = started()
    trained = [(HEAD_ON_THE_TRUNK,), *[(32, 32)] * 2]
    assert sorted(x.shape for x in arrays(state.trained)) == sorted(trained)
    moments = state.actor_optimizer_state.mu, state.critic_optimizer_state.mu
    assert sorted(x.shape for x in arrays(moments)) == sorted(trained)
    frozen = {id(x) for x in arrays(policy)} - {id(x) for x in policy.layers[2:]}
    assert {id(x) for x in arrays(state.frozen)} == frozen, "not copied"
    tiny.assert_trees_close(state.policy, policy, 0.0)


def test_a_step_changes_the_trained_leaves_alone_and_consumes_no_frozen_one():
    policy, state, hyperparams = started()
    ppo = compile_iteration(config=tiny.iteration_config(), learner=LEARNER)
    after, metrics = ppo.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
    assert float(metrics["skipped_minibatches"]) == 0.0
    assert all(x is y for x, y in zip(arrays(after.frozen), arrays(state.frozen), strict=True))
    assert all(x.is_deleted() for x in arrays(state.trained))
    for layer, before in zip(after.policy.layers, policy.layers, strict=True):
        assert (layer is before) != bool((layer != before).any())
    assert after.policy.layers[1] is policy.layers[1]
    assert after.policy.layers[2] is not policy.layers[2]
    ppo.step(after, policy, tiny.prompts(), hyperparams, tiny.even_tokens)


def test_gradients_of_the_trained_leaves_are_those_of_training_all(float64):
    keeping = optax.trace(decay=0.0)
    some, everything = (
        Learner(keeping, keeping, trainable=t) for t in (head_and_last_layers, Learner.trainable)
    )
    states = []
    for learner in (some, everything):
        policy, state, _ = started(learner)
        # The clip is by the norm of what is trained.
        hyperparams = tiny.hyperparams(
            0.0, actor={"max_grad_norm": None}, critic={"max_grad_norm": None}
        )
        ppo = compile_iteration(
            config=tiny.iteration_config(num_epochs=1, num_minibatches=1), learner=learner
        )
        after, _ = ppo.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
        states.append(after)
    part, whole = (s.actor_optimizer_state.trace for s in states)
    for layer in (2, 3):
        np.testing.assert_allclose(part.layers[layer], whole.layers[layer], rtol=1e-9, atol=1e-12)
    assert part.layers[0] is None
    assert float(jnp.abs(whole.layers[0]).max()) > 0.0


def argument_bytes(learner, reference=None):
    """(of the program, of the policy)"""
    policy, state, hyperparams = started(learner)
    reference = policy if reference is None else reference
    lowered = compile_iteration(config=tiny.iteration_config(), learner=learner).lower(
        state, reference, tiny.prompts(), hyperparams, tiny.even_tokens
    )
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes, sum(x.nbytes for x in arrays(policy))


def test_frozen_arrays_are_one_argument_beside_the_reference():
    shared, policy_bytes = argument_bytes(LEARNER)
    apart, _ = argument_bytes(LEARNER, reference=Layered.init(jax.random.key(0)))
    everything, _ = argument_bytes(Learner())
    layer = 32 * 32 * 4
    frozen = policy_bytes - 2 * layer
    assert apart - shared == frozen, "what is frozen is there once"
    # The policy, its copy and both moments of the frozen leaves: three that are left out.
    assert everything - shared == 3 * frozen


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    policy, state, hyperparams = started()
    ppo = compile_iteration(config=tiny.iteration_config(), learner=LEARNER)
    inputs = policy, tiny.prompts(), hyperparams, tiny.even_tokens
    state, _ = ppo.step(state, *inputs)
    save_checkpoint(tmp_path / "checkpoint", state.detached())
    on, _ = ppo.step(state, *inputs)
    _, fresh, _ = started()
    loaded = load_checkpoint(tmp_path / "checkpoint", fresh.detached())
    again, _ = ppo.step(replace(loaded, frozen=fresh.frozen), *inputs)
    tiny.assert_trees_close(again, on, 0.0)


def test_several_iterations_in_one_program_keep_what_is_frozen():
    policy, state, hyperparams = started()
    ppo = compile_iteration(config=tiny.iteration_config(), learner=LEARNER)
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), tiny.prompts())
    after, _ = ppo.steps(state, policy, batches, hyperparams, tiny.even_tokens)
    assert int(after.iteration) == 2
    assert after.policy.body.embedding is policy.body.embedding


@pytest.mark.parametrize("side", ["policy", "critic"])
def test_a_model_of_which_nothing_trains_stays(side):
    def only_the_other(models):
        other = jax.tree.map(lambda _: True, models)
        return eqx.tree_at(lambda m: getattr(m, side), other, False)

    learner = Learner(trainable=only_the_other)
    policy, state, hyperparams = started(learner)
    ppo = compile_iteration(config=tiny.iteration_config(), learner=learner)
    after, metrics = ppo.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
    assert float(metrics["skipped_minibatches"]) == 0.0
    assert not arrays(getattr(after.trained, side))
    tiny.assert_trees_close(getattr(after, side), getattr(started(learner)[1], side), 0.0)
