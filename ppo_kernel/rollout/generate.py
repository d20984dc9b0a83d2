"""Stage 1: prompts -> rollout. A batched prefill, then a compiled decode-and-sample loop."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..config import GenerationConfig
from ..models.protocol import Cache, Policy
from ..ops.checks import FRACTION, POSITIVE, SHARE, check_shape
from ..ops.dtypes import upcast
from ..ops.logprobs import token_logprobs
from ..ops.sampling import ban_tokens, restrict_logits, sample_tokens, sampling_noise
from ..sharding import num_shards
from ..types import Prompts, Rollout, Scalar
from .lockstep import Drawn, decode_batch
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

    Prompts are read once each, then their cache is repeated for the samples. The loop stops as
    soon as every sequence has ended. With `config.decode_slots` fewer sequences than B are decoded
    at a time, and the next one takes the place of one that has ended. Sequence n * G + g is sample
    g of prompt n, with sample id `prompts.sample_ids[n] * G + g`; its noise depends on the key,
    that id and t alone.

    Args:
        policy: see `models.protocol.Policy`.
        prompts: left-padded; a prompt without any valid slot is not meaningful.
        key: consumed; the caller folds the iteration into it.
        config: lengths, EOS ids, top-k, samples per prompt, slots.
        temperature: > 0.
        top_p, min_p: see `restrict_logits`; they restrict sampling only.
        noise: uniforms in [0, 1) to use instead of those of `key` (as an oracle does).

    Returns:
        A `Rollout` of B = N * G sequences and T = `config.max_new_tokens` response slots.

    Raises:
        ValueError: prompts or `noise` of a wrong shape or type, a number out of its range, an EOS
            id outside the vocabulary, `min_new_tokens` bans all of it, or slots and prompts do not
            divide over the devices.
    """
    _check_prompts(prompts)
    POSITIVE.check("temperature", temperature)
    for name, value, limits in (("top_p", top_p, SHARE), ("min_p", min_p, FRACTION)):
        if value is not None:
            limits.check(name, value)
    samples, length = config.samples_per_prompt, config.max_new_tokens
    rows, width = prompts.tokens.shape[0] * samples, prompts.tokens.shape[1]
    first_ids, offsets = prompts.sample_ids * samples, jnp.arange(samples, dtype=jnp.int32)
    sample_ids = (first_ids[:, None] + offsets.astype(first_ids.dtype)[None]).reshape(-1)
    if noise is None:
        noise = sampling_noise(key, sample_ids, length)
    check_shape("noise", noise, (rows, length, 2))
    decoder = policy.decoder()

    def read(tokens: Int[Array, "n P"], mask: Bool[Array, "n P"], steps: int = length - 1):
        return _repeat(policy.prefill(tokens, mask, width + steps), samples)

    def draw(
        hidden: Float[Array, "X D"], noise: Float[Array, "X 2"], t: Int[Array, "*rows"]
    ) -> Drawn:
        logits = upcast(decoder.unembed(hidden))
        logits = logits / jnp.asarray(temperature).astype(logits.dtype)
        return _sample(logits, noise, t, config=config, top_p=top_p, min_p=min_p)

    parts = (read, draw, decoder.step, prompts, noise)
    if config.decode_slots is None or config.decode_slots >= rows:
        written = decode_batch(*parts, config=config, grow=decoder.grow)
    else:
        queues = num_shards("batch")
        written = decode_queue(*parts, config=config, grow=decoder.grow, queues=queues)
    tokens, mask, logprobs, behaviour_logprobs = written
    return Rollout(
        prompt_tokens=_repeat(prompts.tokens, samples),
        prompt_mask=_repeat(prompts.mask, samples),
        sample_ids=sample_ids,
        tokens=tokens,
        mask=mask,
        lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
        terminated=jnp.any(mask & _is_eos(tokens, config.eos_token_ids), axis=1),
        logprobs=logprobs,
        behaviour_logprobs=behaviour_logprobs,
    )


def _check_prompts(prompts: Prompts) -> None:
    tokens, mask, sample_ids = prompts.tokens, prompts.mask, prompts.sample_ids
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(
            f"prompts.tokens must be [N, P], one prompt and one slot at least; got {tokens.shape}."
        )
    check_shape("prompts.mask", mask, tokens.shape)
    check_shape("prompts.sample_ids", sample_ids, tokens.shape[:1])
    kinds = {"tokens": jnp.integer, "mask": bool, "sample_ids": jnp.integer}
    for name, kind in kinds.items():
        x = getattr(prompts, name)
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"prompts.{name} must be of type {kind.__name__}, got {x.dtype}.")


def _sample(
    logits: Float[Array, "B V"],
    noise: Float[Array, "B 2"],
    t: Int[Array, "*rows"],
    *,
    config: GenerationConfig,
    top_p: Scalar | None,
    min_p: Scalar | None,
) -> Drawn:
    """What was drawn; `t` is that of all rows, or of each."""
    _check_vocabulary(config, logits.shape[-1])
    allowed = logits
    if config.eos_token_ids and config.min_new_tokens:
        allowed = ban_tokens(allowed, config.eos_token_ids, t < config.min_new_tokens)
    allowed = restrict_logits(allowed, top_k=config.top_k, top_p=top_p, min_p=min_p)
    tokens, behaviour = sample_tokens(allowed, noise)
    logprobs = behaviour if allowed is logits else token_logprobs(logits, tokens)
    return tokens, logprobs, behaviour, _is_eos(tokens, config.eos_token_ids)


def _repeat(cache: Cache, samples: int) -> Cache:
    if samples == 1:
        return cache
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x, cache)


def _check_vocabulary(config: GenerationConfig, size: int) -> None:
    """Refuse EOS ids that no token can be, and a ban that leaves nothing to sample."""
    outside = [i for i in config.eos_token_ids if i >= size]
    if outside:
        raise ValueError(
            f"eos_token_ids {outside} are outside of the policy's vocabulary of {size} tokens."
        )
    if config.min_new_tokens and len(set(config.eos_token_ids)) == size:
        raise ValueError(
            f"min_new_tokens={config.min_new_tokens} bans eos_token_ids={config.eos_token_ids}, "
            "which is the whole vocabulary; nothing is left to sample."
        )


def _is_eos(tokens: Int[Array, "*shape"], eos_token_ids: tuple[int, ...]) -> Bool[Array, "*shape"]:
    ended = jnp.zeros(tokens.shape, bool)
    for token_id in eos_token_ids:
        ended = ended | (tokens == token_id)
    return ended
