"""Prompts that would give a wrong rollout without a word are refused, or counted where traced."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny

from ppo_kernel.config import Hyperparams
from ppo_kernel.evaluation import evaluate
from ppo_kernel.iteration import ppo_iteration
from ppo_kernel.models.heads import ValueHead
from ppo_kernel.models.protocol import vocabulary_size
from ppo_kernel.program import compile_iteration
from ppo_kernel.rollout.generate import generate


@pytest.fixture(autouse=True)
def unhooked(monkeypatch):
    """As users run the package: without the import hook, which refuses types by itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


GOOD, POLICY, KEY = tiny.prompts(), tiny.language_model(), jax.random.key(0)
ROW = 3
PADDED_RIGHT = jnp.array([True, True, False, False])
GAP = jnp.array([True, False, True, True])
FAULTS = {
    "right": (
        {"mask": GOOD.mask.at[ROW].set(PADDED_RIGHT)},
        "prompt 3 has a gap, or padding on the right; .*Prompts.from_ids",
        {"misplaced_prompts": 1},
    ),
    "gap": (
        {"mask": GOOD.mask.at[ROW].set(GAP)},
        "prompt 3 has a gap, or padding on the right; .*Prompts.from_ids",
        {"misplaced_prompts": 1},
    ),
    "large": (
        {"tokens": GOOD.tokens.at[ROW, -2:].set(tiny.VOCABULARY)},
        "prompt 3 has id 13, outside of the policy's vocabulary of 13 tokens; .*tokenizer",
        {"out_of_vocabulary_ids": 2},
    ),
    "negative": (
        {"tokens": GOOD.tokens.at[ROW, -1].set(-7)},
        "prompt 3 has id -7, outside",
        {"out_of_vocabulary_ids": 1},
    ),
    "twice": (
        {"sample_ids": GOOD.sample_ids.at[1:4].set(GOOD.sample_ids[0])},
        r"sample_ids has 3 more than once; .*jnp.arange\(N\)",
        {"duplicate_sample_ids": 3},
    ),
}
COUNTERS = {"misplaced_prompts": 0, "out_of_vocabulary_ids": 0, "duplicate_sample_ids": 0}
COMPILED = compile_iteration(config=tiny.iteration_config())


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("call", ["generate", "collect", "step", "steps"])
def test_known_prompts_are_refused_at_the_outermost_call(name, call):
    changes, message, _ = FAULTS[name]
    prompts, state = replace(GOOD, **changes), tiny.start(Hyperparams(), policy=POLICY)
    both = jax.tree.map(lambda *xs: jnp.stack(xs), GOOD, prompts)
    calls = {
        "generate": lambda: generate(POLICY, prompts, KEY, config=tiny.generation()),
        "collect": lambda: COMPILED.collect(state, POLICY, prompts, Hyperparams()),
        "step": lambda: COMPILED.step(state, POLICY, prompts, Hyperparams(), tiny.even_tokens),
        "steps": lambda: COMPILED.steps(state, POLICY, both, Hyperparams(), tiny.even_tokens),
    }
    with pytest.raises(ValueError, match=message):
        calls[call]()


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_traced_prompts_are_counted(name):
    changes, _, counts = FAULTS[name] if name else ({}, "", {})
    hyperparams = Hyperparams()
    _, metrics = RUN(tiny.start(hyperparams, policy=POLICY), replace(GOOD, **changes), hyperparams)
    assert {key: int(metrics[key]) for key in COUNTERS} == COUNTERS | counts


@eqx.filter_jit
def RUN(state, prompts, hyperparams):
    return ppo_iteration(
        state, POLICY, prompts, hyperparams, reward=tiny.even_tokens, config=tiny.iteration_config()
    )


def test_what_padding_slots_hold_is_not_judged():
    tokens = jnp.where(GOOD.mask, GOOD.tokens, 10**6)
    generate(POLICY, replace(GOOD, tokens=tokens), KEY, config=tiny.generation())


@pytest.mark.parametrize("key", [0, np.zeros(2, np.uint32), jax.random.PRNGKey(0)])
def test_a_key_that_is_not_typed(key):
    with pytest.raises(ValueError, match=r"key must be a typed key such as jax.random.key\(0\)"):
        generate(POLICY, GOOD, key, config=tiny.generation())


def test_greedy_decoding_is_named():
    for call in (
        lambda: Hyperparams(temperature=0.0),
        lambda: generate(POLICY, GOOD, KEY, config=tiny.generation(), temperature=0.0),
    ):
        with pytest.raises(ValueError, match=r"above 0, got 0.*greedy decoding set top_k=1"):
            call()


@pytest.mark.parametrize("size", [8, 20])
def test_a_reference_of_another_vocabulary(size):
    rollout = generate(POLICY, GOOD, KEY, config=tiny.generation())
    other = tiny.language_model(vocab_size=size)
    with pytest.raises(ValueError, match=f"vocabulary of {size} tokens, the policy one of 13"):
        evaluate(POLICY, other, tiny.value_model(), rollout, temperature=1.0)


def test_a_critic_of_a_smaller_vocabulary():
    rollout = generate(POLICY, GOOD, KEY, config=tiny.generation())
    with pytest.raises(ValueError, match="critic knows 8 token ids, the policy writes 13"):
        evaluate(POLICY, POLICY, tiny.value_model(vocab_size=8), rollout, temperature=1.0)
    for critic in (tiny.value_model(vocab_size=20), ValueHead(jnp.zeros(16))):
        evaluate(POLICY, POLICY, critic, rollout, temperature=1.0)


def test_the_vocabulary_of_any_policy_is_known():
    assert vocabulary_size(POLICY) == tiny.VOCABULARY
    assert vocabulary_size(tiny.language_model(vocab_size=20, tie_embeddings=True)) == 20
    assert vocabulary_size(tiny.RecurrentPolicy(KEY)) == tiny.VOCABULARY
