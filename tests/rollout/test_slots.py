"""Decode slots: the same rollout as the whole batch in step, and no slot left waiting."""

import re

import equinox as eqx
import jax
import numpy as np
import pytest
import tiny
from test_program import STEPS, CountingPolicy, assert_written_in_place, decode_loop, loop_bodies

from ppo_kernel.config import GenerationConfig, Hyperparams
from ppo_kernel.iteration import collect
from ppo_kernel.models import kv_cache
from ppo_kernel.rollout import generate as generate_module
from ppo_kernel.rollout.generate import generate
from ppo_kernel.rollout.slots import refill_size
from ppo_kernel.sharding import make_mesh, place

GENERATE, KEY = eqx.filter_jit(generate), jax.random.key(0)
POLICIES = {
    "transformer": lambda: tiny.language_model(qk_norm=True),
    "local-and-global": lambda: tiny.language_model(**tiny.LOCAL_AND_GLOBAL),
    "recurrent": lambda: tiny.RecurrentPolicy(KEY),
}
LENGTHS = (3, 1, 4, 2, 4, 3, 2, 1, 1, 2, 3, 4, 4, 1, 2, 3, 3, 3, 1, 2, 4)
"""Of 21 ragged prompts."""

CASES = {
    "few-slots": ({"max_new_tokens": 12}, 2, {}),
    "one-slot": ({"max_new_tokens": 3, "eos_token_ids": (1, 5, 7)}, 1, {}),
    # A refill takes two sequences, and the last one only the one that is left.
    "refill-of-two": ({"max_new_tokens": 9, "eos_token_ids": (1, 2, 3, 4)}, 16, {}),
    "samples": ({"max_new_tokens": 7, "samples_per_prompt": 3}, 6, {}),
    "samples-refill-of-two": (
        {"max_new_tokens": 8, "samples_per_prompt": 2, "eos_token_ids": (1, 8, 9)}, 18, {},
    ),
    "one-token": ({"max_new_tokens": 1}, 4, {}),
    "no-eos": ({"max_new_tokens": 5, "eos_token_ids": ()}, 4, {}),
    "restricted": (
        {"max_new_tokens": 8, "min_new_tokens": 3, "top_k": 6, "eos_token_ids": (1, 2, 6, 11),
         "pad_token_id": 1},
        5, {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
    ),
}  # fmt: skip
"""Name -> (settings, slots, what is traced)."""


def both(policy, batch, settings, slots, traced):
    """Rollouts of the whole batch in step, and through the slots."""
    settings = {"eos_token_ids": (tiny.EOS,)} | settings
    return (
        GENERATE(policy, batch, KEY, config=GenerationConfig(**settings), **traced),
        GENERATE(
            policy, batch, KEY,
            config=GenerationConfig(**settings, decode_slots=slots), **traced,
        ),
    )  # fmt: skip


def assert_same(rollout, expected):
    for name, want in vars(expected).items():
        got = getattr(rollout, name)
        assert got.dtype == want.dtype, name
        if "logprobs" in name:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-10, err_msg=name)
        else:
            np.testing.assert_array_equal(got, want, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_slots_change_nothing(policy, name, float64):
    expected, rollout = both(POLICIES[policy](), tiny.prompts(LENGTHS), *CASES[name])
    assert_same(rollout, expected)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_change_nothing(shards, float64):
    settings, policy = {"max_new_tokens": 9, "samples_per_prompt": 2}, tiny.language_model()
    with jax.set_mesh(make_mesh(shards)):
        expected, rollout = both(policy, tiny.prompts(LENGTHS[:20]), settings, 8, {})
    assert_same(rollout, expected)


def test_each_of_a_batch_of_keys_is_as_alone(float64):
    """Under vmap the rollouts share the loops, and refill at different times."""
    policy, batch, keys = POLICIES["recurrent"](), tiny.prompts(LENGTHS), jax.random.split(KEY, 3)
    config = GenerationConfig(max_new_tokens=9, eos_token_ids=(1, 2, 3), decode_slots=17)
    together = eqx.filter_jit(
        eqx.filter_vmap(lambda key: generate(policy, batch, key, config=config))
    )
    rollouts = together(keys)
    for index, key in enumerate(keys):
        alone = GENERATE(policy, batch, key, config=config)
        assert_same(jax.tree.map(lambda x, i=index: x[i], rollouts), alone)


def test_the_ring_is_needed(float64, monkeypatch):
    """A cache that stops at its last slot loses tokens, so the cases above do go round."""
    close = kv_cache.KVCache.close_slot

    def stuck(self, layers):
        closed = close(self, layers)
        return eqx.tree_at(lambda c: c.slot, closed, self.slot + 1)

    monkeypatch.setattr(kv_cache.KVCache, "close_slot", stuck)
    settings = {"max_new_tokens": 12, "pad_token_id": 3}
    expected, rollout = both(tiny.language_model(), tiny.prompts(LENGTHS), settings, 2, {})
    assert (rollout.tokens != expected.tokens).any()


def rows_of_steps(lengths, slots, refill, widths):
    """Rows of each decode step of a loop that takes `refill` sequences once they, or all that wait,
    have room, and that goes on in the fewest slots of `widths` once these are enough for all.
    """
    waiting, running, rows = list(lengths), np.zeros(slots, int), []
    while waiting or running.any():
        idle = np.flatnonzero(running == 0)
        if waiting and len(idle) >= min(refill, len(waiting)):
            for slot in idle[: min(refill, len(waiting))]:
                running[slot] = waiting.pop(0) - 1
        else:
            enough = [width for width in widths if not waiting and (running > 0).sum() <= width]
            rows.append(min(enough, default=slots))
            running = np.maximum(running - 1, 0)
    return rows


@pytest.mark.parametrize(
    ("slots", "refill", "widths", "length"),
    [(1, 1, {1}, 30), (5, 1, {1, 2}, 30), (16, 2, {4, 8}, 30), (5, 1, {1, 2}, 7)],
)
def test_every_sequence_is_decoded_once_and_no_slot_waits(slots, refill, widths, length):
    assert refill_size(slots) == refill
    STEPS.clear()
    config = GenerationConfig(max_new_tokens=length, eos_token_ids=(1, 2, 3), decode_slots=slots)
    policy, batch = CountingPolicy(KEY), tiny.prompts(LENGTHS)
    rollout = GENERATE(policy, batch, KEY, config=config)
    jax.effects_barrier()
    assert len(set(rollout.lengths.tolist())) > 3
    assert (~rollout.terminated).any() == (length == 7)
    expected = rows_of_steps(rollout.lengths.tolist(), slots, refill, widths)
    assert set(expected) == {slots} | widths
    assert expected == STEPS


READS: list[int] = []


class ReadingPolicy(tiny.RecurrentPolicy):
    """Reports the prompts of every prefill that really runs."""

    def prefill(self, tokens, mask, capacity):
        jax.debug.callback(lambda: READS.append(len(tokens)))
        return super().prefill(tokens, mask, capacity)


@pytest.mark.parametrize(("shards", "most"), [(1, 5), (2, 6)])
def test_prompts_are_read_as_many_at_a_time_as_there_are_slots(shards, most, monkeypatch):
    """40 prompts, 8 slots: five reads, and hardly more where shards go at different speeds."""
    READS.clear()
    policy, batch = ReadingPolicy(KEY), tiny.prompts(LENGTHS[:20] * 2)
    config = GenerationConfig(max_new_tokens=30, eos_token_ids=(1, 2, 3), decode_slots=8)
    # On one device, where a callback counts once.
    monkeypatch.setattr(generate_module, "num_shards", lambda axis: shards)
    eqx.filter_jit(lambda *inputs: generate(*inputs, config=config))(policy, batch, KEY)
    jax.effects_barrier()
    reads = [rows for rows in READS if rows == 8]
    assert 5 <= len(reads) <= most, READS
    # What gives the cache its shape reads one prompt per shard, and only a callback makes it run.
    assert set(READS) <= {8, shards}, READS


def test_slots_for_every_sequence_need_no_queue():
    def program(slots):
        config = GenerationConfig(max_new_tokens=3, eos_token_ids=(1,), decode_slots=slots)
        return GENERATE.lower(policy, batch, KEY, config=config).as_text()

    policy, batch = tiny.language_model(), tiny.prompts(LENGTHS[:4])
    assert program(4) == program(5) == program(None) != program(3)


def test_an_iteration_is_the_same_with_slots(float64):
    hyperparams, policy = Hyperparams(), tiny.language_model()
    state, batch = tiny.start(hyperparams, policy=policy), tiny.prompts()
    config = {"samples_per_prompt": 2, "max_new_tokens": 6}
    expected, found = (
        tiny.one_step(
            state, tiny.language_model(seed=5), batch, hyperparams,
            tiny.iteration_config(tiny.generation(**config, decode_slots=slots)),
        )
        for slots in (None, 4)
    )  # fmt: skip
    tiny.assert_trees_close(found, expected, 1e-9)


def test_the_loop_copies_no_cache():
    policy = tiny.language_model(hidden_size=64, intermediate_size=96, head_dim=16)
    config = GenerationConfig(max_new_tokens=40, eos_token_ids=(1,), decode_slots=6)
    lowered = GENERATE.lower(policy, tiny.prompts(), KEY, config=config)
    text = lowered.compile().compiled.as_text()
    assert_written_in_place(decode_loop(text), policy, ["[6,2,16,48]", "[6,2,48,16]"])
    # Copies before the loops lay out what is carried; there is none in a body.
    before, _, entry = text.partition("ENTRY")
    for shape in (r"6,2,16,48\]", r"6,2,48,16\]"):
        copied = re.findall(r".* = \w+\[(?:1,)?" + shape + r"\S* copy\(.*", before)
        assert not copied, copied
        assert re.search(shape, entry)


def test_a_device_keeps_to_its_own_queue(float64):
    hyperparams, policy = Hyperparams(), tiny.language_model()
    state, batch = tiny.start(hyperparams, policy=policy), tiny.prompts(LENGTHS[:16])
    settings = {"samples_per_prompt": 2, "max_new_tokens": 9}
    mesh, run = make_mesh(8), eqx.filter_jit(collect)
    alone = tiny.iteration_config(tiny.generation(**settings))
    expected = run(state, policy, batch, hyperparams, config=alone)
    config = tiny.iteration_config(tiny.generation(**settings, decode_slots=16))
    inputs = (
        *(place(x, mesh, "parameter") for x in (state, policy)),
        place(batch, mesh, "batch"),
        place(hyperparams, mesh, "parameter"),
    )
    with jax.set_mesh(mesh):
        compiled = run.lower(*inputs, config=config).compile()
        assert_same(compiled(*inputs, config=config).rollout, expected.rollout)
    loops = "\n".join(loop_bodies(compiled.compiled.as_text()))
    collectives = re.findall(r" = (.*) (all-\w+|collective-\w+|reduce-scatter)\S*\(", loops)
    # Only whether to go on is asked of all.
    assert collectives
    for shape, kind in collectives:
        assert kind == "all-reduce", kind
        assert set(re.findall(r"\w+\[[\d,]*\]", shape)) == {"pred[]"}, shape


def test_slots_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="decode_slots must be a whole number"):
        GenerationConfig(max_new_tokens=2, decode_slots=0)
    with pytest.raises(ValueError, match=r"multiple of samples_per_prompt=2.*got 3"):
        GenerationConfig(max_new_tokens=2, samples_per_prompt=2, decode_slots=3)
    policy, key = tiny.language_model(), KEY
    config = tiny.generation(samples_per_prompt=2, decode_slots=6)
    with (
        jax.set_mesh(make_mesh(2)),
        pytest.raises(ValueError, match=r"decode_slots=6 must be a multiple of .*=2 \* 2 shards"),
    ):
        generate(policy, tiny.prompts(), key, config=config)
    config = tiny.generation(decode_slots=6)
    with (
        jax.set_mesh(make_mesh(3)),
        pytest.raises(ValueError, match="the 8 prompts a multiple of 3"),
    ):
        generate(policy, tiny.prompts(), key, config=config)
