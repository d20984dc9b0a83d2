"""Static settings of the iterations that the oracle judges, each said twice, and drawn numbers."""

from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle

import reference.config
import reference.derivatives
import reference.evaluation
import reference.losses
import reference.ops.kl
from ppo_kernel import losses
from ppo_kernel.config import GenerationConfig, IterationConfig
from ppo_kernel.evaluation import ModelReward
from ppo_kernel.ops import kl

K1 = (kl.k1, reference.ops.kl.k1, reference.derivatives.k1_slope)
K2 = (kl.k2, reference.ops.kl.k2, reference.derivatives.k2_slope)
K3 = (kl.k3, reference.ops.kl.k3, reference.derivatives.k3_slope)
K3_LIKE_K2 = (kl.with_gradient_of(kl.k3, kl.k2), reference.ops.kl.k3, K2[2])
NO_KL = (None, None, None)
NO_CRITIC = "none"

TOKEN_MEAN = (losses.token_mean, reference.losses.token_mean)
SEQUENCE_MEAN = (losses.sequence_mean, reference.losses.sequence_mean)
FIXED_MEAN = (losses.fixed_mean(5), reference.losses.fixed_mean(5))

TASTE = np.cos(np.arange(50.0))
"""Reward units of each token id."""


class SequenceTaste:
    """Sum over the response, one score a sequence."""

    def shipped(self, rollout):
        return jnp.sum(
            jnp.where(
                rollout.mask, jnp.asarray(TASTE, rollout.logprobs.dtype)[rollout.tokens], 0.0
            ),
            axis=1,
        )

    def reference(self, rollout):
        pairs = zip(rollout.tokens, rollout.lengths, strict=True)
        return np.array([sum(TASTE[row[:length]]) for row, length in pairs])


class TokenTaste:
    """One score a token."""

    def shipped(self, rollout):
        return jnp.asarray(TASTE, rollout.logprobs.dtype)[rollout.tokens]

    def reference(self, rollout):
        return TASTE[rollout.tokens]


class Judge:
    """A reward model."""

    def __init__(self):
        with jax.enable_x64(True):
            rng = np.random.default_rng(7)
            self.model = oracle.draw_critic(oracle.trunk_config(num_layers=1), 8, rng)
            self.shipped = ModelReward(self.model)
            self.twin = oracle.model_to_reference(self.model)

    def reference(self, rollout):
        return reference.evaluation.model_reward(self.twin, rollout)


@dataclass(frozen=True, eq=False)
class Case:
    """Static settings of an iteration; pairs and triples hold (shipped, reference ...)."""

    name: str
    trunk: dict = field(default_factory=dict)
    critic: dict | str | None = field(default_factory=dict)
    generation: dict = field(default_factory=dict)
    iteration: dict = field(default_factory=dict)
    optional: tuple[str, ...] = ("value_clip", "actor", "critic")
    kl: tuple = K1
    kl_in_loss: bool = False
    whiten: bool = True
    reduction: tuple = TOKEN_MEAN
    reward: object = SequenceTaste()
    prompts: tuple[int, int] = (4, 3)

    def __repr__(self):
        return self.name

    def trunk_config(self):
        return oracle.trunk_config(**self.trunk)

    def draw_critic(self, rng):
        """A model, or a head on the policy's trunk, or None."""
        if self.critic == NO_CRITIC:
            return None
        config = None if self.critic is None else oracle.trunk_config(**self.critic)
        return oracle.draw_critic(config, self.trunk_config().hidden_size, rng)

    def config(self):
        generation = {"max_new_tokens": 5, "eos_token_ids": (1,)} | self.generation
        steps = {"num_epochs": 2, "num_minibatches": 2}
        parts = {
            "generation": GenerationConfig(**generation),
            "kl_estimator": self.kl[0],
            "kl_in_loss": self.kl_in_loss,
            "reduction": self.reduction[0],
        }
        return IterationConfig(**parts, **(steps | self.iteration))

    def reference_config(self):
        steps = ("num_epochs", "num_minibatches", "microbatch_size", "logprob_chunk_size")
        generation = vars(self.config().generation).copy()
        del generation["decode_slots"]  # it decides speed, never the result
        return reference.config.IterationConfig(
            generation=reference.config.GenerationConfig(**generation),
            kl_estimator=self.kl[1],
            kl_slope=self.kl[2],
            kl_in_loss=self.kl_in_loss,
            whiten_advantages=self.whiten,
            reduction=self.reduction[1],
            **{name: x for name, x in self.iteration.items() if name not in steps},
        )


