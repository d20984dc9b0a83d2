"""Settings as flags of a command line, with help from the docstrings."""

import inspect
import re
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal

import tyro

from ..ops.kl import k1, k2, k3

_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
_HIDDEN = {"learning_rate_schedule", "sft_model_path", "reward_model_path"}
"""Settings without a flag: functions, and paths that other flags have."""


def choose(commands: dict[str, type], arguments: list[str]) -> Any:
    """The dataclass of the command that `arguments` name, filled from its flags.

    Args:
        commands: name -> dataclass whose fields are the flags.
        arguments: of the command line, without the program's name.
    """
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="ppo-kernel",
        description="PPO post-training of language models, in one compiled program.",
        args=arguments,
    )


def flags_of(cls: type, default: Any = None) -> type:
    """A dataclass with those settings of `cls` that have a flag.

    Args:
        cls: a dataclass whose docstring has an `Attributes:` section.
        default: whose values are the defaults; None takes those of `cls`.
    """
    helps = attribute_help(cls)
    parts = [_flag(x, helps.get(x.name, ""), default) for x in fields(cls) if x.name not in _HIDDEN]
    made = make_dataclass(f"{cls.__name__}Flags", parts, frozen=True)
    made.__doc__ = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return made


def settings_of(cls: type, flags: Any) -> Any:
    """An instance of `cls` from the flags of `flags_of(cls)`.

    Raises:
        ValueError: a value is out of its range.
    """
    values: dict[str, Any] = {}
    for x in fields(cls):
        if x.name in _HIDDEN:
            continue
        value = vars(flags)[x.name]
        if isinstance(x.type, type) and is_dataclass(x.type):
            try:
                value = settings_of(x.type, value)
            except ValueError as error:
                raise ValueError(f"{x.name}: {error}") from error
        values[x.name] = _ESTIMATORS[value] if x.name == "kl_estimator" else value
    return cls(**values)


def attribute_help(cls: type) -> dict[str, str]:
    """Attribute -> its text in the `Attributes:` section; several names may share one text."""
    section = re.search(r"^Attributes:\n((?:[ ].*\n?|\n)*)", inspect.getdoc(cls) or "", re.M)
    helps: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", section.group(1) if section else ""):
        names, _, text = entry.partition(": ")
        helps |= dict.fromkeys(re.findall(r"\w+", names), " ".join(text.split()))
    return helps


def _flag(x: Field, text: str, defaults: Any) -> tuple[str, Any, Any]:
    kind, value = x.type, x.default
    if value is MISSING and x.default_factory is not MISSING:
        value = x.default_factory()
    if defaults is not None:
        value = vars(defaults)[x.name]
    if isinstance(kind, type) and is_dataclass(kind):
        made = flags_of(kind, value)
        return x.name, Annotated[made, tyro.conf.arg(help=text)], field(default_factory=made)
    if x.name == "kl_estimator":
        kind, value = Literal[*_ESTIMATORS], value.__name__
    kind = Annotated[kind, tyro.conf.arg(help=text)]
    return (x.name, kind, field()) if value is MISSING else (x.name, kind, field(default=value))
