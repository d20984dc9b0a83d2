"""The pure functions alone, on [B, T] = [64, 512] and a vocabulary of 32,000."""

import time

import jax
import jax.numpy as jnp
import pytest

from bench.recording import memory_mb, record
from bench.work import Phase, Work
from ppo_kernel.advantages import gae
from ppo_kernel.losses import clipped_policy_loss, clipped_value_loss
from ppo_kernel.ops.kl import k3
from ppo_kernel.ops.logprobs import logprobs_from_hidden
from ppo_kernel.ops.masked import whiten
from ppo_kernel.ops.sampling import restrict_logits, sample_tokens
from ppo_kernel.rewards import token_rewards

SHAPE, WIDTH, VOCABULARY = (64, 512), 128, 32_000


def _normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def _gae():
    mask = jnp.ones(SHAPE, bool)
    arguments = (_normal(0, *SHAPE), _normal(1, *SHAPE), mask, _normal(2, SHAPE[0]))
    return lambda *a: gae(*a, gamma=0.99, lam=0.95), arguments


def _whiten():
    return whiten, (_normal(0, *SHAPE), jnp.ones(SHAPE, bool))


def _rewards():
    mask, ended = jnp.ones(SHAPE, bool), jnp.ones(SHAPE[0], bool)
    arguments = (_normal(0, SHAPE[0]), _normal(1, *SHAPE), mask, ended)
    return lambda *a: token_rewards(*a, kl_coef=0.1, kl_estimator=k3), arguments


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
    noise = jax.random.uniform(jax.random.key(1), (16, 2))
    return sample_tokens, (_normal(0, 16, VOCABULARY), noise)


def _top_p():
    return lambda logits: restrict_logits(logits, top_k=50, top_p=0.9), (
        _normal(0, 16, VOCABULARY),
    )


CASES = {
    "gae": _gae, "whiten": _whiten, "token_rewards": _rewards,
    "clipped_policy_loss, gradient": _policy_loss, "clipped_value_loss, gradient": _value_loss,
    "logprobs_from_hidden, gradient": _logprobs, "sample_tokens": _sampling,
    "restrict_logits, top-k and top-p": _top_p,
}  # fmt: skip
TOKENS = {
    "logprobs_from_hidden, gradient": 4 * 256,
    "sample_tokens": 16,
    "restrict_logits, top-k and top-p": 16,
}
PRODUCTS = {"logprobs_from_hidden, gradient": 6.0 * 4 * 256 * WIDTH * VOCABULARY}


def _work(name: str, function, arguments) -> Work:
    """Matrix products if there are any, arguments read once, results written once."""
    arrays = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    phase = Phase(PRODUCTS.get(name, 0.0), 0.0, float(moved))
    return Work((phase,), TOKENS.get(name, SHAPE[0] * SHAPE[1]))


@pytest.mark.benchmark(group="functions")
@pytest.mark.parametrize("name", CASES)
def bench_function(benchmark, name):
    function, arguments = CASES[name]()
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    record(
        benchmark, name, lambda: compiled(*arguments), _work(name, function, arguments),
        rounds=30, compile_s=compile_s, temporary_mb=memory_mb(compiled),
    )  # fmt: skip
