"""Tokenizers: text -> ids -> text, special ids, saving, equality; left padding."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from ppo_kernel.io.tokenizer import Tokenizer

SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}


def byte_tokenizer(extra=(), **special):
    """One id a byte, BOS in front of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*alphabet, *extra))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL.values()))
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return Tokenizer.of(backend, **(special or SPECIAL))


@given(text=st.text(max_size=20))
def test_decode_inverts_encode(text):
    tokenizer = byte_tokenizer()
    (ids,) = tokenizer.encode([text])
    if not any(token in text for token in SPECIAL.values()):
        assert tokenizer.decode(np.asarray(ids)) == text
        assert len(ids) == 1 + len(text.encode())


def test_special_tokens():
    tokenizer = byte_tokenizer()
    with_bos, without = (tokenizer.encode(["a"], add_special_tokens=b)[0] for b in (True, False))
    assert with_bos == [tokenizer.bos_id, *without]
    ids = [*with_bos, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a</s>"
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (256, 257, 258)
    assert tokenizer.num_ids == 259
    assert byte_tokenizer(eos_token="</s>").pad_id is None


def test_one_string_is_refused():
    with pytest.raises(ValueError, match="list of texts"):
        byte_tokenizer().encode("abc")


def test_unknown_special_token_is_refused():
    with pytest.raises(ValueError, match="eos_token='<end>'"):
        byte_tokenizer(eos_token="<end>")


def test_save_and_load(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded == tokenizer
    assert hash(loaded) == hash(tokenizer)
    assert (loaded.eos_id, loaded.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert loaded.encode(["hello"]) == tokenizer.encode(["hello"])


def test_other_files_of_a_tokenizer_are_kept(tmp_path):
    byte_tokenizer(bos_token="<s>").save(tmp_path)
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (256, 257, 258)
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        assert (again / name).read_text() == (tmp_path / name).read_text()


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend.enable_truncation(2)
    tokenizer.backend.enable_padding(length=9)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert [len(ids) for ids in loaded.encode(["abcdef", "a"])] == [7, 2]
    assert loaded == byte_tokenizer()


def test_equality():
    assert byte_tokenizer() == byte_tokenizer(eos_token="</s>")
    bare = byte_tokenizer()
    bare.backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert byte_tokenizer() == bare
    assert byte_tokenizer() != byte_tokenizer(extra=["ab"])
    more = byte_tokenizer()
    more.backend.add_special_tokens(["<more>"])
    assert byte_tokenizer() != more
    assert byte_tokenizer() != "a tokenizer"


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer.load(tmp_path)
