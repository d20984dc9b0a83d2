"""Files of prompts, examples and preferences: what they give, and what each mistake says."""

import pytest

from ppo_kernel.io.text_files import (
    Example,
    Preference,
    read_examples,
    read_preferences,
    read_prompts,
)


@pytest.fixture
def written(tmp_path):
    def write(content, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_prompts(written):
    rows = '\ufeff{"prompt": "One", "id": 7}\r\n\n{"prompt": "Zw\\u00f6lf\\n"}'
    assert read_prompts(written(rows)) == ["One", "Zwölf\n"]
    # Only a newline ends a line: U+2028 is a character of a text.
    assert read_prompts(written("One \r\n\n two\u2028more\n", "p.txt")) == [
        "One ",
        " two\u2028more",
    ]


def test_examples(written):
    rows = '{"prompt": "a", "response": " b", "text": "ignored"}\n{"text": "c d", "prompt": null}'
    assert read_examples(written(rows)) == [Example("a", " b"), Example(None, "c d")]


def test_preferences(written):
    rows = '{"chosen": "good", "prompt": "p", "rejected": "bad", "score": 1}\n'
    assert read_preferences(written(rows)) == [Preference("p", "good", "bad")]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_prompts, '{"prompt": "a"}\n{"prompt": ', "data.jsonl, line 2: is not JSON .*column"),
        (read_prompts, '{"prompt": "a"}\n\n["b"]', "line 3: holds a list; write an object"),
        (read_prompts, '{"text": "a"}', 'line 1: has no "prompt", only "text"; add it'),
        (read_prompts, "{}", 'line 1: has no "prompt", only nothing; add it'),
        (read_prompts, '{"prompt": 3}', 'line 1: "prompt" is 3; make it a string'),
        (read_prompts, '{"prompt": null}', 'line 1: "prompt" is null; make it a string'),
        (read_prompts, '{"prompt": [{"role": "user"}]}', '"prompt" is a list; .*chat template'),
        (read_prompts, '{"prompt": " "}', 'line 1: "prompt" is empty; leave the row out'),
        (read_prompts, '{"prompt": "\\ud800"}', 'line 1: "prompt" has half of a surrogate pair'),
        (read_prompts, b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2: is not UTF-8 .*save the"),
        (read_prompts, "\n \n", "data.jsonl has no rows; write one per line"),
        (read_prompts, "{}\n" * 3, r"line 1: .*\(2 more lines are wrong\)"),
        (read_examples, '{"label": 1}', 'line 1: has "label"; give it "prompt" and "response"'),
        (read_examples, '{"prompt": "a"}', 'line 1: has no "response", only "prompt"; add it'),
        (read_examples, '{"response": "a"}', 'line 1: has no "prompt", only "response"'),
        (read_examples, '{"prompt": "a", "response": ""}', '"response" is empty; leave the row'),
        (read_preferences, '{"prompt": "a", "chosen": "b"}', 'line 1: has no "rejected", only'),
        (
            read_preferences,
            '{"prompt": "a", "chosen": "b", "rejected": "b"}',
            'line 1: has the same text as "chosen" and "rejected"; leave the row out',
        ),
    ],
)
def test_a_mistake_is_named_by_file_and_line(read, content, message, written):
    with pytest.raises(ValueError, match=message):
        read(written(content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no file '.*nowhere.jsonl'; check the path"):
        read_prompts(tmp_path / "nowhere.jsonl")
