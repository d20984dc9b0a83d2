"""What transformers makes of tokenizer.json: its class, its added and its special tokens.

`AutoTokenizer` of transformers 5 does not always cut texts as tokenizer.json says. A class that
`tokenizer_class` names (or that belongs to the model) may keep the vocabulary alone and put its
own rules in place of the file's; and every token that tokenizer_config.json names as special
becomes one. The functions here follow
https://github.com/huggingface/transformers/blob/main/src/transformers/tokenization_utils_tokenizers.py
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from .folders import read_json
from .tokenizer_classes import CLASSES, DISTRUSTED, GENERIC, OF_MODEL, Json, TokenizerClass

SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The JSON files of a folder that decide what its tokenizer does; {} where there is none.

    Attributes:
        rules: tokenizer.json.
        settings: tokenizer_config.json.
        special: special_tokens_map.json, of transformers 4.
        added: added_tokens.json, of transformers 4: token -> id.
        config: config.json of the model.
    """

    rules: Json
    settings: Json
    special: Json = field(default_factory=dict)
    added: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Those of an existing folder.

        Raises:
            ValueError: it has no tokenizer.json, or a damaged file.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json. If it has a tokenizer in another format, load "
                "it with transformers' AutoTokenizer and save_pretrained it again."
            )
        try:
            tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"cannot read {file}: {error}.") from error
        return cls(
            rules=read_json(file),
            settings=read_json(folder / SETTINGS, {}),
            special=read_json(folder / SPECIAL, {}),
            added=read_json(folder / "added_tokens.json", {}),
            config=read_json(folder / "config.json", {}),
        )


@dataclass(frozen=True)
class Effective:
    """A tokenizer as transformers has it after loading.

    Attributes:
        backend: of the `tokenizers` library.
        named: special tokens by name, such as "eos_token"; the defaults of the class included.
    """

    backend: tokenizers.Tokenizer
    named: dict[str, str]


def effective(files: TokenizerFiles) -> Effective:
    """The tokenizer of a folder, as `transformers.AutoTokenizer` reads it.

    Raises:
        ValueError: a class whose rules are not known here or do not fit the model in the file,
            or a setting that changes the rules and is not supported.
    """
    _check_settings(files)
    name = _class_name(files)
    made = CLASSES.get(name) if name else None
    special = _special_tokens(files, made)
    rules = files.rules if made is None else _of_class(name, made, files.rules, special)
    backend = tokenizers.Tokenizer.from_str(json.dumps(rules))
    if made is not None:
        made.rules(backend, settings=files.settings)
    _add(backend, _added_tokens(files, special.names), special)
    if made is not None:
        made.finish(backend, special=special.names)
    backend.encode_special_tokens = bool(files.settings.get("split_special_tokens", False))
    return Effective(backend, {key: str(token) for key, token in special.named.items()})


def _of_class(name: str | None, made: TokenizerClass, rules: Json, special: "_Special") -> Json:
    """tokenizer.json with the class's model and without added tokens: it adds them itself."""
    kind = rules["model"].get("type")
    if kind != made.kind:
        raise ValueError(
            f"transformers reads this folder with tokenizer_class={name!r}, which is made for "
            f"{made.kind}, but tokenizer.json has {kind}. If model_type in config.json allows, set "
            'tokenizer_class in tokenizer_config.json to "TokenizersBackend".'
        )
    model = rules["model"] | made.model
    if model["unk_token"] is not None:
        model["unk_token"] = str(special.named["unk_token"])
    return rules | {"model": model, "added_tokens": []}


def _check_settings(files: TokenizerFiles) -> None:
    settings = files.settings
    if settings.get("fix_mistral_regex"):
        raise ValueError(
            "fix_mistral_regex in tokenizer_config.json is not supported: load the tokenizer with "
            "transformers, save its backend_tokenizer as tokenizer.json and remove the setting."
        )
    versions = settings.get("fast_tokenizer_files")
    if versions and list(versions) != ["tokenizer.json"]:
        raise ValueError(
            f"fast_tokenizer_files={versions!r} in tokenizer_config.json names files for several "
            "versions; keep tokenizer.json alone and remove the setting."
        )


