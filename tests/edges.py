"""What the tests of numerical edges share: settings, a policy that bans tokens, two judgments."""

import chex
import equinox as eqx
import jax.numpy as jnp
import tiny

from ppo_kernel.models import LanguageModel
from ppo_kernel.ops.kl import k3

SETTINGS = {
    "rate": 1e-2, "dual_clip": 3.0, "kl_coef": 0.1,
    "entropy_coef": 0.01, "missing_eos_penalty": 1.0, "score_clip": 5.0,
}  # fmt: skip
K3_LOSS = {"kl_estimator": k3, "kl_in_loss": True}
STEPS = 4
"""Optimizer steps of `tiny.iteration_config`: two epochs of two minibatches."""


class BanningPolicy(eqx.Module):
    """A policy that never writes some tokens: their logits are -inf."""

    model: LanguageModel
    banned: tuple[int, ...] = eqx.field(static=True, default=(4, 5, 6))

    def hidden(self, tokens, mask, start=0):
        return self.model.hidden(tokens, mask, start)

    def unembed(self, hidden):
        return self._without_banned(self.model.unembed(hidden))

    def prefill(self, tokens, mask, capacity):
        return self.model.prefill(tokens, mask, capacity)

    def decoder(self):
        decoder = self.model.decoder()
        return decoder._replace(unembed=lambda x: self._without_banned(decoder.unembed(x)))

    def _without_banned(self, logits):
        return logits.at[:, jnp.array(self.banned)].set(-jnp.inf)


def one_step(config, policy, batch, critic=None, **settings):
    hyperparams = tiny.hyperparams(**(SETTINGS | settings))
    state = tiny.start(hyperparams, policy=policy, critic=critic)
    return tiny.one_step(state, policy, batch, hyperparams, config)


def trained(state):
    return (
        state.policy, state.critic, state.actor_optimizer_state, state.critic_optimizer_state
    )  # fmt: skip


def assert_unchanged(after, before):
    chex.assert_trees_all_equal(trained(after), trained(before))


def assert_finite(state, metrics):
    chex.assert_tree_all_finite(metrics)
    chex.assert_tree_all_finite(trained(state))
