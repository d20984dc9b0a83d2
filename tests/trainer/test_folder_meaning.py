"""Law 11 for folders: which tokens end a response, which ids exist, which head is read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import SIZES, make_lm, word_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from ppo_kernel import CausalLM, PPOActorCritic, PPOConfig, PythonReward, RewardModel, Rollout
from ppo_kernel.command.data import Encoder
from ppo_kernel.io.tokenizer import Tokenizer
from ppo_kernel.models import TransformerConfig

CONFIG = PPOConfig(train_batch_size=8, max_new_tokens=4, max_seq_len=12)


def sized(rows):
    """A configuration with so many rows in the embedding."""
    return TransformerConfig(**SIZES | {"vocab_size": rows})


def edit(folder, **entries):
    """Change entries of both files that name special ids."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id"])
def test_an_id_without_a_row_is_refused_by_name(key, tmp_path):
    make_lm(tokenizer=word_tokenizer()).save_pretrained(tmp_path)
    edit(tmp_path, **{key: 19})
    for read in (Encoder, CausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"{key} in config.json is 19, .* 19 rows"):
            read(tmp_path)


def chat_words(post_processor=None, **special):
    words = ["<|endoftext|>", "<|im_end|>", "<unk>", "<s>", *(f"w{i}" for i in range(15))]
    backend = Backend(models.WordLevel({x: i for i, x in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*words[:2], "<s>"])
    if post_processor is not None:
        backend.post_processor = post_processor
    return Tokenizer.of(backend, **special)


def test_every_eos_of_the_folder_ends_a_response(tmp_path):
    tokenizer = chat_words(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    make_lm(tokenizer=tokenizer).save_pretrained(tmp_path)
    edit(tmp_path, eos_token_id=0)
    lm = CausalLM.from_pretrained(tmp_path)
    assert lm.eos_token_ids == (0, 1)
    assert Encoder(tmp_path).eos_id == 1
    lm.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 1]


def test_an_eos_without_text_is_said(tmp_path):
    make_lm(sized(24), tokenizer=word_tokenizer()).save_pretrained(tmp_path)
    edit(tmp_path, eos_token_id=[1, 22])
    with pytest.warns(UserWarning, match=r"eos_token_id \[22\] stands for no text"):
        lm = CausalLM.from_pretrained(tmp_path)
    assert set(lm.eos_token_ids) == {1, 22}


def test_the_eos_of_the_tokenizers_rules_is_no_part_of_a_prompt(tmp_path):
    rules = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 3), ("<|im_end|>", 1)]
    )
    tokenizer = chat_words(rules, eos_token="<|im_end|>", bos_token="<s>")
    make_lm(tokenizer=tokenizer).save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.prompts(["w0 w1", "<s> w0 w1"]) == [[3, 4, 5]] * 2
    assert encoder.prompts(["w0 <|im_end|>", ""]) == [[3, 4, 1], [3]]
    assert encoder.texts(["w0 w1"]) == [[3, 4, 5, 1]]
    assert encoder.responses(["w2"], ["w0"]) == encoder.responses(["w2"]) == [[6, 1]]


def test_rows_without_text_are_banned_and_need_no_reader():
    lm = make_lm(sized(24), tokenizer=word_tokenizer())
    assert lm.tokenizer is not None
    first = lm.tokenizer.num_ids
    assert lm.banned_token_ids == tuple(range(first, 24))
    assert lm.num_token_ids == first
    assert make_lm().banned_token_ids == ()
    for rows in (first, 32):
        reward = RewardModel.on(make_lm(sized(rows), tokenizer=word_tokenizer()))
        PPOActorCritic(lm, reward, CONFIG)
    with pytest.raises(ValueError, match=f"policy_model has 24|policy that has {first}"):
        PPOActorCritic(lm, RewardModel.on(make_lm(sized(first - 1))), CONFIG)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A folder of a tied model, and a hidden state."""
    folder = tmp_path_factory.mktemp("tied")
    config = TransformerConfig(**SIZES, tie_embeddings=True)
    CausalLM.init(jax.random.key(0), config).save_pretrained(folder)
    hidden = np.random.default_rng(0).normal(size=(3, config.hidden_size)).astype(np.float32)
    return folder, load_file(folder / "model.safetensors"), jnp.asarray(hidden)


@pytest.mark.filterwarnings("error")
def test_a_copy_of_a_tied_head_is_read_in_silence(tied):
    folder, tensors, hidden = tied
    head = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    lm = CausalLM.from_pretrained(folder)
    assert lm.config.tie_embeddings
    np.testing.assert_allclose(lm.model.unembed(hidden), hidden @ head.T, atol=1e-5)


def test_another_head_of_a_tied_model_is_used_and_said(tied, tmp_path):
    folder, tensors, hidden = tied
    noise = np.random.default_rng(1).normal(size=(19, hidden.shape[1])).astype(np.float32)
    head = tensors["model.embed_tokens.weight"] + noise
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"tie_word_embeddings=true, but its lm_head\.weight"):
        lm = CausalLM.from_pretrained(folder)
    np.testing.assert_allclose(lm.model.unembed(hidden), hidden @ head.T, atol=1e-5)
    lm.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.model.unembed(hidden), hidden @ head.T, atol=1e-5)


MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def chat_bytes():
    signs = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE({x: i for i, x in enumerate(signs)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(MARKS)
    return Tokenizer.of(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("skip", [False, True])
def test_a_text_reward_gets_the_prompt_as_it_stands(skip):
    tokenizer, seen = chat_bytes(), []
    (ids,), (reply,) = tokenizer.encode_prompts([PROMPT]), tokenizer.encode([" 4<|im_end|>"])
    shape = (1, len(reply))
    rollout = Rollout(
        jnp.array([ids], jnp.int32), jnp.ones((1, len(ids)), bool), jnp.arange(1),
        jnp.array([reply], jnp.int32), jnp.ones(shape, bool), jnp.full(1, shape[1], jnp.int32),
        jnp.ones(1, bool), jnp.zeros(shape), jnp.zeros(shape),
    )  # fmt: skip

    def exact(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [1.0]

    PythonReward(exact, tokenizer, skip_special_tokens=skip)(rollout)
    assert seen == [("user\n2+2?\nassistant\n" if skip else PROMPT, " 4")]


def test_a_tokenizer_that_transformers_would_read_by_other_rules_is_not_saved(tmp_path):
    config = TransformerConfig(**SIZES, qkv_bias=True)
    lm = make_lm(config, tokenizer=word_tokenizer(), family="qwen2")
    with pytest.raises(ValueError, match="Qwen2Tokenizer"):
        lm.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*"))
