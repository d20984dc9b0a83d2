"""What a trainer takes besides its config: losses, optimizers, an estimator, a reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_kernel import (
    CausalLM,
    Learner,
    PPOActorCritic,
    PPOBatch,
    PPOConfig,
    PPOTrainer,
    TransformerConfig,
    gae,
    make_mesh,
    ppo_policy_loss,
)

SHAPE = TransformerConfig(
    vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8,
)  # fmt: skip
CONFIG = PPOConfig(train_batch_size=4, max_seq_len=8, max_new_tokens=4, num_ppo_epochs=1)
BATCH = PPOBatch(np.full((4, 3), 5), np.ones((4, 3), bool))


def fives(rollout):
    return jnp.sum((rollout.tokens == 5) & rollout.mask, axis=1).astype(jnp.float32)


def policy(seed=0, **changes):
    return CausalLM.init(jax.random.key(seed), TransformerConfig(**SHAPE.__dict__ | changes))


def trained(*, reference=None, **parts):
    """(metrics of one step, policy after it)"""
    models = PPOActorCritic(policy(), fives, CONFIG, reference_model=reference)
    trainer = PPOTrainer(
        config=CONFIG, actor_critic_model=models, rng_key=jax.random.key(1), mesh=make_mesh(1),
        **parts,
    )  # fmt: skip
    return trainer.train_step(BATCH), trainer.policy.model


def test_the_reference_is_the_policy_at_the_start_unless_another_is_given():
    own, _ = trained()
    assert abs(own["kl_divergence"]) < 1e-5
    same, _ = trained(reference=policy())
    assert same == own
    other, _ = trained(reference=policy(seed=7))
    assert abs(other["kl_divergence"]) > 0.01


def test_an_estimator_and_a_learner_of_ones_own_are_used():
    def none(*arguments, **settings):
        return tuple(jnp.zeros_like(x) for x in gae(*arguments, **settings))

    metrics, _ = trained(advantage_estimator=none)
    assert metrics["return_mean"] == metrics["actor_loss"] == 0.0

    def tripled(inputs, **settings):
        loss, reported = ppo_policy_loss(inputs, **settings)
        return 3.0 * loss, reported

    plain, _ = trained()
    metrics, after = trained(
        learner=Learner(actor_optimizer=optax.set_to_zero(), policy_loss=tripled)
    )
    np.testing.assert_allclose(metrics["actor_loss"], 3 * plain["actor_loss"], rtol=1e-4, atol=1e-7)
    for a, b in zip(*map(jax.tree.leaves, (after, policy().model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("folder", fives), "policy_model must be a CausalLM, .*got 'folder'"),
        ((policy(), "folder"), "reward_model must be a RewardModel, .*got 'folder'"),
        ((policy(), None), "reward_model must be a RewardModel, .*got None"),
        ((policy(), fives, CONFIG, None, policy(vocab_size=8)), "reference_model has 8 token ids"),
    ],
)
def test_models_of_another_kind_are_refused(models, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        PPOActorCritic(*models, **({"config": CONFIG} if len(models) == 2 else {}))


NUMBERS = {
    name: value
    for name, value in vars(PPOConfig()).items()
    if isinstance(value, int | float) and not isinstance(value, bool)
}
NUMBERS |= dict.fromkeys(("clip_ratio_high", "dual_clip", "kl_target", "top_p", "min_p"))
NUMBERS |= dict.fromkeys(("score_clip", "per_device_batch_size", "top_k", "decode_slots"))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_refused_under_the_name_of_its_setting(name, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    for wrong in ("1e-5", [1.0], float("nan"), True):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            PPOConfig(**{name: wrong})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 1.0, 2.0, float("inf")])
def test_the_kernel_takes_what_the_config_takes(name, value, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    said = None
    try:
        config = PPOConfig(**{name: value})
    except ValueError as error:
        said = str(error)
    else:
        config.hyperparams()
    assert said is None or said.startswith(f"{name} must be")


def test_an_estimator_that_is_no_function_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"^kl_estimator must be a function .*got 'k1'"):
        PPOConfig(kl_estimator="k1")
