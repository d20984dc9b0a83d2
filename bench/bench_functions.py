"""The pure functions alone, on [B, T] = [64, 512] and a vocabulary of 32,000."""

import jax
import jax.numpy as jnp
import pytest

from ppo_kernel.advantages import gae
from ppo_kernel.losses import clipped_policy_loss, clipped_value_loss
from ppo_kernel.ops.logprobs import logprobs_from_hidden
from ppo_kernel.ops.masked import whiten
from ppo_kernel.ops.sampling import sample_tokens

SHAPE, WIDTH, VOCABULARY = (64, 512), 128, 32_000


def _normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def _gae():
    mask = jnp.ones(SHAPE, bool)
    arguments = (_normal(0, *SHAPE), _normal(1, *SHAPE), mask, _normal(2, SHAPE[0]))
    return lambda *a: gae(*a, gamma=0.99, lam=0.95), arguments


def _whiten():
    return whiten, (_normal(0, *SHAPE), jnp.ones(SHAPE, bool))


def _policy_loss():
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    arguments = tuple(_normal(seed, *SHAPE) for seed in range(3))
    return jax.grad(lambda *a: jnp.sum(clipped_policy_loss(*a, **clip))), arguments


def _value_loss():
    arguments = tuple(_normal(seed, *SHAPE) for seed in range(3))
    return jax.grad(lambda *a: jnp.sum(clipped_value_loss(*a, value_clip=0.2))), arguments


def _logprobs():
    hidden, matrix = _normal(0, 4, 256, WIDTH), _normal(1, VOCABULARY, WIDTH)
    tokens = jnp.zeros((4, 256), jnp.int32)

    def loss(hidden, matrix):
        logprobs, _ = logprobs_from_hidden(
            hidden, tokens, lambda rows: rows @ matrix.T, temperature=1.0, chunk_size=256
        )
        return jnp.sum(logprobs)

    return jax.grad(loss, argnums=(0, 1)), (hidden, matrix)


def _sampling():
    return sample_tokens, (
        _normal(0, 16, VOCABULARY),
        jax.random.uniform(jax.random.key(1), (16, 2)),
    )


CASES = {
    "gae": _gae, "whiten": _whiten, "clipped_policy_loss, gradient": _policy_loss,
    "clipped_value_loss, gradient": _value_loss, "logprobs_from_hidden, gradient": _logprobs,
    "sample_tokens": _sampling,
}  # fmt: skip


@pytest.mark.benchmark(group="functions")
@pytest.mark.parametrize("name", CASES)
def bench_function(benchmark, name):
    function, arguments = CASES[name]()
    compiled = jax.jit(function).lower(*arguments).compile()
    benchmark.pedantic(
        lambda: jax.block_until_ready(compiled(*arguments)), rounds=20, warmup_rounds=3
    )
