"""The familiar surface: a trainer over the pure functions, a few lines each."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Int, Key, UInt32

from ..advantages import gae
from ..evaluation import ModelReward
from ..io.checkpoint import load_checkpoint, save_checkpoint
from ..learner.state import Learner
from ..models.heads import LanguageModel, ValueModel
from ..program import CompiledIteration, compile_iteration
from ..sharding import make_mesh, num_shards, place
from ..types import AdvantageEstimator, Prompts, RewardFn
from .config import PPOConfig
from .pretrained import CausalLM, RewardModel
from .text_reward import PythonReward

_NONFINITE = {
    "nonfinite_scores": "scores of the reward",
    "nonfinite_logprobs": "log-probabilities of the policy or the reference",
    "nonfinite_values": "values of the critic",
    "nonfinite_parameters": "parameters after the update",
}
"""Counters that stop a run, and what they count."""


class PPOBatch(eqx.Module):
    """Prompts as a data loader gives them, padded on either side.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 or true where there is a token.
    """

    input_ids: Int[ArrayLike, "N P"]
    attention_mask: Int[ArrayLike, "N P"] | Bool[ArrayLike, "N P"]

    def prompts(self) -> Prompts:
        """The same prompts left-padded, numbered by their place in the batch.

        Raises:
            ValueError: the shapes differ, or a prompt has no token.
        """
        tokens, mask = np.asarray(self.input_ids), np.asarray(self.attention_mask).astype(bool)
        if tokens.shape != mask.shape or tokens.ndim != 2:
            raise ValueError(
                f"input_ids {tokens.shape} and attention_mask {mask.shape} must be [N, P] alike."
            )
        if not mask.any(axis=1).all():
            row = int(np.argmin(mask.any(axis=1)))
            raise ValueError(f"prompt {row} has no token: its attention_mask is all zero.")
        # A stable sort by the mask moves padding to the left and keeps the order of tokens.
        order = np.argsort(mask, axis=1, kind="stable")
        return Prompts(
            jnp.asarray(np.take_along_axis(tokens, order, axis=1), jnp.int32),
            jnp.asarray(np.take_along_axis(mask, order, axis=1)),
            jnp.arange(tokens.shape[0], dtype=jnp.int32),
        )


@dataclass(frozen=True)
class PPOActorCritic:
    """The models of a run: policy, frozen reference, critic, reward.

    The critic starts on the reward model's trunk where that has the policy's tokenizer, else on
    the policy's; its head starts at zero.

    Attributes:
        policy_model: the SFT model.
        reward_model: a `RewardModel`, a JAX `RewardFn`, or a `PythonReward`.
        config: settings of the run, those of its `PPOTrainer`.
        critic_model: a critic of your own (`models.protocol.Critic`).
        reference_model: what the KL is measured against; None for the policy as it is at the start.

    Raises:
        ValueError: a policy or reward of another kind; the policy has ids that the reward model,
            the critic or the reference would read as others.
    """

    policy_model: CausalLM
    reward_model: RewardModel | RewardFn | PythonReward
    config: PPOConfig
    critic_model: Callable | None = None
    reference_model: CausalLM | None = None

    def __post_init__(self):
        if not isinstance(self.policy_model, CausalLM):
            raise ValueError(
                f"policy_model must be a CausalLM, such as CausalLM.from_pretrained(path); got "
                f"{self.policy_model!r}."
            )
        if not isinstance(self.reward_model, RewardModel) and not callable(self.reward_model):
            raise ValueError(
                "reward_model must be a RewardModel, such as RewardModel.from_pretrained(path), a "
                f"function of the rollout, or a PythonReward; got {self.reward_model!r}."
            )
        size = self.policy_model.config.vocab_size
        readers = {
            "reward_model": getattr(self.reward(), "model", None),
            "critic_model": self.critic_model,
            "reference_model": getattr(self.reference_model, "model", None),
        }
        for name, model in readers.items():
            # A model of another class does not say how many ids it knows.
            ours = isinstance(model, ValueModel | LanguageModel)
            if ours and model.trunk.config.vocab_size < size:
                raise ValueError(
                    f"{name} has {model.trunk.config.vocab_size} token ids, but reads those of a "
                    f"policy that has {size}; give its embedding as many rows, or let a reward "
                    "model read text: PythonReward(reward_model.score_texts)."
                )

    @property
    def critic(self) -> Callable:
        """The critic before the first update."""
        if self.critic_model is not None:
            return self.critic_model
        reward = self.reward_model
        if isinstance(reward, RewardModel) and self._reads_ids(reward):
            return ValueModel.on(reward.model.trunk)
        return ValueModel.on(self.policy_model.model.trunk)

    def reward(self) -> RewardFn | PythonReward:
        """The reward as the iteration takes it: in the program, or `PythonReward`."""
        reward = self.reward_model
        if isinstance(reward, PythonReward) and reward.tokenizer is None:
            return PythonReward(reward.score, self.policy_model.tokenizer)
        if not isinstance(reward, RewardModel):
            return reward
        if self._reads_ids(reward):
            return ModelReward(reward.model)
        return PythonReward(reward.score_texts, self.policy_model.tokenizer)

    def _reads_ids(self, reward: RewardModel) -> bool:
        """Whether the policy's token ids are the reward model's."""
        ours, theirs = self.policy_model.tokenizer, reward.tokenizer
        return ours is None or theirs is None or ours == theirs


class PPOTrainer:
    """Runs PPO iterations on one device, or on all of them along the batch.

    Args:
        config: settings, those of `actor_critic_model`.
        actor_critic_model: the models.
        rng_key: a typed key, `jax.random.key(seed)`; everything random follows from it.
        mesh: devices to run on; all by default.
        learner: optimizers and losses of your own; None for Adam with the config's weight decay.
        advantage_estimator: `gae` or your own, see `types.AdvantageEstimator`.

    Raises:
        ValueError: the batch does not divide over the devices, two different configs, or a legacy
            key.
    """

    def __init__(
        self,
        *,
        config: PPOConfig,
        actor_critic_model: PPOActorCritic,
        rng_key: Key[Array, ""] | UInt32[Array, "2"],
        mesh: Mesh | None = None,
        learner: Learner | None = None,
        advantage_estimator: AdvantageEstimator = gae,
    ):
        if not jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
            raise ValueError("rng_key must be a typed key: jax.random.key(seed), not PRNGKey.")
        if mesh is None and jax.device_count() > 1:
            mesh = make_mesh()
        self.config, self.mesh = config, mesh
        self.num_devices = 1 if mesh is None else num_shards("batch", mesh)
        _check_same(config, actor_critic_model.config)
        check_devices(config, self.num_devices)
        self.policy_model = actor_critic_model.policy_model
        self.learner = config.learner() if learner is None else learner
        self.advantage_estimator = advantage_estimator
        # Moments lie as the models do: placed first, no device ever holds all of them.
        policy = place(self.policy_model.model, mesh, "parameter")
        critic = place(actor_critic_model.critic, mesh, "parameter")
        state = self.learner.init(policy, critic, rng_key, config.hyperparams())
        reference = actor_critic_model.reference_model
        self.reference = policy if reference is None else place(reference.model, mesh, "parameter")
        self.state = place(state, mesh, "parameter")
        self.reward = actor_critic_model.reward()
        if not isinstance(self.reward, PythonReward):
            self.reward = place(self.reward, mesh, "parameter")
        self._compiled: dict[int, CompiledIteration] = {}

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return int(self.state.iteration)

    def train_step(self, batch: PPOBatch) -> dict[str, float]:
        """One PPO iteration on a batch of `train_batch_size / samples_per_prompt` prompts.

        A new prompt width compiles a new program; pad to few widths.

        Returns:
            The metrics, see docs/metrics.md.

        Raises:
            ValueError: a wrong number of prompts, prompts too long, ids outside the vocabulary;
                scores, log-probabilities, values or parameters that are not finite.
        """
        prompts = batch.prompts()
        self._check_tokens(prompts)
        if prompts.tokens.shape[0] != self.config.num_prompts:
            raise ValueError(
                f"the batch has {prompts.tokens.shape[0]} prompts; train_batch_size="
                f"{self.config.train_batch_size} with samples_per_prompt="
                f"{self.config.samples_per_prompt} takes {self.config.num_prompts}."
            )
        compiled = self._iteration(prompts.tokens.shape[1])
        prompts = place(prompts, self.mesh, "batch")
        hyperparams = place(self.config.hyperparams(self.iteration), self.mesh, "parameter")
        inputs = (self.reference, prompts, hyperparams)
        if isinstance(self.reward, PythonReward):
            collected = compiled.collect(self.state, *inputs)
            scores = place(self.reward(collected.rollout), self.mesh, "batch")
            self.state, metrics = compiled.learn(self.state, collected, scores, hyperparams)
        else:
            self.state, metrics = compiled.step(self.state, *inputs, self.reward)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name, what in _NONFINITE.items():
            if metrics[name]:
                raise ValueError(
                    f"{metrics[name]:.0f} {what} of iteration {self.iteration} are NaN or "
                    "infinite; minibatches with them were skipped."
                )
        return metrics

    def save_checkpoint(self, path: str | os.PathLike) -> None:
        """Write the whole training state to `path`: models, moments, counters, key."""
        save_checkpoint(path, self.state)

    def load_checkpoint(self, path: str | os.PathLike) -> None:
        """Go on from the checkpoint at `path`, of the same models and settings, bit for bit.

        Raises:
            ValueError: no checkpoint there, or one of other models.
        """
        self.state = load_checkpoint(path, self.state)

    def save_model(self, path: str | os.PathLike) -> None:
        """Write the policy as a Hugging Face folder at `path`."""
        self.policy.save_pretrained(path)

    @property
    def policy(self) -> CausalLM:
        """The policy as it is now, whole on every device."""
        return self.policy_model.with_model(place(self.state.policy, self.mesh, None))

    def _check_tokens(self, prompts: Prompts) -> None:
        size = self.policy_model.config.vocab_size
        tokens = np.asarray(prompts.tokens)[np.asarray(prompts.mask)]
        if tokens.min() < 0 or tokens.max() >= size:
            bad = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ValueError(
                f"input_ids has id {bad}, outside of the policy's vocabulary of {size} tokens."
            )

    def _iteration(self, width: int) -> CompiledIteration:
        if width not in self._compiled:
            model = self.policy_model
            generation = self.config.generation(width, model.eos_token_ids, model.pad_token_id)
            config = self.config.iteration(generation, self.num_devices)
            self._compiled[width] = compile_iteration(
                config=config, learner=self.learner, mesh=self.mesh,
                advantage_estimator=self.advantage_estimator,
            )  # fmt: skip
        return self._compiled[width]


def _check_same(config: PPOConfig, of_models: PPOConfig) -> None:
    if of_models != config:
        names = [field.name for field in fields(config)]
        names = [name for name in names if getattr(config, name) != getattr(of_models, name)]
        raise ValueError(
            f"the config of the PPOActorCritic differs in {', '.join(names)}; pass one to both."
        )


def check_devices(config: PPOConfig, num_devices: int) -> None:
    """Refuse what would fail at the first step.

    Args:
        config: of the trainer.
        num_devices: that the batch is sharded over.

    Raises:
        ValueError: a batch that does not divide over the devices.
    """
    minibatch = config.train_batch_size // config.num_minibatches
    for name, count in (("prompts", config.num_prompts), ("sequences a minibatch", minibatch)):
        if count % num_devices:
            raise ValueError(
                f"{count} {name} do not divide over {num_devices} devices; change "
                "train_batch_size or pass mesh=make_mesh(fewer)."
            )
    config.iteration(config.generation(1, (), 0), num_devices)
