"""Stage 1: prompts -> rollout. A batched prefill, then a compiled decode-and-sample loop."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..config import GenerationConfig
from ..models.protocol import Cache, Policy, Unembed
from ..ops.checks import FRACTION, SHARE, TEMPERATURE, check_key, check_shape
from ..ops.dtypes import upcast
from ..ops.logprobs import token_logprobs
from ..ops.sampling import ban_tokens, restrict_logits, sample_tokens, sampling_noise
from ..sharding import num_shards
from ..types import Prompts, Rollout, Scalar
from .decoding import Decoding, Responses, Sampled
from .lockstep import decode_batch
from .prompts import check_prompts
from .slots import decode_queue


def generate(
    policy: Policy,
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    config: GenerationConfig,
    temperature: Scalar = 1.0,
    top_p: Scalar | None = None,
    min_p: Scalar | None = None,
    noise: Float[Array, "B T 2"] | None = None,
) -> Rollout:
    """Sample responses from the policy.

        z_t = logits_t / temperature
        a_t ~ softmax(restrict(z_t)),   logprob_t = log softmax(z_t)[a_t]

    One prefill serves the G samples of a prompt. The loop stops as soon as every sequence has
    ended; with `config.decode_slots` fewer than B are decoded at a time. Sequence n * G + g is
    sample g of prompt n. Its id is `prompts.sample_ids[n] * G + g`, and its noise depends on the
    key, that id and t alone.

    Args:
        policy: see `models.protocol.Policy`.
        prompts: left-padded, one valid slot each at least.
        key: consumed; the caller folds the iteration into it.
        config: lengths, EOS ids, top-k, samples per prompt, slots.
        temperature: > 0.
        top_p, min_p: see `restrict_logits`; they restrict sampling only.
        noise: uniforms in [0, 1) to use instead of those of `key` (as an oracle does).

    Returns:
        A `Rollout` of B = N * G sequences and T = `config.max_new_tokens` response slots.

    Raises:
        ValueError: prompts or `noise` of a wrong shape or type, a number out of its range, an EOS
            or a banned id outside the vocabulary, all of it banned, or slots and prompts do not
            divide over the devices.
    """
    check_prompts(prompts, policy)
    check_key("key", key)
    samples = config.samples_per_prompt
    decoder, sample_ids = policy.decoder(), _sample_ids(prompts.sample_ids, samples)
    if noise is None:
        noise = sampling_noise(key, sample_ids, config.max_new_tokens)
    check_shape("noise", noise, (len(sample_ids), config.max_new_tokens, 2))
    sampler = _Sampler(decoder.unembed, config, temperature, top_p, min_p)

    def prefill(tokens: Int[Array, "n P"], mask: Bool[Array, "n P"], capacity: int):
        return _repeat(policy.prefill(tokens, mask, capacity), samples)

    decoding = Decoding(prefill, sampler, decoder.step, decoder.grow, prompts, noise, config)
    if config.decode_slots is None or config.decode_slots >= len(sample_ids):
        responses = decode_batch(decoding)
    else:
        responses = decode_queue(decoding, num_shards("batch"))
    return _rollout(prompts, sample_ids, responses, config)


@dataclass(frozen=True)
class _Sampler:
    """Hidden states -> tokens, by the tempered and restricted distribution."""

    unembed: Unembed
    config: GenerationConfig
    temperature: Scalar
    top_p: Scalar | None
    min_p: Scalar | None

    def __post_init__(self):
        TEMPERATURE.check("temperature", self.temperature)
        for name, value, limits in (("top_p", self.top_p, SHARE), ("min_p", self.min_p, FRACTION)):
            if value is not None:
                limits.check(name, value)

    def __call__(
        self, hidden: Float[Array, "X D"], noise: Float[Array, "X 2"], t: Int[Array, "*rows"]
    ) -> Sampled:
        config, logits = self.config, upcast(self.unembed(hidden))
        _check_vocabulary(config, logits.shape[-1])
        logits = logits / jnp.asarray(self.temperature).astype(logits.dtype)
        allowed = logits
        if config.banned_token_ids:
            allowed = ban_tokens(allowed, config.banned_token_ids, jnp.ones((), bool))
        if config.eos_token_ids and config.min_new_tokens:
            allowed = ban_tokens(allowed, config.eos_token_ids, t < config.min_new_tokens)
        allowed = restrict_logits(allowed, top_k=config.top_k, top_p=self.top_p, min_p=self.min_p)
        tokens, behaviour = sample_tokens(allowed, noise)
        logprobs = behaviour if allowed is logits else token_logprobs(logits, tokens)
        return Sampled(tokens, logprobs, behaviour, _is_eos(tokens, config.eos_token_ids))


def _rollout(
    prompts: Prompts, sample_ids: Int[Array, " B"], responses: Responses, config: GenerationConfig
) -> Rollout:
    tokens, mask, logprobs, behaviour_logprobs = responses
    return Rollout(
        prompt_tokens=_repeat(prompts.tokens, config.samples_per_prompt),
        prompt_mask=_repeat(prompts.mask, config.samples_per_prompt),
        sample_ids=sample_ids,
        tokens=tokens,
        mask=mask,
        lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
        terminated=jnp.any(mask & _is_eos(tokens, config.eos_token_ids), axis=1),
        logprobs=logprobs,
        behaviour_logprobs=behaviour_logprobs,
    )


def _sample_ids(prompt_ids: Int[Array, " N"], samples: int) -> Int[Array, " B"]:
    """Prompt id * G + g for each sample g."""
    offsets = jnp.arange(samples, dtype=jnp.int32).astype(prompt_ids.dtype)
    return (prompt_ids[:, None] * samples + offsets[None]).reshape(-1)


def _repeat(cache: Cache, samples: int) -> Cache:
    if samples == 1:
        return cache
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x, cache)


def _check_vocabulary(config: GenerationConfig, size: int) -> None:
    """Refuse ids that no token can have, and bans that leave nothing to sample."""
    named = {"eos_token_ids": config.eos_token_ids, "banned_token_ids": config.banned_token_ids}
    for name, ids in named.items():
        outside = [i for i in ids if i >= size]
        if outside:
            raise ValueError(
                f"{name} {outside} are outside of the policy's vocabulary of {size} tokens."
            )
    banned = {*config.banned_token_ids, *(config.eos_token_ids if config.min_new_tokens else ())}
    if len(banned) == size:
        raise ValueError(
            f"banned_token_ids has {len(config.banned_token_ids)} ids and min_new_tokens="
            f"{config.min_new_tokens} bans eos_token_ids={config.eos_token_ids}: together the "
            "whole vocabulary; nothing is left to sample."
        )


def _is_eos(tokens: Int[Array, "*shape"], eos_token_ids: tuple[int, ...]) -> Bool[Array, "*shape"]:
    ended = jnp.zeros(tokens.shape, bool)
    for token_id in eos_token_ids:
        ended = ended | (tokens == token_id)
    return ended
