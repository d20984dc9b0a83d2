"""The arithmetic preset: its problems, its reward, its tokenizer, and the files of a run."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from ppo_kernel.command.display import Display
from ppo_kernel.command.pipeline import random_streams
from ppo_kernel.command.run_folder import RunFolder
from ppo_kernel.demos.arithmetic import ArithmeticSettings, run_arithmetic
from ppo_kernel.demos.sums import (
    ANSWER_WIDTH,
    PROMPT_WIDTH,
    exact,
    make_tokenizer,
    question,
    solved,
    split_problems,
)
from ppo_kernel.models import LanguageModel, TransformerConfig
from ppo_kernel.trainer.config import PPOConfig
from ppo_kernel.trainer.pretrained import CausalLM
from ppo_kernel.trainer.sft import next_token_logprobs, next_token_loss
from ppo_kernel.trainer.supervised import Batch, FitConfig, pad_right

TINY = TransformerConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=4, max_positions=32,
)  # fmt: skip
SETTINGS = ArithmeticSettings(
    policy=TINY,
    sft=FitConfig(
        num_steps=2, batch_size=8, widths=(PROMPT_WIDTH + ANSWER_WIDTH,), learning_rate=1e-2
    ),
    ppo=PPOConfig(
        learning_rate_actor=1e-2, train_batch_size=16, samples_per_prompt=2, num_ppo_epochs=1,
        max_seq_len=PROMPT_WIDTH + ANSWER_WIDTH, max_new_tokens=ANSWER_WIDTH,
    ),
    num_iterations=2,
    operands=(88, 99),
    num_stop_problems=8,
)  # fmt: skip


def split_by(settings, rng):
    return split_problems(settings.operands, settings.sft_share, settings.held_out_share, rng)


@pytest.mark.parametrize("seed", range(3))
def test_every_problem_is_in_one_part_with_its_mirror(seed):
    problems = split_by(ArithmeticSettings(), np.random.default_rng(seed))
    parts = [set(problems.sft), set(problems.ppo), set(problems.held_out)]
    assert sum(map(len, parts)) == 90**2 == len(set.union(*parts))
    assert [len(part) for part in parts] == list(
        map(len, (problems.sft, problems.ppo, problems.held_out))
    )
    for part in parts:
        assert {(b, a) for a, b in part} == part
    assert len(problems.held_out) > 700


def test_the_split_follows_the_generator():
    first, again, other = (
        split_by(ArithmeticSettings(), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.held_out != other.held_out


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("82", 1.0), ("83", 0.0), ("28", 0.0), ("8", 0.0), ("822", 0.0), ("082", 0.0),
        ("", 0.0), ("+82", 0.0), ("82=", 0.0), ("=+", 0.0), ("8 2", 0.0), ("82.0", 0.0),
    ],
)  # fmt: skip
def test_the_reward_is_one_for_the_right_number_only(response, score):
    assert exact(["37+45="], [response]) == [score]


def test_the_reward_reads_each_prompt():
    assert exact(["0+0=", "99+99=", "5+7="], ["0", "198", "13"]) == [1.0, 1.0, 0.0]


def test_text_survives_the_tokenizer(tmp_path):
    tokenizer = make_tokenizer()
    texts = [f"{question((a, b))}{a + b}" for a, b in ((0, 0), (37, 45), (99, 99))]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode([*ids, tokenizer.eos_id]) for ids in encoded] == texts
    assert [len(ids) for ids in encoded] == [len(text) for text in texts]
    assert len(encoded[2]) + 1 == PROMPT_WIDTH + ANSWER_WIDTH
    tokenizer.save(tmp_path)
    assert type(tokenizer).load(tmp_path) == tokenizer


def test_every_token_but_eos_is_seen_by_the_reward():
    # An invisible token inside an answer would let a response be right without being one.
    tokenizer = make_tokenizer()
    seen = [tokenizer.decode([i]) for i in range(tokenizer.num_ids) if i != tokenizer.eos_id]
    assert all(len(text) == 1 for text in seen)


def test_the_sft_loss_is_of_the_answer_alone():
    tokenizer = make_tokenizer()
    ids, num_read = solved([(3, 4), (37, 45)], tokenizer)
    assert ids == [[*x, tokenizer.eos_id] for x in tokenizer.encode(["3+4=7", "37+45=82"])]
    tokens, mask = (jnp.asarray(x) for x in pad_right(ids, PROMPT_WIDTH + ANSWER_WIDTH))

    @jax.jit
    def both():
        policy = LanguageModel.init(jax.random.key(0), TINY)
        loss = next_token_loss(policy, (Batch(tokens, mask, jnp.asarray(num_read)),))
        return next_token_logprobs(policy, tokens, mask)[0], loss

    logprobs, loss = both()
    answers = [*logprobs[0, 3:5].tolist(), *logprobs[1, 5:8].tolist()]
    np.testing.assert_allclose(float(loss), -np.mean(answers), rtol=1e-5)


def test_a_run_leaves_all_its_files(tmp_path, monkeypatch):
    # Sharded programs take several times as long to compile, and are tested elsewhere.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    console = Console(file=io.StringIO(), width=120)
    with RunFolder(tmp_path / "run") as run, Display(console) as display:
        figures = run_arithmetic(display, run, seed=3, settings=SETTINGS)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {
        "config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "exact.png", "sft",
        "policy", "checkpoint",
    }  # fmt: skip
    assert any("tfevents" in name for name in names)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["sft", "ppo", "ppo", "result"]
    assert 0.0 <= lines[2]["exact"] <= 1.0
    assert figures["exact_after"] == lines[2]["exact"]
    _, (split_rng, *_) = random_streams(3, keys=3, generators=3)
    held_out = len(split_by(SETTINGS, split_rng).held_out)
    assert figures["held_out_problems"] == held_out
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * held_out
    assert f"{held_out} held-out problems" in console.file.getvalue()
    policy = CausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert policy.tokenizer == make_tokenizer()
    assert policy.config.hidden_size == TINY.hidden_size
