"""Holes in the loss mask: what another wrote into a response is read, and not trained on."""

from dataclasses import replace

import pytest
import tiny
from edges import BanningPolicy, assert_finite
from test_update_edges import experience, language_model, unclamped_loss, updated

from ppo_kernel.learner.state import Learner
from ppo_kernel.losses import ppo_policy_loss


@pytest.mark.parametrize("loss", [ppo_policy_loss, unclamped_loss])
def test_a_hole_with_a_token_that_the_policy_cannot_write_is_no_edge(float64, loss):
    """Its log-probability there is -inf."""
    whole = experience()
    rollout = replace(
        whole.rollout,
        tokens=whole.rollout.tokens.at[2, 1].set(tiny.EOS),
        mask=whole.rollout.mask.at[2, 1].set(False),
    )
    never = BanningPolicy(language_model(), banned=(tiny.EOS,))
    state, metrics = updated(
        replace(whole, rollout=rollout), policy=never, learner=Learner(policy_loss=loss)
    )
    assert metrics["skipped_minibatches"] == 0
    assert_finite(state, metrics)
