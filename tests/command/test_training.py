"""The whole of `ppo-kernel train` on a tiny model: its stages, its data, and going on."""

import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from small_models import make_lm, word_tokenizer
from tokenizers import processors

from ppo_kernel.command.data import Encoder, TokenExample, load_data
from ppo_kernel.command.display import Display
from ppo_kernel.command.pipeline import Pipeline
from ppo_kernel.command.run_folder import RunFolder
from ppo_kernel.command.settings import TrainSettings
from ppo_kernel.io.tokenizer import Tokenizer
from ppo_kernel.models import ValueModel
from ppo_kernel.trainer.config import PPOConfig
from ppo_kernel.trainer.ppo import PPOTrainer
from ppo_kernel.trainer.pretrained import CausalLM, RewardModel
from ppo_kernel.trainer.sft import next_token_loss, perplexity
from ppo_kernel.trainer.supervised import FitConfig, batches

EOS = 1
FIT = FitConfig(num_steps=20, batch_size=4, widths=(16,), learning_rate=1e-2)
PPO = PPOConfig(train_batch_size=8, max_new_tokens=4, max_seq_len=12, num_ppo_epochs=1)


def text(rng, low=1, high=4):
    return " ".join(f"w{i}" for i in rng.integers(0, 16, rng.integers(low, high)))


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    """Sharded programs take several times as long to compile, and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and three files of data: preferred responses begin with w1."""
    root, rng = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    make_lm(tokenizer=word_tokenizer()).save_pretrained(root / "model")
    write_rows(root / "prompts.jsonl", [{"prompt": text(rng)} for _ in range(24)])
    examples = [{"prompt": text(rng), "response": text(rng)} for _ in range(8)]
    write_rows(root / "sft.jsonl", [*examples, {"text": text(rng)}, {"text": text(rng)}])
    pairs = [
        {"prompt": text(rng), "chosen": f"w1 {text(rng)}", "rejected": f"w2 {text(rng)}"}
        for _ in range(20)
    ]
    write_rows(root / "pairs.jsonl", pairs)
    return root


def settings(folder: Path, output: Path, **changes) -> TrainSettings:
    given = {
        "model": folder / "model", "prompts": folder / "prompts.jsonl", "output": output,
        "sft": folder / "sft.jsonl", "preferences": folder / "pairs.jsonl",
        "num_iterations": 4, "save_every": 2, "evaluate_every": 2,
        "sft_fit": FIT, "reward_fit": replace(FIT, num_steps=60), "ppo": PPO,
    }  # fmt: skip
    return TrainSettings(**(given | changes))


