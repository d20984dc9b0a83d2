"""Law 11 for tokenizers: ids and texts are those of transformers, prompts and responses apart."""

import json
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from tokenizer_cases import ATOMS, CASES, Case, byte_level, sentencepiece, unigram, wordpiece
from tokenizers import Tokenizer as Backend
from tokenizers import models

from ppo_kernel.io.tokenizer import Tokenizer

REASON = "comparisons with transformers need it (extra 'hf')"

texts = st.one_of(st.lists(st.sampled_from(ATOMS), max_size=5).map("".join), st.text(max_size=8))
lossless = [name for name in CASES if not name.startswith(("wordpiece", "unigram", "added"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a case -> its folder."""
    root = tmp_path_factory.mktemp("tokenizers")

    @cache
    def folder(name) -> Path:
        (root / name).mkdir()
        return CASES[name].write(root / name)

    return folder


@pytest.fixture(scope="module")
def theirs(folders):
    """Name of a case -> transformers' tokenizer, also of the folder that ours is saved to."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    transformers.logging.set_verbosity_error()

    @cache
    def load(name, again=False):
        folder = folders(name)
        if again:
            folder = folder / "again"
            folder.mkdir()
            if CASES[name].config is not None:
                (folder / "config.json").write_text(json.dumps(CASES[name].config))
            Tokenizer.load(folders(name)).save(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)

    return load


@pytest.fixture(scope="module")
def ours(folders):
    """Name of a case -> our tokenizer."""
    return cache(lambda name: Tokenizer.load(folders(name)))


@pytest.mark.parametrize("name", CASES)
@given(text=texts)
@example(text="")
@example(text=" good ")
@example(text="<s>good</s>")
def test_ids_and_texts_are_those_of_transformers(name, text, ours, theirs):
    mine, other = ours(name), theirs(name)
    ids = other(text)["input_ids"]
    assert mine.encode([text])[0] == ids
    assert theirs(name, again=True)(text)["input_ids"] == ids
    bare = other(text, add_special_tokens=False)["input_ids"]
    assert mine.encode([text], add_special_tokens=False)[0] == bare
    for skip in (True, False):
        options = {"skip_special_tokens": skip}
        assert mine.decode(ids, **options) == other.decode(ids, **options)


@pytest.mark.parametrize("name", CASES)
def test_special_ids_are_those_of_transformers(name, ours, theirs):
    mine, other = ours(name), theirs(name)
    assert (mine.eos_id, mine.bos_id) == (other.eos_token_id, other.bos_token_id)
    assert mine.pad_id == other.pad_token_id
    assert mine.num_ids == 1 + max(other.get_vocab().values())
    assert theirs(name, again=True).get_vocab() == other.get_vocab()


@pytest.mark.parametrize("name", CASES)
@given(text=texts)
@example(text="<s>good")
@example(text="good</s>")
def test_a_prompt_has_bos_once_and_no_eos_of_the_rules(name, text, ours):
    tokenizer = ours(name)
    front, back = ([tokenizer.id_of(token)] if token else [] for token in CASES[name].frame)
    ids = tokenizer.encode_prompts([text])[0]
    (whole,) = tokenizer.encode([text])
    doubled = bool(front) and whole[: 2 * len(front)] == front * 2
    assert ids + back == whole[len(front) if doubled else 0 :]


@pytest.mark.parametrize("name", CASES)
@given(prompt=texts, response=texts)
@example(prompt="good", response=" day")
@example(prompt="good", response="ness")
@example(prompt="good ", response="day")
@example(prompt="", response=" good")
@example(prompt="good\n", response="\n the")
def test_a_response_continues_its_prompt(name, prompt, response, ours):
    tokenizer = ours(name)
    (head,), (joint,) = (tokenizer.encode_prompts([x]) for x in (prompt, prompt + response))
    try:
        (ids,) = tokenizer.encode_responses([response], [prompt])
    except ValueError:
        assert name not in lossless
        return
    if joint[: len(head)] == head:
        assert head + ids == joint
    spelled = tokenizer.decode(head + ids, skip_special_tokens=False)
    before = tokenizer.decode(head, skip_special_tokens=False)
    assert spelled in (tokenizer.decode(joint, skip_special_tokens=False), before + response)
    added = tokenizer.decode_response(head, ids, skip_special_tokens=False)
    assert before + added == spelled


@pytest.mark.parametrize(
    "make",
    [
        byte_level,
        lambda: sentencepiece("llama2"),
        lambda: sentencepiece("first"),
        lambda: sentencepiece("always"),
        lambda: sentencepiece("never"),
        lambda: unigram("always"),
    ],
)
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("good", " day"), ("good", "ness"), ("good day", " to you"), ("the", "y"), ("good ", "day")],
)
def test_prompt_and_response_spell_the_text(make, prompt, response):
    tokenizer = Tokenizer.of(make(), eos_token="</s>", bos_token="<s>")
    (head,), (ids,) = tokenizer.encode_prompts([prompt]), tokenizer.encode_responses([response])
    assert tokenizer.decode(head + ids) == prompt + response
    (ids,) = tokenizer.encode_responses([response], [prompt])
    assert tokenizer.decode(head + ids) == prompt + response
    assert tokenizer.decode_response(head, ids) == response


def test_wordpiece_continues_a_word():
    tokenizer = Tokenizer.of(wordpiece(), eos_token="</s>")
    (head,), (ids,) = (
        tokenizer.encode_prompts(["fri"]),
        tokenizer.encode_responses(["end"], ["fri"]),
    )
    assert tokenizer.decode(head + ids) == "friend"
    assert tokenizer.decode_response(head, ids) == "end"


def test_a_character_that_the_response_completes():
    tokenizer = Tokenizer.of(byte_level(), eos_token="</s>")
    (ids,) = tokenizer.encode(["good 😀 day"])
    texts = [tokenizer.decode_response(ids[:n], ids[n:]) for n in range(len(ids))]
    assert [x for x in texts if x.startswith("😀")]
    assert not [x for x in texts[:4] if "�" in x]


@pytest.mark.parametrize("text", ["good day", "", "a ", "the\n"])
@pytest.mark.parametrize("name", ["byte-level", "byte-level-both", "llama2", "metaspace-first"])
def test_a_decoded_prompt_is_what_was_encoded(name, text, ours):
    (ids,) = ours(name).encode_prompts([text])
    assert ours(name).decode_prompt(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["byte-level", "byte-level-bos", "metaspace-first"])
def test_a_decoded_chat_prompt_keeps_its_marks(name, ours):
    text = "<s><|im_start|>user\nthe<|im_end|>\n<|im_start|>you\n"
    (ids,) = ours(name).encode_prompts([text])
    assert ours(name).decode_prompt(ids, skip_special_tokens=False) == text


def test_ids_without_text():
    backend = Backend(models.WordLevel({"a": 0, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer = Tokenizer.of(backend)
    assert tokenizer.num_ids == 5
    assert tokenizer.ids_without_text(8) == (1, 2, 5, 6, 7)
    assert tokenizer.ids_without_text(5) == (1, 2)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(wordpiece, {"tokenizer_class": "BertTokenizerFast"}), "tokenizer_class='BertTok"),
        (Case(wordpiece, {"tokenizer_class": "LlamaTokenizer"}), "made for BPE, but .* WordPiece"),
        (Case(wordpiece, config={"model_type": "qwen2"}), "'Qwen2Tokenizer'.*has WordPiece"),
        (Case(byte_level, {"fix_mistral_regex": True}), "fix_mistral_regex"),
        (
            Case(byte_level, {"fast_tokenizer_files": ["tokenizer.4.0.json"]}),
            "fast_tokenizer_files",
        ),
    ],
)
def test_folders_whose_rules_are_not_known_are_refused(case, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(case.write(tmp_path))
