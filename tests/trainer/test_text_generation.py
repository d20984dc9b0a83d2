"""`CausalLM.generate`: text in, text out, by the kernel's own rollout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_lm, word_tokenizer

from ppo_kernel import GenerationConfig, Prompts, generate
from ppo_kernel.trainer.text_reward import rollout_texts

PROMPTS = ["w3 w4 w5", "w2", "w6 w7"]


def test_it_writes_what_the_rollout_writes():
    model = make_lm(tokenizer=word_tokenizer())
    got = model.generate(PROMPTS, jax.random.key(3), max_new_tokens=5, temperature=0.7, top_p=0.9)
    ids = model.tokenizer.encode(PROMPTS)
    width = max(map(len, ids))
    rows = np.array([[0] * (width - len(row)) + row for row in ids])
    mask = np.arange(width) >= width - np.array([len(row) for row in ids])[:, None]
    batch = Prompts(jnp.asarray(rows), jnp.asarray(mask), jnp.arange(3))
    config = GenerationConfig(5, model.eos_token_ids, model.pad_token_id)
    rollout = generate(
        model.model, batch, jax.random.key(3), config=config, temperature=0.7, top_p=0.9
    )
    texts = rollout_texts(model.tokenizer, rollout, skip_special_tokens=True)
    assert (got, PROMPTS) == (texts.responses, texts.prompts)
    assert len(set(got)) == 3


def test_the_likeliest_tokens_do_not_depend_on_the_key():
    model = make_lm(tokenizer=word_tokenizer())
    texts = [
        model.generate(PROMPTS, jax.random.key(seed), max_new_tokens=4, top_k=1) for seed in (0, 1)
    ]
    assert texts[0] == texts[1]
    free = [model.generate(PROMPTS, jax.random.key(seed), max_new_tokens=4) for seed in (0, 1)]
    assert free[0] != free[1]


def test_refusals():
    model = make_lm(tokenizer=word_tokenizer())
    for prompts, settings, message in (
        (["w3", ""], {}, "prompt 1 is empty"),
        ("w3", {}, "expected a list of texts"),
        (["w3"], {"temperature": 0.0}, "temperature must be finite, above 0"),
        (["w3"], {"top_k": 0}, "top_k must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, jax.random.key(0), max_new_tokens=2, **settings)
    with pytest.raises(ValueError, match="no tokenizer"):
        make_lm().generate(["w3"], jax.random.key(0), max_new_tokens=2)
