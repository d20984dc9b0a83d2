"""Stage 1, one token of one sequence at a time, reading everything again for each: no cache."""

import numpy as np
from jaxtyping import Float64, Int

from .config import GenerationConfig
from .models.heads import Model, hidden_states, unembed
from .ops.logprobs import token_logprobs
from .ops.sampling import ban_tokens, restrict_logits, sample_tokens
from .types import Prompts, Rollout


def generate(
    policy: Model,
    prompts: Prompts,
    noise: Float64[np.ndarray, "B T 2"],
    *,
    config: GenerationConfig,
    temperature: float = 1.0,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Rollout:
    """Write until an EOS or until the room runs out; sequence n G + g is sample g of prompt n."""
    samples, length = config.samples_per_prompt, config.max_new_tokens
    rows = len(prompts.tokens) * samples
    tokens = np.full((rows, length), config.pad_token_id)
    logprobs, behaviour = np.zeros((rows, length)), np.zeros((rows, length))
    lengths, terminated = np.zeros(rows, int), np.zeros(rows, bool)
    for b in range(rows):
        prompt, filled = prompts.tokens[b // samples], prompts.mask[b // samples]
        for t in range(length):
            context = np.concatenate([prompt, tokens[b, :t]])
            mask = np.concatenate([filled, np.ones(t, bool)])
            last = hidden_states(policy, context, mask)[-1:]
            logits = unembed(policy, last) / temperature
            allowed = ban_tokens(logits, config.banned_token_ids, True)
            allowed = ban_tokens(allowed, config.eos_token_ids, t < config.min_new_tokens)
            allowed = restrict_logits(allowed, top_k=config.top_k, top_p=top_p, min_p=min_p)
            drawn, behaviour[b, t : t + 1] = sample_tokens(allowed, noise[b, t][None])
            tokens[b, t], logprobs[b, t] = drawn[0], token_logprobs(logits, drawn)[0]
            lengths[b] += 1
            if drawn[0] in config.eos_token_ids:
                terminated[b] = True
                break
    return Rollout(
        prompt_tokens=np.repeat(prompts.tokens, samples, axis=0),
        prompt_mask=np.repeat(prompts.mask, samples, axis=0),
        sample_ids=_sample_ids(prompts.sample_ids, samples),
        tokens=tokens,
        mask=np.arange(length)[None] < lengths[:, None],
        lengths=lengths,
        terminated=terminated,
        logprobs=logprobs,
        behaviour_logprobs=behaviour,
    )


def _sample_ids(prompt_ids: Int[np.ndarray, " N"], samples: int) -> Int[np.ndarray, " B"]:
    return np.array([i * samples + g for i in prompt_ids for g in range(samples)])
