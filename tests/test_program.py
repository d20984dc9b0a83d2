"""The compiled iteration as a program: one trace, no host in it, nothing copied for nothing."""

import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import io_callback

from ppo_kernel.config import GenerationConfig, Hyperparams, OptimizerHyperparams
from ppo_kernel.learner.state import Learner
from ppo_kernel.losses import ppo_policy_loss
from ppo_kernel.ops.kl import k3
from ppo_kernel.program import compile_iteration
from ppo_kernel.rollout.generate import generate
from ppo_kernel.sharding import make_mesh, place


@pytest.fixture(scope="module")
def compiled_text() -> str:
    """HLO of the whole iteration, optimised."""
    hyperparams, policy = Hyperparams(kl_target=6.0), tiny.language_model()
    state = tiny.start(hyperparams, policy=policy)
    config = tiny.iteration_config(kl_estimator=k3, kl_in_loss=True, microbatch_size=2)
    compiled = compile_iteration(config=config)
    lowered = compiled.lower(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
    return lowered.compile().as_text()


def test_the_iteration_never_calls_the_host(compiled_text):
    for word in ("callback", "infeed", "outfeed", "send(", "recv(", "host_"):
        assert word not in compiled_text.lower(), word
    assert compiled_text.count("ENTRY") == 1


def test_the_state_is_donated(compiled_text):
    header = compiled_text.split("\n", 1)[0]
    leaves = jax.tree.leaves(tiny.start(Hyperparams(kl_target=6.0)))
    assert header.count("may-alias") + header.count("must-alias") >= len(leaves) - 2
    hyperparams, policy = Hyperparams(), tiny.language_model()
    state = tiny.start(hyperparams, policy=policy)
    compiled = compile_iteration(config=tiny.iteration_config())
    compiled.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
    assert state.policy.trunk.embedding.is_deleted()
    assert not policy.trunk.embedding.is_deleted(), "the reference must stay usable"


def test_one_gradient_is_in_memory_at_a_time():
    """That of a separate critic comes after the policy's has been used."""
    width = {"hidden_size": 128, "intermediate_size": 1024, "num_layers": 4}
    policy, critic = tiny.language_model(**width), tiny.value_model(**width)
    hyperparams = Hyperparams()
    state = tiny.start(hyperparams, policy=policy, critic=critic)
    lowered = compile_iteration(config=tiny.iteration_config()).lower(
        state, policy, tiny.prompts(), hyperparams, tiny.even_tokens
    )
    gradient = sum(x.nbytes for x in jax.tree.leaves(policy) if eqx.is_inexact_array(x))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.6 * gradient


def test_it_traces_once_whatever_the_coefficients():
    # Counted where it is called while tracing; a second trace raises.
    reward = chex.assert_max_traces(tiny.even_tokens, n=1)
    policy = tiny.language_model()
    state = tiny.start(Hyperparams(), policy=policy)
    compiled = compile_iteration(config=tiny.iteration_config())
    for step in range(4):
        hyperparams = Hyperparams(
            OptimizerHyperparams(10.0**-step, 1.0 + step),
            clip_ratio_low=0.1 * step, kl_coef=0.01 * step,
            gamma=1.0 - 0.1 * step, lam=0.9 - 0.1 * step, temperature=1.0 + 0.1 * step,
            entropy_coef=0.01 * step, value_clip=0.1 + step,
        )  # fmt: skip
        state, _ = compiled.step(state, policy, tiny.prompts(), hyperparams, reward)
    assert int(state.iteration) == 4


def loop_bodies(text: str) -> list[str]:
    """What the loops of a program run, as its HLO prints it."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    parts = [(re.match(r"\s*%?([\w.\-]+) \(", part), part) for part in text.split("\n\n")]
    return [part for match, part in parts if match and match.group(1) in bodies]


def decode_loop(text: str) -> str:
    """The body of the decode loop: the largest that has no loop itself."""
    return max((body for body in loop_bodies(text) if " while(" not in body), key=len)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("width", [64, 1024], ids=["plain products", "matrices laid out"])
def test_the_decode_loop_copies_neither_weights_nor_cache(width, kv_heads):
    policy = tiny.language_model(
        hidden_size=width, intermediate_size=width + 32, head_dim=16, num_kv_heads=kv_heads
    )
    config = GenerationConfig(max_new_tokens=40, eos_token_ids=(1,))
    lowered = eqx.filter_jit(generate).lower(
        policy, tiny.prompts(), jax.random.key(0), config=config
    )
    body = decode_loop(lowered.compile().compiled.as_text())
    smallest = min(width * 16 * kv_heads, 8 * kv_heads * 16 * 48)
    for line in body.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        if match is None or not match.group(1):
            continue
        size = np.prod([int(n) for n in match.group(1).split(",")])
        if match.group(2) in ("copy", "transpose", "dynamic-slice", "slice", "convert"):
            assert size < smallest, line
    heads = "2," * (kv_heads > 1)
    assert_written_in_place(body, policy, [f"[8,{heads}16,48]", f"[8,{heads}48,16]"])


def assert_written_in_place(body: str, policy, buffers: list[str]) -> None:
    """Each layer makes buffers of these shapes (keys, values) once, by an update in place."""
    for shape in buffers:
        assert shape in body, "the body holds the cache"
        writes = re.findall(r"%?(\S+) = \w+" + re.escape(shape) + r"\S* fusion\(", body)
        assert len(writes) == policy.trunk.config.num_layers, writes
        assert all("dynamic-update-slice" in name for name in writes), writes


class CountingPolicy(tiny.RecurrentPolicy):
    """Reports every decode step that really runs."""

    def decoder(self):
        decoder = super().decoder()

        def counted(tokens, state):
            jax.debug.callback(STEPS.append, tokens.shape[0])
            return decoder.step(tokens, state)

        return decoder._replace(step=counted)


STEPS: list[int] = []


@pytest.mark.parametrize(("eos_token_ids", "length"), [((1, 2, 3), 200), ((), 5)])
def test_generation_stops_when_every_sequence_has_ended(eos_token_ids, length):
    STEPS.clear()
    policy = CountingPolicy(jax.random.key(0))
    config = GenerationConfig(max_new_tokens=length, eos_token_ids=eos_token_ids)
    rollout = eqx.filter_jit(generate)(policy, tiny.prompts(), jax.random.key(0), config=config)
    jax.effects_barrier()
    longest = int(rollout.lengths.max())
    assert rollout.terminated.all() == bool(eos_token_ids)
    assert longest < 100
    # The first token comes from the prefill, and the last one is never read.
    assert len(STEPS) == longest - 1


def test_a_python_reward_is_refused_by_the_single_program():
    policy = tiny.language_model()
    state = tiny.start(Hyperparams(), policy=policy)
    compiled = compile_iteration(config=tiny.iteration_config())
    inputs = (state, policy, tiny.prompts(), Hyperparams())
    with pytest.raises(ValueError, match="between `collect` and `learn`"):
        compiled.step(*inputs, lambda rollout: np.asarray(rollout.tokens).sum(axis=1))
    with pytest.raises(ValueError, match="one per sequence, or one per token"):
        compiled.step(*inputs, lambda rollout: jnp.zeros(3))
    for call in (_pure, _io, jax.jit(_pure)):
        with pytest.raises(ValueError, match="calls back to Python"):
            compiled.step(*inputs, call)


def _pure(rollout):
    shape = jax.ShapeDtypeStruct(rollout.lengths.shape, jnp.float32)
    return jax.pure_callback(lambda x: np.asarray(x, np.float32), shape, rollout.lengths)


def _io(rollout):
    shape = jax.ShapeDtypeStruct(rollout.lengths.shape, jnp.float32)
    return io_callback(lambda x: np.asarray(x, np.float32), shape, rollout.lengths)


@jax.jit
def _prints(rollout):
    jax.debug.print("lengths {}", rollout.lengths)
    return rollout.lengths.astype(jnp.float32)


def test_a_reward_may_print_and_report(capfd):
    policy = tiny.language_model()
    compiled = compile_iteration(config=tiny.iteration_config())
    state = tiny.start(Hyperparams(), policy=policy)
    inputs = (policy, tiny.prompts(), Hyperparams())

    def reporting(rollout):
        scores = _prints(rollout)
        return scores, {"even": tiny.even_tokens(rollout), "long": rollout.lengths > 2}

    collected = compiled.collect(state, *inputs)
    scores, parts = reporting(collected.rollout)
    state, metrics = compiled.step(state, *inputs, reporting)
    jax.effects_barrier()
    assert "lengths [" in capfd.readouterr().out
    for name, values in parts.items():
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-6)
    np.testing.assert_allclose(metrics["mean_reward"], np.mean(scores), rtol=1e-6)
    collected = compiled.collect(state, *inputs)
    _, halves = compiled.learn(state, collected, reporting(collected.rollout), Hyperparams())
    assert {"even", "long"} <= halves.keys()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"mean_reward": jnp.zeros(8)}, "two metrics have the name 'mean_reward'"),
        ({"entropy": jnp.zeros(8)}, "two metrics have the name 'entropy'"),
        ({"mine": jnp.zeros(3)}, "'mine', a metric of the reward, must be an array of shape"),
    ],
)
def test_metrics_of_a_reward_that_are_refused(metrics, message):
    policy = tiny.language_model()
    compiled = compile_iteration(config=tiny.iteration_config())
    inputs = (tiny.start(Hyperparams(), policy=policy), policy, tiny.prompts(), Hyperparams())
    with pytest.raises(ValueError, match=message):
        compiled.step(*inputs, lambda rollout: (tiny.even_tokens(rollout), metrics))


def test_a_reward_that_is_made_anew_is_warned_of():
    policy = tiny.language_model()
    compiled = compile_iteration(config=tiny.iteration_config())
    state = tiny.start(Hyperparams(), policy=policy)

    def step(state, reward):
        return compiled.step(state, policy, tiny.prompts(), Hyperparams(), reward)[0]

    for _ in range(2):  # the same object: no warning, which would be an error here
        state = step(state, tiny.even_tokens)
    rewards = [lambda rollout: tiny.even_tokens(rollout) for _ in range(2)]
    state = step(state, rewards[0])
    with pytest.warns(UserWarning, match="compiled anew; make it once"):
        step(state, rewards[1])


def test_a_state_of_another_learner_is_refused():
    def mine(inputs, **settings):
        return ppo_policy_loss(inputs, **settings)

    policy, learner = tiny.language_model(), Learner(policy_loss=mine)
    state = learner.init(policy, tiny.value_model(), jax.random.key(0), Hyperparams())
    inputs = (policy, tiny.prompts(), Hyperparams(), tiny.even_tokens)
    with pytest.raises(ValueError, match="a Learner with another policy_loss; pass the same"):
        compile_iteration(config=tiny.iteration_config()).step(state, *inputs)
    compile_iteration(config=tiny.iteration_config(), learner=learner).step(state, *inputs)


def test_sizes_that_do_not_divide_are_refused_before_any_work():
    policy = tiny.language_model()
    state = tiny.start(Hyperparams(), policy=policy)
    inputs = (state, policy, tiny.prompts(), Hyperparams(), tiny.even_tokens)
    for changes, message in (
        ({"num_minibatches": 3}, "do not divide into num_minibatches=3"),
        ({"num_minibatches": 1, "microbatch_size": 3}, "micro-batches of 3"),
    ):
        compiled = compile_iteration(config=tiny.iteration_config(**changes))
        with pytest.raises(ValueError, match=message):
            compiled.step(*inputs)
    with pytest.raises(ValueError, match="does not divide over 8 devices"):
        place(tiny.prompts((1, 2, 3)), make_mesh(8), "batch")


def test_one_key_is_used_once():
    hyperparams, policy = Hyperparams(), tiny.language_model()
    state = tiny.start(hyperparams, policy=policy)
    with jax.debug_key_reuse(True):
        tiny.one_step(state, policy, tiny.prompts(), hyperparams, tiny.iteration_config())
