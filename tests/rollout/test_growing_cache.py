"""Long responses are decoded in a few loops, whose cache grows: less to read, the same tokens."""

from collections import Counter
from functools import partial

import equinox as eqx
import jax
import numpy as np
import pytest
import tiny
from edges import BanningPolicy

from ppo_kernel.models import LanguageModel
from ppo_kernel.rollout.generate import generate

LENGTH = 4 * 64 + 3


class FixedCachePolicy(BanningPolicy):
    """The same policy, but its cache has all its slots from the start."""

    def decoder(self):
        return super().decoder()._replace(grow=None)


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"eos_token_ids": ()}, LENGTH, LENGTH),
        ({"min_new_tokens": 150}, 150, 200),
        ({"eos_token_ids": (1, 2, 3, 7)}, 1, 60),
        ({"eos_token_ids": (), "decode_slots": 2}, LENGTH, LENGTH),
        ({"min_new_tokens": 70, "decode_slots": 2}, 70, 140),
        ({"min_new_tokens": 150, "decode_slots": 4}, 150, 200),
    ],
    ids=[
        "to the end", "into the third loop", "in the first loop", "slots, thrice around the ring",
        "slots, refilled between the loops", "slots, none refilled before the third loop",
    ],
)  # fmt: skip
def test_a_growing_cache_changes_nothing(float64, settings, least, most):
    config = tiny.generation(max_new_tokens=LENGTH, samples_per_prompt=2, **settings)
    run = eqx.filter_jit(generate)
    model, batch, key = tiny.language_model(), tiny.prompts((3, 1, 4)), jax.random.key(4)
    got = run(BanningPolicy(model), batch, key, config=config)
    want = run(FixedCachePolicy(model), batch, key, config=config)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.mask, want.mask)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-12)
    assert least <= int(got.lengths.max()) <= most


def watch(monkeypatch, see):
    """`see` is called with the slots of the cache wherever a decode step is traced."""
    decoder = LanguageModel.decoder

    def watched(self):
        plain = decoder(self)

        def seen(tokens, cache):
            see(cache.mask.shape[1])
            return plain.step(tokens, cache)

        return plain._replace(step=seen)

    monkeypatch.setattr(LanguageModel, "decoder", watched)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (1, [0]),
        (127, [126]),
        (128, [63, 127]),
        (259, [64, 129, 193, 258]),
        (1000, [249, 499, 749, 999]),
    ],
)
@pytest.mark.parametrize("slots", [None, 4])
def test_each_loop_has_room_up_to_its_own_end(length, steps, slots, monkeypatch):
    capacities = []
    watch(monkeypatch, capacities.append)
    config = tiny.generation(max_new_tokens=length, decode_slots=slots)
    batch = tiny.prompts()
    jax.eval_shape(
        lambda policy, key: generate(policy, batch, key, config=config),
        tiny.language_model(), jax.random.key(0),
    )  # fmt: skip
    width = batch.tokens.shape[1]
    assert list(dict.fromkeys(capacities)) == [-(-(width + end) // 16) * 16 for end in steps]


@pytest.mark.parametrize("slots", [None, 2])
def test_each_loop_runs_to_its_own_end(slots, monkeypatch):
    """No step is left to a larger cache, and none is taken that the cache has no room for."""
    ran = Counter()
    watch(monkeypatch, lambda slots: jax.debug.callback(partial(ran.update, [slots])))
    config = tiny.generation(max_new_tokens=LENGTH, decode_slots=slots, eos_token_ids=())
    batch = tiny.prompts((3, 1, 4))
    jax.block_until_ready(
        jax.jit(lambda policy, key: generate(policy, batch, key, config=config))(
            tiny.language_model(), jax.random.key(0)
        )
    )
    jax.effects_barrier()
    steps = [count for _, count in sorted(ran.items())]
    assert steps[:3] == [64, 65, 64]
    assert steps[3:] == [65 if slots is None else 2 * (LENGTH - 1) - 193]


@pytest.mark.parametrize("slots", [None, 4])
def test_a_cache_that_does_not_grow_has_room_for_every_step(slots, monkeypatch):
    """All tokens but the last are written: here one more than 16 slots hold."""
    capacities = []
    watch(monkeypatch, capacities.append)
    batch = tiny.prompts()
    length = 16 + 2 - batch.tokens.shape[1]
    config = tiny.generation(max_new_tokens=length, decode_slots=slots)
    jax.eval_shape(
        lambda model, key: generate(FixedCachePolicy(model), batch, key, config=config),
        tiny.language_model(), jax.random.key(0),
    )  # fmt: skip
    assert set(capacities) == {32}


def test_a_cache_does_not_shrink():
    batch = tiny.prompts()
    _, cache = tiny.language_model().prefill(batch.tokens, batch.mask, 17)
    assert cache.grown(18).mask.shape == cache.mask.shape == (len(batch.tokens), 32)
    with pytest.raises(ValueError, match="a cache of 32 slots cannot grow to 16"):
        cache.grown(16)
