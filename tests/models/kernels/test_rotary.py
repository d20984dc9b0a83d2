"""Rotary embeddings against complex numbers."""

import jax.numpy as jnp
import numpy as np

from ppo_kernel.models.kernels.rotary import rotate, rotation_of


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_a_rotation_turns_each_pair_by_its_angle(float64):
    x, frequencies = drawn(2, 3, 4, 6), jnp.array([1.0, 0.3, 0.01])
    positions = jnp.array([[0, 1, 2], [0, 7, 1000]])
    got = rotate(x, rotation_of(positions, frequencies))
    pairs = np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])
    angles = np.asarray(positions)[..., None, None] * np.asarray(frequencies)
    turned = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-12)
