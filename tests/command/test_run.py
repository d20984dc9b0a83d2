"""What a run leaves behind, and how prompts and samples are counted."""

import io
import itertools
import json

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from rich.console import Console
from tokenizers.models import WordLevel

from ppo_kernel.command.display import Display
from ppo_kernel.command.loop import prompt_batches
from ppo_kernel.command.pipeline import random_streams
from ppo_kernel.command.report import Evaluator, distinct_n
from ppo_kernel.command.run_folder import RunFolder
from ppo_kernel.io.tokenizer import Tokenizer
from ppo_kernel.trainer.config import PPOConfig
from ppo_kernel.trainer.text_reward import PythonReward


def words(count: int) -> Tokenizer:
    """One word an id."""
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(count - 2))]
    backend = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="w0"))
    return Tokenizer.of(backend, eos_token="<eos>", pad_token="<pad>")


def test_distinct_n_counts_over_all_responses():
    assert distinct_n([[1, 2, 3], [1, 2]], 2) == 2 / 3
    assert distinct_n([[7], []], 2) == 0.0


def test_every_prompt_comes_once_an_epoch_in_a_new_order():
    prompts = [[i] for i in range(2, 8)]
    rng = np.random.default_rng(0)
    stream = prompt_batches(prompts, 3, pad_id=0, width=2, rng=rng)
    epochs = [
        np.concatenate([batch.input_ids[:, -1] for batch in itertools.islice(stream, 2)])
        for _ in range(3)
    ]
    assert all(sorted(epoch.tolist()) == list(range(2, 8)) for epoch in epochs)
    assert any((epochs[0] != epoch).any() for epoch in epochs[1:])
    with pytest.raises(ValueError, match="do not fill one batch of 7"):
        next(prompt_batches(prompts, 7, pad_id=0, width=2, rng=rng))


def test_a_run_folder_holds_the_whole_run(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        run.config(task="none", settings=PPOConfig())
        for step in range(1, 4):
            run.metrics("ppo", step, {"reward": 0.1 * step, "kl_divergence": 1.0, "other": 2.0})
        run.samples("before", [{"prompt": "é", "reward": 1.0}])
        drawn = {path.name for path in run.curves()}
    assert drawn == {"reward.png", "kl_divergence.png", "curves.png"}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["kl_estimator"] == "k1"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("ppo", i) for i in (1, 2, 3)]
    assert lines[2]["reward"] == pytest.approx(0.3)
    assert json.loads((tmp_path / "run/samples.jsonl").read_text())["prompt"] == "é"
    assert list((tmp_path / "run").glob("events.*"))
    with pytest.raises(ValueError, match=r"is not empty, it has config\.json"):
        RunFolder(tmp_path / "run")


def test_no_stream_of_a_run_is_one_of_another_run():
    keys, draws = set(), set()
    for seed in range(8):
        run_keys, generators = random_streams(seed, keys=4, generators=5)
        keys |= {tuple(jax.random.key_data(key).tolist()) for key in run_keys}
        draws |= {generator.integers(2**63) for generator in generators}
    assert (len(keys), len(draws)) == (8 * 4, 8 * 5)


def test_a_run_repeats_its_streams():
    first, second = (random_streams(3, keys=2, generators=2) for _ in range(2))
    assert [jax.random.key_data(key).tolist() for key in first[0]] == [
        jax.random.key_data(key).tolist() for key in second[0]
    ]
    assert [x.integers(99) for x in first[1]] == [x.integers(99) for x in second[1]]


def test_an_evaluator_compiles_a_reward_in_jax_and_calls_one_in_python():
    policy, calls = tiny.language_model(), []

    def traced(rollout):
        calls.append("traced")
        return tiny.even_tokens(rollout)

    def score(prompts, responses):
        calls.append("python")
        return [float(len(response)) for response in responses]

    tokenizer = words(tiny.VOCABULARY)
    settings = {
        "reference": policy, "tokenizer": tokenizer, "config": tiny.generation(),
        "key": jax.random.key(0),
    }  # fmt: skip
    for reward, expected in (
        (traced, ["traced"]),
        (PythonReward(score, tokenizer), ["python", "python"]),
    ):
        calls.clear()
        evaluator = Evaluator(tiny.prompts(), reward=reward, **settings)
        first, second = evaluator(policy), evaluator(policy)
        assert calls == expected
        np.testing.assert_array_equal(first.scores, second.scores)
        np.testing.assert_allclose(first.sequence_kl, 0.0, atol=1e-5)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_display_shows_stage_step_and_metrics(terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    with Display(console) as display:
        display.stage("ppo", 2)
        display.update("ppo", 1, {"reward": 0.25, "kl_divergence": 1.5, "unknown": 7.0})
        display.update("ppo", 2, {"reward": 0.5, "tokens_per_second": 1234.0})
    shown = stream.getvalue()
    for word in ("ppo", "reward 0.5", "tokens/s 1234"):
        assert word in shown
    assert "unknown" not in shown
