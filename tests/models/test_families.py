"""Families: every one maps its settings and weights there and back, and refuses what it cannot."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_kernel.io.folders import staged
from ppo_kernel.io.safetensors import WeightFiles, load_weights, save_weights
from ppo_kernel.models import LanguageModel, RopeScaling, TransformerConfig, ValueModel
from ppo_kernel.models.families.table import FAMILIES, family_named, family_of

SIZES = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "rope_theta": 5e5,
    "norm_epsilon": 1e-5,
}
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)

CASES = [  # family, settings of ours
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_embeddings": True, "rope_scaling": LLAMA3}, id="llama3.2"),
    pytest.param("qwen2", {"qkv_bias": True}, id="qwen2"),
    pytest.param("qwen2", {"qkv_bias": True, "tie_embeddings": True}, id="qwen2-tied"),
    pytest.param("qwen3", {"qk_norm": True}, id="qwen3"),
]

HF = {  # the part of config.json that is always there
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
LLAMA3_ENTRIES = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shapes(kind, config):
    def build():
        lm = LanguageModel.init(jax.random.key(0), config)
        return lm if kind == "causal_lm" else ValueModel.on(lm.trunk)

    return eqx.filter_eval_shape(build)


def random_like(model):
    """Every array random, so that ones and zeros cannot hide a swap."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model)


def leaf_paths(model):
    return {
        jax.tree_util.keystr(path).removeprefix(".") for path, _ in jax.tree.leaves_with_path(model)
    }


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_config_round_trip(name, settings):
    ours = {"param_dtype": "bfloat16", "remat": None, "unroll": 3}
    config = TransformerConfig(**SIZES, **settings, **ours)
    family = FAMILIES[name]
    entries = json.loads(json.dumps(family.describe(config)))
    assert family.to_config(entries, **ours) == config
    assert entries["dtype"] == entries["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["causal_lm", "classifier"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_array_has_one_tensor(name, settings, kind):
    config = TransformerConfig(**SIZES, **settings)
    weights = getattr(FAMILIES[name], f"{kind}_weights")(config)
    paths = [weight.path for weight in weights]
    assert len(paths) == len(set(paths))
    assert set(paths) == leaf_paths(shapes(kind, config))
    assert len({weight.name for weight in weights}) == len(weights)


@pytest.mark.parametrize("shard_bytes", [2**30, 500])
@pytest.mark.parametrize("kind", ["causal_lm", "classifier"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_weights_round_trip(name, settings, kind, shard_bytes, tmp_path):
    config = TransformerConfig(**SIZES, **settings)
    weights = getattr(FAMILIES[name], f"{kind}_weights")(config)
    like = shapes(kind, config)
    model = random_like(like)
    with staged(tmp_path) as folder:
        save_weights(folder, model, like, weights, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").is_file() == (shard_bytes > 500)
    with WeightFiles(tmp_path) as files:
        loaded = load_weights(files, like, weights)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)


SPELLINGS = [  # entries beside HF, the settings they mean
    pytest.param({}, {"rope_theta": 10_000.0}, id="all-defaults"),
    pytest.param({"rope_theta": 5e5}, {"rope_theta": 5e5}, id="rope_theta-4"),
    pytest.param(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5},
        id="rope_theta-5",
    ),
    pytest.param(
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ENTRIES}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        id="llama3-4",
    ),
    pytest.param(
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ENTRIES}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        id="llama3-5",
    ),
    pytest.param({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}, id="type-old"),
    pytest.param({"num_key_value_heads": 1}, {"num_kv_heads": 1}, id="kv-heads"),
    pytest.param({"num_key_value_heads": None}, {"num_kv_heads": 4}, id="kv-heads-null"),
    pytest.param({"head_dim": 8}, {"head_dim": 8}, id="head_dim"),
    pytest.param({"tie_word_embeddings": True}, {"tie_embeddings": True}, id="tied"),
    pytest.param({"attention_dropout": 0.1, "use_cache": False}, {}, id="of-no-concern"),
]


@pytest.mark.parametrize(("entries", "meaning"), SPELLINGS)
def test_spellings(entries, meaning):
    config = family_named("llama").to_config(HF | entries)
    assert {key: getattr(config, key) for key in meaning} == meaning


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("llama", {"head_dim": 4, "max_positions": 2048, "qkv_bias": False}),
        ("qwen2", {"head_dim": 4, "max_positions": 32_768, "qkv_bias": True}),
        ("qwen3", {"head_dim": 128, "max_positions": 32_768, "qk_norm": True}),
    ],
)
def test_defaults_of_each_family(name, defaults):
    config = FAMILIES[name].to_config(HF)
    defaults |= {"tie_embeddings": False, "num_kv_heads": 4}
    assert {key: getattr(config, key) for key in defaults} == defaults


REFUSED = [  # family, entries, what the message must name
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "fp8.*dequantize"),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "one per kind of layer"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"vocab_size": None}, "no vocab_size"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
]


@pytest.mark.parametrize(("name", "entries", "message"), REFUSED)
def test_refusals(name, entries, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].to_config(HF | entries)


@pytest.mark.parametrize("entries", [{"model_type": "mamba"}, {}])
def test_unknown_model_type(entries):
    with pytest.raises(ValueError, match="'llama', 'qwen2', 'qwen3'"):
        family_of(entries)


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [("llama", {"qkv_bias": True}, "qkv_bias=True"), ("qwen2", {}, "qkv_bias=False")],
)
def test_family_cannot_express(name, settings, field):
    with pytest.raises(ValueError, match=field):
        FAMILIES[name].describe(TransformerConfig(**SIZES, **settings))
