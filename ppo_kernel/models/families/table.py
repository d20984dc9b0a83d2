"""The table of families: a new one is a file beside this one and an entry here."""

from collections.abc import Mapping
from typing import Any

from .family import Family
from .llama import LLAMA
from .qwen2 import QWEN2
from .qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3)}
"""model_type -> family."""


def family_of(entries: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: there is none of its `model_type`; names the known ones.
    """
    return family_named(entries.get("model_type"))


def family_named(model_type: str | None) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none; names the known ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; the families are {sorted(FAMILIES)}. "
            "A new one is a file in ppo_kernel/models and an entry of FAMILIES."
        )
    return FAMILIES[model_type]
