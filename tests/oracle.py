"""Between the shipped records and those of the reference: one way for each, and drawn models."""

from dataclasses import fields
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import reference.config
import reference.models.heads
import reference.models.transformer
import reference.types
from ppo_kernel.config import Hyperparams
from ppo_kernel.models import LanguageModel, Transformer, TransformerConfig, ValueHead, ValueModel
from ppo_kernel.testing import NORM_TOLERANCES
from ppo_kernel.types import Evaluation, Experience, Prompts, Rollout
from reference.tree import tree_leaves, tree_map

RECORDS = (Prompts, Rollout, Evaluation, Experience)


def trunk_config(**settings) -> TransformerConfig:
    """The smallest trunk with every axis of another size, all in float64."""
    sizes = {
        "vocab_size": 13, "hidden_size": 8, "intermediate_size": 10,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
    }  # fmt: skip
    types = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), "float64")
    return TransformerConfig(**(sizes | types | settings))


def draw_policy(config: TransformerConfig, rng: np.random.Generator) -> LanguageModel:
    """A random policy."""
    return _filled(_policy_shapes(config), rng)


def draw_critic(config: TransformerConfig | None, width: int, rng: np.random.Generator):
    """A random critic; None gives a head for a policy's trunk of that width."""
    return _filled(_critic_shapes(config, width), rng)


@cache
def _policy_shapes(config):
    return eqx.filter_eval_shape(lambda: LanguageModel.init(jax.random.key(0), config))


@cache
def _critic_shapes(config, width):
    if config is None:
        return eqx.filter_eval_shape(lambda: ValueHead(jnp.zeros(width)))
    return eqx.filter_eval_shape(lambda: ValueModel.on(Transformer.init(jax.random.key(0), config)))


def _filled(shapes, rng: np.random.Generator):
    """Random numbers of these shapes: norms about 1, the rest about 0."""

    def fill(path, leaf):
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.4 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def draw_prompts(
    rows: int, width: int, vocabulary: int, rng: np.random.Generator, *, shortest: int = 1
) -> Prompts:
    """Left-padded prompts of ragged lengths and distinct tokens, with sample ids in no order."""
    lengths = rng.integers(shortest, width + 1, rows)
    tokens = [rng.permutation(vocabulary)[:width] for _ in range(rows)]
    return Prompts(
        tokens=jnp.asarray(np.stack(tokens), jnp.int32),
        mask=jnp.asarray(np.arange(width)[None] >= width - lengths[:, None]),
        sample_ids=jnp.asarray(rng.permutation(100)[:rows], jnp.int32),
    )


def draw_rollout(rows: int, shape: tuple[int, int], vocabulary: int, rng) -> Rollout:
    """A rollout nobody sampled: empty responses, holes in the loss mask, any log-probabilities."""
    prompt_width, length = shape
    prompts = draw_prompts(rows, prompt_width, vocabulary, rng, shortest=2)
    lengths = rng.integers(0, length + 1, rows)
    written = np.arange(length)[None] < lengths[:, None]
    logprobs = -rng.random((2, rows, length)) - 1.5
    return Rollout(
        prompt_tokens=prompts.tokens,
        prompt_mask=prompts.mask,
        sample_ids=prompts.sample_ids,
        tokens=jnp.asarray(rng.integers(0, vocabulary, (rows, length)), jnp.int32),
        mask=jnp.asarray(written & (rng.random((rows, length)) < 0.8)),
        lengths=jnp.asarray(lengths, jnp.int32),
        terminated=jnp.asarray(rng.random(rows) < 0.5),
        logprobs=jnp.asarray(logprobs[0]),
        behaviour_logprobs=jnp.asarray(logprobs[1]),
    )


