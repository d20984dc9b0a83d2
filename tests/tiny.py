"""Models and batches small enough to compile in a second; one of the models is not ours."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_kernel.config import (
    GenerationConfig,
    Hyperparams,
    IterationConfig,
    OptimizerHyperparams,
)
from ppo_kernel.learner.state import Learner
from ppo_kernel.models import (
    Decoder,
    LanguageModel,
    LayerSpec,
    Rope,
    Transformer,
    TransformerConfig,
    ValueModel,
)
from ppo_kernel.models.heads import ValueHead
from ppo_kernel.models.norm import LayerNorm
from ppo_kernel.program import compile_iteration
from ppo_kernel.types import Prompts

VOCABULARY, EOS, PAD = 13, 1, 0


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.gelu(x, approximate=False)


LOCAL_AND_GLOBAL = {
    "layers": (
        LayerSpec(Rope(100.0), window=2, softcap=2.0, scale=0.4),
        LayerSpec(Rope(1e4), softcap=3.0),
    ),
    "post_norms": True, "norm_offset": 1.0, "activation": jax.nn.gelu, "final_softcap": 4.0,
    "embedding_scale": 4.0, "tie_embeddings": True, "num_layers": 4,
}  # fmt: skip
"""Settings of a model whose layers take turns: every other one sees two tokens alone."""

CLASSIC = {
    "norm": LayerNorm, "norm_bias": True, "norm_epsilon": 1e-5, "gated": False,
    "activation": exact_gelu, "learned_positions": True, "max_positions": 64,
    "qkv_bias": True, "output_bias": True, "mlp_bias": True,
}  # fmt: skip
"""Layer norms, a plain MLP, learned positions, and a bias everywhere."""


def transformer_config(**changes) -> TransformerConfig:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    }  # fmt: skip
    dtype = str(jnp.zeros(()).dtype)
    types = {"param_dtype": dtype, "compute_dtype": dtype, "cache_dtype": dtype}
    return TransformerConfig(**(sizes | types | changes))


def sharpened(tree, factor: float = 3.0):
    """Random weights this small make every distribution nearly uniform; scale them up."""
    return jax.tree.map(lambda x: factor * x if x.ndim > 1 else x, tree)


def language_model(seed: int = 0, **changes) -> LanguageModel:
    return sharpened(LanguageModel.init(jax.random.key(seed), transformer_config(**changes)))


def value_model(seed: int = 1, **changes) -> ValueModel:
    trunk = Transformer.init(jax.random.key(seed), transformer_config(**changes))
    weight = jax.random.normal(jax.random.key(seed + 100), (trunk.config.hidden_size,))
    return ValueModel(sharpened(trunk), ValueHead(weight))


def prompts(lengths=(3, 1, 4, 2, 4, 3, 2, 1), width: int = 4, pad: int = PAD) -> Prompts:
    """Left-padded random prompts whose ids are 2 and above, with scattered sample ids."""
    count = len(lengths)
    tokens = jax.random.randint(jax.random.key(5), (count, 4), 2, VOCABULARY, jnp.int32)
    tokens = jnp.pad(tokens, ((0, 0), (width - 4, 0)))
    mask = jnp.arange(width)[None] >= width - jnp.array(lengths)[:, None]
    tokens = jnp.where(mask, tokens, pad)
    return Prompts(tokens, mask, jnp.arange(count, dtype=jnp.int32) * 7 + 3)


def generation(**changes) -> GenerationConfig:
    return GenerationConfig(
        **({"max_new_tokens": 5, "eos_token_ids": (EOS,), "pad_token_id": PAD} | changes)
    )


def iteration_config(generation_config=None, **changes) -> IterationConfig:
    settings = {"num_epochs": 2, "num_minibatches": 2} | changes
    return IterationConfig(generation_config or generation(), **settings)


def hyperparams(rate=None, *, actor=None, critic=None, **settings) -> Hyperparams:
    """Hyper-parameters from plain numbers, those of each optimizer in a dict.

    `rate` is the learning rate of both.
    """
    rates = {} if rate is None else {"learning_rate": rate}
    return Hyperparams(
        actor=OptimizerHyperparams(**(rates | (actor or {}))),
        critic=OptimizerHyperparams(**(rates | (critic or {}))),
        **settings,
    )


def even_tokens(rollout) -> Float[Array, " B"]:
    """A reward: how many tokens of the response are even."""
    dtype = rollout.logprobs.dtype
    return jnp.sum((rollout.tokens % 2 == 0) & rollout.mask, axis=1).astype(dtype)


def start(hyperparams: Hyperparams, *, seed: int = 3, policy=None, critic=None, no_critic=False):
    """A fresh train state; by default of a language model and a critic of its own trunk."""
    policy = language_model() if policy is None else policy
    critic = value_model() if critic is None and not no_critic else critic
    return Learner().init(policy, critic, jax.random.key(seed), hyperparams)


def one_step(state, reference, batch, hyperparams, config, *, mesh=None, reward=even_tokens):
    """One compiled iteration; the state passed in stays usable."""
    compiled = compile_iteration(config=config, mesh=mesh)
    return compiled.step(jax.tree.map(jnp.copy, state), reference, batch, hyperparams, reward)


class RecurrentPolicy(eqx.Module):
    """A gated recurrent language model: somebody else's policy, in the documented protocol."""

    embedding: Float[Array, "V D"]
    cell: eqx.nn.GRUCell

    def __init__(self, key: Array, width: int = 8):
        embedding_key, cell_key = jax.random.split(key)
        self.embedding = jax.random.normal(embedding_key, (VOCABULARY, width))
        self.cell = eqx.nn.GRUCell(width, width, key=cell_key)

    def _read(self, state: Float[Array, "B D"], tokens: Int[Array, " B"], valid: Bool[Array, " B"]):
        new = jax.vmap(self.cell)(self.embedding[tokens], state)
        return jnp.where(valid[:, None], new, state)

    def _scan(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]):
        def step(state, inputs):
            state = self._read(state, *inputs)
            return state, state

        initial = jnp.zeros((tokens.shape[0], self.embedding.shape[1]))
        return jax.lax.scan(step, initial, (tokens.T, mask.T))

    def hidden(self, tokens, mask, start=0):
        return self._scan(tokens, mask)[1].swapaxes(0, 1)[:, start:]

    def unembed(self, hidden):
        return hidden @ self.embedding.T

    def prefill(self, tokens, mask, capacity):
        del capacity  # a recurrent state does not grow
        state, _ = self._scan(tokens, mask)
        return state, state

    def decoder(self):
        def step(tokens, state):
            state = self._read(state, tokens, jnp.ones(tokens.shape, bool))
            return state, state

        return Decoder(step, self.unembed)


class RecurrentCritic(eqx.Module):
    """A critic on the same kind of network."""

    body: RecurrentPolicy
    weight: Float[Array, " D"]

    def __call__(self, tokens, mask, start=0):
        return self.body.hidden(tokens, mask, start) @ self.weight


def assert_trees_close(a, b, tolerance: float):
    """Every leaf within `tolerance` of the leaf's norm."""
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if "initial_log_ratio" in jax.tree_util.keystr(path) and max(x.max(), y.max()) < 1e-4:
            continue  # on a rollout of the policy itself it is rounding, and nothing else
        worst = np.abs(x - y).max() / max(np.linalg.norm(y), 1e-30) if x.size else 0.0
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)} differs by {worst} of its norm"