CASES = [
    Case("grouped", trunk={"qkv_bias": True, "qk_norm": True}, prompts=(2, 3),
         generation={"samples_per_prompt": 2, "top_k": 7, "eos_token_ids": (1, 4, 9),
                     "min_new_tokens": 2},
         iteration={"microbatch_size": 1}, kl=K2, kl_in_loss=True,
         optional=("value_clip", "dual_clip", "actor")),
    Case("shared-tied", trunk={"tie_embeddings": True, "qkv_bias": True}, critic=None,
         iteration={"bootstrap_truncated": True}, whiten=False,
         kl=K3_LIKE_K2, kl_in_loss=True, reduction=FIXED_MEAN, optional=("actor",)),
    Case("nucleus", trunk={"qk_norm": True, "tie_embeddings": True}, kl=K3,
         reduction=SEQUENCE_MEAN, optional=("top_p", "min_p", "score_clip", "dual_clip"),
         iteration={"recompute_old_logprobs": True, "logprob_chunk_size": 3, "num_epochs": 3}),
    Case("shared-adaptive", critic=None, reduction=SEQUENCE_MEAN, reward=TokenTaste(),
         kl=K3, kl_in_loss=True, optional=("kl_target", "value_clip", "critic"),
         iteration={"microbatch_size": 2, "num_minibatches": 1}),
    Case("never-ends", trunk={"num_kv_heads": 1, "num_layers": 1, "hidden_size": 12},
         critic={"num_kv_heads": 4, "num_layers": 3}, reward=Judge(), prompts=(3, 4),
         generation={"eos_token_ids": (), "max_new_tokens": 4}, kl=K1, kl_in_loss=True,
         iteration={"num_minibatches": 3, "bootstrap_truncated": True}),
    Case("pad-is-eos", trunk={"num_kv_heads": 4, "vocab_size": 11}, prompts=(2, 3),
         critic={"vocab_size": 11, "tie_embeddings": True, "qkv_bias": True, "qk_norm": True},
         generation={"eos_token_ids": (2, 3, 5), "pad_token_id": 2, "samples_per_prompt": 3},
         iteration={"num_minibatches": 2, "microbatch_size": 1}, kl=K2),
    Case("no-critic", critic=NO_CRITIC, prompts=(2, 3), generation={"samples_per_prompt": 2},
         optional=("actor", "kl_target"), iteration={"microbatch_size": 1}),
    Case("no-penalty", kl=NO_KL, trunk={"num_layers": 1}, iteration={"num_epochs": 1}),
]  # fmt: skip


def once_in_float32(case):
    """A case in float32 with a single optimizer step.

    Adam's step is near the sign of the gradient. Where that is near 0, float32 parameters may be
    a whole step off after the first one, and the gradients that follow are others.
    """
    types = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), "float32")
    steps = {"num_epochs": 1, "num_minibatches": 1}
    return replace(
        case, trunk=case.trunk | types, critic=case.critic | types,
        iteration=case.iteration | steps,
    )  # fmt: skip


SINGLE = ("grouped", "nucleus", "pad-is-eos")
FLOAT32_CASES = [once_in_float32(case) for case in CASES if case.name in SINGLE]

REQUIRED = {
    "clip_ratio_low": st.floats(0.02, 0.5),
    "clip_ratio_high": st.floats(0.02, 0.5),
    "gamma": st.floats(0.0, 1.0),
    "lam": st.floats(0.0, 1.0),
    "kl_coef": st.floats(0.0, 0.5),
    "kl_horizon": st.floats(10.0, 100.0),
    "entropy_coef": st.floats(0.0, 0.5),
    "value_coef": st.floats(0.1, 2.0),
    "temperature": st.floats(0.5, 2.0),
    "missing_eos_penalty": st.floats(0.0, 2.0),
}
OPTIONAL = {
    "dual_clip": st.floats(1.01, 1.5),
    "value_clip": st.floats(0.01, 0.5),
    "kl_target": st.floats(0.1, 5.0),
    "top_p": st.floats(0.3, 1.0),
    "min_p": st.floats(0.01, 0.3),
    "score_clip": st.floats(0.1, 2.0),
}


def hyperparameters(case):
    """Drawn numbers; those that a case does not name among its optional ones are None.

    "actor" and "critic" stand for the gradient clip of each.
    """
    optional = {k: v if k in case.optional else st.none() for k, v in OPTIONAL.items()}
    sides = {side: optimizer(clipped=side in case.optional) for side in ("actor", "critic")}
    return st.fixed_dictionaries(REQUIRED | optional | sides)


def optimizer(*, clipped):
    """Learning rate and gradient clip of one model."""
    limits = st.floats(0.01, 1.0) if clipped else st.none()
    return st.fixed_dictionaries({"learning_rate": st.floats(1e-3, 5e-2), "max_grad_norm": limits})
