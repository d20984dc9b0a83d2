"""Imports go down only, read from the source of every module that is there."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import ppo_kernel

ROOT = Path(__file__).parents[1]

ARRAYS_ONLY = {"rewards": {"ops"}, "advantages": {"ops"}, "losses": {"ops"}}
DOWN = {
    "cli": {"command", "demos"},
    "demos": {"command"},
    "command": {"trainer"},
    "trainer": {"program", "io"},
    "program": {"iteration", "donation"},
    "donation": {"learner"},
    "iteration": {"rollout", "learner", "advantages", "metrics"},
    "metrics": {"rewards"},
    "learner": {"evaluation", "losses"},
    "rollout": {"models"},
    "evaluation": {"models"},
    **ARRAYS_ONLY,
    "io": {"models"},
    "models": {"sharding"},
    "sharding": {"config"},
    "config": {"losses"},
    "ops": {"functions"},
    "functions": {"types"},
    "types": set(),
}
"""Each part of the package and what stands right below it; what stands below that is below too."""

EVERYTHING = {"__init__", "__main__", "testing"}


def below(part):
    return set().union(*({lower} | below(lower) for lower in DOWN[part]))


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Full dotted names of all that a file imports, wherever in it the import stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules("ppo_kernel"), ids=named)
def test_package_imports_go_down(path):
    part = path.relative_to(ROOT / "ppo_kernel").parts[0].removesuffix(".py")
    if part in EVERYTHING:
        return
    assert part in DOWN, f"{part} is new: give it a place in the table above"
    inside = [name.split(".")[1] for name in imported(path) if name.startswith("ppo_kernel.")]
    up = set(inside) - below(part) - {part}
    assert not up, f"{named(path)} imports {sorted(up)}, which stand above or beside it"


@pytest.mark.parametrize("path", modules("ppo_kernel"), ids=named)
def test_package_knows_neither_its_judges_nor_hypothesis(path):
    forbidden = {"reference", "tests"} | (set() if "testing" in path.parts else {"hypothesis"})
    assert not forbidden & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", modules("ppo_kernel"), ids=named)
def test_only_the_command_and_the_demos_need_the_extra_demo(path):
    extra = {"matplotlib", "requests", "rich", "tensorboardX", "tyro", "vaderSentiment"}
    if path.relative_to(ROOT / "ppo_kernel").parts[0] not in ("command", "demos"):
        assert not extra & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", modules("reference"), ids=named)
def test_reference_imports_nothing_that_it_judges(path):
    allowed = {"collections", "dataclasses", "functools", "itertools", "jaxtyping", "math", "numpy"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed | {"reference", "typing"}


def test_importing_the_reference_loads_no_jax():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in modules("reference")]
    code = f"import {', '.join(names)}, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("part", ["rewards", "advantages", "losses"])
def test_array_stages_use_aliases_but_no_record(part):
    records = {"Prompts", "Rollout", "Evaluation", "Experience"}
    names = {name.split(".")[-1] for name in imported(ROOT / f"ppo_kernel/{part}.py")}
    assert not names & records


def test_an_exported_name_hides_no_module_of_the_package():
    hidden = {name for name in ppo_kernel.__all__ if find_spec(f"ppo_kernel.{name}")}
    assert not hidden, f"`import ppo_kernel.{min(hidden, default='')}` gives something else"
    assert len(set(ppo_kernel.__all__)) == len(ppo_kernel.__all__)


def test_a_star_import_brings_functions_and_classes_and_no_module():
    bound = {}
    exec("from ppo_kernel import *", bound)
    modules = {name for name, value in bound.items() if isinstance(value, ModuleType)}
    assert not modules


@pytest.mark.parametrize("name", ["kl", "losses", "advantages", "models", "sampling"])
def test_a_namespace_is_the_module_that_has_its_functions(name):
    namespace = getattr(ppo_kernel, name)
    inside = f"ppo_kernel.{name}"
    assert namespace.__name__ in (inside, f"ppo_kernel.ops.{name}")
    assert namespace.__name__ == inside or find_spec(inside) is None


def test_everything_imported_in_the_package_file_is_exported():
    tree = ast.parse((ROOT / "ppo_kernel/__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names if alias.asname is None}
    assert names == set(ppo_kernel.__all__)
