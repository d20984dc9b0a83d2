"""The program that users of such a library write, as they write it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from ppo_kernel import (
    CausalLM,
    ModelReward,
    PPOActorCritic,
    PPOBatch,
    PPOConfig,
    PPOTrainer,
    PythonReward,
    RewardModel,
    TransformerConfig,
    ValueModel,
    make_mesh,
)
from ppo_kernel.io.tokenizer import Tokenizer

METRICS = {
    "actor_loss", "critic_loss", "mean_reward", "kl_divergence", "entropy", "clip_fraction",
    "explained_variance", "response_length", "grad_norm_actor", "grad_norm_critic",
}  # fmt: skip
SHAPE = TransformerConfig(
    vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8,
)  # fmt: skip


def words(order: int = 1) -> Tokenizer:
    """A word-level tokenizer of 24 words; `order` -1 gives the same words other ids."""
    names = ["<pad>", "<eos>", *[f"w{i}" for i in range(22)][::order]]
    backend = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return Tokenizer.of(backend, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An SFT model and a reward model on disk."""
    root = tmp_path_factory.mktemp("models")
    policy = CausalLM.init(jax.random.key(0), SHAPE, tokenizer=words())
    policy.save_pretrained(root / "sft")
    head = jnp.ones(SHAPE.hidden_size)
    reward = RewardModel.on(policy)
    reward = reward.with_model(
        type(reward.model)(reward.model.trunk, type(reward.model.head)(head))
    )
    reward.save_pretrained(root / "reward")
    return root


