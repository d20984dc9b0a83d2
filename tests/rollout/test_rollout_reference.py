"""With the same noise, `generate` writes what the reference writes that reads all over again."""

from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from hypothesis import Phase, given, settings
from oracle import assert_near, model_to_reference, to_reference

import reference.config
import reference.rollout
from ppo_kernel.config import GenerationConfig
from ppo_kernel.evaluation import full_sequences
from ppo_kernel.ops.logprobs import token_logprobs
from ppo_kernel.rollout.generate import generate

TRUNK = {"num_layers": 1, "tie_embeddings": True}
CASES = {
    "free": ({"max_new_tokens": 5, "eos_token_ids": (3,)}, ()),
    "samples": ({"max_new_tokens": 4, "samples_per_prompt": 3, "pad_token_id": 9}, ("min_p",)),
    "one-token": ({"max_new_tokens": 1, "eos_token_ids": (0, 1, 2), "top_k": 4}, ("top_p",)),
    "banned": ({"max_new_tokens": 6, "eos_token_ids": (2, 5, 7, 8, 11), "min_new_tokens": 3,
                "pad_token_id": 5, "samples_per_prompt": 2, "top_k": 6}, ("top_p", "min_p")),
    "textless": ({"max_new_tokens": 5, "eos_token_ids": (2, 5), "banned_token_ids": (0, 4, 11, 12)},
                 ("top_p",)),
    "slots": ({"max_new_tokens": 6, "eos_token_ids": (2, 5, 7), "min_new_tokens": 2,
               "samples_per_prompt": 2, "decode_slots": 2}, ("top_p",)),
}  # fmt: skip


@cache
def compiled(name):
    config = GenerationConfig(**CASES[name][0])

    @jax.jit
    def run(policy, prompts, noise, sampling):
        return generate(policy, prompts, jax.random.key(0), config=config, noise=noise, **sampling)

    return run


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=5, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.3, 3.0),
    top_p=st.floats(0.2, 1.0),
    min_p=st.floats(0.01, 0.5),
)
def test_same_noise_same_rollout(float64, name, seed, temperature, top_p, min_p):
    settings_, restrictions = dict(CASES[name][0]), CASES[name][1]
    settings_.pop("decode_slots", None)  # they decide speed, never the result
    rng = np.random.default_rng(seed)
    sampling = {"temperature": temperature}
    sampling |= {k: v for k, v in {"top_p": top_p, "min_p": min_p}.items() if k in restrictions}
    policy = oracle.draw_policy(oracle.trunk_config(**TRUNK), rng)
    prompts = oracle.draw_prompts(3, 4, 13, rng)
    rows = 3 * settings_.get("samples_per_prompt", 1)
    noise = rng.random((rows, settings_["max_new_tokens"], 2))
    rollout = compiled(name)(policy, prompts, noise, sampling)
    expected = reference.rollout.generate(
        model_to_reference(policy), to_reference(prompts), noise,
        config=reference.config.GenerationConfig(**settings_), **sampling,
    )  # fmt: skip
    for field, want in vars(expected).items():
        got = np.asarray(getattr(rollout, field))
        if want.dtype == np.float64:
            assert_near(got, want, field, 1e-10)
        else:
            np.testing.assert_array_equal(got, want, field)


def test_noise_of_another_shape_is_refused(float64):
    rng = np.random.default_rng(0)
    policy = oracle.draw_policy(oracle.trunk_config(**TRUNK), rng)
    prompts = oracle.draw_prompts(3, 4, 13, rng)
    with pytest.raises(ValueError, match=r"\(3, 5, 2\), got shape \(3, 4, 2\)"):
        jax.eval_shape(
            lambda noise: generate(
                policy, prompts, jax.random.key(0),
                config=GenerationConfig(max_new_tokens=5), noise=noise,
            ),
            jax.ShapeDtypeStruct((3, 4, 2), np.float64),
        )  # fmt: skip


def test_the_temperature_is_1_where_none_is_given(float64):
    rng = np.random.default_rng(0)
    policy = oracle.draw_policy(oracle.trunk_config(**TRUNK), rng)
    inputs = policy, oracle.draw_prompts(3, 4, 13, rng), jax.random.key(0)
    config = GenerationConfig(max_new_tokens=2)
    plain, tempered = (
        jax.jit(lambda *a, s=s: generate(*a, config=config, **s))(*inputs)
        for s in ({}, {"temperature": 1.0})
    )
    np.testing.assert_array_equal(plain.logprobs, tempered.logprobs)


def test_bfloat16_logits_are_divided_by_the_temperature_in_float32():
    """To 2e-3: a fused program may keep more digits of a logit than bfloat16 has."""
    policy = tiny.language_model(compute_dtype="bfloat16", cache_dtype="bfloat16")
    policy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    config = GenerationConfig(max_new_tokens=1)
    rollout = jax.jit(lambda: generate(
        policy, tiny.prompts(), jax.random.key(0), config=config, temperature=0.7
    ))()  # fmt: skip
    tokens, mask = full_sequences(rollout)
    last = policy.hidden(tokens[:, :-1], mask[:, :-1])[:, -1]
    logits = policy.unembed(last)
    assert logits.dtype == jnp.float32
    expected = token_logprobs(logits / 0.7, rollout.tokens[:, 0])
    np.testing.assert_allclose(rollout.logprobs[:, 0], expected, rtol=0, atol=2e-3)
