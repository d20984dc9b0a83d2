"""What the two decode loops share: their arguments, their results, the sizes of their caches."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..config import GenerationConfig
from ..models.protocol import Cache, DecodeStep, GrowCache
from ..ops.dtypes import promote_types
from ..types import Prompts

_MOST_LOOPS = 4
"""For a cache that grows. More loops read fewer empty slots and take longer to compile."""

_LEAST_STEPS = 64
"""Decode steps per loop. A shorter loop saves less time than it takes to compile."""


class Sampled(NamedTuple):
    """One token per row.

    Attributes:
        tokens: ids.
        logprobs: under the policy, nats.
        behaviour_logprobs: under the restricted distribution that was sampled from, nats.
        is_eos: whether the token ends its response.
    """

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    behaviour_logprobs: Float[Array, " B"]
    is_eos: Bool[Array, " B"]


class Responses(NamedTuple):
    """Responses while they are written: right-padded arrays [..., T].

    Attributes:
        tokens: ids.
        mask: which slots hold one.
        logprobs, behaviour_logprobs: as in `Sampled`.
    """

    tokens: Int[Array, "*rows T"]
    mask: Bool[Array, "*rows T"]
    logprobs: Float[Array, "*rows T"]
    behaviour_logprobs: Float[Array, "*rows T"]


@runtime_checkable
class Prefill(Protocol):
    """n prompts -> last hidden states and cache of their n * G samples, prompt by prompt."""

    def __call__(
        self, tokens: Int[Array, "n P"], mask: Bool[Array, "n P"], capacity: int
    ) -> tuple[Float[Array, "B D"], Cache]: ...


@runtime_checkable
class Sampler(Protocol):
    """Samples token `t` of every row; `t` has rank 0 where the rows share it."""

    def __call__(
        self, hidden: Float[Array, "X D"], noise: Float[Array, "X 2"], t: Int[Array, "*rows"]
    ) -> Sampled: ...


class Decoding(NamedTuple):
    """The arguments of a decode loop.

    Attributes:
        prefill, sample: see `Prefill` and `Sampler`.
        step, grow: of the policy's `Decoder`.
        prompts: N of them; a queue takes them in this order.
        noise: uniforms in [0, 1) per sequence and token.
        config: settings of the rollout.
    """

    prefill: Prefill
    sample: Sampler
    step: DecodeStep
    grow: GrowCache | None
    prompts: Prompts
    noise: Float[Array, "B T 2"]
    config: GenerationConfig


def cache_capacities(prompt_width: int, num_tokens: int, *, growing: bool) -> list[int]:
    """Slots of the cache in each decode loop, in order.

    The first token comes from the prefill and the last one is never read, so the last loop ends
    with P + T - 1 slots.

    Args:
        prompt_width: P.
        num_tokens: T.
        growing: whether the cache can grow: then up to four loops, else one.

    Returns:
        Ascending numbers of slots.
    """
    loops = min(_MOST_LOOPS, max(1, num_tokens // _LEAST_STEPS)) if growing else 1
    return [prompt_width + (num_tokens - 1) * n // loops for n in range(1, loops + 1)]


def empty_responses(shape: tuple[int, ...], dtype: jnp.dtype, pad_token_id: int) -> Responses:
    """Responses without any token.

    Args:
        shape: of each array; the last axis is T.
        dtype: of the log-probabilities, at least float32.
        pad_token_id: what every slot holds.

    Returns:
        Pads, a false mask, and zero log-probabilities.
    """
    dtype = promote_types(dtype, jnp.float32)
    return Responses(
        tokens=jnp.full(shape, pad_token_id, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logprobs=jnp.zeros(shape, dtype),
        behaviour_logprobs=jnp.zeros(shape, dtype),
    )
