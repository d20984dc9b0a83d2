"""The shape checks are on in tests: a wrong shape or type raises, eager and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from ppo_kernel.advantages import gae
from ppo_kernel.ops.masked import masked_mean
from ppo_kernel.types import Prompts
from reference.ops.masked import masked_mean as reference_mean


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_lengths_that_disagree_raise(transform):
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(TypeCheckError):
        transform(gae)(x, x, mask, jnp.zeros(3), gamma=1.0, lam=1.0)


def test_a_mask_of_floats_raises():
    with pytest.raises(TypeCheckError):
        masked_mean(jnp.zeros(3), jnp.ones(3))


def test_a_record_with_a_wrong_field_raises():
    with pytest.raises(TypeCheckError):
        Prompts(
            tokens=jnp.zeros((2, 3), int), mask=jnp.ones((2, 4), bool), sample_ids=jnp.arange(2)
        )


def test_the_reference_is_checked_too():
    with pytest.raises(TypeCheckError):
        reference_mean(np.zeros(3), np.ones(4, bool))


def test_ranks_and_dtypes_are_never_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)
    with pytest.raises(jax.dtypes.TypePromotionError, match="promotion"):
        jnp.zeros(3) + jnp.zeros(3, jnp.bfloat16)
