"""Large matrices times the few rows of a decode step: other forms, the same numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ppo_kernel.models import LanguageModel
from ppo_kernel.models.kernels import decode_matmul
from ppo_kernel.models.kernels.decode_matmul import DecodeMatrix
from ppo_kernel.models.linear import Linear, decoding
from ppo_kernel.rollout.generate import generate

WIDE = {"hidden_size": 512, "intermediate_size": 320, "num_heads": 8, "head_dim": 64}
"""Every matrix of a layer is a whole number of strips: see `strips_from`."""


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 5, 6, 8, 15, 16, 64, 65])
def test_layers_in_one_product_equal_numpy(rows):
    x, sizes = drawn((rows, 384)), (512, 128, 256)
    layers = [
        Linear(jnp.asarray(drawn((384, size), size)), jnp.asarray(bias))
        for size, bias in zip(sizes, (drawn(512, 1), drawn(128, 2), drawn(256, 3)), strict=True)
    ]
    layers[1] = Linear(layers[1].weight)
    got = jax.jit(lambda x: decoding(*layers)(x))(x)
    for part, layer in zip(got, layers, strict=True):
        bias = 0.0 if layer.bias is None else np.asarray(layer.bias, np.float64)
        want = np.float64(x) @ np.asarray(layer.weight, np.float64) + bias
        np.testing.assert_allclose(part, want, rtol=1e-5, atol=2e-4)


def strips_from(monkeypatch, outputs, weights=0):
    """Strips for matrices of at least so many outputs and weights, whatever the version of JAX."""
    monkeypatch.setattr(decode_matmul, "STRIPS_ARE_FAST", True)
    monkeypatch.setattr(decode_matmul, "STRIPS_FROM", outputs)
    monkeypatch.setattr(decode_matmul, "LARGE", weights)


@pytest.mark.parametrize(
    ("outputs", "inputs", "strip"),
    [
        (600, 384, 0),  # no whole number of strips
        (640, 384, 64),
        (672, 384, 32),  # no whole number of the wider ones
        (640, 800, 32),  # the wider ones are too large
        (640, 1056, 0),  # both are, and there are few
        (704, 1056, 32),  # there are many of the narrower ones
        (1344, 1056, 64),  # and of the wider ones
        (480, 384, 0),  # too few outputs
        (640, 192, 0),  # too small
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 8, 40, 100])
def test_the_product_equals_numpys(monkeypatch, rows, outputs, inputs, strip):
    strips_from(monkeypatch, 512, 2**17)
    monkeypatch.setattr(decode_matmul, "MANY_STRIPS", 21)
    x, weight = drawn((rows, inputs)), drawn((outputs, inputs), 1)
    packed = DecodeMatrix.of(jnp.asarray(weight))
    assert packed.strip == strip
    assert np.array_equal(packed.weight, weight) == (strip == 0)
    got = jax.jit(lambda x, weight: DecodeMatrix.of(weight)(x))(x, weight)
    np.testing.assert_allclose(got, np.float64(x) @ np.float64(weight).T, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("outputs", [600, 640])
@pytest.mark.parametrize("inputs", [512, 800])
@pytest.mark.parametrize("rows", [3, 8, 40, 100])
def test_the_product_and_its_gradient_equal_the_plain_ones(monkeypatch, rows, inputs, outputs):
    strips_from(monkeypatch, 640)
    x, weight = drawn((rows, inputs)), drawn((outputs, inputs), 1)
    along = jnp.asarray(drawn((rows, outputs), 2))

    def product(x, weight):
        return jnp.sum(along * DecodeMatrix.of(weight)(x))

    value, gradients = jax.jit(jax.value_and_grad(product, (0, 1)))(x, weight)
    wide = [np.asarray(a, np.float64) for a in (x, weight, along)]
    np.testing.assert_allclose(value, np.sum(wide[2] * (wide[0] @ wide[1].T)), rtol=1e-4)
    np.testing.assert_allclose(gradients[0], wide[2] @ wide[1], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(gradients[1], wide[2].T @ wide[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "outputs", "dtype"),
    [(8, 600, "float64"), (20, 640, "float64"), (8, 640, "bfloat16"), (65, 600, "float32")],
)
def test_other_types_and_more_rows_get_the_plain_product(
    float64, monkeypatch, rows, outputs, dtype
):
    strips_from(monkeypatch, 512)
    x, weight = (jnp.asarray(drawn(shape), dtype) for shape in ((rows, 512), (outputs, 512)))

    def product(x, weight):
        return DecodeMatrix.of(weight)(x)

    assert "platform_index" not in str(jax.make_jaxpr(product)(x, weight))
    got = jax.jit(product)(x, weight)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jax.jit(lambda x, weight: x @ weight.T)(x, weight))


def test_other_devices_get_the_matrix_as_it_is(monkeypatch):
    strips_from(monkeypatch, 64)
    packed = jax.jit(DecodeMatrix.of).trace(jnp.ones((128, 32))).lower(lowering_platforms=("cuda",))
    assert "transpose" not in packed.as_text()
    product = jax.jit(lambda x, weight: DecodeMatrix.of(weight)(x))
    text = product.trace(jnp.ones((8, 32)), jnp.ones((128, 32))).lower(
        lowering_platforms=("cuda",)
    ).as_text()  # fmt: skip
    assert "dot_general" in text
    assert "stablehlo.reduce" not in text


@pytest.mark.parametrize("rows", [3, 8, 20])
@pytest.mark.parametrize("strips", [64, 10**6])
@pytest.mark.parametrize("settings", [{"qkv_bias": True, "num_kv_heads": 2}, {"qk_norm": True}])
def test_a_wide_model_token_by_token_equals_whole_sequences(monkeypatch, rows, settings, strips):
    strips_from(monkeypatch, strips)
    policy = tiny.language_model(**WIDE | settings)
    policy = jax.tree.map(lambda x: x + 0.02 * drawn(x.shape) if x.ndim == 2 else x, policy)
    tokens = jax.random.randint(jax.random.key(1), (rows, 7), 0, tiny.VOCABULARY, jnp.int32)
    mask = jnp.ones((rows, 7), bool).at[0, :2].set(False)

    @jax.jit
    def token_by_token(policy):
        hidden, cache = policy.prefill(tokens[:, :3], mask[:, :3], 7)
        decoder, states = policy.decoder(), [hidden]
        for t in range(3, 7):
            hidden, cache = decoder.step(tokens[:, t], cache)
            states.append(hidden)
        return jnp.stack(states, axis=1)

    want = jax.jit(lambda policy: policy.hidden(tokens, mask))(policy)[:, 2:]
    np.testing.assert_allclose(token_by_token(policy), want, atol=2e-4)


def test_a_wide_model_with_a_queue_draws_the_same_tokens():
    policy, batch = tiny.language_model(**WIDE), tiny.prompts()
    key = jax.random.key(2)
    fixed, queued = (
        eqx.filter_jit(generate)(
            policy, batch, key, config=tiny.generation(max_new_tokens=6, decode_slots=slots)
        )
        for slots in (None, 4)
    )
    np.testing.assert_array_equal(fixed.tokens, queued.tokens)
    np.testing.assert_allclose(fixed.logprobs, queued.logprobs, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [2, 6])
def test_a_head_in_strips_draws_what_the_plain_head_draws(monkeypatch, tied, length):
    config = tiny.transformer_config(**WIDE, vocab_size=640, tie_embeddings=tied)
    # Not sharpened: the rounding of large logits alone can be 1e-4.
    policy = LanguageModel.init(jax.random.key(0), config)
    batch, config = tiny.prompts(), tiny.generation(max_new_tokens=length)
    key, rollouts = jax.random.key(3), []
    for outputs in (10**6, 64):
        strips_from(monkeypatch, outputs)
        matrix = policy.trunk.embedding if tied else policy.output
        assert (DecodeMatrix.of(matrix).strip > 0) == (outputs == 64)
        # A function of its own: JAX would reuse what it traced for the other form.
        sample = eqx.filter_jit(lambda policy: generate(policy, batch, key, config=config))
        rollouts.append(sample(policy))
    plain, strips = rollouts
    np.testing.assert_array_equal(strips.tokens, plain.tokens)
    np.testing.assert_allclose(strips.logprobs, plain.logprobs, atol=1e-4)
