"""`check_policy` passes right policies, and names the law that a wrong one breaks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import tiny

from ppo_kernel.models import LanguageModel
from ppo_kernel.testing import check_policy

KEY = jax.random.key(0)
RIGHT = {
    "transformer": lambda: tiny.language_model(),
    "tied": lambda: tiny.language_model(tie_embeddings=True, num_kv_heads=1),
    "unrolled": lambda: tiny.language_model(qk_norm=True, unroll=2),
    "recurrent": lambda: tiny.RecurrentPolicy(KEY),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_policy_passes(name):
    check_policy(RIGHT[name](), tiny.VOCABULARY)


@pytest.mark.parametrize("name", ["transformer", "recurrent"])
def test_a_right_policy_passes_in_float64(name, float64):
    check_policy(RIGHT[name](), tiny.VOCABULARY)


class LateDecoder(tiny.RecurrentPolicy):
    """A step returns the state before its token."""

    def decoder(self):
        decoder = super().decoder()
        return decoder._replace(step=lambda tokens, state: (state, decoder.step(tokens, state)[1]))


class ShiftedPositions(LanguageModel):
    """A step reads one position too far."""

    def decoder(self):
        decoder = super().decoder()

        def step(tokens, cache):
            moved = eqx.tree_at(lambda c: c.lengths, cache, cache.lengths + 1)
            hidden, moved = decoder.step(tokens, moved)
            return hidden, eqx.tree_at(lambda c: c.lengths, moved, cache.lengths + 1)

        return decoder._replace(step=step)


class OtherMatrix(LanguageModel):
    """The decoder's logits are of another matrix."""

    def decoder(self):
        decoder = super().decoder()
        return decoder._replace(unembed=lambda hidden: 1.01 * decoder.unembed(hidden))


class LosingCache(LanguageModel):
    """A cache that grows forgets its first slot."""

    def decoder(self):
        decoder = super().decoder()

        def grow(cache, capacity):
            grown = decoder.grow(cache, capacity)
            return eqx.tree_at(lambda c: c.mask, grown, grown.mask.at[:, 0].set(False))

        return decoder._replace(grow=grow)


class StuckCache(LanguageModel):
    """A cache whose slot, a rank-0 leaf, stays at the end instead of going round the ring."""

    def decoder(self):
        decoder = super().decoder()

        def step(tokens, cache):
            hidden, after = decoder.step(tokens, cache)
            return hidden, eqx.tree_at(lambda c: c.slot, after, cache.slot + 1)

        return decoder._replace(step=step)


class IgnoringStart(tiny.RecurrentPolicy):
    """`hidden` returns all slots, whatever `start` is."""

    def hidden(self, tokens, mask, start=0):
        return super().hidden(tokens, mask)


class ReadingPads(tiny.RecurrentPolicy):
    """Padding is read like tokens."""

    def _scan(self, tokens, mask):
        return super()._scan(tokens, jnp.ones_like(mask))


class ReadingNeighbours(tiny.RecurrentPolicy):
    """Logits have the mean of the batch taken out."""

    def _read(self, state, tokens, valid):
        state = super()._read(state, tokens, valid)
        return state - 0.1 * jnp.mean(state, axis=0, keepdims=True)


def like(kind):
    model = tiny.language_model()
    return kind(model.trunk, model.output)


WRONG = {
    "late": (lambda: LateDecoder(KEY), "law 2: prefill and step equal hidden"),
    "shifted": (lambda: like(ShiftedPositions), "law 2: prefill and step equal hidden"),
    "matrix": (lambda: like(OtherMatrix), "law 2: prefill and step equal hidden"),
    "growing": (lambda: like(LosingCache), "law 2: a cache that grows"),
    "stuck": (lambda: like(StuckCache), "law 4: decode slots"),
    "start": (lambda: IgnoringStart(KEY), r"law 2: hidden\(start\) is the end"),
    "pads": (lambda: ReadingPads(KEY), "law 2: the ids of left padding"),
    "neighbours": (lambda: ReadingNeighbours(KEY), "law 4: neighbours in the batch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_policy_is_refused_by_the_law_that_it_breaks(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make, law = WRONG[name]
    with pytest.raises(AssertionError, match=law):
        check_policy(make(), tiny.VOCABULARY)


def test_the_largest_difference_is_named():
    with pytest.raises(AssertionError, match=r"the largest difference is \d+\.?\d*"):
        check_policy(LateDecoder(KEY), tiny.VOCABULARY)


def test_another_vocabulary_and_narrow_types():
    with pytest.raises(AssertionError, match="logits are of 13 tokens, vocab_size is 12"):
        check_policy(tiny.language_model(), 12)
    narrow = tiny.language_model(
        param_dtype="bfloat16", compute_dtype="bfloat16", cache_dtype="bfloat16"
    )
    with pytest.raises(ValueError, match="hidden states are bfloat16; judge"):
        check_policy(narrow, tiny.VOCABULARY)
