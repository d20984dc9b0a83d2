"""Torch on the GPU that JAX is measured on: `python -m bench.peers.torch_cuda --shape qwen05,...`.

Transformers' `generate`, and a PPO update as torch code has it: Qwen2 models with fused attention,
log-probabilities of the response slots, clipped policy loss, fused AdamW. Prints a line of JSON.
"""

import argparse
import json
import math
import statistics
import time

import torch

from bench.peers.common import CLIP, LEARNING_RATE, prompt_ids
from bench.peers.hf_models import policy_model, sampling, value_model
from bench.sizes import Size, parse_size
from bench.work import learn_work, rollout_work


def seconds_of(call, rounds: int) -> float:
    """Median seconds of `call` after one that is not counted, each to the end of its work."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.inference_mode()
def generation(model, size: Size, rounds: int) -> float:
    """Seconds of a decode step: those of `generate` with all tokens less those with one."""
    ids = torch.from_numpy(prompt_ids(size, 1)[0]).long().cuda()
    model.generation_config.eos_token_id = None

    def seconds(tokens: int) -> float:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings = sampling(tokens)
        return seconds_of(lambda: model.generate(**inputs, generation_config=settings), rounds)

    whole, first = seconds(size.response), seconds(1)
    return (whole - first) / (size.response - 1)


def update(policy, critic, size: Size, parts: int, rounds: int) -> float:
    """Seconds of one epoch in one minibatch, its gradient summed over `parts` micro-batches."""
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, weight_decay=0.0)
        for model in (policy, critic)
    ]
    shape = (size.batch, size.prompt + size.response)
    ids = torch.randint(2, size.vocab, shape, device="cuda")
    old, advantages, returns = (torch.randn(size.batch, size.response).cuda() for _ in range(3))
    # Near what random weights give, so that few ratios are clipped and gradients are not zero.
    old = 0.1 * old - math.log(size.vocab)

    def losses(rows: slice):
        hidden = policy.model(ids[rows]).last_hidden_state[:, size.prompt - 1 : -1]
        logp = policy.lm_head(hidden).float().log_softmax(-1)
        chosen = logp.gather(-1, ids[rows, size.prompt :, None]).squeeze(-1)
        ratio = torch.exp(chosen - old[rows])
        kept = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[rows]
        yield -torch.minimum(ratio * advantages[rows], kept).mean() / parts
        hidden = critic.model(ids[rows]).last_hidden_state[:, size.prompt - 1 : -1]
        values = critic.score(hidden).squeeze(-1).float()
        yield 0.5 * (values - returns[rows]).square().mean() / parts

    def run():
        each = size.batch // parts
        for part in range(parts):
            for loss in losses(slice(part * each, (part + 1) * each)):
                loss.backward()
        for model, optimizer in zip((policy, critic), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return seconds_of(run, rounds)


def product_flops() -> float:
    """The best of two large bfloat16 products of random numbers, FLOP/s."""
    rates = []
    for rows, inner, columns in ((8192, 8192, 8192), (16384, 4096, 4096)):
        left, right = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            for shape in ((rows, inner), (inner, columns))
        )
        seconds = seconds_of(lambda a=left, b=right: [a @ b for _ in range(10)], 5) / 10
        rates.append(2.0 * rows * inner * columns / seconds)
    return max(rates)


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen05,batch=64,prompt=256,response=256")
    parser.add_argument("--stages", nargs="*", default=["decode", "learn"])
    parser.add_argument("--parts", type=int, default=4, help="micro-batches of the update")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    size, report = parse_size(flags.shape), {"shape": flags.shape}
    if size.batch % flags.parts:
        parser.error(f"--parts {flags.parts} does not divide a batch of {size.batch} sequences.")
    policy = policy_model(size, seed=0).bfloat16().cuda()
    if "decode" in flags.stages:
        step = generation(policy.eval(), size, flags.rounds)
        bytes_a_step = rollout_work(size, 2).phases[1].bytes / (size.response - 1)
        report |= {"step_ms": round(1e3 * step, 3), "gb_per_s": round(bytes_a_step / step / 1e9, 1)}
    if "learn" in flags.stages:
        critic = value_model(size, seed=1).bfloat16().cuda().train()
        seconds = update(policy.train(), critic, size, flags.parts, flags.rounds)
        peak = product_flops()
        report |= {
            "learn_s": round(seconds, 4), "tflops": round(peak / 1e12, 1),
            "mfu": round(learn_work(size, 2).flops / size.epochs / seconds / peak, 4),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }  # fmt: skip
    print(json.dumps(report | {"device": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
