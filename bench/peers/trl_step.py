"""TRL: its experimental PPOTrainer (1.12.0, the last version that has one)."""

import os
import tempfile
import time
from types import SimpleNamespace

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_TELEMETRY="1")

import datasets
import torch
import transformers
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.peers import common
from bench.peers.hf_models import policy_model, value_model
from bench.sizes import Size


class EvenFraction(torch.nn.Module):
    """The reward, dressed as the reward model that the trainer insists on.

    score[b, t] is the share of even ids among the response tokens up to t.
    """

    base_model_prefix = "model"

    def __init__(self, prompt: int):
        super().__init__()
        self.prompt, self.model = prompt, self._backbone
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def _backbone(self, input_ids, **_):
        even = (input_ids % 2 == 0).float()
        even[:, : self.prompt] = 0
        count = torch.arange(input_ids.shape[1]) - self.prompt + 1
        return SimpleNamespace(hidden_states=[(even.cumsum(1) / count.clamp(min=1))[..., None]])

    def score(self, hidden):
        """The trainer's name for the head."""
        return hidden


class Parts(transformers.TrainerCallback):
    """Splits each step at the end of generation and at the first pass of the update."""

    def __init__(self, turns: common.Rounds, total: int):
        self.turns, self.total = turns, total
        generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def generation(*arguments, **options):
            result = generate(*arguments, **options)
            self.marks["written"] = time.perf_counter()
            return result

        def first_forward(model, *arguments, **options):
            if isinstance(model, ppo_trainer.PolicyAndValueWrapper):
                self.marks.setdefault("update", time.perf_counter())
            return forward(model, *arguments, **options)

        ppo_trainer.batch_generation, ppo_trainer.forward = generation, first_forward

    def on_train_begin(self, *_, **__):
        """The first step starts."""
        self._begin()

    def on_step_end(self, *_, **__):
        """A step is done; the next waits for its turn."""
        now, marks = time.perf_counter(), self.marks
        self.turns.end(
            step_s=now - marks["start"],
            rollout_s=marks["written"] - marks["start"],
            update_s=now - marks["update"],
        )
        if self.turns.done < self.total:
            self._begin()

    def _begin(self):
        self.turns.begin()
        self.marks = {"start": time.perf_counter()}


def settings(size: Size, total: int, folder: str) -> PPOConfig:
    """One update an epoch, float32, on the CPU, nothing saved or reported."""
    return PPOConfig(
        output_dir=folder, per_device_train_batch_size=size.batch, num_mini_batches=1,
        gradient_accumulation_steps=1, num_ppo_epochs=size.epochs,
        total_episodes=total * size.batch, local_rollout_forward_batch_size=size.batch,
        response_length=size.response, temperature=1.0, stop_token=None,
        learning_rate=common.LEARNING_RATE, kl_coef=common.KL, kl_estimator="k1",
        cliprange=common.CLIP, cliprange_value=common.CLIP, gamma=common.GAMMA, lam=common.LAM,
        whiten_rewards=False, num_sample_generations=0, bf16=False, fp16=False,
        gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
        eval_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip


def main(size: Size, warmup: int, rounds: int) -> None:
    """Train for `warmup + rounds` steps; the callback does the timing."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    total = warmup + rounds
    ids = common.prompt_ids(size, total).reshape(-1, size.prompt)
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=settings(size, total, folder),
            processing_class=common.make_tokenizer(size),
            model=policy_model(size, seed=0), ref_model=policy_model(size, seed=0),
            reward_model=EvenFraction(size.prompt), value_model=value_model(size, seed=1),
            train_dataset=data, eval_dataset=data.select(range(size.batch)),
            callbacks=[Parts(common.Rounds(warmup), total)],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    parsed = common.flags()
    main(parsed.size, parsed.warmup, parsed.rounds)
