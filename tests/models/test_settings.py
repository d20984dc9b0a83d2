"""Every setting of a model and its layers, against a NumPy forward pass that shares no code."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpy_forward
import pytest
import tiny
from jax.test_util import check_grads

from ppo_kernel.models import LanguageModel, LayerSpec, Rope
from ppo_kernel.models.norm import LayerNorm

ACTIVATIONS = {
    jax.nn.silu: numpy_forward.silu,
    jax.nn.gelu: numpy_forward.gelu_tanh,
    jax.nn.relu: numpy_forward.relu,
    tiny.exact_gelu: numpy_forward.gelu,
}
CASES = {
    "local-and-global": tiny.LOCAL_AND_GLOBAL,
    "classic": tiny.CLASSIC,
    "one-of-each": {"num_layers": 2},
    "a-period-that-stops-early": tiny.LOCAL_AND_GLOBAL | {"num_layers": 5},
    "fewer-layers-than-a-period": tiny.LOCAL_AND_GLOBAL | {"num_layers": 1},
    "five-to-one": {
        "layers": (LayerSpec(Rope(100.0), window=2),) * 5 + (LayerSpec(Rope(1e6)),),
        "num_layers": 8, "qk_norm": True, "norm_offset": 1.0,
    },
    "no-rope-every-fourth": {
        "layers": (LayerSpec(),) * 3 + (LayerSpec(rope=None),), "num_layers": 6,
    },
    "parallel": {
        "parallel": True, "norm": LayerNorm, "layers": (LayerSpec(Rope(fraction=0.5)),),
    },
    "norms-after-alone": {"pre_norms": False, "post_norms": True, "qk_norm": True},
    "relu-and-scale": {
        "activation": jax.nn.relu, "gated": False, "layers": (LayerSpec(scale=1.0),),
        "mlp_bias": True,
    },
    "wider-window-than-text": {"layers": (LayerSpec(window=100),)},
}  # fmt: skip
MASK = np.array(
    [[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1, 1]], bool
)
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCABULARY, MASK.shape).astype(np.int32)


def random_model(**settings) -> LanguageModel:
    """Every array random, biases and norms too."""
    like = eqx.filter_eval_shape(
        lambda: LanguageModel.init(jax.random.key(0), tiny.transformer_config(**settings))
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), like)


def plain(node):
    """A module as dictionaries of its array fields."""
    if node is None or isinstance(node, jax.Array):
        return None if node is None else np.asarray(node)
    return {
        "bias": None,
        **{name: plain(x) for name, x in vars(node).items() if x is None or _has_arrays(x)},
    }


def _has_arrays(x) -> bool:
    return isinstance(x, jax.Array | eqx.Module)


def to_numpy(model):
    """(parameters, settings) for `numpy_forward`."""
    trunk, config = model.trunk, model.trunk.config
    count = config.num_layers
    parameters = {
        "embedding": plain(trunk.embedding),
        "position_embedding": plain(trunk.position_embedding),
        "norm": plain(trunk.norm),
        "output": plain(model.output),
        "layers": [plain(jax.tree.map(lambda x, i=i: x[i], trunk.blocks)) for i in range(count)],
    }
    settings = vars(config) | {
        "norm": {
            "centred": config.norm is LayerNorm,
            "offset": config.norm_offset,
            "epsilon": config.norm_epsilon,
        },
        "activation": ACTIVATIONS[config.activation],
        "layers": [
            vars(spec) | {"rope": None if spec.rope is None else vars(spec.rope)}
            for spec in (config.period[i % len(config.period)] for i in range(count))
        ],
    }
    return parameters, settings


@pytest.mark.parametrize("unroll", [1, 2, 8])
@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_logits_equal_numpys(name, unroll, float64):
    model = random_model(**CASES[name], unroll=unroll)
    parameters, settings = to_numpy(model)
    start = 2

    @jax.jit
    def run(model):
        hidden = model.hidden(jnp.asarray(TOKENS), jnp.asarray(MASK), start)
        return hidden, model.unembed(hidden.reshape(-1, hidden.shape[-1]))

    hidden, logits = run(model)
    logits = np.asarray(logits).reshape(*hidden.shape[:2], -1)
    for row, mask in enumerate(MASK):
        want = numpy_forward.forward(parameters, settings, TOKENS[row, mask])
        read = mask[start:]
        for got, expected in zip((hidden, logits), want, strict=True):
            expected = expected[-read.sum() :]
            np.testing.assert_allclose(got[row][read], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["local-and-global", "classic", "parallel"])
def test_gradients_equal_finite_differences(name, float64):
    model = random_model(**CASES[name] | {"num_layers": 2})

    def value(model):
        hidden = model.hidden(jnp.asarray(TOKENS), jnp.asarray(MASK), 2)
        logits = model.unembed(hidden.reshape(-1, hidden.shape[-1]))
        logits = jnp.where(jnp.asarray(MASK)[:, 2:].reshape(-1, 1), logits, 0.0)
        return jnp.sum(jnp.sin(logits))

    run = jax.jit(value)
    check_grads(lambda m: run(jax.tree.map(jnp.asarray, m)), (model,), order=1, modes=["rev"])


@pytest.mark.parametrize("name", ["local-and-global", "a-period-that-stops-early"])
@pytest.mark.parametrize("remat", [None, jax.checkpoint_policies.nothing_saveable])
def test_what_is_kept_does_not_change_the_gradient_of_periods(name, remat, float64):
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)

    def gradient(**settings):
        model = random_model(**CASES[name], **settings)
        return jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m.hidden(tokens, mask)))))(model)

    tiny.assert_trees_close(gradient(remat=remat), gradient(), 1e-12)
    tiny.assert_trees_close(gradient(unroll=8), gradient(), 1e-12)


REFUSED = [
    ({"layers": (LayerSpec(),), "rope_theta": 5e5}, "rope_theta and rope_scaling have no meaning"),
    ({"norm_bias": True}, "norm_bias=True needs norm=LayerNorm"),
    ({"pre_norms": False}, "pre_norms and post_norms are both False"),
    ({"parallel": True, "pre_norms": False, "post_norms": True}, "parallel=True needs pre_norms"),
    ({"layers": (LayerSpec(Rope(fraction=0.2)),)}, "0 channels to rotate"),
    ({"embedding_scale": 0.0}, "embedding_scale must be finite, above 0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.transformer_config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"softcap": 0.0}, "softcap must be finite, above 0"),
        ({"scale": -1.0}, "scale must be finite, above 0"),
    ],
)
def test_a_layer_refuses_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec(**settings)


def test_more_slots_than_learned_positions_are_refused():
    model, batch = random_model(**tiny.CLASSIC | {"max_positions": 16}), tiny.prompts()
    with pytest.raises(ValueError, match="17 slots, but the model has learned 16 positions"):
        model.prefill(batch.tokens, batch.mask, 17)
    with pytest.raises(ValueError, match="17 slots"):
        model.hidden(jnp.zeros((1, 17), jnp.int32), jnp.ones((1, 17), bool))
    _, cache = model.prefill(batch.tokens, batch.mask, 5)
    with pytest.raises(ValueError, match="17 slots"):
        model.decoder().grow(cache, 17)
