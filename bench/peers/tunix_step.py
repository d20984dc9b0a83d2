"""Tunix: PPOLearner on an RLCluster with its own (vanilla) rollout engine."""

import time

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster, utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

from bench.peers import common
from bench.sizes import Size


class TiedCritic(nnx.Module):
    """A value head on a model with tied embeddings, which `create_critic_model` cannot take."""

    def __init__(self, model, width: int):
        self.model, self.config = model, model.config
        self.score = nnx.Linear(width, 1, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, *arguments, **options):
        self.model(*arguments, **options, output_hidden_states=True)
        hidden = nnx.pop(self.model, nnx.Intermediate)["all_hidden_states"]
        return self.score(hidden.get_value()[-1])


def make_model(size: Size, seed: int):
    """Qwen2 with every matrix N(0, 0.02^2); Tunix leaves the MLPs at zero for a checkpoint."""
    model = qwen2.Qwen2(
        qwen2.ModelConfig(
            num_layers=size.layers, vocab_size=size.vocab, embed_dim=size.width,
            hidden_dim=size.mlp, num_heads=size.heads, head_dim=size.head_dim,
            num_kv_heads=size.kv_heads, rope_theta=1_000_000, norm_eps=1e-6,
            use_tied_embedding=size.tied,
        ),
        rngs=nnx.Rngs(seed),
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(nnx.state(model, nnx.Param))
    generator = np.random.default_rng(seed)
    filled = [
        0.02 * generator.standard_normal(x.shape, np.float32) if x.ndim > 1 else x for x in leaves
    ]
    filled = [jax.numpy.asarray(x, old.dtype) for x, old in zip(filled, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(structure, filled))
    return model


def even_fraction(prompts, completions, **_):
    """The reward: the share of even token ids, read back from the words."""
    ids = [[int(word[1:]) for word in text.split() if word[0] == "w"] for text in completions]
    return [sum(i % 2 == 0 for i in row) / max(1, len(row)) for row in ids]


def make_learner(size: Size, total: int):
    """A cluster of actor, critic and reference on one device, and the learner on it."""
    axes = {"axis_types": (jax.sharding.AxisType.Auto,) * 2}
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), **axes)
    critic = make_model(size, 1)
    critic = TiedCritic(critic, size.width) if size.tied else utils.create_critic_model(critic)
    adam = optax.adamw(common.LEARNING_RATE, weight_decay=0.0)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=adam, critic_optimizer=adam, eval_every_n_steps=10**9,
        max_steps=total * size.epochs, mini_batch_size=size.batch,
        train_micro_batch_size=size.batch, rollout_micro_batch_size=size.batch,
        compute_logps_micro_batch_size=size.batch,
    )  # fmt: skip
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=size.response, max_prompt_length=size.prompt,
        kv_cache_size=size.prompt + size.response, temperature=1.0, top_p=1.0, top_k=None,
        eos_tokens=[-1],
    )  # fmt: skip
    cluster = rl_cluster.RLCluster(
        actor=make_model(size, 0), critic=critic, reference=make_model(size, 0), reward=None,
        tokenizer=common.make_tokenizer(size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh), rollout_engine="vanilla",
            offload_to_cpu=False, training_config=training, rollout_config=rollout,
        ),
    )  # fmt: skip
    ppo = ppo_learner.PPOConfig(
        num_iterations=size.epochs, gamma=common.GAMMA, gae_lambda=common.LAM, beta=common.KL,
        epsilon=common.CLIP, clip_range_value=common.CLIP, kl_method="kl",
    )  # fmt: skip
    return cluster, ppo_learner.PPOLearner(
        rl_cluster=cluster, reward_fns=even_fraction, ppo_config=ppo
    )


def time_parts(cluster, learner, turns: common.Rounds) -> None:
    """Wrap generation, the two updates and the step, each timed to the end of its computation."""
    seconds: dict[str, float] = {}

    def models():
        trainers = (cluster.actor_trainer, cluster.critic_trainer)
        return [nnx.state(trainer.model) for trainer in trainers]

    def wrap(name: str, part: str):
        function = getattr(cluster, name)

        def timed(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            jax.block_until_ready((result, models()))
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(cluster, name, timed)

    wrap("generate", "rollout_s")
    wrap("update_actor", "update_s")
    wrap("update_critic", "update_s")
    step = learner._run_global_step

    def timed_step(*arguments, **options):
        turns.begin()
        seconds.clear()
        start = time.perf_counter()
        result = step(*arguments, **options)
        jax.block_until_ready(models())
        turns.end(step_s=time.perf_counter() - start, **seconds)
        return result

    learner._run_global_step = timed_step


def main(size: Size, warmup: int, rounds: int) -> None:
    """Train for `warmup + rounds` global steps."""
    total = warmup + rounds
    cluster, learner = make_learner(size, total)
    time_parts(cluster, learner, common.Rounds(warmup))
    batches = [common.to_text(ids) for ids in common.prompt_ids(size, total)]
    learner.train([{"prompts": np.array(texts)} for texts in batches])


if __name__ == "__main__":
    parsed = common.flags()
    main(parsed.size, parsed.warmup, parsed.rounds)