def test_the_familiar_program_runs(folders, tmp_path):
    config = PPOConfig(
        learning_rate_actor=1e-5, learning_rate_critic=1e-5, clip_ratio=0.2, gamma=0.99,
        lambda_gae=0.95, num_ppo_epochs=4, train_batch_size=16, per_device_batch_size=2,
        sft_model_path=folders / "sft", reward_model_path=folders / "reward", kl_coeff=0.1,
        max_seq_len=12,
    )  # fmt: skip
    policy = CausalLM.from_pretrained(config.sft_model_path)
    reward_model = RewardModel.from_pretrained(config.reward_model_path)
    actor_critic = PPOActorCritic(policy_model=policy, reward_model=reward_model, config=config)
    trainer = PPOTrainer(config=config, actor_critic_model=actor_critic, rng_key=jax.random.key(0))
    input_ids = np.random.default_rng(0).integers(2, 24, (16, 5))
    batch = PPOBatch(input_ids=input_ids, attention_mask=np.ones((16, 5), np.int64))
    metrics = trainer.train_step(batch)
    assert set(metrics) >= METRICS
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    json.dumps(metrics)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    trainer.save_model(tmp_path / "model")
    saved = CausalLM.from_pretrained(tmp_path / "model")
    for ours, theirs in zip(
        jax.tree.leaves(trainer.policy.model), jax.tree.leaves(saved.model), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    changed = np.abs(saved.model.trunk.embedding - policy.model.trunk.embedding).max()
    assert changed > 0.0, "the policy is trained, and the one passed in stays as it was"
    on_two = PPOTrainer(
        config=config, actor_critic_model=actor_critic, rng_key=jax.random.key(1), mesh=make_mesh(2)
    )
    on_two.load_checkpoint(tmp_path / "checkpoint")
    for here, there in zip(
        jax.tree.leaves(on_two.state), jax.tree.leaves(trainer.state), strict=True
    ):
        assert (here.sharding.num_devices, there.sharding.num_devices) == (2, 8)
        assert jnp.array_equal(jax.device_get(here), jax.device_get(there))


def _config(**changes):
    settings = {"train_batch_size": 8, "max_seq_len": 10, "max_new_tokens": 4, "num_ppo_epochs": 1}
    return PPOConfig(**(settings | changes))


def _trainer(folders, reward, seed=0, mesh=None, **changes):
    config = _config(**changes)
    policy = CausalLM.from_pretrained(folders / "sft")
    return PPOTrainer(
        config=config,
        actor_critic_model=PPOActorCritic(policy, reward, config),
        rng_key=jax.random.key(seed),
        mesh=make_mesh(1) if mesh is None else mesh,
    )


def _batch(rows: int = 8) -> PPOBatch:
    ids = np.random.default_rng(1).integers(2, 24, (rows, 5))
    mask = np.ones((rows, 5), np.int64)
    mask[0, 3:] = 0  # padded on the right, as many loaders do
    return PPOBatch(input_ids=ids, attention_mask=mask)


TRAIN_SAVE_AND_DIE = """
import os, pathlib, signal, sys
import test_familiar_surface as here
root, checkpoint = map(pathlib.Path, sys.argv[1:])
trainer = here.resumable(root)
trainer.train_step(here._batch())
trainer.save_checkpoint(checkpoint)
os.kill(os.getpid(), signal.SIGKILL)
"""


def resumable(folders, seed=0):
    """A trainer whose whole state moves: models, moments, counters, the KL coefficient."""
    reward = RewardModel.from_pretrained(folders / "reward")
    settings = {"learning_rate_actor": 1e-3, "learning_rate_critic": 1e-3, "kl_target": 1.0}
    return _trainer(folders, reward, seed, **settings)


def test_law_9_save_kill_resume_is_never_stopped_bit_for_bit(folders, tmp_path):
    """A process is killed after its checkpoint; a trainer of another seed goes on from that."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    killed = subprocess.run(
        [sys.executable, "-c", TRAIN_SAVE_AND_DIE, folders, tmp_path / "checkpoint"],
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    never_stopped, resumed = resumable(folders), resumable(folders, seed=99)
    never_stopped.train_step(_batch())
    resumed.load_checkpoint(tmp_path / "checkpoint")
    for _ in range(2):
        states = never_stopped.state, resumed.state
        for a, b in zip(*map(jax.tree.leaves, states), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = map(jax.random.key_data, (a, b))
            np.testing.assert_array_equal(a, b)
        assert never_stopped.train_step(_batch()) == resumed.train_step(_batch())
    with pytest.raises(ValueError, match="no checkpoint at"):
        resumed.load_checkpoint(tmp_path / "nowhere")


def test_a_python_reward_sees_text(folders):
    seen = []

    def score(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(response.split())) for response in responses]

    trainer = _trainer(folders, PythonReward(score))
    metrics = trainer.train_step(_batch())
    assert len(seen) == 8
    assert len(seen[0][0].split()) == 3, "the padding of the prompt is not decoded"
    mean = np.mean([len(response.split()) for _, response in seen])
    np.testing.assert_allclose(metrics["mean_reward"], mean, rtol=1e-6)


def test_a_reward_model_with_another_tokenizer_goes_through_text(folders):
    model = RewardModel.from_pretrained(folders / "reward")
    same = _trainer(folders, model)
    other = _trainer(folders, type(model)(model.model, words(-1), model.manifest))
    assert not isinstance(same.reward, PythonReward)
    assert isinstance(other.reward, PythonReward)
    assert same.train_step(_batch())["mean_reward"] != other.train_step(_batch())["mean_reward"]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda p, r: [float("nan")] * len(r), "nan for response 0: .*return a finite float"),
        (lambda p, r: [1.0], "1 values for 8 responses; return one float for each"),
        (lambda p, r: ["1"] * len(r), "returned '1' for response 0: .*return a finite float"),
        (lambda p, r: [0.0, None] * 4, "returned None for response 1"),
        (lambda p, r: [[1.0]] * len(r), r"returned \[1.0\] for response 0"),
        (lambda p, r: None, "returned None; return a list of floats"),
        (lambda p, r: 1.0, "returned 1.0; return a list of floats"),
        (lambda p, r: ([1.0] * 8, {"right": ["yes"] * 8}), "metric 'right' of the reward is 'yes'"),
        (lambda p, r, answer: [1.0] * 8, "takes the column 'answer', the batch has none; pass"),
    ],
)
def test_bad_scores_are_refused_before_the_update(folders, scores, message):
    trainer = _trainer(folders, PythonReward(scores))
    with pytest.raises(ValueError, match=message):
        trainer.train_step(_batch())
    assert trainer.iteration == 0


def test_bad_batches_are_refused(folders):
    trainer = _trainer(folders, PythonReward(lambda p, r: [0.0] * len(r)))
    with pytest.raises(ValueError, match="has 4 prompts"):
        trainer.train_step(_batch(4))
    wide = PPOBatch(input_ids=np.ones((8, 9), np.int64), attention_mask=np.ones((8, 9), np.int64))
    with pytest.raises(ValueError, match="do not fit into max_seq_len=10"):
        trainer.train_step(wide)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_ratio": -0.1}, "clip_ratio must be"),
        ({"gamma": 1.5}, "gamma must be .* at most 1, got 1.5"),
        ({"temperature": 0.0}, "temperature must be finite, above 0"),
        ({"learning_rate_actor": float("nan")}, "learning_rate_actor"),
        ({"lambda_gae": 1.5}, "^lambda_gae must be"),
        ({"kl_coeff": -1.0}, "^kl_coeff must be"),
        ({"entropy_coeff": float("inf")}, "^entropy_coeff must be"),
        ({"value_coeff": -1.0}, "^value_coeff must be"),
        ({"max_grad_norm": 0.0}, "^max_grad_norm must be"),
        ({"weight_decay": -0.1}, "^weight_decay must be"),
        ({"dual_clip": 0.5}, "dual_clip must be"),
        ({"kl_coeff": 0.0, "kl_target": 1.0}, "kl_coeff=0 with kl_target=1.0"),
        ({"num_ppo_epochs": 0}, "^num_ppo_epochs must be a whole number of at least 1"),
        ({"num_minibatches": 0}, "num_minibatches must be a whole number of at least 1"),
        ({"train_batch_size": 0}, "train_batch_size must be a whole number of at least 1"),
        (
            {"per_device_batch_size": 0},
            "per_device_batch_size must be a whole number of at least 1",
        ),
        ({"train_batch_size": 6, "num_minibatches": 4}, "not a multiple"),
        ({"max_new_tokens": 512}, "1 slots and 512 new tokens do not fit into max_seq_len=512"),
        ({"max_seq_len": 1}, "1 slots and 1 new tokens do not fit into max_seq_len=1"),
        ({"min_new_tokens": -3}, "min_new_tokens must be"),
        ({"min_new_tokens": 600}, "min_new_tokens must be at most max_new_tokens=511"),
        ({"logprob_chunk_size": 0}, "logprob_chunk_size must be"),
        ({"response_widths": (8, 4)}, "response_widths must be"),
        ({"decode_slots": 3, "samples_per_prompt": 2}, "decode_slots must be a multiple"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)


@pytest.mark.parametrize("changes", [{"num_ppo_epochs": 1.5}, {"max_seq_len": None}])
def test_counts_are_whole_numbers(changes, monkeypatch):
    # The shape checks of the tests would be first to say so.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be a whole number"):
        PPOConfig(**changes)


def test_settings_do_not_start_the_devices():
    """A program may make them first, and choose its devices, or its processes, afterwards."""
    code = """
import jax
from ppo_kernel import PPOConfig
PPOConfig(kl_target=6.0, dual_clip=3.0)
jax.config.update("jax_num_cpu_devices", 3)  # an error once they are there
assert jax.device_count() == 3
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_schedule_may_be_one_of_optax():
    config = PPOConfig(
        learning_rate_actor=1.0, learning_rate_schedule=optax.linear_schedule(1, 0, 4)
    )
    rates = [float(config.hyperparams(i).actor.learning_rate) for i in (0, 1, 4)]
    assert rates == [1.0, 0.75, 0.0]


def test_gradient_accumulation_must_fit():
    config = PPOConfig(train_batch_size=8, per_device_batch_size=3, max_seq_len=8)
    generation = config.generation(4, (1,), 0)
    with pytest.raises(ValueError, match="per_device_batch_size=3 on 1 devices"):
        config.iteration(generation)
    legal = PPOConfig(kl_coeff=0.0, learning_rate_critic=0.0, entropy_coeff=0.0)
    assert float(legal.hyperparams().kl_coef) == 0.0


def test_a_mesh_may_have_axes_that_the_batch_is_not_split_over(folders):
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    settings = {"train_batch_size": 2, "per_device_batch_size": 1}
    reward = PythonReward(lambda prompts, responses: [float(len(r)) for r in responses])
    metrics = {
        mesh: _trainer(folders, reward, mesh=mesh, **settings).train_step(_batch(2))
        for mesh in (make_mesh(1), jax.sharding.Mesh(devices, ("data", "model")))
    }
    one, four = metrics.values()
    for name in METRICS:
        np.testing.assert_allclose(four[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tokenizer", [None, words()], ids=["no tokenizer", "the policy's"])
def test_a_reward_model_or_critic_with_fewer_ids_is_refused(folders, tokenizer):
    policy = CausalLM.from_pretrained(folders / "sft")
    small = CausalLM.init(jax.random.key(1), dataclasses.replace(SHAPE, vocab_size=23))
    large = CausalLM.init(jax.random.key(1), dataclasses.replace(SHAPE, vocab_size=25))
    config, python = _config(), PythonReward(lambda p, r: [0.0] * len(r))
    # Made by hand where the tokenizer has more ids than the model.
    reward = dataclasses.replace(RewardModel.on(small), tokenizer=tokenizer)
    for wrong in (reward, ModelReward(reward.model)):
        with pytest.raises(ValueError, match=r"reward_model has 23 .* that has 24.*PythonReward"):
            PPOActorCritic(policy, wrong, config)
    with pytest.raises(ValueError, match=r"critic_model has 23 .* that has 24"):
        PPOActorCritic(policy, python, config, ValueModel.on(small.model.trunk))
    PPOActorCritic(policy, RewardModel.on(large), config, ValueModel.on(large.model.trunk))
    # Through text the sizes do not matter, and a model of another class does not have one.
    other = dataclasses.replace(RewardModel.on(small), tokenizer=words(-1))
    assert isinstance(PPOActorCritic(policy, other, config).reward(), PythonReward)
    PPOActorCritic(
        policy, python, config, lambda tokens, mask, start=0: jnp.zeros(tokens[:, start:].shape)
    )


def test_models_and_trainer_have_one_config(folders):
    policy = CausalLM.from_pretrained(folders / "sft")
    models = PPOActorCritic(policy, PythonReward(lambda p, r: [0.0] * len(r)), _config())
    settings = {"actor_critic_model": models, "rng_key": jax.random.key(0), "mesh": make_mesh(1)}
    with pytest.raises(ValueError, match=r"PPOActorCritic differs in gamma, kl_coeff; pass one"):
        PPOTrainer(config=_config(gamma=0.9, kl_coeff=0.2), **settings)
    PPOTrainer(config=_config(), **settings)


def test_micro_batches_that_do_not_fit_the_devices_are_refused_before_a_step(folders):
    with pytest.raises(ValueError, match="per_device_batch_size=3 on 1 devices"):
        _trainer(folders, lambda rollout: rollout.lengths, per_device_batch_size=3)


def test_legacy_keys_are_refused(folders, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config = PPOConfig(train_batch_size=8)
    policy = CausalLM.from_pretrained(folders / "sft")
    models = PPOActorCritic(policy, PythonReward(lambda p, r: r), config)
    for key, got in (
        (jax.random.PRNGKey(0), r"the legacy key of PRNGKey\(seed\), uint32\[2\]"),
        (0, "0"),
        (None, "None"),
    ):
        with pytest.raises(ValueError, match=rf"typed key, jax.random.key\(seed\); got {got}\."):
            PPOTrainer(config=config, actor_critic_model=models, rng_key=key)