def run(chosen: TrainSettings) -> dict[str, float]:
    pipeline = Pipeline(chosen)
    with RunFolder(chosen.output, resume=pipeline.config) as folder:
        return pipeline.run(Display(Console(file=io.StringIO())), folder)


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path: Path):
    times = ("time_s", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in lines(path)]


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing stopped, and its figures."""
    output = folder / "whole"
    return output, run(settings(folder, output))


def test_the_stages_leave_models_that_load_and_the_figures_of_all(whole):
    output, figures = whole
    sft, policy = (CausalLM.from_pretrained(output / name) for name in ("sft", "policy"))
    assert any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (sft.model, policy.model)), strict=True)
    )
    assert policy.tokenizer == word_tokenizer()
    metrics = lines(output / "metrics.jsonl")
    (judged,) = [x["held_out_accuracy"] for x in metrics if "held_out_accuracy" in x]
    assert judged == 1.0
    steps = [(x["stage"], x["step"]) for x in metrics]
    assert steps == [
        *(("sft", i) for i in (0, 10, 20, 20)),
        *(("reward_model", i) for i in (10, 20, 30, 40, 50, 60, 60)),
        *(("ppo", i) for i in range(1, 5)), ("result", 4),
    ]  # fmt: skip
    assert [i for i, x in enumerate(metrics) if "held_out_reward" in x] == [12, 14]
    before, after = [x["held_out_perplexity"] for x in metrics if "held_out_perplexity" in x]
    assert before != after
    samples = lines(output / "samples.jsonl")
    assert [x["stage"] for x in samples] == ["before"] * 2 + ["after"] * 2
    reward = RewardModel.from_pretrained(output / "reward_model")
    (first, *_) = samples
    ids = reward.tokenizer.encode([f"{first['prompt']} {first['response']}"])[0]
    # A response that ended has EOS as its last token, which the text does not show.
    ids = ids if len(first["response"].split()) == PPO.max_new_tokens else [*ids, EOS]
    values = reward.model(jnp.asarray([ids]), jnp.ones((1, len(ids)), bool))
    assert first["reward"] == pytest.approx(float(values[0, -1]), abs=1e-4)
    assert figures["reward_before"] == pytest.approx(
        np.mean([x["reward"] for x in samples if x["stage"] == "before"])
    )
    assert {p.name for p in output.iterdir()} >= {"config.json", "curves.png", "checkpoint"}


class Stopped(KeyboardInterrupt):
    """A run is stopped here."""


def stop_after(monkeypatch, owner, name, when):
    """The method does its work, then the run is stopped if `when(*arguments)`."""
    original = getattr(owner, name)

    def stopping(self, *arguments, **settings):
        result = original(self, *arguments, **settings)
        if when(*arguments):
            raise Stopped
        return result

    monkeypatch.setattr(owner, name, stopping)


def at(stage, step):
    return lambda *arguments: arguments[:2] == (stage, step)


STOPS = {
    "in the middle of SFT": (RunFolder, "metrics", at("sft", 10)),
    "after SFT": (CausalLM, "save_pretrained", lambda path: path.name == "sft"),
    "in the middle of the reward model": (RunFolder, "metrics", at("reward_model", 20)),
    "after the reward model": (RewardModel, "save_pretrained", lambda path: True),
    "before the first checkpoint": (RunFolder, "metrics", at("ppo", 1)),
    "after the first checkpoint": (RunFolder, "metrics", at("ppo", 3)),
    "before the policy is written": (RunFolder, "curves", lambda: True),
}


def test_law_9_stopped_in_and_between_all_stages_is_never_stopped(
    whole, folder, tmp_path, monkeypatch
):
    output, _ = whole
    chosen = settings(folder, tmp_path)
    steps = []
    original = PPOTrainer.train_step

    def counted(self, batch):
        steps.append(self.iteration)
        return original(self, batch)

    monkeypatch.setattr(PPOTrainer, "train_step", counted)
    for where, (owner, name, when) in STOPS.items():
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, owner, name, when)
            with pytest.raises(Stopped):
                run(chosen)
            assert not Pipeline(chosen).finished, where
    run(chosen)
    assert Pipeline(chosen).finished
    assert steps == [0, 0, 1, 2, 2, 3], "PPO goes on from the newest checkpoint"
    for file in ("sft", "reward_model", "policy"):
        file = f"{file}/model.safetensors"
        assert (tmp_path / file).read_bytes() == (output / file).read_bytes(), file
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(tmp_path / file) == without_times(output / file)


def test_what_is_finished_is_not_trained_again(whole, folder, monkeypatch):
    def fit(*arguments, **settings):
        pytest.fail("trained again")

    monkeypatch.setattr("ppo_kernel.command.pipeline.fit", fit)
    output, _ = whole
    chosen = settings(folder, output)
    assert Pipeline(chosen).finished
    (output / "policy/model.safetensors").rename(output / "policy/away")
    before = without_times(output / "metrics.jsonl")
    run(chosen)
    assert without_times(output / "metrics.jsonl") == before
    assert (output / "policy/model.safetensors").read_bytes() == (
        output / "policy/away"
    ).read_bytes()


def test_another_run_is_refused_by_the_setting_that_differs(whole, folder):
    output, _ = whole
    for changes, message in (
        ({"seed": 1}, "seed was 0, now 1"),
        ({"ppo": replace(PPO, kl_coeff=0.2)}, "ppo.kl_coeff was 0.05, now 0.2"),
        ({"sft_fit": replace(FIT, widths=(8, 16))}, r"sft_fit.widths was \[16\], now \[8, 16\]"),
        ({"sft": folder / "pairs.jsonl", "preferences": folder / "pairs.jsonl"}, "response"),
    ):
        with pytest.raises(ValueError, match=message):
            Pipeline(settings(folder, output, **changes))
    moved = folder / "moved.jsonl"
    moved.write_text((folder / "prompts.jsonl").read_text() + '{"prompt": "w3"}\n')
    with pytest.raises(ValueError, match=r"prompts\.sha256 was"):
        Pipeline(settings(folder, output, prompts=moved))


def test_nothing_is_written_by_settings_that_do_not_fit(folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    for changes, message in (
        (
            {"ppo": replace(PPO, train_batch_size=32)},
            r"22 prompts \(2 more .* a batch takes 32",
        ),
        (
            {"sft_fit": replace(FIT, batch_size=10)},
            r"9 examples \(1 more .* takes 10; add",
        ),
        (
            {"reward_fit": replace(FIT, batch_size=19)},
            "18 pairs .* reward_fit.batch_size",
        ),
        ({"reward_fit": replace(FIT, widths=(4,))}, "[0-9] pairs .* a batch takes 4"),
        ({"preferences": None, "reward_model": folder / "model"}, "has no score.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            Pipeline(settings(folder, output, **changes))
    monkeypatch.setattr(jax, "device_count", lambda: 5)
    with pytest.raises(ValueError, match="8 prompts do not divide over 5 devices"):
        Pipeline(settings(folder, output))
    with pytest.raises(FileNotFoundError, match="no folder"):
        Pipeline(settings(folder, output, model=folder / "nowhere"))
    assert not output.exists()


def test_the_reward_is_given_in_exactly_one_way(folder, tmp_path):
    for changes, got in (
        ({"preferences": None}, "neither"),
        ({"reward_model": folder / "reward"}, "both"),
    ):
        with pytest.raises(ValueError, match=f"--preferences FILE .*--reward-model .*got {got}"):
            settings(folder, tmp_path, **changes)


def test_a_reward_model_of_another_tokenizer_reads_the_text(folder, tmp_path):
    lm = make_lm(tokenizer=word_tokenizer(17))
    reward = RewardModel.on(lm)
    head = jax.tree.map(lambda w: w + 0.5, reward.model.head)
    reward.with_model(ValueModel(reward.model.trunk, head)).save_pretrained(tmp_path / "reward")
    chosen = settings(
        folder, tmp_path / "run", sft=None, preferences=None, reward_model=tmp_path / "reward",
        num_iterations=1,
    )  # fmt: skip
    run(chosen)
    samples = lines(tmp_path / "run/samples.jsonl")
    scores = RewardModel.from_pretrained(tmp_path / "reward").score_texts(
        [x["prompt"] for x in samples], [x["response"] for x in samples]
    )
    np.testing.assert_allclose([x["reward"] for x in samples], scores, rtol=1e-5)
    assert not (tmp_path / "run/sft").exists()


def test_sft_imitates_the_response_and_its_eos_alone(folder, tmp_path):
    rows = [{"prompt": "w3 w4", "response": "w5 w6"}, {"text": "w3 w4 w5 w6"}]
    write_rows(tmp_path / "sft.jsonl", rows * 3)
    chosen = settings(
        folder, tmp_path, sft=tmp_path / "sft.jsonl",
        sft_fit=replace(FIT, batch_size=2), held_out=0.3,
    )  # fmt: skip
    data = load_data(chosen, np.random.default_rng(0))
    whole_row = [6, 7, 8, 9, EOS]
    rows = sorted(data.examples.train, key=lambda x: -x.num_read)
    assert rows == [TokenExample(whole_row, 2)] * 2 + [TokenExample(whole_row, 0)] * 2
    model = CausalLM.from_pretrained(folder / "model").model
    hidden = model.hidden(jnp.asarray([whole_row]), jnp.ones((1, 5), bool))[0]
    logprobs = np.asarray(jax.nn.log_softmax(model.unembed(hidden)))
    nll = [-logprobs[slot, token] for slot, token in enumerate(whole_row[1:])]
    # Of one row w5, w6 and EOS are imitated, of the other all that has a token before it.
    wanted = (sum(nll[1:]) + sum(nll)) / (3 + 4)
    ids, num_read = [whole_row] * 2, [2.0, 0.0]
    batch = next(batches(ids, num_read, chosen.sft_fit, np.random.default_rng(0)))
    np.testing.assert_allclose(next_token_loss(model, batch), wanted, rtol=1e-5)
    measured = perplexity(model, ids, num_read, width=8, batch_size=3)
    np.testing.assert_allclose(measured, np.exp(wanted), rtol=1e-5)


def test_what_is_too_long_is_left_out_or_cut_and_said(folder, tmp_path):
    long = " ".join(["w3"] * 9)
    prompts = [*lines(folder / "prompts.jsonl"), {"prompt": long}]
    examples = [
        *lines(folder / "sft.jsonl"),
        {"prompt": long, "response": "w5"},
        {"prompt": "w4", "response": long},
    ]
    pairs = [
        *lines(folder / "pairs.jsonl"),
        {"prompt": "w3", "chosen": "w1", "rejected": long},
    ]
    chosen = settings(
        folder, tmp_path,
        prompts=write_rows(tmp_path / "p.jsonl", prompts),
        sft=write_rows(tmp_path / "s.jsonl", examples), sft_fit=replace(FIT, widths=(9,)),
        preferences=write_rows(tmp_path / "r.jsonl", pairs), reward_fit=replace(FIT, widths=(10,)),
    )  # fmt: skip
    data = load_data(chosen, np.random.default_rng(0))
    sizes = [len(x.train) + len(x.held_out) for x in (data.prompts, data.examples, data.pairs)]
    assert sizes == [24, 11, 20]
    prompt_note, example_note, pair_note = data.notes
    assert "1 of 25 prompts are left out" in prompt_note
    assert "2 of 12 examples have more than 9 tokens" in example_note
    assert "1 of them are left out" in example_note
    assert "1 of 21 pairs are left out" in pair_note


def test_nothing_held_out_is_trained_on(folder, tmp_path):
    data = load_data(settings(folder, tmp_path), np.random.default_rng(0))
    for split, sizes in ((data.prompts, (22, 2)), (data.examples, (9, 1)), (data.pairs, (18, 2))):
        assert (len(split.train), len(split.held_out)) == sizes
    texts = [row["prompt"] for row in lines(folder / "prompts.jsonl")]
    everything = sorted(Encoder(folder / "model").prompts(texts))
    assert sorted(data.prompts.train + data.prompts.held_out) == everything


def test_bos_and_eos_stand_once_also_where_a_chat_template_has_written_them(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    tokenizer = Tokenizer.of(
        tokenizer.backend, eos_token="</s>", pad_token="<pad>", bos_token="<pad>"
    )
    make_lm(tokenizer=tokenizer).save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.prompts(["w0 w1", "<pad> w0 w1"]) == [[0, 3, 4]] * 2
    assert encoder.texts(["w0", "<pad> w0 </s>"]) == [[0, 3, EOS]] * 2
    assert encoder.responses(["w0", "w0 </s>"]) == [[3, EOS]] * 2


def test_a_summary_says_how_often_each_row_is_seen(folder, tmp_path):
    data = load_data(settings(folder, tmp_path), np.random.default_rng(0))
    assert data.summary() == (
        "22 prompts (2 more held out) of up to 3 tokens; SFT on 9 examples (1 more held out), "
        "8.9 times; reward model on 18 pairs (2 more held out), 13 times"
    )
