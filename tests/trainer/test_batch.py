"""`PPOBatch`: what it refuses, prompts from text, and the columns that reach a Python reward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIG, make_lm, word_tokenizer

from ppo_kernel import (
    PPOActorCritic,
    PPOBatch,
    PPOConfig,
    PPOTrainer,
    PythonReward,
    RewardModel,
    generate,
    make_mesh,
)
from ppo_kernel.config import GenerationConfig

IDS, MASK = np.array([[5, 6, 0], [7, 8, 9]]), np.array([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((IDS + 0.7, MASK), "input_ids must be whole numbers, .*got float64"),
        ((IDS, MASK * 0.5), "attention_mask must be 0 and 1, or booleans; got 0.5"),
        ((IDS, MASK * 1.0), "attention_mask must be 0 and 1, or booleans; got float64"),
        ((IDS, MASK * 2), "attention_mask must be 0 and 1, or booleans; got 2"),
        ((IDS, MASK[:, 1:]), r"input_ids \(2, 3\) and attention_mask \(2, 2\)"),
        ((IDS[0], MASK[0]), r"must be \[N, P\] alike"),
        ((IDS, MASK * [[0], [1]]), "prompt 0 has no token"),
        ((IDS, MASK, {"answer": ["a"]}), "column 'answer' has 1 values for 2 prompts"),
    ],
)
def test_refusals(fields, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        PPOBatch(*fields)


def test_prompts_are_left_padded_whatever_the_loader_pads():
    right = PPOBatch(IDS, MASK.astype(bool)).prompts()
    left = PPOBatch(
        IDS[:, [2, 0, 1]] * [[1], [0]] + IDS * [[0], [1]], MASK[:, ::-1] | MASK * [[0], [1]]
    )
    assert right.mask.tolist() == [[False, True, True], [True, True, True]]
    assert right.tokens[right.mask].tolist() == [5, 6, 7, 8, 9]
    for a, b in zip(*map(jax.tree.leaves, (right, left.prompts())), strict=True):
        np.testing.assert_array_equal(a, b)
    assert right.sample_ids.tolist() == [0, 1]


def test_texts_become_the_ids_of_the_tokenizer():
    batch = PPOBatch.from_texts(word_tokenizer(), ["w0 w1 w2", "w3"], columns={"answer": "ab"})
    prompts = batch.prompts()
    assert prompts.mask.tolist() == [[True] * 3, [False, False, True]]
    assert prompts.tokens[prompts.mask].tolist() == [3, 4, 5, 6]
    assert batch.columns_of([1, 1, 0]) == {"answer": ["b", "b", "a"]}
    wide = PPOBatch.from_texts(word_tokenizer(), ["w0"], width=4)
    assert wide.input_ids.shape == (1, 4)
    with pytest.raises(ValueError, match="more than width=1"):
        PPOBatch.from_texts(word_tokenizer(), ["w0 w1"], width=1)
    with pytest.raises(ValueError, match="the policy has no tokenizer"):
        PPOBatch.from_texts(None, ["w0"])


def trainer(reward, policy=None, **changes):
    config = PPOConfig(
        train_batch_size=4, samples_per_prompt=2, max_new_tokens=3, max_seq_len=8, num_ppo_epochs=1,
        **changes,
    )  # fmt: skip
    policy = make_lm(tokenizer=word_tokenizer()) if policy is None else policy
    return PPOTrainer(
        config=config, actor_critic_model=PPOActorCritic(policy, reward, config),
        rng_key=jax.random.key(0), mesh=make_mesh(1),
    )  # fmt: skip


def test_a_reward_gets_the_columns_it_names_and_reports_metrics():
    seen = []

    def score(prompts, responses, answer, *, weight=1.0):
        seen.append((prompts, answer, weight))
        right = [float(x == "a") for x in answer]
        return right, {"right": right, "constant": 2}

    columns = {"answer": ["a", "b"], "unused": [1, 2]}
    batch = PPOBatch.from_texts(word_tokenizer(), ["w0 w1", "w2"], columns=columns)
    training = trainer(PythonReward(score))
    metrics = training.train_step(batch)
    ((prompts, answer, weight),) = seen
    assert dict(zip(prompts, answer, strict=True)) == {"w0 w1": "a", "w2": "b"}
    assert (sorted(answer), weight) == (["a", "a", "b", "b"], 1.0)
    assert (metrics["right"], metrics["constant"], metrics["mean_reward"]) == (0.5, 2.0, 0.5)

    everything = []
    training.reward = PythonReward(
        lambda prompts, responses, **columns: (everything.append(columns), [0.0] * 4)[1],
        word_tokenizer(),
    )
    training.train_step(batch)
    (given,) = everything
    assert {name: sorted(set(values)) for name, values in given.items()} == {
        "answer": ["a", "b"],
        "unused": [1, 2],
    }


def test_a_reward_does_not_report_under_a_name_of_ppo():
    reward = PythonReward(lambda prompts, responses: ([0.0] * 4, {"entropy": 1.0}))
    with pytest.raises(ValueError, match="two metrics have the name 'entropy'"):
        trainer(reward).train_step(PPOBatch.from_texts(word_tokenizer(), ["w0", "w1"]))


def test_more_tokens_than_positions_are_refused():
    short = make_lm(dataclasses.replace(CONFIG, max_positions=5), tokenizer=word_tokenizer())
    reward = PythonReward(lambda prompts, responses: [0.0] * len(responses))
    texts = ["w0 w1 w2", "w0"]
    with pytest.raises(ValueError, match=r"3 tokens and 3 new tokens .*=5 of policy_model"):
        trainer(reward, short).train_step(PPOBatch.from_texts(word_tokenizer(), texts))
    with pytest.raises(ValueError, match="of reward_model"):
        trainer(RewardModel.on(short)).train_step(PPOBatch.from_texts(word_tokenizer(), texts))
    with pytest.raises(ValueError, match="3 tokens and 3 new tokens exceed the model's"):
        short.generate(texts, jax.random.key(0), max_new_tokens=3)
    with pytest.raises(ValueError, match="6 tokens and 0 new tokens"):
        RewardModel.on(short).score_texts(["w0 w1 w2 "], ["w0 w1 w2"])
    trainer(reward, short).train_step(
        PPOBatch.from_texts(word_tokenizer(), ["w0 w1", "w0"], width=3)
    )


def test_a_model_whose_arrays_a_step_consumed_says_so():
    policy = make_lm(tokenizer=word_tokenizer())
    consumed = jax.tree.map(jnp.copy, policy.model)
    jax.tree.map(lambda x: x.delete(), consumed)
    with pytest.raises(ValueError, match=r"consumed by a training step; .*PPOTrainer\.policy"):
        policy.with_model(consumed).generate(["w0"], jax.random.key(0), max_new_tokens=1)


def test_a_python_reward_inside_a_program_is_no_matter_of_its_tokenizer():
    policy = make_lm(tokenizer=word_tokenizer())
    prompts = PPOBatch(IDS, MASK).prompts()
    rollout = generate(policy.model, prompts, jax.random.key(0), config=GenerationConfig(2, (1,)))
    reward = PythonReward(lambda prompts, responses: [0.0] * len(responses))
    with pytest.raises(ValueError, match="has no tokenizer"):
        reward(rollout)
    with pytest.raises(jax.errors.JAXTypeError):
        jax.make_jaxpr(reward)(rollout)
