"""Models, states and prompts of a size, filled by NumPy: nothing is compiled to make them."""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_kernel.config import GenerationConfig, Hyperparams, IterationConfig
from ppo_kernel.learner.state import Learner, TrainState
from ppo_kernel.models import LanguageModel, Transformer, TransformerConfig, ValueModel
from ppo_kernel.models.config import KEEP_PROJECTIONS
from ppo_kernel.models.kernels.causal_attention import attend_causally
from ppo_kernel.sharding import make_mesh, place
from ppo_kernel.types import Prompts, Rollout

from .sizes import Size


@dataclass(frozen=True)
class Case:
    """All that a stage needs. `state` is consumed by the stages that donate it."""

    size: Size
    mesh: Mesh | None
    config: IterationConfig
    hyperparams: Hyperparams
    reference: LanguageModel
    state: TrainState
    prompts: Prompts


def build(
    size: Size,
    dtype: str = "float32",
    devices: int | None = None,
    attention: Callable = attend_causally,
) -> Case:
    """Weights N(0, 0.02^2), random prompts, responses of full length: no EOS id is given.

    Args:
        size: of the models and the batch.
        dtype: of parameters, activations and the KV cache alike.
        devices: of a data mesh; None for no mesh at all.
        attention: of `TransformerConfig`.
    """
    mesh = None if devices is None else make_mesh(devices)
    reference = place(random_policy(size, dtype, attention), mesh, "parameter")
    trunk = _filled(Transformer.init, model_config(size, dtype, attention), seed=1)
    critic = place(ValueModel.on(trunk), mesh, "parameter")
    config, hyperparams = settings(size)
    state = Learner().init(reference, critic, jax.random.key(3), hyperparams)
    return Case(
        size=size,
        mesh=mesh,
        config=config,
        hyperparams=place(hyperparams, mesh, "parameter"),
        reference=reference,
        state=place(state, mesh, "parameter"),
        prompts=place(random_prompts(size), mesh, "batch"),
    )


def random_policy(
    size: Size, dtype: str = "float32", attention: Callable = attend_causally
) -> LanguageModel:
    """The policy and reference of `build`, by itself."""
    return _filled(LanguageModel.init, model_config(size, dtype, attention), seed=0)


def settings(size: Size) -> tuple[IterationConfig, Hyperparams]:
    """One minibatch an epoch, and a KL penalty, as the peers have them."""
    config = IterationConfig(GenerationConfig(size.response), num_epochs=size.epochs)
    return config, Hyperparams(kl_coef=0.1)


def even_fraction(rollout: Rollout):
    """The reward of the benchmarks: the share of even token ids."""
    return jnp.mean((rollout.tokens % 2 == 0).astype(jnp.float32), axis=1)


def model_config(
    size: Size, dtype: str, attention: Callable = attend_causally
) -> TransformerConfig:
    """Of policy, reference and critic; arguments as in `build`."""
    # Computing anything again gains small models nothing: their activations lie in the caches.
    remat = None if size.policy_parameters < 10**7 else KEEP_PROJECTIONS
    return TransformerConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.mlp,
        num_layers=size.layers, num_heads=size.heads, num_kv_heads=size.kv_heads,
        head_dim=size.head_dim, rope_theta=1e6, qkv_bias=True, tie_embeddings=size.tied,
        param_dtype=dtype, compute_dtype=dtype, cache_dtype=dtype,
        unroll=8 if size.layers <= 8 else 1, remat=remat, attention=attention,
    )  # fmt: skip


def _filled(init, model: TransformerConfig, seed: int):
    """The arrays `init` would make, filled by name: norms with ones, biases with zeros."""
    shapes = eqx.filter_eval_shape(init, jax.random.key(0), model)
    generator = np.random.Generator(np.random.SFC64(seed))

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "bias" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(np.multiply(values, 0.02, out=values), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_prompts(size: Size) -> Prompts:
    """Full prompts, numbered from 0."""
    shape = (size.batch, size.prompt)
    tokens = np.random.default_rng(2).integers(2, size.vocab, shape, dtype=np.int32)
    return Prompts(jnp.asarray(tokens), jnp.ones(shape, bool), jnp.arange(size.batch))
