"""transformers: `generate` with sampling and its default cache, responses of full length."""

import os
import time

import torch
from transformers import GenerationConfig

from bench.peers.common import PAD, Rounds, flags, prompt_ids
from bench.peers.hf_models import policy_model
from bench.sizes import Size


@torch.inference_mode()
def main(size: Size, warmup: int, rounds: int) -> None:
    """One call a round."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = policy_model(size, seed=0).eval()
    model.generation_config.eos_token_id = None
    settings = GenerationConfig(
        max_new_tokens=size.response, min_new_tokens=size.response, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, pad_token_id=PAD, use_cache=True,
    )  # fmt: skip
    turns = Rounds(warmup)
    for ids in torch.from_numpy(prompt_ids(size, warmup + rounds)).long():
        turns.begin()
        start = time.perf_counter()
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        seconds = time.perf_counter() - start
        if written.shape[1] != size.prompt + size.response:
            raise RuntimeError(f"responses stopped early: {tuple(written.shape)}.")
        turns.end(rollout_s=seconds)


if __name__ == "__main__":
    parsed = flags()
    main(parsed.size, parsed.warmup, parsed.rounds)