def _class_name(files: TokenizerFiles) -> str | None:
    """The class that rebuilds the tokenizer; None where tokenizer.json stands as it is."""
    declared = files.settings.get("tokenizer_class") or files.config.get("tokenizer_class")
    model_type = files.config.get("model_type", "")
    registered = OF_MODEL.get(model_type)
    if declared is None:
        return registered if registered in CLASSES else None
    name = declared.removesuffix("Fast") if declared not in GENERIC else None
    if name == "LlamaTokenizer" and model_type not in DISTRUSTED and _is_byte_level(files.rules):
        return None
    if registered is not None and name != registered:
        if registered in GENERIC:
            return None
        name = registered if model_type in DISTRUSTED else name
    if name is not None and name not in CLASSES:
        raise ValueError(
            f"tokenizer_class={declared!r} in tokenizer_config.json is not supported: transformers "
            "puts rules of that class in place of those in tokenizer.json. Load the tokenizer with "
            "transformers, save its backend_tokenizer as tokenizer.json, and set tokenizer_class "
            'to "TokenizersBackend".'
        )
    return name


def _is_byte_level(rules: Json) -> bool:
    return '"ByteLevel"' in json.dumps(rules)


@dataclass(frozen=True)
class _Special:
    named: dict[str, str | AddedToken]
    extra: list[str | AddedToken]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(str(token) for token in (*self.named.values(), *self.extra)))


def _special_tokens(files: TokenizerFiles, made: TokenizerClass | None) -> _Special:
    """Named and other special tokens; special_tokens_map.json counts as transformers counts it."""
    settings = dict(files.settings)
    if "added_tokens_decoder" not in settings:
        settings |= files.special
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    told = {} if made is None else dict(made.special)
    told |= {key: value for key, value in settings.items() if key.endswith("_token")}
    more = extra if isinstance(extra, dict) else {}
    # The order decides the ids of tokens that are added.
    order = dict.fromkeys((*_NAMED, *told, *more))
    told |= more
    named = {
        key: _token(told[key]) for key in order if isinstance(told.get(key), (str, dict))
    }  # fmt: skip
    return _Special(named, [_token(token) for token in extra if not more])


def _added_tokens(files: TokenizerFiles, special: list[str]) -> dict[int, AddedToken]:
    """Tokens beside the model's own, by id."""
    told = files.settings.get("added_tokens_decoder")
    if told is not None:
        return {int(i): _flagged(token) for i, token in told.items()}
    tokens = {
        i: AddedToken(content, normalized=content not in special, special=content in special)
        for content, i in files.added.items()
    }
    return tokens | {
        entry["id"]: _flagged(entry) for entry in files.rules.get("added_tokens") or ()
    }


def _add(backend: tokenizers.Tokenizer, added: dict[int, AddedToken], special: _Special) -> None:
    """Add what the backend lacks; a token that it has is given the flags that the folder says."""
    there = backend.get_added_tokens_decoder().values()
    same = {repr(token) for token in there}
    tokens = [token for _, token in sorted(added.items()) if repr(token) not in same]
    known = {token.content: token for token in (*there, *tokens)}
    for token in (*special.named.values(), *special.extra):
        if str(token) not in known:
            token = AddedToken(token, special=True) if isinstance(token, str) else token
            known[token.content] = token
            tokens.append(token)
    named = {str(token) for token in special.named.values()}
    for token in tokens:
        token.special = token.special or token.content in named
    backend.add_tokens(tokens)


def _token(entry: str | Json) -> str | AddedToken:
    """A named token of a JSON file; with its flags where it has some."""
    return entry if isinstance(entry, str) else _flagged(entry | {"special": True})


def _flagged(entry: Json) -> AddedToken:
    return AddedToken(**{key: entry[key] for key in _FLAGS if key in entry})
