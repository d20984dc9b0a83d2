"""`PPOTrainer`: PPO iterations on batches of prompts, one call each."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt32

from ..functions import AdvantageEstimator
from ..io.checkpoint import load_checkpoint, save_checkpoint
from ..learner.state import Learner
from ..program import CompiledIteration, compile_iteration
from ..sharding import make_mesh, num_shards, place
from ..types import Prompts
from .actor_critic import PPOActorCritic
from .batch import PPOBatch
from .config import PPOConfig
from .pretrained import CausalLM
from .text_reward import PythonReward

_NONFINITE = {
    "nonfinite_scores": "scores of the reward",
    "nonfinite_logprobs": "log-probabilities of the policy or the reference",
    "nonfinite_values": "values of the critic",
    "nonfinite_parameters": "parameters after the update",
}
"""Counters that stop a run -> their meaning."""


class PPOTrainer:
    """Runs PPO iterations on one device, or on all of them along the batch.

    Args:
        config: settings, those of `actor_critic_model`.
        actor_critic_model: the models.
        rng_key: a typed key, `jax.random.key(seed)`; everything random follows from it.
        mesh: devices to run on; all by default.
        learner: optimizers and losses of your own; None for Adam with the config's weight decay.
        advantage_estimator: one of your own, see `functions.AdvantageEstimator`; None for `gae`.

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
        advantage_estimator: AdvantageEstimator | None = None,
    ):
        if not isinstance(rng_key, jax.Array) or not jnp.issubdtype(
            rng_key.dtype, jax.dtypes.prng_key
        ):
            raise ValueError(
                f"rng_key must be a typed key, jax.random.key(seed); got {_legacy(rng_key)}."
            )
        if mesh is None and jax.device_count() > 1:
            mesh = make_mesh()
        self.config, self.mesh = config, mesh
        self.num_devices = 1 if mesh is None else num_shards("batch", mesh)
        _check_same(config, actor_critic_model.config)
        check_devices(config, self.num_devices)
        self._models, self.policy_model = actor_critic_model, actor_critic_model.policy_model
        self.learner = config.learner() if learner is None else learner
        self.advantage_estimator = advantage_estimator or config.estimator()
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

        Args:
            batch: prompts, and the columns that a `PythonReward` takes.

        Returns:
            The metrics, see docs/metrics.md, and those of a `PythonReward`, averaged.

        Raises:
            ValueError: a wrong number of prompts, prompts too long, ids outside the vocabulary;
                scores, log-probabilities, values or parameters that are not finite; a metric of
                the reward under a name of PPO's.
        """
        prompts = batch.prompts()
        self._check(prompts)
        compiled = self._iteration(prompts.tokens.shape[1])
        prompts = place(prompts, self.mesh, "batch")
        hyperparams = place(self.config.hyperparams(self.iteration), self.mesh, "parameter")
        inputs = (self.reference, prompts, hyperparams)
        if isinstance(self.reward, PythonReward):
            collected = compiled.collect(self.state, *inputs)
            ids = np.asarray(collected.rollout.sample_ids) // self.config.samples_per_prompt
            scored = self.reward.scored(collected.rollout, batch.columns_of(ids.tolist()))
            scored = place(scored, self.mesh, "batch")
            self.state, metrics = compiled.learn(self.state, collected, scored, hyperparams)
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
        save_checkpoint(path, self.state.detached())

    def load_checkpoint(self, path: str | os.PathLike) -> None:
        """Go on from the checkpoint at `path`, of the same models and settings, bit for bit.

        Raises:
            ValueError: no checkpoint there, or one of other models.
        """
        state = load_checkpoint(path, self.state.detached())
        self.state = replace(state, frozen=self.state.frozen)

    def save_model(self, path: str | os.PathLike) -> None:
        """Write the policy as a Hugging Face folder at `path`."""
        self.policy.save_pretrained(path)

    @property
    def policy(self) -> CausalLM:
        """The current policy, gathered on every device."""
        return self.policy_model.with_model(place(self.state.policy, self.mesh, None))

    def _check(self, prompts: Prompts) -> None:
        """Refuse a wrong number of prompts, and tokens or lengths that the models do not know."""
        config, count = self.config, len(prompts.tokens)
        if count != config.num_prompts:
            raise ValueError(
                f"the batch has {count} prompts; train_batch_size={config.train_batch_size} with "
                f"samples_per_prompt={config.samples_per_prompt} takes {config.num_prompts}."
            )
        mask, size = np.asarray(prompts.mask), self.policy_model.num_token_ids
        tokens = np.asarray(prompts.tokens)[mask]
        if tokens.min() < 0 or tokens.max() >= size:
            bad = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ValueError(
                f"input_ids has id {bad}, outside of the policy's vocabulary of {size} tokens."
            )
        new = config.generation(mask.shape[1], (), 0).max_new_tokens
        self._models.check_length(int(mask.sum(axis=1).max()), new)

    def _iteration(self, width: int) -> CompiledIteration:
        if width not in self._compiled:
            model = self.policy_model
            generation = self.config.generation(
                width, model.eos_token_ids, model.pad_token_id, model.banned_token_ids
            )
            config = self.config.iteration(generation, self.num_devices)
            self._compiled[width] = compile_iteration(
                config=config, learner=self.learner, mesh=self.mesh,
                advantage_estimator=self.advantage_estimator,
            )  # fmt: skip
        return self._compiled[width]


def _legacy(key: object) -> str:
    """What was given in the place of a typed key."""
    if isinstance(key, jax.Array | np.ndarray):
        return f"the legacy key of PRNGKey(seed), {key.dtype}{list(key.shape)}"
    return repr(key)


def _check_same(config: PPOConfig, of_models: PPOConfig) -> None:
    if of_models != config:
        others = vars(of_models)
        names = [name for name, value in vars(config).items() if value != others[name]]
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
