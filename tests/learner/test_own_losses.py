"""Published losses that are not PPO's, as a researcher writes them, each with its NumPy twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from test_update_edges import experience, updated

from ppo_kernel.learner.state import Learner
from ppo_kernel.losses import ppo_policy_loss, sequence_mean
from ppo_kernel.testing import assert_matches, masks, reals
from ppo_kernel.types import LossInputs

SHAPE = (4, 6)
CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
CAP = 2.0


def gspo(inputs, *, clip_ratio_low, clip_ratio_high, dual_clip):
    """One ratio per sequence, the geometric mean of its tokens' ratios.

    Source: Zheng et al. 2025 (GSPO), eqs. 5 and 7, https://arxiv.org/abs/2507.18071.
    """
    del dual_clip
    lengths = jnp.maximum(jnp.sum(inputs.mask, axis=1, keepdims=True), 1)
    log_ratio = jnp.sum(inputs.logprobs - inputs.old_logprobs, axis=1, keepdims=True)
    ratio = jnp.exp(log_ratio / lengths.astype(log_ratio.dtype))
    clipped = jnp.clip(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    loss = jnp.maximum(-inputs.advantages * ratio, -inputs.advantages * clipped)
    return loss, {"sequence_clip_fraction": jnp.broadcast_to(ratio != clipped, loss.shape)}


def gspo_in_numpy(logprobs, old_logprobs, behaviour_logprobs, advantages, mask):
    loss = np.zeros(mask.shape)
    for b, valid in enumerate(mask):
        if valid.any():
            ratio = np.exp((logprobs[b] - old_logprobs[b])[valid].mean())
            for t in np.flatnonzero(valid):
                bound = 1.28 if advantages[b, t] > 0 else 0.8
                best = min(ratio, bound) if advantages[b, t] > 0 else max(ratio, bound)
                loss[b, t] = -advantages[b, t] * best
    return loss


def truncated_importance_sampling(inputs, **settings):
    """PPO's loss, weighted by how likely the policy that acted was to sample the token.

        w = min(exp(old_logprob - behaviour_logprob), C)

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", https://fengyao.notion.site/off-policy-rl.
    """
    weight = jnp.minimum(jnp.exp(inputs.old_logprobs - inputs.behaviour_logprobs), CAP)
    loss, metrics = ppo_policy_loss(inputs, **settings)
    return jax.lax.stop_gradient(weight) * loss, metrics | {"importance_weight": weight}


def truncated_in_numpy(logprobs, old_logprobs, behaviour_logprobs, advantages, mask):
    loss = np.zeros(mask.shape)
    for place in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(logprobs[place] - old_logprobs[place])
        ratio = min(ratio, 1.28) if advantages[place] > 0 else max(ratio, 0.8)
        weight = min(np.exp(old_logprobs[place] - behaviour_logprobs[place]), CAP)
        loss[place] = -weight * advantages[place] * ratio
    return loss


def on_arrays(loss):
    def call(logprobs, old_logprobs, behaviour_logprobs, advantages, mask):
        """What the update hands over: zeros outside the mask."""
        arrays = (
            jnp.where(mask, x, 0.0)
            for x in (logprobs, old_logprobs, behaviour_logprobs, advantages)
        )
        logprobs, old_logprobs, behaviour_logprobs, advantages = arrays
        zeros = jnp.zeros_like(logprobs)
        inputs = LossInputs(
            logprobs=logprobs, old_logprobs=old_logprobs, behaviour_logprobs=behaviour_logprobs,
            reference_logprobs=zeros, entropy=zeros, advantages=advantages, mask=mask,
            weights=sequence_mean(mask).astype(zeros.dtype),
        )  # fmt: skip
        return loss(inputs, **CLIPS, dual_clip=None)[0]

    return call


LOSSES = {
    "GSPO": (gspo, gspo_in_numpy, on_arrays(gspo)),
    "TIS": (
        truncated_importance_sampling, truncated_in_numpy, on_arrays(truncated_importance_sampling)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@given(
    logprobs=reals(SHAPE, 2), old_logprobs=reals(SHAPE, 2), behaviour_logprobs=reals(SHAPE, 2),
    advantages=reals(SHAPE), mask=masks(SHAPE),
)  # fmt: skip
def test_a_published_loss_is_its_plain_loop(
    name, logprobs, old_logprobs, behaviour_logprobs, advantages, mask
):
    _, in_numpy, call = LOSSES[name]
    assert_matches(call, in_numpy, logprobs, old_logprobs, behaviour_logprobs, advantages, mask)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_ones_own_trains_and_reports(float64, name):
    """In micro-batches and narrowed to the responses it is the same."""
    loss, *_ = LOSSES[name]
    settings = {
        "num_minibatches": 1,
        "reduction": sequence_mean,
        "learner": Learner(policy_loss=loss),
    }
    state, metrics = updated(experience(), **settings)
    parts, others = updated(experience(), microbatch_size=2, response_widths=(2, 5), **settings)
    tiny.assert_trees_close(parts.trained, state.trained, 1e-9)
    tiny.assert_trees_close(others, metrics, 1e-9)
    own = {"GSPO": "sequence_clip_fraction", "TIS": "importance_weight"}[name]
    assert 0.0 < float(metrics[own]) <= CAP
    assert ("clip_fraction" in metrics) == (name == "TIS"), "a metric is that of the loss"


def test_what_a_loss_sees(float64):
    """Every field by its own name, zero outside the mask, and a metric's mean over valid tokens."""
    seen, whole = {}, experience()

    def noting(inputs, **settings):
        for name in ("old_logprobs", "behaviour_logprobs", "reference_logprobs", "advantages"):
            seen[name] = inputs
        numbers = {
            name: getattr(inputs, name)
            for name in ("old_logprobs", "behaviour_logprobs", "reference_logprobs", "advantages")
        }
        outside = jnp.abs(jnp.where(inputs.mask, 0.0, sum(numbers.values()) + inputs.entropy))
        worst = jnp.broadcast_to(jnp.max(outside), outside.shape)
        sums = {"weight": inputs.weights, "outside": worst}
        return ppo_policy_loss(inputs, **settings)[0], numbers | sums

    _, metrics = updated(
        whole, learner=Learner(policy_loss=noting), num_epochs=1, num_minibatches=1
    )
    mask = np.asarray(whole.rollout.mask)
    expected = {
        "old_logprobs": whole.old_logprobs, "reference_logprobs": whole.reference_logprobs,
        "behaviour_logprobs": whole.rollout.behaviour_logprobs, "advantages": whole.advantages,
    }  # fmt: skip
    for name, array in expected.items():
        np.testing.assert_allclose(metrics[name], np.asarray(array)[mask].mean(), rtol=1e-10)
    np.testing.assert_allclose(metrics["weight"], 1 / mask.sum(), rtol=1e-10)
    assert metrics["outside"] == 0.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: loss, r"policy_loss must return \(loss per token, metrics\)"),
        (lambda loss: (loss, {"entropy": loss}), "two metrics have the name 'entropy'"),
        (lambda loss: (loss, {"mine": loss[:, 0]}), r"'mine', a metric of policy_loss, must be"),
        (lambda loss: (loss, {"kl_coef": loss}), None),
    ],
)  # fmt: skip
def test_metrics_that_are_refused(monkeypatch, returned, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    learner = Learner(
        policy_loss=lambda inputs, **_: returned(-inputs.advantages * inputs.logprobs)
    )
    if message is None:
        assert "kl_coef" in updated(experience(), learner=learner)[1]
        return
    with pytest.raises(ValueError, match=message):
        updated(experience(), learner=learner)


def test_a_metric_that_is_not_finite_shows_and_skips_nothing():
    def noting(inputs, **settings):
        loss, metrics = ppo_policy_loss(inputs, **settings)
        return loss, metrics | {"mine": inputs.advantages / jnp.zeros_like(inputs.advantages)}

    _, metrics = updated(experience(), learner=Learner(policy_loss=noting))
    assert not np.isfinite(metrics["mine"])
    assert metrics["skipped_minibatches"] == 0
