"""transformers: `generate` with sampling and its default cache, responses of full length."""

import os
import time

import torch

from bench.peers.common import Rounds, flags, prompt_ids
from bench.peers.hf_models import policy_model, sampling
from bench.sizes import Size


@torch.inference_mode()
def main(size: Size, warmup: int, rounds: int) -> None:
    """One call a round."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = policy_model(size, seed=0).eval()
    model.generation_config.eos_token_id = None
    settings, turns = sampling(size.response), Rounds(warmup)
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
