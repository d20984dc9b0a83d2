"""The fused kernel's seam: to the front, mixed by lengths, back; judged by the plain path."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from ppo_kernel.models.kernels.causal_attention import plain_attend_causally
from ppo_kernel.models.kernels.cudnn import attend_by_lengths, cudnn_attention

MASK = np.array([
    [0, 0, 1, 1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
    [0, 1, 1, 0, 0, 1, 0, 1, 1],
    [0, 0, 0, 0, 0, 0, 0, 0, 0],
], bool)  # fmt: skip
"""A response between paddings, a full row, one with holes, an empty one."""


def draw(dtype, heads=2, group=3, width=8):
    """Query, key, value and a cotangent that asks for tokens alone."""
    rng, (rows, slots) = np.random.default_rng(0), MASK.shape
    query, cotangent = rng.standard_normal((2, rows, heads, group, slots, width))
    key, value = rng.standard_normal((2, rows, heads, slots, width))
    cotangent = cotangent * MASK[:, None, None, :, None]
    return *(jnp.asarray(x, dtype) for x in (query, key, value)), jnp.asarray(cotangent, dtype)


def with_gradients(mix, query, key, value, cotangent, **settings):
    def attend(*arrays):
        return mix(*arrays, jnp.asarray(MASK), **settings)

    mixed, backward = jax.vjp(attend, query, key, value)
    return jnp.where(MASK[:, None, None, :, None], mixed, 0.0), *backward(cotangent)


@pytest.mark.parametrize(
    "settings", [{}, {"scale": 0.2}, {"window": 2}, {"window": 3, "scale": 1.0}]
)
def test_law_7_by_lengths_equals_the_plain_form_for_any_mask(settings):
    by_lengths = partial(attend_by_lengths, implementation="xla")
    for got, want in zip(
        with_gradients(by_lengths, *draw(jnp.float32), **settings),
        with_gradients(plain_attend_causally, *draw(jnp.float32), **settings),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_nothing_stands_where_there_is_no_token():
    query, key, value, _ = draw(jnp.float32)
    mixed = attend_by_lengths(query, key, value, jnp.asarray(MASK), implementation="xla")
    assert not np.any(np.asarray(mixed)[~np.broadcast_to(MASK[:, None, None], mixed.shape[:4])])


def test_a_model_takes_it_in_the_place_of_the_plain_path():
    batch = tiny.prompts()
    plain = tiny.language_model()
    switched = tiny.language_model(attention=partial(attend_by_lengths, implementation="xla"))
    got, want = (model.hidden(batch.tokens, batch.mask) for model in (switched, plain))
    np.testing.assert_allclose(got[batch.mask], want[batch.mask], rtol=1e-4, atol=1e-5)


def test_cudnn_runs_forward_and_backward_on_gpus(monkeypatch):
    """Lowered for CUDA on any machine, with the look for a cuDNN and a GPU left out."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)

    def gradients(*arguments):
        return with_gradients(cudnn_attention, *arguments)

    traced = jax.jit(gradients).trace(*draw(jnp.bfloat16, width=64))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @([\w$]+)\(", text)
    assert kernels == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert text.count("PADDING_CAUSAL") == 2
    assert not re.search(r"x(9x9|10x10)x", text), "no array of slots by slots"


def test_other_types_are_refused():
    query, key, value, _ = draw(jnp.float32)
    with pytest.raises(ValueError, match=r"float32: set compute_dtype=\"bfloat16\""):
        cudnn_attention(query, key, value, jnp.asarray(MASK))


def test_a_soft_cap_is_refused():
    query, key, value, _ = draw(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"no soft-cap, .* softcap=2.0"):
        cudnn_attention(query, key, value, jnp.asarray(MASK), softcap=2.0)
