"""Judging a policy: whether its four methods agree, and whether anything else leaks in."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..config import GenerationConfig
from ..models.protocol import Policy, vocabulary_size
from ..rollout.generate import generate
from ..types import Prompts, Rollout

_LENGTHS = (3, 1, 4, 2, 4, 1)
"""Of the prompts; their width is the longest, and the rows fill two decode slots three times."""

_WIDTH, _NEW = 4, 6

_ROUNDINGS = 1024
"""Of the largest logit: some hundred dependent ones lie on the way through a small model."""


def check_policy(policy: Policy, vocab_size: int, *, seed: int = 0) -> None:
    """Judge a policy by the laws that the rollout and the update rest on.

        law 2: logits of prefill, then step by step = logits of `hidden` on the whole sequence
        law 2: padding on the left, its width and its ids change no logits
        law 4: neighbours, samples that share a prefill and decode slots change no completion

    Pass a small model with random weights, in float32 or, sharper, in float64.

    Args:
        policy: see `models.protocol.Policy`.
        vocab_size: V; ids are drawn from all of it.
        seed: of the token ids and of the sampling noise.

    Raises:
        AssertionError: names the law that is broken, and the largest difference.
        ValueError: hidden states narrower than float32, whose rounding would hide a fault.
    """
    size = vocabulary_size(policy)
    assert size == vocab_size, f"the logits are of {size} tokens, vocab_size is {vocab_size}."
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(len(_LENGTHS), _WIDTH + _NEW))
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.arange(_WIDTH + _NEW)[None] >= _WIDTH - jnp.asarray(_LENGTHS)[:, None]
    _check_steps(policy, tokens, mask)
    _check_padding(policy, tokens, mask, vocab_size)
    _check_neighbours(policy, tokens, mask)
    prompts = Prompts(tokens[:, :_WIDTH], mask[:, :_WIDTH], jnp.arange(len(_LENGTHS)) * 7 + 3)
    _check_completions(policy, prompts, jax.random.key(seed))


def _check_steps(policy: Policy, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> None:
    whole, last = _whole(policy, tokens, mask, 0), _whole(policy, tokens, mask, _WIDTH - 1)
    _same("law 2: hidden(start) is the end of hidden(0)", last, whole[:, _WIDTH - 1 :])
    _same("law 2: prefill and step equal hidden", _decoded(policy, tokens, mask), last)
    if policy.decoder().grow is not None:
        grown = _decoded(policy, tokens, mask, growing=True)
        _same("law 2: a cache that grows equals one that has its slots at once", grown, last)


def _check_padding(
    policy: Policy, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], vocab_size: int
) -> None:
    others = jnp.where(mask, tokens, (tokens + 1) % vocab_size)
    wide, wide_mask = (jnp.pad(x, ((0, 0), (3, 0))) for x in (tokens, mask))
    whole, decoded = _whole(policy, tokens, mask, _WIDTH - 1), _decoded(policy, tokens, mask)
    for what, x, m, more in (("ids", others, mask, 0), ("width", wide, wide_mask, 3)):
        law = f"law 2: the {what} of left padding changes nothing"
        _same(f"{law} in hidden", _whole(policy, x, m, _WIDTH - 1 + more), whole)
        _same(f"{law} in prefill and step", _decoded(policy, x, m, more=more), decoded)


def _check_neighbours(policy: Policy, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> None:
    order = jnp.asarray([4, 0, 3])
    whole, decoded = _whole(policy, tokens, mask, _WIDTH - 1), _decoded(policy, tokens, mask)
    few = tokens[order], mask[order]
    law = "law 4: neighbours in the batch change nothing"
    _same(f"{law} in hidden", _whole(policy, *few, _WIDTH - 1), whole[order])
    _same(f"{law} in prefill and step", _decoded(policy, *few), decoded[order])


def _check_completions(policy: Policy, prompts: Prompts, key: Array) -> None:
    """Token 0 ends a response, so that decode slots are refilled at different times."""

    def sample(prompts: Prompts, slots: int | None = None) -> Rollout:
        config = GenerationConfig(_NEW, (0,), samples_per_prompt=2, decode_slots=slots)
        return eqx.filter_jit(generate)(policy, prompts, key, config=config)

    together, order = sample(prompts), jnp.asarray([4, 0, 3])
    rows = (order[:, None] * 2 + jnp.arange(2)[None]).reshape(-1)
    moved = sample(jax.tree.map(lambda x: x[order], prompts))
    _same_completions("law 4: neighbours", moved, jax.tree.map(lambda x: x[rows], together))
    _same_completions("law 4: decode slots", sample(prompts, 4), together)


def _same_completions(law: str, got: Rollout, want: Rollout) -> None:
    _same(f"{law} change no completion", got.logprobs, want.logprobs)
    assert jnp.array_equal(got.tokens, want.tokens), f"{law} change the tokens of a completion."


@eqx.filter_jit
def _whole(
    policy: Policy, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int
) -> Float[Array, "B rest V"]:
    """Logits of slots `start` to S - 1, by `hidden`."""
    hidden = policy.hidden(tokens, mask, start)
    if jnp.finfo(hidden.dtype).bits < 32:
        raise ValueError(f"hidden states are {hidden.dtype}; judge the policy in float32.")
    logits = policy.unembed(hidden.reshape(-1, hidden.shape[-1]))
    return logits.reshape(*hidden.shape[:2], -1)


@eqx.filter_jit
def _decoded(
    policy: Policy,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    *,
    more: int = 0,
    growing: bool = False,
) -> Float[Array, "B rest V"]:
    """Logits from the last prompt slot on, by `prefill` and `step`; `more` slots of padding."""
    width, slots, decoder = _WIDTH + more, tokens.shape[1], policy.decoder()
    hidden, cache = policy.prefill(tokens[:, :width], mask[:, :width], width if growing else slots)
    if growing and decoder.grow is not None:
        cache = decoder.grow(cache, slots)
    logits = [decoder.unembed(hidden)]
    for t in range(width, slots):
        hidden, cache = decoder.step(tokens[:, t], cache)
        logits.append(decoder.unembed(hidden))
    return jnp.stack(logits, axis=1)


def _same(law: str, got: Float[Array, "..."], want: Float[Array, "..."]) -> None:
    assert got.shape == want.shape, f"{law}: shapes {got.shape} and {want.shape}."
    a, b = (np.asarray(x, np.float64) for x in (got, want))
    finite = np.isfinite(a) & np.isfinite(b)
    off = np.where(finite, np.abs(np.where(finite, a - b, 0.0)), np.where(a == b, 0.0, np.inf))
    scale = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0.0))
    allowed = _ROUNDINGS * float(jnp.finfo(got.dtype).eps) * scale
    worst = np.nan_to_num(off, nan=np.inf).max()
    assert worst <= allowed, (
        f"{law}: the largest difference is {worst:.3g}, rounding may make {allowed:.2g}."
    )
