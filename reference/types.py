"""The records that travel between the stages."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts."""

    tokens: Int[np.ndarray, "N P"]
    mask: Bool[np.ndarray, "N P"]
    sample_ids: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Rollout:
    """Prompts and what the policy wrote."""

    prompt_tokens: Int[np.ndarray, "B P"]
    prompt_mask: Bool[np.ndarray, "B P"]
    sample_ids: Int[np.ndarray, " B"]
    tokens: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    terminated: Bool[np.ndarray, " B"]
    logprobs: Float64[np.ndarray, "B T"]
    behaviour_logprobs: Float64[np.ndarray, "B T"]


@dataclass(frozen=True)
class Evaluation:
    """What the frozen and the value models say of a rollout."""

    reference_logprobs: Float64[np.ndarray, "B T"]
    values: Float64[np.ndarray, "B T"]
    bootstrap_values: Float64[np.ndarray, " B"]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """All that the update needs."""

    rollout: Rollout
    old_logprobs: Float64[np.ndarray, "B T"]
    reference_logprobs: Float64[np.ndarray, "B T"]
    old_values: Float64[np.ndarray, "B T"]
    advantages: Float64[np.ndarray, "B T"]
    returns: Float64[np.ndarray, "B T"]