def to_reference(record):
    """A shipped record (or `Hyperparams`) as the reference's, on NumPy arrays and Python floats."""
    if isinstance(record, Hyperparams):
        return reference.config.Hyperparams(
            actor=reference.config.OptimizerHyperparams(**_numbers(record.actor)),
            critic=reference.config.OptimizerHyperparams(**_numbers(record.critic)),
            **_numbers(record),
        )
    if isinstance(record, RECORDS):
        twin = getattr(reference.types, type(record).__name__)
        return twin(**{f.name: to_reference(getattr(record, f.name)) for f in fields(record)})
    return _exact(record)


def _numbers(record) -> dict:
    """The numbers of hyper-parameters by name, without those of the optimizers."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    values = {name: x for name, x in values.items() if name not in ("actor", "critic")}
    return {name: None if x is None else float(x) for name, x in values.items()}


def _exact(x) -> np.ndarray:
    """The same numbers; the reference takes its floats in float64."""
    x = np.asarray(x)
    return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x


def model_to_reference(model) -> reference.models.heads.Model | None:
    """A shipped policy, critic or head as the reference's; None for no critic."""
    if model is None:
        return None
    if isinstance(model, ValueHead):
        return reference.models.heads.Model(parameters_of(model), None)
    return reference.models.heads.Model(parameters_of(model), config_of(model.trunk.config))


def config_of(config: TransformerConfig) -> reference.models.transformer.TransformerConfig:
    """What the reference needs of a trunk's settings."""
    scaling = config.rope_scaling
    if scaling is not None:
        scaling = reference.models.transformer.RopeScaling(**vars(scaling))
    return reference.models.transformer.TransformerConfig(
        config.head_dim, config.rope_theta, scaling, config.norm_epsilon
    )


def parameters_of(model) -> dict:
    """The numbers of a model, or a gradient or moment of its shape, as the reference names them."""
    model = jax.tree.map(_exact, eqx.filter(model, eqx.is_inexact_array))
    if isinstance(model, ValueHead):
        return {"head": model.weight}
    trunk = model.trunk
    layers = [
        _layer(jax.tree.map(lambda x, i=index: x[i], trunk.blocks))
        for index in range(trunk.config.num_layers)
    ]
    parameters = {"embedding": trunk.embedding, "layers": layers, "norm": trunk.norm.weight}
    if isinstance(model, LanguageModel):
        return parameters | {"output": model.output}
    return parameters | {"head": model.head.weight}


def _layer(block) -> dict:
    def linear(layer):
        return {"weight": layer.weight, "bias": layer.bias}

    attention = {
        name: linear(getattr(block.attention, name)) for name in ("query", "key", "value", "output")
    }
    for name in ("query_norm", "key_norm"):
        norm = getattr(block.attention, name)
        attention[name] = None if norm is None else norm.weight
    return {
        "attention_norm": block.attention_norm.weight,
        "attention": attention,
        "mlp_norm": block.mlp_norm.weight,
        "mlp": {name: linear(getattr(block.mlp, name)) for name in ("gate", "up", "down")},
    }


def assert_near(got, want, name: str, relative: float = NORM_TOLERANCES["float64"]) -> None:
    """Every array of `got` is within `relative` of the norm of its twin in `want`.

    An array may be zero but for rounding, so a thousandth of the whole tree counts as well.
    """
    floor = 1e-3 * np.sqrt(sum(np.linalg.norm(leaf) ** 2 for leaf in tree_leaves(want)))

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, f"{name}: shape {a.shape}, not {b.shape}"
        off, size = np.linalg.norm(a - b), max(np.linalg.norm(b), floor)
        if not off <= relative * size + 1e-14:
            gaps = np.nan_to_num(np.abs(a - b), nan=np.inf)
            worst = tuple(map(int, np.unravel_index(np.argmax(gaps), a.shape)))
            raise AssertionError(
                f"{name}, shape {a.shape}: off by {off:.3g} in norm, allowed {relative * size:.3g};"
                f" most at {worst}: {float(a[worst])}, the reference {float(b[worst])}"
            )

    assert len(tree_leaves(got)) == len(tree_leaves(want)), name
    tree_map(compare, got, want)
