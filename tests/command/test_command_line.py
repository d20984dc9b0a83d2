"""`ppo-kernel` as a person types it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from small_models import make_lm, word_tokenizer

from ppo_kernel import cli
from ppo_kernel.command.flags import attribute_help
from ppo_kernel.command.settings import TrainSettings
from ppo_kernel.ops.kl import k3
from ppo_kernel.trainer.config import PPOConfig
from ppo_kernel.trainer.pretrained import CausalLM, RewardModel

ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def call(*arguments):
    return [sys.executable, "-m", "ppo_kernel", *map(str, arguments)]


@pytest.fixture
def chosen(monkeypatch):
    """The settings that a command line gives, without the training."""

    def parse(*arguments):
        caught = []
        with monkeypatch.context() as patch:
            patch.setattr(cli, "train", caught.append)
            patch.setattr(sys, "argv", ["ppo-kernel", "train", *arguments])
            cli.main()
        return caught[0]

    return parse


NEEDED = ("--model", "m", "--prompts", "p.jsonl", "--output", "o")


def test_every_setting_that_a_line_can_say_is_a_flag(chosen):
    settings = chosen(
        *NEEDED, "--preferences", "r.jsonl", "--num-iterations", "7", "--sft-fit.widths", "64",
        "256", "--reward-fit.average", "0.9", "--ppo.kl-estimator", "k3", "--ppo.value-clip",
        "None", "--ppo.top-k", "5", "--ppo.kl-in-loss", "--ppo.response-widths", "16", "32",
    )  # fmt: skip
    assert (settings.num_iterations, settings.sft_fit.widths) == (7, (64, 256))
    assert settings.reward_fit.average == 0.9
    ppo = settings.ppo
    assert (ppo.kl_estimator, ppo.value_clip, ppo.top_k, ppo.kl_in_loss) == (k3, None, 5, True)
    assert ppo.response_widths == (16, 32)


def test_without_flags_the_settings_are_those_of_the_class(chosen):
    plain = chosen(*NEEDED, "--preferences", "r.jsonl")
    same = {"model": plain.model, "prompts": plain.prompts, "output": plain.output}
    assert plain == TrainSettings(**same, preferences=plain.preferences)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--preferences FILE .*--reward-model FOLDER; got neither"),
        (["--reward-model", "r", "--preferences", "p"], "got both"),
        (["--reward-model", "r", "--ppo.clip-ratio", "2"], "train: ppo: clip_ratio must be finite"),
        (["--reward-model", "r", "--sft-fit.num-steps", "1"], "train: sft_fit: num_steps must be"),
        (["--reward-model", "r", "--held-out", "0"], "held_out must be finite, above 0"),
        (["--reward-model", "r", "--save-every", "0"], "save_every must be a whole number"),
    ],
)
def test_settings_out_of_range_are_one_line(flags, message, chosen):
    with pytest.raises(SystemExit, match=f"^ppo-kernel train: .*{message.removeprefix('train: ')}"):
        chosen(*NEEDED, *flags)


def test_help_says_what_every_flag_means(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo-kernel", "train", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--sft ", "--preferences", "--reward-model", "--ppo.clip-ratio", "--sft-fit.num"):
        assert flag in shown
    assert "schedule" not in shown
    assert "model-path" not in shown
    assert all(attribute_help(PPOConfig)[name] for name in PPOConfig.__dataclass_fields__)


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; from ppo_kernel.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "ppo-kernel needs tyro: pip install 'ppo-kernel[demo]'\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    make_lm(tokenizer=word_tokenizer()).save_pretrained(root / "model")

    def text():
        return " ".join(f"w{i}" for i in rng.integers(0, 16, rng.integers(1, 4)))

    def write(name, *keys):
        rows = [json.dumps({key: f"{key[0]} {text()}" for key in keys}) for _ in range(12)]
        (root / name).write_text("\n".join(rows))

    (root / "prompts.txt").write_text("\n".join(text() for _ in range(12)))
    write("sft.jsonl", "prompt", "response")
    write("pairs.jsonl", "prompt", "chosen", "rejected")
    return root


def test_stopped_by_ctrl_c_and_called_again_it_ends_with_a_policy(files):
    output = files / "run"
    command = call(
        "train", "--model", files / "model", "--prompts", files / "prompts.txt", "--sft",
        files / "sft.jsonl", "--preferences", files / "pairs.jsonl", "--output", output,
        "--sft-fit.num-steps", 10, "--sft-fit.batch-size", 4, "--reward-fit.num-steps", 10,
        "--reward-fit.batch-size", 4, "--ppo.train-batch-size", 4, "--ppo.max-new-tokens", 4,
        "--num-iterations", 200, "--save-every", 5,
    )  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        while not (output / "checkpoint").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out.splitlines()[-1].startswith(f"stopped; to go on from what {output} has: ppo-kernel ")
    assert not (output / "policy").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "sft: " not in done.stdout
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in steps if x["stage"] == "ppo"] == list(range(1, 201))
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "is finished" in again.stdout
    for name in ("sft", "policy"):
        CausalLM.from_pretrained(output / name)
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    for name in ("sft", "policy"):
        transformers.AutoModelForCausalLM.from_pretrained(output / name)
    transformers.AutoModelForSequenceClassification.from_pretrained(output / "reward_model")


def test_a_mistake_in_the_data_is_one_line(files):
    (files / "wrong.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    done = subprocess.run(
        call(
            "train", "--model", files / "nowhere", "--prompts", files / "prompts.txt",
            "--preferences", files / "wrong.jsonl", "--output", files / "none",
        ),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith('wrong.jsonl, line 1: has no "rejected", only "prompt", "chosen"; add it.')
    assert not (files / "none").exists()


@pytest.mark.parametrize("kind", ["model", "reward_model"])
def test_an_output_that_is_a_model_folder_is_refused_as_it_is(kind, files, chosen):
    folder = files / kind
    if kind == "reward_model":
        RewardModel.on(CausalLM.from_pretrained(files / "model")).save_pretrained(folder)
    before = {x.name: x.read_bytes() for x in folder.iterdir()}
    reward = (
        ("--preferences", files / "pairs.jsonl")
        if kind == "model"
        else ("--reward-model", files / "reward_model")
    )
    settings = chosen(
        "--model", str(files / "model"), "--prompts", str(files / "prompts.txt"),
        "--output", str(folder), *map(str, reward),
    )  # fmt: skip
    with pytest.raises(SystemExit, match=f"^ppo-kernel train: {kind}=.* lies in output="):
        cli.train(settings)
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == before


def test_an_output_with_files_of_a_user_is_refused_before_the_data_is_read(files, tmp_path, chosen):
    (tmp_path / "notes.txt").write_text("mine")
    settings = chosen(*NEEDED[:4], "--output", str(tmp_path), "--preferences", "none.jsonl")
    with pytest.raises(SystemExit, match=r"^ppo-kernel train: .* has notes\.txt, which no run"):
        cli.train(settings)
    assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(files, tmp_path):
    output = tmp_path / "run"
    command = call(
        "train", "--model", files / "model", "--prompts", files / "prompts.txt", "--preferences",
        files / "pairs.jsonl", "--output", output, "--reward-fit.num-steps", 4,
        "--reward-fit.batch-size", 4, "--ppo.train-batch-size", 4, "--ppo.max-new-tokens", 4,
        "--num-iterations", 1,
    )  # fmt: skip
    # No compilation cache: its files would be too large as well.
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    limited = f"ulimit -f 8; exec {shlex.join(command)}"
    full = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, env=environment, check=False
    )
    assert full.returncode == 1
    (line,) = full.stderr.splitlines()
    assert line.startswith(f"ppo-kernel train: cannot save {output / 'reward_model'}: ")
    assert "File too large" in line
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    CausalLM.from_pretrained(output / "policy")
