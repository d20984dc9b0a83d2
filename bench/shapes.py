"""Named sizes, and the states and prompts that the benchmarks share."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ppo_kernel.config import GenerationConfig, Hyperparams, IterationConfig
from ppo_kernel.models import LanguageModel, Transformer, TransformerConfig, ValueModel
from ppo_kernel.types import Prompts, Rollout
from ppo_kernel.update import Learner, TrainState


@dataclass(frozen=True)
class Shape:
    """A model and a batch: B sequences of P prompt and T response slots."""

    model: TransformerConfig
    batch: int
    prompt: int
    response: int
    epochs: int


def _model(
    vocab: int, width: int, inner: int, layers: int, heads: int, kv: int, tied: bool = False
):
    return TransformerConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_layers=layers,
        num_heads=heads, num_kv_heads=kv, head_dim=64 if width > 128 else 32, qkv_bias=True,
        tie_embeddings=tied, rope_theta=1e6,
    )  # fmt: skip


SHAPES = {
    "tiny": Shape(_model(512, 128, 512, 4, 4, 2), 16, 32, 64, 4),
    "small": Shape(_model(32_000, 512, 1408, 8, 8, 4), 8, 64, 128, 2),
}
"""`tiny` has 1.2 M parameters, `small` 56 M."""


@dataclass(frozen=True)
class Case:
    """All that a benchmark of a stage needs."""

    shape: Shape
    config: IterationConfig
    hyperparams: Hyperparams
    policy: LanguageModel
    state: TrainState
    prompts: Prompts


def case(name: str) -> Case:
    """Random weights, random prompts, responses of full length: no EOS id is given."""
    shape = SHAPES[name]
    policy = LanguageModel.init(jax.random.key(0), shape.model)
    critic = ValueModel.on(Transformer.init(jax.random.key(1), shape.model))
    hyperparams = Hyperparams(kl_coef=0.1)
    tokens = jax.random.randint(
        jax.random.key(2), (shape.batch, shape.prompt), 2, shape.model.vocab_size, jnp.int32
    )
    return Case(
        shape=shape,
        config=IterationConfig(
            generation=GenerationConfig(shape.response), num_epochs=shape.epochs
        ),
        hyperparams=hyperparams,
        policy=policy,
        state=Learner().init(policy, critic, jax.random.key(3), hyperparams),
        prompts=Prompts(tokens, jnp.ones_like(tokens, bool), jnp.arange(shape.batch)),
    )


def even_fraction(rollout: Rollout):
    """The reward of the benchmarks: the share of even token ids."""
    return jnp.mean((rollout.tokens % 2 == 0).astype(jnp.float32), axis=1)
